"""Tokens that are given: the law of the others is the conditional, by enumeration of every draw, and nothing else changes."""

import itertools
from typing import Any

import pytest
import torch
from enumerating import Table, TableCausal, every_code, law_drawn, random_joint, scripts, total_variation
from pipelines import Pipeline
from prior_runs import open_prior, prior_run
from tensors import normal, randomised
from torch import Tensor

from midway.gen.priors.causal import CausalPrior
from midway.gen.priors.config import PriorConfig, TokenHeadConfig
from midway.gen.priors.continuous import ContinuousPrior
from midway.gen.priors.decoding import Decoding, Prompt, Rule, halton_order
from midway.gen.priors.draws import SeededDraws
from midway.gen.priors.layout import CodeLayout, LatentLayout, covered, region
from midway.gen.priors.masked import MaskedPrior, decode
from midway.gen.priors.prior import CodePrior
from midway.gen.priors.sampling import CodeSampling, decode_codes, encode_codes, identity_of, sample_codes
from midway.gen.training.batches import Context

FOUR = CodeLayout(((2, 2),), ((3,),))
SIX = CodeLayout(((2, 3),), ((5, 2),))
CLASSES = 3


def _prompt(code: Tensor, places: tuple[int, ...], rows: int) -> Prompt:
    known = torch.zeros(len(code), dtype=torch.bool)
    known[list(places)] = True
    junk = torch.full_like(code, -7)  # what is not known is not read
    return Prompt(torch.where(known[:, None], code, junk).expand(rows, -1, -1), known)


def _conditional(table: Table, code: Tensor, places: tuple[int, ...]) -> Tensor:
    """Of every code, given that of these places."""
    fits = (table.codes[:, list(places)] == code[list(places)]).all(-1).all(-1)
    return fits * table.joint / (fits * table.joint).sum()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_causal_prior_draws_from_the_conditional_of_its_law(count: int) -> None:
    table, places = Table(FOUR, random_joint(FOUR)), tuple(range(count))
    for code in table.codes[[0, 17, 44, 80]]:
        script = scripts(FOUR)
        labels = torch.zeros(len(script.outcomes), dtype=torch.int64)
        tokens = TableCausal(table).draw(labels, script, Decoding(), _prompt(code, places, len(labels)))
        assert torch.equal(tokens[:, :count], code[:count].expand(len(tokens), -1, -1))
        assert total_variation(law_drawn(FOUR, tokens, script), _conditional(table, code, places)) < 1e-12


@pytest.mark.parametrize("places", [(0,), (3,), (0, 3), (1, 2), (0, 1, 2), (1, 3)])
@pytest.mark.parametrize("rule", ["random", "halton", "certain"])
def test_one_evaluation_a_missing_token_draws_from_the_conditional(rule: Rule, places: tuple[int, ...]) -> None:
    """Of a masked prior, in every order; with fewer evaluations it is another law."""
    table = Table(FOUR, random_joint(FOUR))
    for code in table.codes[[5, 44]]:
        expected = _conditional(table, code, places)
        for steps in (None, 1):
            script = scripts(FOUR, shuffled=rule == "random")
            prompt = _prompt(code, places, len(script.outcomes))
            tokens = decode(table, len(script.outcomes), script, Decoding(rule, steps), prompt=prompt)
            assert bool((tokens == prompt.tokens)[:, prompt.known].all())
            away = total_variation(law_drawn(FOUR, tokens, script), expected)
            assert away < 1e-12 if steps is None or len(places) == 3 else away > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_network_has_the_conditional_of_its_bits(guidance: float) -> None:
    """The whole prompt goes through the cache at once; without guidance the law is that which `bits` scores."""
    layout, labels = CodeLayout(((1, 3),), ((2, 2),)), torch.full((64,), 2)
    prior = randomised(CausalPrior(PriorConfig("causal", "digits", 16, 2, 2), layout, 3), std=0.3).double()
    codes, how = every_code(layout), Decoding(guidance=guidance)
    script = scripts(layout)
    joint = law_drawn(layout, prior.draw(labels, script, how), script)
    if guidance == 1:
        assert torch.allclose(joint, torch.exp2(-prior.bits(codes, labels)), rtol=1e-10)
    for code, count in itertools.product(codes[[9, 50]], (1, 2)):
        fits = (codes[:, :count] == code[:count]).all(-1).all(-1)
        script = scripts(layout)
        law = law_drawn(layout, prior.draw(labels, script, how, Prompt.first(code.expand(64, -1, -1), count)), script)
        assert torch.allclose(law, fits * joint / (fits * joint).sum(), rtol=1e-9, atol=1e-15)


