"""Measures of a tokenizer: closed forms on tokenizers whose codes, errors and latents are known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from midway.gen.core.errors import DataError, DivergedError, UsageError
from midway.gen.core.randomness import normal
from midway.gen.data.images import ImageData, to_float, to_uint8
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.evaluation.tokenizer_records import TokenizerRow, description
from midway.gen.evaluation.tokenizers import EvaluationConfig, Instruments, check_size, choose, measure
from midway.gen.features.classifier import FeatureConfig, FeatureNetwork
from midway.gen.features.reference import FeatureReference, Subject, make_reference
from midway.gen.metrics import latent_rank
from midway.gen.metrics.code_usage import CodeCounter
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.latent_rank import interpolated, moments, nearest, ranks, slerp
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.psnr_ssim import PSNR_CAP, psnr
from midway.tokenizers.base import Quantized
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EvaluationConfig(n=40, batch_size=16, noise=(0.0, 0.1, 0.8))
TINY = {"width": 8, "blocks": 1, "image_size": 8}


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_splits(DataConfig())


@pytest.fixture(scope="module")
def reference(splits: Splits) -> FeatureReference:
    torch.manual_seed(0)
    network = FeatureNetwork(FeatureConfig(1, 8, 10, width=8, dim=8)).eval().requires_grad_(False)
    return make_reference(network, "cnn-digits@test", splits.train)


def tokenizer(quantizer: dict[str, object], **options: object) -> ImageTokenizer:
    """A small untrained tokenizer whose latents vary."""
    torch.manual_seed(1)
    made = ImageTokenizer(**{**TINY, **options}, quantizer=quantizer)  # pyright: ignore[reportArgumentType]
    return made.eval().requires_grad_(False)


def pixels() -> ImageTokenizer:
    return tokenizer({"type": "identity", "dim": 1}, downsample=1)


FSQ = {"type": "fsq", "levels": [5, 5, 4]}


class Signs(nn.Module):
    """Pixels in [-1, 1] to three channels: brighter than 0, brighter than 1/2, and a constant -1."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.cat([x, x - 0.5, -torch.ones_like(x)], 1)


class First(nn.Module):
    """The first channel."""

    def forward(self, codes: Tensor) -> Tensor:
        return codes[:, :1]


def signs() -> ImageTokenizer:
    """One token a pixel, three of eight codes: known from the pixels."""
    made = tokenizer({"type": "lfq", "bits": 3}, downsample=1)
    made.encoder, made.decoder = Signs(), First()
    return made


def row_of(
    made: ImageTokenizer, subject: Subject, instruments: Instruments | None = None, config: EvaluationConfig = CONFIG
) -> TokenizerRow:
    return measure("it", made, subject, instruments or Instruments(), config).row


def plain(row: TokenizerRow) -> dict[str, object]:
    """All that does not depend on the clock."""
    values = dataclasses.asdict(row)
    return {name: value for name, value in values.items() if not name.endswith("_seconds")}


# ---- which images ----


def test_the_images_are_balanced_and_carry_their_places(splits: Splits) -> None:
    subject = choose(splits.held_out, EvaluationConfig(n=30))
    assert torch.equal(subject.images[:], splits.held_out.images[:][subject.places])
    assert torch.bincount(splits.held_out.labels[subject.places]).tolist() == [3] * 10
    assert subject.name == f"digits-heldout@{splits.held_out.fingerprint[:12]}"
    assert len(choose(splits.held_out, EvaluationConfig()).images) == len(splits.held_out.images)


@pytest.mark.parametrize(
    ("wrong", "flag"),
    [
        ({"n": 1}, "--n 1"),
        ({"n": 10**6}, "--n 1000000"),
        ({"batch_size": 0}, "--batch-size"),
        ({"noise": (0.1, -0.1)}, "--noise 0.1 -0.1"),
        ({"noise": (math.inf,)}, "--noise inf"),
        ({"noise": (math.nan,)}, "--noise nan"),
    ],
)
def test_flags_that_cannot_be_used_raise(wrong: dict[str, object], flag: str, splits: Splits) -> None:
    with pytest.raises(UsageError, match=flag):
        choose(splits.held_out, dataclasses.replace(EvaluationConfig(), **wrong))  # pyright: ignore[reportArgumentType]


