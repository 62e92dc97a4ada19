"""The masked prior: what it reads, its bound in bits, and its rules of decoding on networks of any weights."""

import itertools
import math
import warnings
from typing import Any

import pytest
import torch
from enumerating import Script, every_code, law_drawn, scripts
from tensors import randomised
from torch import Tensor

from midway.gen.priors.config import PriorConfig
from midway.gen.priors.decoding import Decoding, Rule, counts, guided, halton_order
from midway.gen.priors.draws import SeededDraws
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.masked import MaskedPrior
from midway.gen.training.batches import CodeBatch, Context

SIX = CodeLayout(((2, 3),), ((5, 2),))
FOUR = CodeLayout(((2, 2),), ((3,),))
CLASSES = 3
RULES: tuple[Rule, ...] = ("random", "halton", "certain", "maskgit")


def _prior(layout: CodeLayout = SIX, **config: Any) -> MaskedPrior:
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, **config}
    return randomised(MaskedPrior(PriorConfig("masked", **sizes), layout, CLASSES), std=0.3).eval()


def _tokens(layout: CodeLayout = SIX, count: int = 4) -> Tensor:
    drawn = torch.rand(count, layout.length, len(layout.sizes), generator=torch.Generator().manual_seed(3))
    return (drawn * torch.tensor(layout.sizes)).long()


class _Masks(Context):
    """A context whose masks are given: the first `count` of an order (B, L)."""

    def uniform(self, purpose: str, shape: Any = ()) -> Tensor:
        return self.given[purpose] if purpose in self.given else super().uniform(purpose, shape)

    given: dict[str, Tensor]


def _masks(counts: Tensor, orders: Tensor) -> _Masks:
    context = _Masks(0, 0, torch.arange(len(orders)))
    length = orders.shape[1]
    context.__dict__["given"] = {"count": (counts - 0.5) / length, "mask": (orders.argsort(-1) + 0.5) / length}
    return context


def _watched(prior: MaskedPrior) -> list[tuple[Tensor, Tensor]]:
    """Tokens and known of every evaluation from now on."""
    seen: list[tuple[Tensor, Tensor]] = []

    def hidden(tokens: Tensor, known: Tensor, labels: Tensor, context: Context | None = None) -> Tensor:
        seen.append((tokens.clone(), known.clone()))
        return MaskedPrior.hidden(prior, tokens, known, labels, context)

    prior.hidden = hidden  # pyright: ignore[reportAttributeAccessIssue]
    return seen


# ---- what is read ----


def test_missing_tokens_are_not_read_and_known_ones_are() -> None:
    prior, tokens, labels = _prior().double(), _tokens(count=1), torch.tensor([1])
    known = torch.tensor([[True, False, True, False, False, True]])
    plain = prior.hidden(tokens, known, labels)
    for i, j in itertools.product(range(6), range(2)):
        other = tokens.clone()
        other[0, i, j] = (other[0, i, j] + 1) % SIX.sizes[j]
        assert torch.equal(prior.hidden(other, known, labels), plain) != bool(known[0, i])
    away = (prior.hidden(tokens, known, torch.tensor([2])) - plain).abs().amax(-1)
    assert bool((away > 1e-6).all())


# ---- bits ----


def _exact(prior: MaskedPrior, tokens: Tensor, labels: Tensor) -> Tensor:
    """The bound (B,) in bits: the mean over all masks of each size, added up in plain loops."""
    length = prior.layout.length
    total = torch.zeros(len(tokens), dtype=torch.float64)
    for count in range(1, length + 1):
        sets = list(itertools.combinations(range(length), count))
        for missing in sets:
            known = torch.ones(length, dtype=torch.bool)
            known[list(missing)] = False
            hidden = prior.hidden(tokens, known.expand(len(tokens), -1), labels)
            found = prior.head.log_probs(hidden, tokens).sum(-1)[:, list(missing)].sum(1)
            total -= found.double() / count / len(sets)
    return total / math.log(2)


@torch.no_grad()
@pytest.mark.parametrize("evaluations", [1, 4, 6])
def test_bits_are_unbiased_at_any_number_of_masks(evaluations: int) -> None:
    prior, count = _prior(FOUR), 2000
    tokens = _tokens(FOUR, 1).expand(count, -1, -1)
    labels = torch.full((count,), 1)
    expected = _exact(prior.double(), tokens[:1], labels[:1]).item()
    found = prior.bits(tokens, labels, SeededDraws(torch.arange(count)), evaluations)
    assert found.mean().item() == pytest.approx(expected, abs=5 * found.std().item() / math.sqrt(count))
    assert found.std().item() > 1e-2


