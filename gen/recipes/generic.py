"""Recipes for any images: `small` for minutes of a CPU, `base` for a GPU. Sizes follow from those of the images.

    side            8   16   28   32   48   64   96  128  224  256  512
    downsample      2    4    4    4    4    4    8    8   16   16   16
    latent side     4    4    7    8   12   16   12   16   14   16   32
    patch of small  1    1    1    1    2    2    2    2    2    2    4       at most 64 tokens where the side can be divided so
    patch of base   1    1    1    1    1    1    1    1    1    1    2       at most 256

Where the table's downsample does not divide the side, the largest smaller one that does, if that leaves a latent of at most 32 a
side; else a UsageError with the nearest size that fits. Everything can be overridden by flags.
"""

from collections.abc import Callable
from dataclasses import dataclass

import tyro

from midway.gen.core.errors import UsageError
from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.presets import SIZES
from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.training.config import TrainConfig

FINEST, WIDEST = 16, 32
"""Sides of a latent: the aim, and the largest."""
COARSEST = 16
"""The largest downsample."""
MULTIPLIERS = {1: (1,), 2: (1, 2), 4: (1, 2, 4), 8: (1, 2, 4, 4), 16: (1, 1, 2, 4, 4)}
"""Of the base tokenizer's width, by its downsample."""


@dataclass(frozen=True)
class Shape:
    """Channels and side of square images."""

    channels: int = 3
    side: int = 32

    def __str__(self) -> str:
        return f"{self.side}x{self.side} {'grey' if self.channels == 1 else 'RGB'}"


def shape_of(data: ImageData) -> Shape:
    """Of these images; UsageError with a size that fits unless they are square."""
    channels, height, width = data.images.shape[1:]
    if height != width:
        fit = _fitting(min(height, width))
        raise UsageError(f"images are {height}x{width}", "tokenizers take square images", _fix(fit, min(height, width)))
    return Shape(channels, height)


def downsample_of(side: int) -> int:
    """Pixels a side of a latent pixel; UsageError with a size that fits where none does."""
    factor = _wanted(side)
    while factor > 1 and side % factor:
        factor //= 2
    if side < 4 or (factor == 1 and side > 4) or side // factor > WIDEST:
        what = f"images of {side}x{side} pixels cannot be divided into patches"
        raise UsageError(what, f"{side} is no multiple of {_wanted(side)}", _fix(_fitting(side), side))
    return factor


def _wanted(side: int) -> int:
    factor = 2 if side < 16 else 4
    while factor < COARSEST and side / factor > FINEST:
        factor *= 2
    return factor