def _codes(kind: str) -> CodePrior:
    torch.manual_seed(0)
    made = CausalPrior if kind == "causal" else MaskedPrior
    return randomised(made(PriorConfig(kind, width=16, depth=2, heads=2), SIX, CLASSES), std=0.3).eval()  # pyright: ignore[reportArgumentType]


def _latents() -> ContinuousPrior:
    torch.manual_seed(0)
    config = PriorConfig("continuous", width=16, depth=2, heads=2, head=TokenHeadConfig(width=16, depth=2))
    return randomised(ContinuousPrior(config, LatentLayout(2, 2, 3), CLASSES)).eval()


LABELS, SEEDS = torch.tensor([0, 1, 2, 1]), torch.tensor([5, 3, 2**50, 1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["causal", "masked", "continuous"])
@pytest.mark.parametrize("count", [1, 3, 5])
def test_what_an_image_begins_with_is_completed_as_it_was(kind: str, count: int) -> None:
    """Draws are functions of seed and place: the beginning of an image, as a prompt, gives the image."""
    prior = _latents() if kind == "continuous" else _codes(kind)
    how = Decoding("causal" if kind == "causal" else "halton")
    order = list(range(6)) if kind == "causal" else list(halton_order(2, 3))
    known = torch.zeros(6, dtype=torch.bool)
    known[order[:count]] = True
    image = prior.draw(LABELS, SeededDraws(SEEDS), how)
    found = prior.draw(LABELS, SeededDraws(SEEDS), how, prompt=Prompt(image, known))
    assert torch.equal(found[:, known], image[:, known])
    torch.testing.assert_close(found, image, atol=1e-4 if kind == "continuous" else 0, rtol=0)
    other = prior.draw(LABELS, SeededDraws(SEEDS), how, prompt=Prompt(image.flip(0), known))
    assert torch.equal(other[:, known], image.flip(0)[:, known]) and not torch.equal(other, image)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["random", "halton", "certain", "maskgit"])
def test_the_schedule_runs_over_the_tokens_that_are_missing(rule: Rule) -> None:
    prior, seen = _codes("masked"), list[Tensor]()

    def hidden(tokens: Tensor, known: Tensor, labels: Tensor, context: Context | None = None) -> Tensor:
        seen.append(known[0].clone())
        return MaskedPrior.hidden(prior, tokens, known, labels, context)  # pyright: ignore[reportArgumentType]

    prior.hidden = hidden  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    tokens = (normal(4, 6, 2, seed=2).abs() * 7).long() % torch.tensor([5, 2])
    prompt = Prompt(tokens, torch.tensor([False, True, False, False, True, False]))
    found = prior.draw(LABELS, SeededDraws(SEEDS), Decoding(rule, 2, "linear"), prompt)
    assert [int(known.sum()) for known in seen] == [2, 4] and bool((seen[1] | ~prompt.known).all())
    assert torch.equal(found[:, prompt.known], tokens[:, prompt.known])
    alone = prior.draw(
        LABELS[2:3], SeededDraws(SEEDS[2:3]), Decoding(rule, 2, "linear"), Prompt(tokens[2:3], prompt.known)
    )
    assert torch.equal(alone, found[2:3])


def test_noise_of_continuous_tokens_differs_for_all_seeds() -> None:
    """2^20 places follow one seed: of seeds that differ by multiples of 2^44 the numbers of places were the same."""
    seeds, places = torch.tensor([5, 5 + 2**44, 5 + 2**45, 5 + 2**61, 6]), torch.arange(7).expand(5, -1)
    found = SeededDraws(seeds).normal(0, places, 3)
    assert len(found.unique()) == found.numel()
    alone = SeededDraws(seeds[[1]]).normal(0, places[:1], 3)
    assert torch.equal(alone, found[1:2])


# ---- regions ----


def test_regions_are_of_the_plane_at_every_level() -> None:
    grid, levels = CodeLayout(((4, 4),), ((3,),)), CodeLayout(((2, 2), (4, 4)), ((3,),), flat=True)
    top = [True] * 8 + [False] * 8
    assert region(grid, "top").tolist() == top and region(grid, "bottom").tolist() == [not each for each in top]
    assert region(levels, "top").tolist() == [True, True, False, False, *top]
    assert region(grid, "left").view(4, 4)[0].tolist() == [True, True, False, False]
    assert torch.equal(region(grid, "right"), ~region(grid, "left"))
    assert region(grid, "center").view(4, 4).nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert torch.equal(region(LatentLayout(3, 4, 4), "border"), ~region(grid, "center"))