@torch.no_grad()
def test_more_masks_have_less_chance_and_each_size_occurs_as_often_at_multiples_of_the_length() -> None:
    prior, count = _prior(FOUR), 500
    tokens, labels = _tokens(FOUR, 1).expand(count, -1, -1), torch.zeros(count, dtype=torch.int64)
    stds = [prior.bits(tokens, labels, SeededDraws(torch.arange(count)), n).std().item() for n in (1, 4, 16)]
    assert stds[0] > 1.8 * stds[1] > 3 * stds[2]
    seen = _watched(prior)
    prior.bits(tokens, labels, SeededDraws(torch.arange(count)), 8)
    sizes = torch.stack([(~known).sum(1) for _, known in seen], dim=1).sort(1).values
    assert sizes.tolist() == [[1, 1, 2, 2, 3, 3, 4, 4]] * count


@torch.no_grad()
def test_the_loss_is_the_bound_in_nats_a_token() -> None:
    """Its mean over all sizes and masks; its log in bits of an image."""
    prior = _prior(FOUR, dropout=0.0, label_dropout=0.0).double()
    orders = torch.tensor(list(itertools.permutations(range(4)))).repeat(4, 1)
    counts = torch.arange(1, 5).repeat_interleave(24)
    tokens, labels = _tokens(FOUR, 1).expand(96, -1, -1), torch.full((96,), 2)
    loss, log = prior.loss(CodeBatch(tokens, labels), _masks(counts, orders))
    expected = _exact(prior, tokens[:1], labels[:1]).item()
    assert log["bits"].item() == pytest.approx(expected, rel=1e-12)
    assert loss.item() == pytest.approx(expected * math.log(2) / 4, rel=1e-12)


def test_masks_have_every_size_and_place_equally_often() -> None:
    prior, count = _prior(FOUR), 4000
    seen = _watched(prior)
    tokens, labels = _tokens(FOUR, 1).expand(count, -1, -1), torch.zeros(count, dtype=torch.int64)
    prior.loss(CodeBatch(tokens, labels), Context(0, 3, torch.arange(count)))
    missing = (~seen[0][1]).long()
    sizes = missing.sum(1).bincount(minlength=5).tolist()
    assert sizes[0] == 0 and all(abs(size - 1000) < 5 * math.sqrt(750) for size in sizes[1:])
    kinds = (missing[missing.sum(1) == 2] @ torch.tensor([1, 2, 4, 8])).bincount()
    assert all(abs(int(kinds[kind]) - sizes[2] / 6) < 5 * math.sqrt(sizes[2] / 6) for kind in (3, 5, 6, 9, 10, 12))


# ---- decoding ----


@torch.no_grad()
def test_one_evaluation_a_token_in_a_fixed_order_multiplies_the_conditionals() -> None:
    prior, codes = _prior(FOUR).double(), every_code(FOUR)
    labels, order = torch.full((81,), 1), halton_order(2, 2)
    script = scripts(FOUR)
    law = law_drawn(FOUR, prior.draw(labels, script, Decoding("halton")), script)
    total = torch.zeros(81, dtype=torch.float64)
    for i, place in enumerate(order):
        known = torch.zeros(4, dtype=torch.bool)
        known[list(order[:i])] = True
        hidden = prior.hidden(codes, known.expand(81, -1), labels)
        total += prior.head.log_probs(hidden, codes)[:, place, 0]
    assert torch.allclose(law, total.exp(), rtol=1e-12) and float(law.sum()) == pytest.approx(1, abs=1e-12)