def test_a_tokenizer_of_other_images_raises(splits: Splits) -> None:
    with pytest.raises(DataError, match=r"it takes \(1, 8, 8\)"):
        check_size("it", pixels(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    check_size("it", pixels(), splits.train.images[:])


# ---- reconstruction and distances ----


def test_the_identity_is_perfect_and_scores_the_floor(splits: Splits, reference: FeatureReference) -> None:
    subject = choose(splits.held_out, CONFIG)
    floor = reference.distance(subject.images)
    row = row_of(pixels(), subject, Instruments(reference, floor))
    assert (row.mse, row.psnr, row.distance) == (0, PSNR_CAP, floor)
    assert row.ssim == pytest.approx(1, abs=1e-12)
    assert row.psnr_noisy[0] == PSNR_CAP
    assert row.psnr_snapped is row.bits is row.codebook is row.usage is row.rate is row.code_rank is None
    assert row.latent_rank == row.latent_stable_rank == 1
    assert (row.floor, row.features, row.reference) == (floor, "cnn-digits@test", reference.name)


def test_reconstructions_are_rounded_not_cut_off(splits: Splits) -> None:
    class Lower(nn.Module):
        def forward(self, codes: Tensor) -> Tensor:
            return codes - 0.4 * 2 / 255

    made = pixels()
    made.decoder = Lower()
    assert row_of(made, choose(splits.held_out, CONFIG)).mse == 0


def test_figures_are_those_of_the_tokenizers_own_reconstructions(splits: Splits, reference: FeatureReference) -> None:
    """One image at a time, by the tokenizer's forward: PSNR is the mean over images, the distance that of all together."""
    subject, made = choose(splits.held_out, CONFIG), tokenizer(FSQ)
    found = measure("it", made, subject, Instruments(reference, 0.5), CONFIG)
    each = [to_uint8(made(to_float(image[None])).reconstruction)[0] for image in subject.images[:]]
    errors = [
        (a.double() - b.double()).square().mean().item() / 127.5**2
        for a, b in zip(subject.images[:], each, strict=True)
    ]
    assert found.row.mse == pytest.approx(np.mean(errors), rel=1e-9)
    assert found.row.psnr == pytest.approx(np.mean([10 * math.log10(4 / error) for error in errors]), rel=1e-9)
    assert found.row.distance == pytest.approx(reference.distance(torch.stack(each)), rel=1e-9)
    assert torch.equal(found.reconstructions, torch.stack(each[:10]))


def test_lpips_is_the_mean_of_the_given_distance(splits: Splits) -> None:
    subject, made = choose(splits.held_out, CONFIG), tokenizer(FSQ)
    instruments = Instruments(perceptual=lambda a, b: (a - b).abs().amax((1, 2, 3)), perceptual_name="LPIPS-test@1")
    row = row_of(made, subject, instruments)
    shown = to_uint8(made(to_float(subject.images[:])).reconstruction)
    expected = (to_float(shown) - to_float(subject.images[:])).abs().amax((1, 2, 3)).mean()
    assert row.lpips == pytest.approx(expected.item(), rel=1e-6)
    assert row.perceptual == "LPIPS-test@1"
    assert row.distance is row.interpolated is row.features is None
    assert row_of(made, subject).lpips is None


def test_a_tokenizer_that_diverged_is_named(splits: Splits) -> None:
    made = tokenizer(FSQ)
    next(made.decoder.parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="it decodes to NaN"):
        row_of(made, choose(splits.held_out, CONFIG))


@pytest.mark.parametrize(
    "quantizer",
    [
        FSQ,
        {"type": "kl", "dim": 3},
        {"type": "residual", "base": {"type": "vq", "codebook_size": 16, "dim": 3}, "depth": 2},
    ],
    ids=lambda config: config["type"],
)
def test_nothing_depends_on_the_batch_size(
    quantizer: dict[str, object], splits: Splits, reference: FeatureReference
) -> None:
    subject, made = choose(splits.held_out, CONFIG), tokenizer(quantizer)
    rows = [
        plain(row_of(made, subject, Instruments(reference, 0.5), dataclasses.replace(CONFIG, batch_size=size)))
        for size in (40, 7, 1)
    ]
    for row in rows[1:]:
        for name, value in row.items():
            same = value == rows[0][name]
            assert same or value == pytest.approx(rows[0][name], rel=1e-6), name


# ---- codes ----


def test_codes_of_a_known_tokenizer_are_counted_exactly(splits: Splits) -> None:
    subject = choose(splits.held_out, CONFIG)
    x = to_float(subject.images[:])
    found = row_of(signs(), subject)
    shares = [((x < 0).sum() / x.numel()).item(), ((x >= 0.5).sum() / x.numel()).item()]
    shares.append(1 - sum(shares))
    entropy = -sum(p * math.log2(p) for p in shares)
    assert (found.codebook, found.used, found.dead, found.counted) == (8, 3, 5, 40 * 64)
    assert found.usage == 3 / 8
    assert found.perplexity == pytest.approx(2**entropy, rel=1e-6)
    assert found.bits == 64 * 3
    assert found.entropy_bits == pytest.approx(64 * entropy, rel=1e-6)


def batches(groups: int, size: int, count: int = 3) -> list[Tensor]:
    """Indices (B, 5) or (B, 5, groups), unevenly distributed, some never."""
    generator = torch.Generator().manual_seed(0)
    shape = (4, 5) if groups == 1 else (4, 5, groups)
    return [(torch.rand(shape, generator=generator) ** 2 * size * 0.7).long() for _ in range(count)]


def quantized(indices: Tensor, groups: int, size: int, counted: bool) -> Quantized:
    rows = indices.reshape(-1, groups).T
    counts = torch.stack([torch.bincount(row, minlength=size) for row in rows]) if counted else None
    if counts is not None and groups == 1:
        counts = counts[0]
    return Quantized(torch.zeros(1), indices, {}, torch.zeros(()), counts)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("counted", [True, False], ids=["histogram", "tokens"])
def test_codes_are_counted_by_histogram_and_by_token_alike(counted: bool, groups: int) -> None:
    size, parts = 9, batches(groups, 9)
    counter = CodeCounter(size, groups)
    for part in parts:
        counter.add(quantized(part, groups, size, counted))
    use = counter.use()
    tokens = torch.cat([part.reshape(-1, groups) for part in parts]).numpy()
    each = [np.sort(np.unique(column, return_counts=True)[1])[::-1] for column in tokens.T]
    assert [counts.tolist() for counts in use.counts] == [counts.tolist() for counts in each]
    assert (use.used, use.dead) == (sum(map(len, each)), groups * size - sum(map(len, each)))
    assert use.counted == len(tokens) == 60
    expected = [math.exp(-sum(c / 60 * math.log(c / 60) for c in counts)) for counts in each]
    assert use.perplexities == pytest.approx(expected)
    assert use.frequencies.sum().item() == pytest.approx(1)
    assert use.frequencies[0].item() == pytest.approx(np.mean([counts[0] / 60 for counts in each]))


def test_a_codebook_beyond_counting_is_counted_by_its_tokens(splits: Splits) -> None:
    made = tokenizer({"type": "fsq", "levels": [9] * 10})
    subject = choose(splits.held_out, CONFIG)
    row = row_of(made, subject)
    indices = made.encode_indices(to_float(subject.images[:])).flatten()
    counts = np.unique(indices.numpy(), return_counts=True)[1]
    assert (row.codebook, row.used, row.dead) == (9**10, len(counts), 9**10 - len(counts))
    assert row.perplexity == pytest.approx(
        math.exp(-sum(c / len(indices) * math.log(c / len(indices)) for c in counts))
    )


def test_groups_add_bits_and_average_perplexities(splits: Splits) -> None:
    made = tokenizer({"type": "grouped", "base": {"type": "fsq", "levels": [5, 4]}, "groups": 2})
    subject = choose(splits.held_out, CONFIG)
    row = row_of(made, subject)
    indices = made.encode_indices(to_float(subject.images[:])).reshape(-1, 2)
    each = [torch.bincount(column, minlength=20).double() / len(indices) for column in indices.T]
    entropies = [torch.special.entr(p).sum().item() for p in each]
    assert (row.groups, row.codebook, row.tokens) == (2, 20, 16)
    assert row.bits == pytest.approx(16 * 2 * math.log2(20))
    assert row.perplexity == pytest.approx(np.mean(np.exp(entropies)))
    assert row.entropy_bits == pytest.approx(16 * sum(entropies) / math.log(2))


# ---- ranks ----


def test_ranks_of_known_spectra() -> None:
    generator = torch.Generator().manual_seed(0)
    effective, stable = ranks(moments(torch.randn(100, 6, 40, generator=generator)))
    assert effective == pytest.approx(6, abs=0.01)
    assert stable == pytest.approx(6, abs=0.5)
    line = torch.outer(torch.randn(500, generator=generator), torch.tensor([3.0, -1, 2]))
    assert ranks(moments(line + torch.tensor([5.0, 7, -2]))) == pytest.approx((1, 1), abs=1e-4)
    cross = torch.tensor([[3.0, 0], [-3, 0], [0, 1], [0, -1]]) + 10
    assert ranks(moments(cross)) == pytest.approx((math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)), 10 / 9))


