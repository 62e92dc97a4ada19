"""The causal prior: what depends on what, the cache, bits, orders, guidance, and draws by seed."""

import math

import pytest
import torch
from enumerating import every_code
from tensors import normal, randomised
from torch import Tensor

from midway.gen.networks.layers import PERIOD, rotated, rotation
from midway.gen.priors.blocks import Block
from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig
from midway.gen.priors.decoding import Decoding, guided
from midway.gen.priors.digits import DigitHead
from midway.gen.priors.draws import SeededDraws
from midway.gen.priors.layout import CodeLayout
from midway.gen.training.batches import CodeBatch, Context

SIX = CodeLayout(((2, 3),), ((5, 2),))
LAYOUTS = {
    "digits": SIX,
    "one digit": CodeLayout(((2, 3),), ((7,),)),
    "one token": CodeLayout(((1, 1),), ((3, 2),)),
    "two levels": CodeLayout(((1, 1), (2, 2)), ((4,),), flat=True),
}
CLASSES = 3


def _prior(layout: CodeLayout = SIX, classes: int = CLASSES, **config: object) -> CausalPrior:
    sizes = {"width": 16, "depth": 2, "heads": 2, **config}
    torch.manual_seed(0)
    prior = CausalPrior(PriorConfig("causal", **sizes), layout, classes)  # pyright: ignore[reportArgumentType]
    return randomised(prior, std=0.3).eval()


def _tokens(layout: CodeLayout = SIX, count: int = 4) -> Tensor:
    drawn = torch.rand(count, layout.length, len(layout.sizes), generator=torch.Generator().manual_seed(3))
    return (drawn * torch.tensor(layout.sizes)).long()


def _orders(count: int, length: int = 6) -> Tensor:
    return torch.rand(count, length, generator=torch.Generator().manual_seed(5)).argsort(-1)


# ---- the transformer ----


def test_attention_depends_on_differences_of_places_alone() -> None:
    places = 10 * normal(4, 2, dtype=torch.float64)
    q, k = normal(1, 1, 4, 8, dtype=torch.float64), normal(1, 1, 4, 8, seed=1, dtype=torch.float64)
    score, same = (rotated(q, rotation(at, 8)) @ rotated(k, rotation(at, 8)).mT for at in (places, places + 3.7))
    assert torch.allclose(score, same, atol=1e-12)
    moved = rotated(q, rotation(places + torch.tensor([1.0, 0.0]), 8)) @ rotated(k, rotation(places, 8)).mT
    assert not torch.allclose(moved, score, atol=1e-2)
    assert torch.allclose(rotated(q, rotation(places, 8)).norm(dim=-1), q.norm(dim=-1))


def test_rotations_are_by_rows_and_columns_at_geometric_frequencies() -> None:
    places = torch.tensor([[2.0, 5.0]], dtype=torch.float64)
    angles = [place * PERIOD ** (-i / 2) for place in (2, 5) for i in range(2)]
    cos, sin = rotation(places, 8)[:, 0]
    assert torch.allclose(cos, torch.tensor(angles, dtype=torch.float64).cos())
    assert torch.allclose(sin, torch.tensor(angles, dtype=torch.float64).sin())


def test_rotations_are_exact_in_bfloat16() -> None:
    """An angle of 60 has an error of 1/8 there."""
    x, places = normal(1, 1, 2, 8), torch.tensor([[60.3, 41.7], [3.0, 55.1]])
    found = rotated(x.bfloat16(), rotation(places.double(), 8)).double()
    assert torch.allclose(found, rotated(x.double(), rotation(places.double(), 8)), atol=0.05)
    assert rotation(places.bfloat16(), 8).dtype == torch.float32