@torch.no_grad()
def test_guided_decoding_extrapolates_at_every_evaluation() -> None:
    prior, codes = _prior(FOUR).double(), every_code(FOUR)
    labels, order = torch.full((81,), 1), list(halton_order(2, 2))
    how = Decoding("halton", 2, "linear", guidance=2.0, ramp=1.0)
    script = scripts(FOUR)
    law = law_drawn(FOUR, prior.draw(labels, script, how), script)
    total = torch.zeros(81, dtype=torch.float64)
    for done, places in ((0, order[:2]), (2, order[2:])):
        known = torch.zeros(4, dtype=torch.bool)
        known[order[:done]] = True
        both = [prior.hidden(codes, known.expand(81, -1), y) for y in (labels, prior.null_labels(labels))]
        logits = guided(torch.cat([prior.head.logits(h, codes, 0) for h in both]), 1 + done / 4)
        total += logits.log_softmax(-1).gather(-1, codes).squeeze(-1)[:, places].sum(1)
    assert torch.allclose(law, total.exp(), rtol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guidance", [1, 2.5])
def test_samples_do_not_depend_on_their_batch(rule: Rule, guidance: float) -> None:
    prior, labels = _prior(), torch.tensor([0, 1, 2, 3, 0])
    for steps in (1, 3, 6):
        how = Decoding(rule, steps, guidance=guidance)
        whole = prior.draw(labels, SeededDraws(torch.arange(5)), how)
        assert whole.shape == (5, 6, 2)
        SIX.indices(whole)  # none is out of its range
        single = [prior.draw(labels[i : i + 1], SeededDraws(torch.tensor([i])), how) for i in range(5)]
        assert torch.equal(whole, torch.cat(single))


@torch.no_grad()
@pytest.mark.parametrize("rule", RULES)
def test_every_evaluation_decides_as_many_tokens_as_planned_and_changes_none(rule: Rule) -> None:
    prior, rows = _prior(), torch.arange(7)
    seen = _watched(prior)
    last = prior.draw(rows % 3, SeededDraws(rows), Decoding(rule, 4, "arccos"))
    done = torch.tensor([0, *counts("arccos", 6, 4)]).cumsum(0)
    assert [known.sum(1).unique().tolist() for _, known in seen] == [[n] for n in done[:-1]]
    for (tokens, known), (later, more) in itertools.pairwise([*seen, (last, torch.ones(7, 6, dtype=torch.bool))]):
        assert bool((more | ~known).all()) and torch.equal(later[known], tokens[known])


@torch.no_grad()
def test_the_rule_certain_decides_the_most_certain_places_at_any_temperature() -> None:
    """By the law of the model: under a temperature of 0 every place is certain."""
    prior, labels = _prior(FOUR), torch.tensor([1])
    hidden = prior.hidden(torch.zeros(1, 4, 1, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.bool), labels)
    best = prior.head.logits(hidden, torch.zeros(1, 4, 1, dtype=torch.int64), 0).log_softmax(-1).amax(-1)[0]
    for how in ({}, {"temperature": 0}, {"top_k": 1}, {"temperature": 2.0}):
        seen = _watched(prior)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prior.draw(labels, SeededDraws(torch.tensor([0])), Decoding("certain", 2, "linear", **how))  # pyright: ignore
        assert seen[1][1][0].nonzero().flatten().tolist() == sorted(best.topk(2).indices.tolist())


@torch.no_grad()
def test_noise_on_confidences_spreads_what_maskgit_keeps() -> None:
    """Without noise the most probable of the tokens drawn; with much of it any of them, at first."""
    prior, rows = _prior(), torch.arange(300)
    firsts: dict[float, Tensor] = {}
    for noise in (0.0, 1000.0):
        seen = _watched(prior)
        prior.draw(torch.ones_like(rows), SeededDraws(rows), Decoding("maskgit", 6, choice_noise=noise))
        firsts[noise] = seen[1][1].double().mean(0)
    assert bool(((firsts[1000.0] - 1 / 6).abs() < 5 * math.sqrt(5 / 36 / 300)).all())
    assert bool(((firsts[0.0] - 1 / 6).abs() > 5 * math.sqrt(5 / 36 / 300)).any())


# ---- what cannot be ----


def test_the_rule_of_causal_priors_and_more_evaluations_than_tokens() -> None:
    prior, labels, draws = _prior(), torch.tensor([0]), SeededDraws(torch.tensor([0]))
    with pytest.raises(
        ValueError, match=r"causal is the rule of causal priors, .* use random, halton, certain or maskgit"
    ):
        prior.draw(labels, draws, Decoding())
    with pytest.raises(ValueError, match=r"7 evaluations for 6 tokens: .* give 1 to 6"):
        prior.draw(labels, draws, Decoding("random", 7))
    with pytest.raises(ValueError, match="labels are 4 to 4"):
        prior.draw(torch.tensor([4]), draws, Decoding("random"))


def test_temperature_0_in_fewer_evaluations_than_tokens_warns() -> None:
    prior, labels, draws = _prior(), torch.tensor([0]), SeededDraws(torch.tensor([0]))
    with pytest.warns(UserWarning, match=r"one evaluation \(6 in 3\) are each the most probable.* use temperature 1"):
        prior.draw(labels, draws, Decoding("random", 3, temperature=0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prior.draw(labels, draws, Decoding("random", temperature=0))
        prior.draw(labels, draws, Decoding("random", 3))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("guidance", [1, 2])
def test_no_images(rule: Rule, guidance: float) -> None:
    prior, none = _prior(), torch.zeros(0, dtype=torch.int64)
    assert prior.draw(none, SeededDraws(none), Decoding(rule, 3, guidance=guidance)).shape == (0, 6, 2)
    assert prior.bits(torch.zeros(0, 6, 2, dtype=torch.int64), none, SeededDraws(none), 3).shape == (0,)


def test_one_token() -> None:
    layout = CodeLayout(((1, 1),), ((3, 2),))
    prior, labels = _prior(layout).double(), torch.zeros(6, dtype=torch.int64)
    codes = every_code(layout)
    bits = prior.bits(codes, labels, SeededDraws(torch.arange(6)), 2)
    assert float(torch.exp2(-bits).sum()) == pytest.approx(1, abs=1e-12)  # all of it is missing at once
    for rule in RULES:
        script = Script(codes[:, None], layout.sizes)
        assert torch.allclose(law_drawn(layout, prior.draw(labels, script, Decoding(rule)), script), torch.exp2(-bits))