def test_equal_vectors_have_no_rank() -> None:
    assert ranks(moments(torch.full((9, 3, 4), 0.1))) == (0, 0)
    assert ranks(moments(torch.zeros(9, 3))) == (0, 0)


def test_ranks_are_of_codes_as_often_as_they_occur_and_of_latents(splits: Splits) -> None:
    subject, made = choose(splits.held_out, CONFIG), tokenizer(FSQ)
    row = row_of(made, subject)
    x = to_float(subject.images[:])
    for found, stable, vectors in (
        (row.code_rank, row.code_stable_rank, made(x).quantized.codes),
        (row.latent_rank, row.latent_stable_rank, made.raw_latents(x)),
    ):
        centred = vectors.double().transpose(0, 1).flatten(1).T
        values = np.linalg.svd((centred - centred.mean(0)).numpy(), compute_uv=False)
        share = values / values.sum()
        assert found == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=1e-6)
        assert stable == pytest.approx((values**2).sum() / values.max() ** 2, rel=1e-6)


# ---- interpolation ----


def test_the_neighbour_is_the_other_one_of_least_angle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_rank, "_ROWS", 7)
    vectors = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 31)[:, None]
    found = nearest(vectors)
    x = vectors.double().numpy()
    for i, j in enumerate(found.tolist()):
        angles = [math.acos(np.clip(a @ x[i] / np.linalg.norm(a) / np.linalg.norm(x[i]), -1, 1)) for a in x]
        angles[i] = math.inf
        assert j == int(np.argmin(angles))
    assert nearest(torch.ones(3, 2)).tolist() == [1, 0, 0]