@pytest.mark.parametrize("shuffled", [False, True])
def test_no_token_depends_on_itself_or_on_later_ones(shuffled: bool) -> None:
    prior = _prior().double()
    tokens, labels = _tokens(count=1), torch.tensor([1])
    order = _orders(1) if shuffled else torch.arange(6)[None]
    vectors: list[Tensor] = []

    def watched(module: torch.nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        assert torch.equal(args[0], tokens.gather(1, order[..., None].expand(-1, -1, 2))[:, :-1])
        vectors.append(out.detach().requires_grad_())
        return vectors[0]

    hook = prior.embed.register_forward_hook(watched)
    found = prior.log_probs(tokens, labels, order if shuffled else None).sum(-1)[0]
    hook.remove()
    for i in range(6):
        (slope,) = torch.autograd.grad(found[order[0, i]], vectors[0], retain_graph=True, allow_unused=True)
        size = (
            torch.zeros(5) if slope is None else slope[0].abs().sum(-1)
        )  # by each token but the last one in the order
        assert bool((size[i:] == 0).all()) and bool((size[:i] > 1e-9).all())


def test_a_digit_depends_on_those_before_it_and_on_the_trunk() -> None:
    head = randomised(DigitHead(8, (3, 4, 5)), std=0.3)
    hidden, tokens = normal(1, 1, 8), torch.tensor([[[1, 2, 3]]])
    plain = [head.logits(hidden, tokens, digit) for digit in range(3)]
    assert [law.shape[-1] for law in plain] == [3, 4, 5]
    for changed in range(3):
        other = tokens.index_fill(2, torch.tensor([changed]), 0)
        same = [torch.equal(head.logits(hidden, other, digit), plain[digit]) for digit in range(3)]
        assert same == [digit <= changed for digit in range(3)]
    assert not any(torch.equal(head.logits(2 * hidden + 1, tokens, digit), plain[digit]) for digit in range(3))
    found = head.log_probs(hidden, tokens)[0, 0]
    assert found.tolist() == pytest.approx([law.log_softmax(-1)[0, 0, i].item() for law, i in zip(plain, (1, 2, 3))])


# ---- laws ----


@pytest.mark.parametrize("name", LAYOUTS)
def test_probabilities_add_up_to_1(name: str) -> None:
    layout = LAYOUTS[name]
    layout = CodeLayout(((1, 2),), layout.radices) if layout.length > 1 else layout
    prior, codes = _prior(layout).double(), every_code(layout)
    for label in range(CLASSES + 1):
        bits = prior.bits(codes, torch.full((len(codes),), label))
        assert bits.dtype == torch.float64 and float(torch.exp2(-bits).sum()) == pytest.approx(1, abs=1e-12)
    orders = torch.tensor([[1, 0]]).expand(len(codes), -1) if layout.length > 1 else None
    found = prior.log_probs(codes, torch.zeros(len(codes), dtype=torch.int64), orders).sum((1, 2))
    assert found.exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_orders_change_the_law_and_the_row_by_row_one_is_that_without() -> None:
    prior, tokens, labels = _prior().double(), _tokens(), torch.tensor([0, 1, 2, 3])
    plain = prior.log_probs(tokens, labels)
    assert torch.allclose(prior.log_probs(tokens, labels, torch.arange(6).expand(4, -1)), plain, atol=1e-13)
    assert not torch.allclose(prior.log_probs(tokens, labels, _orders(4)), plain, atol=1e-2)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_cache_computes_what_the_whole_sequence_does(name: str, dtype: torch.dtype) -> None:
    """Also with guidance, on a ramp: the laws that are drawn from are those of all tokens at once."""
    layout = LAYOUTS[name]
    prior, labels = _prior(layout).to(dtype), torch.tensor([0, 1, 2, 3])
    seen: list[Tensor] = []

    class Watched(SeededDraws):
        def categorical(self, law: Tensor, places: Tensor, digit: int, attempt: int = 0) -> Tensor:
            value = super().categorical(law, places, digit, attempt)
            seen.append(law.gather(-1, value[..., None])[:, 0, 0])
            return value

    for how in (Decoding(), Decoding(guidance=2.5, ramp=1.0)):
        seen.clear()
        tokens = prior.draw(labels, Watched(torch.arange(4)), how)
        assert torch.equal(tokens, prior.draw(labels, SeededDraws(torch.arange(4)), how))
        expected = prior.log_probs(tokens, labels) if how.copies == 1 else _guided(prior, tokens, labels, how)
        found = torch.stack(seen, dim=1).view(expected.shape)
        assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 1e-12)