def test_a_token_is_in_a_mask_with_all_its_pixels() -> None:
    mask = torch.ones(8, 8, dtype=torch.bool)
    mask[5, 7] = False
    found = covered(CodeLayout(((2, 2), (4, 4)), ((3,),), flat=True), mask)
    assert (~found).nonzero().flatten().tolist() == [3, 4 + 2 * 4 + 3]


# ---- sampling by seed ----


@pytest.mark.parametrize("kind", ["causal", "masked", "continuous"])
def test_what_runs_is_counted(pipeline: Pipeline, kind: str, one_thread: None) -> None:
    """Of a causal prior the prompt and the first token after it take one evaluation; the head runs for drawn tokens alone."""
    trained = open_prior(prior_run(pipeline.root / f"prompted-{kind}", pipeline.tokenizer, kind=kind))
    images = torch.randint(0, 256, (3, *trained.tokenizer.image_shape), dtype=torch.uint8)
    tokens = encode_codes(trained, images)
    assert torch.equal(decode_codes(trained, tokens), decode_codes(trained, encode_codes(trained, images)))
    prompt, seeds = Prompt.first(tokens, 2), torch.arange(4, 11)
    for guidance in (1.0, 2.0):
        how = Decoding("causal" if kind == "causal" else "halton", guidance=guidance)
        sampling = CodeSampling(how, batch_size=3, prompt=prompt)
        found, passes = sample_codes(trained, seeds, sampling), 2 if guidance != 1 else 1
        assert found.nfe == 2 * passes
        assert found.token_evaluations == passes * (4 if kind == "causal" else 2 * 5)
        assert found.head_nfe == (20 * passes if kind == "continuous" else 0)
        assert torch.equal(found.tokens[:, :2], tokens[seeds % 3, :2])
    own = identity_of(trained, sampling)
    other = Prompt(tokens.flip(0), prompt.known)
    unread = Prompt(torch.where(prompt.known[:, None], tokens, 0 * tokens), prompt.known)
    assert own == identity_of(trained, CodeSampling(how, 3, prompt=unread)), "what is drawn is not read"
    assert own != identity_of(trained, CodeSampling(how, 3, prompt=other)) != identity_of(trained, CodeSampling(how, 3))


# ---- what cannot be ----


def test_prompts_that_are_none() -> None:
    tokens, none = torch.zeros(4, 6, 2, dtype=torch.int64), torch.zeros(6, dtype=torch.bool)
    for made, words in (
        (lambda: Prompt(tokens, none), "a prompt of 0 tokens of 6: give at least 1"),
        (lambda: Prompt(tokens, ~none), "leave at least 1 to draw"),
        (lambda: Prompt(tokens, none[:5]), r"known torch.bool \(5,\): give"),
        (lambda: Prompt(tokens[:0], ~none), "of 1 or more images"),
    ):
        with pytest.raises(ValueError, match=words):
            made()
    draws, causal, masked = SeededDraws(SEEDS), _codes("causal"), _codes("masked")
    later = Prompt(tokens, torch.arange(6) > 2)
    cases: list[tuple[Any, Prompt, Decoding, str]] = [
        (causal, later, Decoding(), "the first tokens of its sequence"),
        (causal, Prompt.first(tokens, 2), Decoding(steps=6), "one evaluation a token, 4 and not 6"),
        (masked, Prompt.first(tokens, 2), Decoding("halton", 5), "5 evaluations for 4 tokens"),
        (masked, Prompt.first(tokens + 5, 2), Decoding("halton"), "digits outside their sizes"),
        (masked, Prompt.first(tokens[:2], 2), Decoding("halton"), "2 prompts for 4 images"),
        (masked, Prompt.first(tokens[..., :1], 2), Decoding("halton"), r"this prior has tokens \(B, 6, 2\)"),
        (masked, Prompt.first(torch.cat([tokens, tokens], 1), 8), Decoding("halton"), r"shape \(4, 12, 2\)"),
        (_latents(), Prompt.first(tokens[..., :1], 2), Decoding("halton"), r"\(B, 6, 2\)"),
    ]
    for prior, prompt, how, words in cases:
        with pytest.raises(ValueError, match=words):
            prior.draw(LABELS, draws, how, prompt=prompt)
