"""Bits per dimension of pixel models: every Jacobian on the way from integers to latents, and a real run."""

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.data.images import load_images, to_float
from midway.gen.data.levels import from_levels
from midway.gen.diffusion.likelihood import Cost, LikelihoodConfig, bits_per_dim, dequantised_latents
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.training.batches import Context
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_latent, train_tokenizer
from midway.samplers.prediction import Prediction, expand
from midway.samplers.schedule import SCHEDULES
from midway.tokenizers.tokenizer import ImageTokenizer

DIT = DiTConfig(width=16, depth=1, heads=2, patch=1)


def pixels(mean: tuple[float, ...], std: tuple[float, ...], size: int = 2) -> ImageTokenizer:
    tokenizer = ImageTokenizer(len(mean), size, downsample=1, quantizer={"type": "identity", "dim": len(mean)})
    tokenizer.set_latent_statistics(torch.tensor(mean), torch.tensor(std))
    return tokenizer


def model(schedule: str = "linear", classes: int = 0, channels: int = 1) -> LatentModel:
    torch.manual_seed(0)
    config = LatentModelConfig(schedule=schedule, conditional=classes > 0, dit=DIT)  # pyright: ignore
    return LatentModel(config, (channels, 2, 2), classes).eval().requires_grad_(False)


def context(count: int, first: int = 0, step: int = 0) -> Context:
    return Context(0, step, torch.arange(first, first + count))


def images(levels: int, low: int, high: int, count: int = 4, channels: int = 1) -> Tensor:
    k = torch.randint(low, high, (count, channels, 2, 2), generator=torch.Generator().manual_seed(0))
    return from_levels(k, levels)


# ---- from integers to latents ----


@dataclass(frozen=True)
class Middle(Context):
    """Draws the middle of every bin."""

    def uniform(self, purpose: str, shape: object = ()) -> Tensor:
        return super().uniform(purpose, shape) * 0 + 0.5  # pyright: ignore


def test_a_cell_lies_around_its_level() -> None:
    tokenizer = pixels((0.2, -0.1, 0.4), (0.3, 0.5, 0.9))
    for levels, error in ((256, 1e-6), (17, 0.5 / 127.5 / 0.3 + 1e-6)):  # 17 levels are stored rounded to uint8
        given = images(levels, 0, levels, channels=3)
        z, _ = dequantised_latents(tokenizer, given, levels, Middle(0, 0, torch.arange(4)))
        torch.testing.assert_close(z, tokenizer.encode_latents(to_float(given)), rtol=0, atol=error)


def test_the_jacobian_is_the_one_of_the_map() -> None:
    """The volume of one bin, 1 / L^D in x, is the product of what one level more adds to z."""
    tokenizer, levels = pixels((0.2, -0.1, 0.4), (0.3, 0.5, 0.9)), 17
    lower, upper = (from_levels(torch.full((1, 3, 2, 2), k), levels) for k in (3, 4))
    (z, log_det), (above, _) = (dequantised_latents(tokenizer, i, levels, context(1)) for i in (lower, upper))
    assert (above - z).double().log().sum().item() == pytest.approx(log_det - 12 * math.log(levels), abs=1e-4)