def _guided(prior: CausalPrior, tokens: Tensor, labels: Tensor, how: Decoding) -> Tensor:
    """log p (B, L, D) of guided laws, all tokens at once."""
    x = torch.cat([prior.label(torch.cat([labels, prior.null_labels(labels)]))[:, None]], dim=1)
    before = prior.embed(torch.cat([tokens] * 2))[:, :-1]
    hidden = prior.trunk(torch.cat([x, before], dim=1) + prior.position.weight, prior.places[:-1])
    found = []
    for digit in range(tokens.shape[2]):
        logits = prior.head.logits(hidden, torch.cat([tokens] * 2), digit)
        length = tokens.shape[1]
        laws = [guided(logits[:, i], how.scale(i / length)).log_softmax(-1) for i in range(length)]
        found.append(torch.stack(laws, dim=1).gather(-1, tokens[..., digit, None]).squeeze(-1))
    return torch.stack(found, dim=-1)


def test_samples_do_not_depend_on_their_batch() -> None:
    prior, labels = _prior(), torch.tensor([0, 1, 2, 3, 0])
    for how in (Decoding(), Decoding(guidance=3), Decoding(top_k=2, temperature=0.7), Decoding(top_p=0.8)):
        whole = prior.draw(labels, SeededDraws(torch.arange(5)), how)
        single = [prior.draw(labels[i : i + 1], SeededDraws(torch.tensor([i])), how) for i in range(5)]
        assert torch.equal(whole, torch.cat(single))
    assert torch.equal(
        prior.draw(labels, SeededDraws(torch.arange(5)), Decoding(temperature=0)),
        prior.draw(labels, SeededDraws(torch.arange(5, 10)), Decoding(temperature=0)),
    )


def test_samples_have_the_frequencies_of_the_law() -> None:
    layout = CodeLayout(((1, 2),), ((2, 2),))
    prior, codes, rows = _prior(layout), every_code(layout), 4000
    law = torch.exp2(-prior.bits(codes, torch.zeros(16, dtype=torch.int64)))
    tokens = prior.draw(torch.zeros(rows, dtype=torch.int64), SeededDraws(torch.arange(rows)), Decoding())
    frequencies = (tokens[:, None] == codes).all(-1).all(-1).sum(0)
    assert bool(((frequencies - rows * law).abs() < 5 * (rows * law).sqrt()).all())


# ---- training ----


def test_the_loss_is_nats_a_token_and_its_log_bits_an_image() -> None:
    prior, tokens, labels = _prior(label_dropout=0.0), _tokens(), torch.tensor([0, 1, 2, 0])
    loss, log = prior.loss(CodeBatch(tokens, labels), Context(0, 0, torch.arange(4)))
    bits = prior.bits(tokens, labels)
    assert log["bits"].item() != pytest.approx(bits.mean().item(), rel=1e-4)  # under dropout
    prior = _prior(label_dropout=0.0, dropout=0.0)
    loss, log = prior.loss(CodeBatch(tokens, labels), Context(0, 0, torch.arange(4)))
    bits = prior.bits(tokens, labels)
    assert log["bits"].item() == pytest.approx(bits.mean().item(), rel=1e-5)
    assert loss.item() == pytest.approx(bits.mean().item() * math.log(2) / 6, rel=1e-5)


def test_orders_are_random_at_first_then_for_ever_fewer_and_then_never() -> None:
    prior, count = _prior(shuffle_steps=100), 4000
    rows = torch.arange(6)

    def share(step: int) -> float:
        orders = prior._orders(Context(0, step, torch.arange(count)))
        assert orders is not None and bool((orders.sort(-1).values == rows).all())
        return float((orders != rows).any(-1).double().mean())

    chance = 1 - 1 / math.factorial(6)
    for step, expected in ((0, 1.0), (50, 1.0), (60, 0.8), (75, 0.5), (99, 0.02)):
        assert share(step) == pytest.approx(expected * chance, abs=5 * math.sqrt(0.25 / count))
    assert prior._orders(Context(0, 100, torch.arange(4))) is None
    assert _prior()._orders(Context(0, 0, torch.arange(4))) is None


def test_orders_are_functions_of_seed_step_and_sample() -> None:
    prior = _prior(shuffle_steps=10)
    whole = prior._orders(Context(1, 7, torch.arange(20)))
    part = prior._orders(Context(1, 7, torch.arange(13, 20)))
    assert whole is not None and part is not None and torch.equal(whole[13:], part)
    for other in (Context(2, 7, torch.arange(20)), Context(1, 6, torch.arange(20))):
        found = prior._orders(other)
        assert found is not None and not torch.equal(found, whole)


