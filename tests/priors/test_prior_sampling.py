"""Codes by seed: the same whatever the batch, counted where they pass, and of laws that are watched."""

from dataclasses import replace

import pytest
import torch
from pipelines import Pipeline
from prior_runs import open_prior, prior_run

from midway.gen.data.splits import load_splits
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.priors.decoding import Decoding, Rule
from midway.gen.priors.layout import CodeLayout
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.sampling import (
    CodeSampling,
    decode_codes,
    encode_codes,
    identity_of,
    sample_codes,
    settled,
)
from midway.tokenizers.tiling import tile_networks

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 4
SEEDS = torch.arange(5, 16)


@pytest.fixture(scope="module")
def causal(pipeline: Pipeline) -> TrainedPrior:
    return open_prior(prior_run(pipeline.root / "causal-prior", pipeline.tokenizer))


@pytest.fixture(scope="module")
def masked(pipeline: Pipeline) -> TrainedPrior:
    return open_prior(prior_run(pipeline.root / "masked-prior", pipeline.tokenizer, kind="masked"))


def how(rule: Rule, steps: int = LENGTH, guidance: float = 1.0, batch_size: int = 256) -> CodeSampling:
    return CodeSampling(Decoding(rule, steps, guidance=guidance), batch_size)


@pytest.mark.parametrize(
    ("rule", "steps", "guidance"),
    [
        ("causal", 4, 1.0),
        ("causal", 4, 2.0),
        ("random", 2, 1.0),
        ("halton", 4, 2.0),
        ("certain", 3, 1.0),
        ("maskgit", 2, 2.0),
    ],
)
def test_an_image_depends_on_its_seed_alone(
    causal: TrainedPrior, masked: TrainedPrior, rule: Rule, steps: int, guidance: float
) -> None:
    """Not on the batch, nor on the seeds beside it; and other seeds have other images."""
    trained = causal if rule == "causal" else masked
    found = sample_codes(trained, SEEDS, how(rule, steps, guidance))
    some = sample_codes(trained, SEEDS[[7, 2]], how(rule, steps, guidance))
    assert torch.equal(found.tokens, sample_codes(trained, SEEDS, how(rule, steps, guidance, batch_size=3)).tokens)
    assert torch.equal(found.tokens[[7, 2]], some.tokens) and len(found.tokens.unique(dim=0)) > 5
    assert found.finite.all()
    passes = 2 if guidance != 1 else 1
    tokens = passes * (LENGTH if rule == "causal" else steps * (LENGTH + 1))
    assert (found.nfe, found.token_evaluations) == (passes * steps, tokens)


def test_classes_are_drawn_by_seed_or_given(masked: TrainedPrior) -> None:
    labels = SEEDS % 10
    drawn = sample_codes(masked, SEEDS, how("random"))
    assert torch.equal(drawn.tokens, sample_codes(masked, SEEDS, how("random"), labels).tokens), "in turn"
    one = replace(how("random"), draw=ClassDraw((0, 0, 3, 0, 0, 0, 0, 0, 0, 0)))
    found = sample_codes(masked, SEEDS, one).tokens
    assert torch.equal(found, sample_codes(masked, SEEDS, how("random"), torch.full_like(SEEDS, 2)).tokens)
    assert not torch.equal(found, drawn.tokens)


def test_codes_are_images_and_images_codes(masked: TrainedPrior) -> None:
    """Decoding is that of the tokenizer; tokens of its images are the codes that it decodes."""
    images = load_splits(masked.data).held_out.images[:6]
    tokens = encode_codes(masked, images)
    floats = images.float() / 127.5 - 1
    indices = masked.tokenizer.encode_indices(floats)
    layout = masked.prior.layout
    assert isinstance(layout, CodeLayout) and torch.equal(layout.indices(tokens), indices)
    made = decode_codes(masked, tokens)
    expected = ((masked.tokenizer.decode_indices(indices).clamp(-1, 1) + 1) * 127.5).round()
    assert made.dtype == torch.uint8 and (made - expected).abs().max() <= 1


def test_samples_of_laws_that_are_not_finite_are_marked(masked: TrainedPrior) -> None:
    """Of their seeds alone: class 3 has a NaN in its vector, and with guidance so do both laws."""
    table = masked.prior.label.weight
    kept = table[3].clone()
    table[3] = torch.nan
    try:
        for guidance in (1.0, 2.0):
            found = sample_codes(masked, SEEDS, how("random", guidance=guidance, batch_size=4))
            assert found.finite.tolist() == [int(seed) % 10 != 3 for seed in SEEDS]
    finally:
        table[3] = kept


def test_the_identity_has_all_that_images_depend_on(masked: TrainedPrior, causal: TrainedPrior) -> None:
    """And nothing that a rule does not read, nor the batch."""
    base = how("maskgit", 2)
    own = identity_of(masked, base)
    assert identity_of(masked, replace(base, batch_size=3)) == own
    decodings = {
        "rule": "random", "steps": 3, "decay": "linear", "temperature": 0.5, "top_k": 3, "top_p": 0.5, "guidance": 2.0,
        "choice_noise": 1.0,
    }  # fmt: skip
    others = [replace(base, decoding=replace(base.decoding, **{name: value})) for name, value in decodings.items()]  # pyright: ignore[reportArgumentType]
    others += [replace(base, precision="bf16"), replace(base, draw=ClassDraw((1,) * 10, "random"))]
    found = [identity_of(masked, other) for other in others] + [identity_of(causal, base), own]
    assert len({str(identity) for identity in found}) == len(found)
    plain = settled(Decoding("random", 2), LENGTH)
    assert settled(Decoding("random", 2, choice_noise=1.0, ramp=3.0), LENGTH) == plain, "maskgit and guidance read them"
    assert settled(Decoding("random", decay="linear"), LENGTH) == settled(Decoding("random", LENGTH), LENGTH)


def test_tiles_and_the_decoder_are_part_of_it(pipeline: Pipeline, masked: TrainedPrior) -> None:
    own, path = identity_of(masked, how("random")), pipeline.root / "masked-prior"
    changed, tiled = open_prior(path), open_prior(path)
    with torch.no_grad():
        next(iter(changed.tokenizer.decoder.parameters())).add_(1)
    tile_networks(tiled.tokenizer, 8, 0)
    assert own != identity_of(changed, how("random")) and own != identity_of(tiled, how("random"))
    assert identity_of(open_prior(path), how("random")) == own