def _fitting(side: int) -> int:
    """The largest size up to `side` that its downsample divides, at least 8."""
    factor = _wanted(side)
    return max(side // factor * factor, 8)


def _fix(fit: int, side: int) -> str:
    crop = f", or --crop {fit} for a part of each at its own scale" if fit < side else ""
    return f"pass --resize {fit}{crop}"


def patch_of(side: int, most: int) -> int:
    """Side of a token in latent pixels: the smallest that divides `side` into at most `most` tokens and at least 9, or 1."""
    fits = [patch for patch in range(1, side + 1) if side % patch == 0 and 9 <= (side // patch) ** 2 <= most]
    return fits[0] if fits else 1


# ---- tokenizers ----


def small_tokenizer(shape: Shape) -> TokenizerTask:
    """FSQ, one residual block, the shortcuts from principal components: the recipe mnist5k-fsq at other sizes."""
    factor = downsample_of(shape.side)
    model = TokenizerConfig(
        levels=_levels(shape, factor),
        width=48 if shape.channels == 1 and shape.side <= 32 else 64,
        blocks=1,
        downsample=factor,
        shortcut="principal",
    )
    batch = 64 if shape.side <= 32 else 32 if shape.side <= 128 else 16
    train = TrainConfig(steps=1000, batch_size=batch, lr=4e-3 if batch == 64 else 2e-3, decay="cosine", ema=0.99)
    return TokenizerTask(out=tyro.MISSING, data=UNNAMED, model=model, train=train)


def base_tokenizer(shape: Shape) -> TokenizerTask:
    """FSQ with residual blocks at every resolution."""
    factor = downsample_of(shape.side)
    model = TokenizerConfig(
        levels=_levels(shape, factor), width=64, downsample=factor, multipliers=MULTIPLIERS[factor], upsample="nearest"
    )
    batch = 128 if shape.side <= 64 else 64
    train = TrainConfig(steps=30_000, batch_size=batch, lr=3e-4, decay="cosine", warmup=500, precision="auto")
    return TokenizerTask(out=tyro.MISSING, data=UNNAMED, model=model, loss=LossConfig(pixel="l1"), train=train)


UNNAMED = DataConfig(data=tyro.MISSING)


def _levels(shape: Shape, factor: int) -> tuple[int, ...]:
    """512 codes where a code stands for 16 grey pixels or fewer, else 64000."""
    return (8, 8, 8) if shape.channels == 1 and factor <= 4 else (8, 8, 8, 5, 5, 5)


def describe_tokenizer(name: str, shape: Shape, task: TokenizerTask) -> str:
    """`small for 64x64 RGB: downsample 4, width 64, 256 tokens, batch 32`."""
    model = task.model
    tokens = model.latent_tokens or (shape.side // model.downsample) ** 2
    sizes = f"downsample {model.downsample}, width {model.width}, {tokens} tokens, batch {task.train.batch_size}"
    return f"{name} for {shape}: {sizes}"


# ---- latent models ----


def small_latent(latent: tuple[int, int, int]) -> LatentTask:
    """The process and optimizer of mnist5k-dit; wider where latents have more than four channels."""
    channels, side, _ = latent
    patch = patch_of(side, 64)
    dit = DiTConfig(width=96, depth=4, heads=4, patch=patch) if channels <= 4 else DiTConfig(128, 6, 4, patch)
    model = LatentModelConfig(schedule="vp", target="v", time_mean=0.1, time_std=1.2, dit=dit)
    batch = 64 if (side // patch) ** 2 <= 36 else 32
    train = TrainConfig(steps=2400, batch_size=batch, optimizer="muon", lr=3e-3, decay="cosine", log_every=100)
    return LatentTask(out=tyro.MISSING, tokenizer=tyro.MISSING, model=model, train=train)


def base_latent(latent: tuple[int, int, int]) -> LatentTask:
    """DiT-S as a rectified flow with logit-normal times, the settings of SiT otherwise."""
    patch = patch_of(latent[1], 256)
    model = LatentModelConfig(dit=DiTConfig(**SIZES["S"], patch=patch))
    train = TrainConfig(
        steps=100_000, batch_size=256, lr=2e-4, betas=(0.9, 0.999), ema=0.9995, precision="auto", log_every=100
    )
    return LatentTask(out=tyro.MISSING, tokenizer=tyro.MISSING, model=model, train=train)


def describe_latent(name: str, latent: tuple[int, int, int], task: LatentTask) -> str:
    """`small for latents 6x16x16: patch 2, 64 tokens, width 128, depth 6, batch 32`."""
    dit, shape = task.model.dit, "x".join(map(str, latent))
    tokens = (latent[1] // dit.patch) * (latent[2] // dit.patch)
    sizes = f"patch {dit.patch}, {tokens} tokens, width {dit.width}, depth {dit.depth}, batch {task.train.batch_size}"
    return f"{name} for latents {shape}: {sizes}"


GENERIC_TOKENIZERS: dict[str, Callable[[Shape], TokenizerTask]] = {"small": small_tokenizer, "base": base_tokenizer}
GENERIC_LATENTS: dict[str, Callable[[tuple[int, int, int]], LatentTask]] = {"small": small_latent, "base": base_latent}
TOKENIZER_SIZES = (
    "model.downsample",
    "model.width",
    "model.multipliers",
    "quantizer.levels",
    "train.batch_size",
    "train.lr",
)
LATENT_SIZES = ("model.dit.patch", "model.dit.width", "model.dit.depth", "train.batch_size")
"""What the sizes of images and latents decide."""