def test_slerp_walks_the_arc() -> None:
    a, b = torch.tensor([[2.0, 0.0]]).double(), torch.tensor([[0.0, 2.0]]).double()
    for weight in (0.0, 0.25, 0.5, 1.0):
        angle = weight * math.pi / 2
        assert slerp(a, b, weight)[0].tolist() == pytest.approx([2 * math.cos(angle), 2 * math.sin(angle)])
    assert slerp(a, 3 * a, 0.5)[0].tolist() == [4, 0]
    assert torch.isfinite(slerp(a, -a, 0.5)).all()


def test_interpolation_begins_at_the_image_and_ends_at_its_neighbour(splits: Splits) -> None:
    made = tokenizer(FSQ)
    x = to_float(choose(splits.held_out, CONFIG).images[:])
    latents = made.raw_latents(x)
    mean, std = latents.mean((0, 2, 3), keepdim=True), latents.std((0, 2, 3), keepdim=True)
    neighbours = nearest(((latents - mean) / std).flatten(1))
    assert torch.equal(interpolated(latents, 0.0), latents)
    torch.testing.assert_close(interpolated(latents, 1.0), latents[neighbours])
    reconstruction = to_uint8(made.decode(made.quantizer.snap(interpolated(latents, 0.0))))
    assert torch.equal(reconstruction, to_uint8(made(x).reconstruction))