# ---- densities that are known ----


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_uniform_data_has_log2_of_the_levels(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """x uniform on (0, 1)^D, as the exact denoiser of its latents: the mean of a normal cut at both ends.

    Of mean 0, as the noise: at rho = 80 another mean would still be seen.
    """
    levels, made, tokenizer = 17, model(schedule), pixels((0.0,), (0.7,))
    low, high = (sign * levels / (levels - 1) / 0.7 for sign in (-1, 1))

    def cut(x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        alpha, sigma = (expand(f(t.double()), x) for f in (made.schedule.alpha, made.schedule.sigma))
        y, rho = x.double() / alpha, sigma / alpha
        a, b = (low - y) / rho, (high - y) / rho
        mass = torch.special.ndtr(b) - torch.special.ndtr(a)
        slope = ((-0.5 * a**2).exp() - (-0.5 * b**2).exp()) / math.sqrt(2 * math.pi)
        x0 = y + rho * slope / mass
        return Prediction(x0, (y - x0) / rho)

    monkeypatch.setattr(made, "conditional_field", cut)
    got, _ = bits_per_dim(
        made, tokenizer, images(levels, 3, levels - 3), None, levels, context(4), LikelihoodConfig(steps=30)
    )
    torch.testing.assert_close(got, torch.full_like(got, math.log2(levels)), rtol=0, atol=3e-4)


@pytest.mark.parametrize("levels", [17, 256])
def test_a_model_that_does_not_move_has_its_noise_as_density(levels: int) -> None:
    """A new network's velocity is 0 on `linear`: x_t is what it started as, N(0, alpha^2 + sigma^2) at rho = 80."""
    made, tokenizer = model(channels=3), pixels((0.2, -0.1, 0.4), (0.3, 0.5, 0.9))
    given = images(levels, 0, levels, channels=3)
    got, cost = bits_per_dim(made, tokenizer, given, None, levels, context(4), LikelihoodConfig(steps=9, rho_min=0.1))
    z, log_det = dequantised_latents(tokenizer, given, levels, context(4))
    scale, variance = 1 / 1.1, (1 / 81) ** 2 + (80 / 81) ** 2
    square = (scale * z).double().square().flatten(1).sum(1)
    log_p = -square / (2 * variance) - 6 * math.log(2 * math.pi * variance) + 12 * math.log(scale) + log_det
    want = (12 * math.log(levels) - log_p) / (12 * math.log(2))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    assert cost == Cost(36, 36 * 12)


# ---- a real run ----


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional pixel model of digits after one step."""
    root = tmp_path_factory.mktemp("pixels")
    one = TrainConfig(steps=1, batch_size=16, lr=1e-2, warmup=0, ema=0, log_every=1)
    train_tokenizer.train(
        TokenizerTask(
            root / "tokenizer", model=TokenizerConfig(quantizer="identity", downsample=1), train=TrainConfig()
        )
    )
    config = LatentModelConfig(dit=DiTConfig(width=16, depth=1, heads=2, patch=4))
    train_latent.train(LatentTask(root / "model", root / "tokenizer", model=config, train=one))
    return root / "model"


def test_a_trained_pixel_model_has_bits(run: Path) -> None:
    trained, data = load_model(run, torch.device("cpu")), load_images("digits")
    config = LikelihoodConfig(solver="heun", steps=1)

    def bits(rows: slice, labels: Tensor = data.labels, step: int = 0, config: LikelihoodConfig = config) -> Tensor:
        draws = context(rows.stop - rows.start, rows.start, step)
        model, tokenizer = trained.model, trained.tokenizer
        return bits_per_dim(model, tokenizer, data.images[rows], labels[rows], 17, draws, config)[0]

    got = bits(slice(0, 4))
    assert got.dtype == torch.float64
    assert bool(((got > 0) & (got < 20)).all())
    assert torch.equal(bits(slice(0, 4)), got)
    torch.testing.assert_close(bits(slice(2, 3)), got[2:3], rtol=0, atol=1e-5)
    assert not torch.isclose(bits(slice(0, 4), step=1), got, rtol=0, atol=1e-5).any()  # another u
    probed = LikelihoodConfig(solver="heun", steps=1, trace="hutchinson", probes=32)
    torch.testing.assert_close(bits(slice(0, 4), config=probed), got, rtol=0, atol=0.02)
    torch.testing.assert_close(
        bits(slice(2, 3), config=probed), bits(slice(0, 4), config=probed)[2:3], rtol=0, atol=1e-5
    )


def test_labels_change_the_likelihood() -> None:
    """Of the class, if it is conditional; an unconditional one ignores it."""
    given, labels, config = images(17, 0, 17), torch.tensor([0, 1, 2, 0]), LikelihoodConfig(steps=2)
    for classes in (3, 0):
        made = model(classes=classes)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        first, second = (
            bits_per_dim(made, pixels((0.0,), (0.8,)), given, chosen, 17, context(4), config)[0]
            for chosen in (labels, (labels + 1) % 3)
        )
        assert torch.isclose(first, second, rtol=0, atol=1e-6).any() == (classes == 0)


# ---- what has no bits ----


def test_a_learned_tokenizer_has_no_pixel_density() -> None:
    tokenizer = ImageTokenizer(1, 2, width=8, downsample=1, quantizer={"type": "fsq", "levels": [5]})
    tokenizer.set_latent_statistics(torch.zeros(1), torch.ones(1))
    with pytest.raises(UsageError, match=r"its tokenizer is learned.*\n.*digits-pixels"):
        bits_per_dim(model(), tokenizer, images(17, 0, 17), None, 17, context(4))


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (None, "no labels for 4"),
        (torch.zeros(3).long(), r"shape \(3,\)"),
        (torch.tensor([0, 1, 3, 0]), "labels 0 to 3"),
    ],
)
def test_labels_that_a_model_does_not_have_raise(labels: Tensor | None, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        bits_per_dim(model(classes=3), pixels((0.0,), (1.0,)), images(17, 0, 17), labels, 17, context(4))


def test_values_that_are_no_levels_raise() -> None:
    with pytest.raises(ValueError, match="none of 17 levels"):
        bits_per_dim(model(), pixels((0.0,), (1.0,)), images(256, 1, 2), None, 17, context(4))