def test_labels_are_dropped_with_their_probability() -> None:
    prior, labels = _prior(label_dropout=0.3), torch.arange(4000) % CLASSES
    kept = prior.kept_labels(labels, Context(0, 0, torch.arange(4000)))
    dropped = kept == CLASSES
    assert torch.equal(kept[~dropped], labels[~dropped])
    assert float(dropped.double().mean()) == pytest.approx(0.3, abs=5 * math.sqrt(0.21 / 4000))
    assert bool((prior.kept_labels(torch.full((4,), CLASSES), Context(0, 0, torch.arange(4))) == CLASSES).all())


def test_dropout_is_that_of_training_alone() -> None:
    """Masks are functions of (seed, step, sample): the same in any batch."""
    block = randomised(Block(8, 2, 0.5, 0, causal=True))
    x, turn = normal(4, 3, 8), rotation(torch.rand(3, 2), 4)
    plain = block(x, turn)
    whole, part = (block(x[at], turn, Context(0, 0, torch.arange(4)[at])) for at in (slice(0, 4), slice(2, 4)))
    assert torch.allclose(whole[2:], part, atol=1e-6) and not torch.allclose(whole, plain, atol=1e-3)


# ---- what cannot be ----


def test_rules_and_evaluations_of_masked_priors() -> None:
    prior, labels, draws = _prior(), torch.tensor([0]), SeededDraws(torch.tensor([0]))
    with pytest.raises(
        ValueError, match="halton is a rule of masked priors, and this one is causal: use the rule causal"
    ):
        prior.draw(labels, draws, Decoding("halton"))
    with pytest.raises(
        ValueError, match="one evaluation a token, 6 and not 3: drop the number, or train a masked prior"
    ):
        prior.draw(labels, draws, Decoding(steps=3))
    assert prior.draw(labels, draws, Decoding(steps=6)).shape == (1, 6, 2)


def test_classes_that_do_not_exist_and_guidance_without_classes() -> None:
    draws = SeededDraws(torch.tensor([0]))
    for wrong in (4, -1):
        with pytest.raises(
            ValueError, match=f"labels are {wrong} to {wrong}: this prior has the classes 0 to 2, and 3 for none"
        ):
            _prior().draw(torch.tensor([wrong]), draws, Decoding())
        with pytest.raises(ValueError, match=f"labels are {wrong} to {wrong}"):
            _prior().bits(_tokens(count=1), torch.tensor([wrong]))
    for prior, why in (
        (_prior(classes=0), "without classes"),
        (_prior(conditional=False), "without classes"),
        (_prior(classes=1), "one class"),
        (_prior(label_dropout=0.0), "label_dropout 0"),
    ):
        with pytest.raises(ValueError, match=f"guidance 2 needs .*{why}.*: use guidance 1"):
            prior.draw(torch.tensor([0]), draws, Decoding(guidance=2))


def test_an_unconditional_prior_takes_any_label() -> None:
    prior, tokens = _prior(conditional=False), _tokens()
    assert prior.classes == 0 and len(prior.label.weight) == 1
    given, none = torch.tensor([0, 1, 2, 9]), torch.zeros(4, dtype=torch.int64)
    assert torch.equal(prior.bits(tokens, given), prior.bits(tokens, none))
    draws = SeededDraws(torch.arange(4))
    assert torch.equal(prior.draw(given, draws, Decoding()), prior.draw(none, draws, Decoding()))
    assert bool((prior.kept_labels(given, Context(0, 0, torch.arange(4))) == 0).all())


@pytest.mark.parametrize("guidance", [1, 2])
def test_no_images(guidance: float) -> None:
    prior, none = _prior(), torch.zeros(0, dtype=torch.int64)
    assert prior.draw(none, SeededDraws(none), Decoding(guidance=guidance)).shape == (0, 6, 2)
    assert prior.bits(torch.zeros(0, 6, 2, dtype=torch.int64), none).shape == (0,)


def test_configurations_that_are_none() -> None:
    for wrong, why in (
        ({"width": 18, "heads": 4}, "heads of 4.5 channels"),
        ({"width": 24, "heads": 4}, "whole multiples of 4"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"kind": "masked", "shuffle_steps": 1}, "shuffle_steps is for causal"),
    ):
        with pytest.raises(ValueError, match=why):
            PriorConfig(**wrong)  # pyright: ignore[reportArgumentType]