def test_interpolation_knows_no_scale_of_a_channel() -> None:
    latents = torch.randn(20, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    scale, shift = torch.tensor([1.0, 50, 0.1]).view(3, 1, 1), torch.tensor([0.0, -9, 2]).view(3, 1, 1)
    torch.testing.assert_close(
        interpolated(latents * scale + shift), interpolated(latents) * scale + shift, rtol=1e-4, atol=1e-4
    )
    dead = torch.cat([latents, torch.full((20, 1, 2, 2), 7.0)], 1)
    torch.testing.assert_close(interpolated(dead), torch.cat([interpolated(latents), dead[:, 3:]], 1))


@pytest.mark.parametrize("snap", [True, False])
def test_the_interpolated_distance_is_of_decoded_midpoints(
    snap: bool, splits: Splits, reference: FeatureReference
) -> None:
    made, subject = tokenizer(FSQ, snap_on_decode=snap), choose(splits.held_out, CONFIG)
    found = measure("it", made, subject, Instruments(reference, 0.5), CONFIG)
    middle = interpolated(made.raw_latents(to_float(subject.images[:])), 0.5)
    images = to_uint8(made.decode(made.quantizer.snap(middle) if snap else middle))
    expected = frechet_distance(FeatureStatistics.of(reference.network.features(images)), reference.statistics)
    assert found.row.interpolated == pytest.approx(expected, rel=1e-9)
    assert found.interpolations is not None
    assert torch.equal(found.interpolations, images[:10])
    assert found.row.interpolated != pytest.approx(found.row.distance, rel=1e-3)


# ---- noise ----


def test_without_noise_the_curve_is_the_reconstruction(splits: Splits) -> None:
    subject = choose(splits.held_out, CONFIG)
    for options in ({}, {"latent_space": "post"}):
        row = row_of(tokenizer(FSQ, **options), subject)
        assert row.psnr_snapped is not None
        assert row.psnr_snapped[0] == pytest.approx(row.psnr, rel=1e-9)
        assert (row.psnr_noisy[0] == pytest.approx(row.psnr, rel=1e-9)) == bool(options)
    unsnapped = row_of(tokenizer(FSQ, snap_on_decode=False), subject)
    assert unsnapped.psnr_snapped is None


def test_noise_has_the_standard_deviation_of_its_channel() -> None:
    """Pixels as latents, far from black and white: the error is sigma times their deviation."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.randn(40, 1, 8, 8, generator=generator) * 12 + 128).clamp(90, 166).to(torch.uint8)
    grey = Subject(images, torch.zeros(40), torch.arange(40), "grey")
    row = row_of(pixels(), grey, config=dataclasses.replace(CONFIG, noise=(0.5, 1)))
    std = to_float(images).double().std().item()
    for sigma, found in zip(row.noise, row.psnr_noisy, strict=True):
        assert found == pytest.approx(10 * math.log10(4 / (sigma * std) ** 2), abs=0.15)


def test_snapping_forgives_noise_below_half_a_cell(splits: Splits) -> None:
    """Codes are signs: no code changes as long as the noise is less than the distance to 0."""
    subject, made = choose(splits.held_out, CONFIG), tokenizer({"type": "lfq", "bits": 3}, latent_space="post")
    row = row_of(made, subject, config=dataclasses.replace(CONFIG, noise=(0.0, 0.05, 3.0)))
    assert row.psnr_snapped is not None
    assert row.psnr_snapped[0] == row.psnr_snapped[1] == row.psnr_noisy[0] == pytest.approx(row.psnr)
    assert row.psnr_noisy[1] != row.psnr_noisy[0]
    assert row.psnr_snapped[2] != row.psnr_snapped[1]


def test_an_image_has_its_own_noise(splits: Splits) -> None:
    """The mean over images does not know their order, and another seed gives other noise."""
    subject, made = choose(splits.held_out, CONFIG), tokenizer(FSQ)
    turned = dataclasses.replace(subject, images=subject.images[:].flip(0), places=subject.places.flip(0))
    first, second = row_of(made, subject), row_of(made, turned)
    assert second.psnr_noisy == pytest.approx(first.psnr_noisy, rel=1e-6)
    other = row_of(made, subject, config=dataclasses.replace(CONFIG, seed=1))
    assert other.psnr_noisy[0] == first.psnr_noisy[0]
    assert other.psnr_noisy[1] != first.psnr_noisy[1]


# ---- posterior ----


def test_the_rate_of_a_posterior_and_its_draws(splits: Splits) -> None:
    subject, made = choose(splits.held_out, CONFIG), tokenizer({"type": "kl", "dim": 2})
    row = row_of(made, subject)
    x = to_float(subject.images[:])
    mean, log_variance = made.encode(x).double().chunk(2, 1)
    nats = ((mean**2 + log_variance.exp() - 1 - log_variance) / 2).sum((1, 2, 3)).mean().item()
    assert row.rate == pytest.approx(nats / math.log(2), rel=1e-6)
    noise = normal(CONFIG.seed, "posterior", 0, subject.places, made.noise_shape)
    drawn = to_uint8(made.decode((mean + (log_variance / 2).exp() * noise).float()))
    assert row.psnr_sampled == pytest.approx(psnr(subject.images[:], drawn).mean().item(), rel=1e-6)
    assert row.psnr_sampled != pytest.approx(row.psnr, rel=1e-4)
    assert row.bits is row.usage is row.perplexity is row.psnr_snapped is None


# ---- words ----


def test_a_quantizer_in_words() -> None:
    assert description(FSQ) == "fsq levels 5,5,4"
    assert (
        description({"type": "residual", "base": {"type": "vq", "dim": 8}, "depth": 4})
        == "residual base (vq dim 8), depth 4"
    )


def test_a_row_says_what_was_measured(splits: Splits) -> None:
    made = tokenizer(FSQ)
    row = row_of(made, choose(splits.held_out, CONFIG))
    assert (row.latent_shape, row.tokens, row.n, row.seed, row.noise) == ("3x4x4", 16, 40, 0, CONFIG.noise)
    assert row.parameters == sum(p.numel() for p in made.parameters())
    assert row.encode_seconds > 0 and row.decode_seconds > 0
    assert isinstance(splits.held_out, ImageData) and row.images.startswith("digits-heldout@")
