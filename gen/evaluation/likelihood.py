"""Bits per dimension of held-out images under baselines, beside what needs no network.

    uniform      log2 L
    histogram    every value on its own:  P(k at a place) = (count in training images + 1) / (N + L)

Draws of u or z depend on (seed, place of the image in the held-out split), so that neither batches nor the number of
images change a figure beyond rounding. The standard error is that of the mean over images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from midway.gen.baselines.base import Baseline
from midway.gen.baselines.vae import VAE
from midway.gen.core.ranges import BATCH, COUNT, SEED, check_ranges
from midway.gen.data.levels import bits_per_dim, levels_of, to_levels, values_of
from midway.gen.data.pixels import Images
from midway.gen.data.splits import Splits
from midway.gen.features.reference import Subject
from midway.gen.training.batches import Context

VAE_DRAWS = 16


@dataclass(frozen=True)
class Bounds:
    """How likelihoods are bounded. ValueError for numbers below 1."""

    draws: int | None = None
    """Draws of the latents (VAE: the mean of their bounds) or of the dequantisation (flows: inside the logarithm)."""
    seed: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name in ("draws", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        check_ranges(self, draws=COUNT, batch_size=BATCH, seed=SEED)


@dataclass(frozen=True)
class Score:
    """Bits per dimension, and the standard error of that mean over n images."""

    bits: float
    error: float
    n: int

    def __str__(self) -> str:
        return f"{self.bits:.4f} ± {self.error:.4f}"


def levels_in_data(splits: Splits) -> int:
    """The number of levels that holds all training and held-out images."""
    return levels_of(torch.cat([values_of(data.images) for data in (splits.train, splits.held_out)]))


# ---- scores ----


def score(nats: Tensor, dims: int) -> Score:
    """The mean of log-likelihoods in nats (N,) of images of `dims` values."""
    return score_of(bits_per_dim(nats.double(), dims))


def score_of(bits: Tensor) -> Score:
    """The mean of bits per dimension, float64 (N,), of N images."""
    error = bits.std().item() / math.sqrt(len(bits)) if len(bits) > 1 else math.nan
    return Score(bits.mean().item(), error, len(bits))


def bits_of(model: Baseline, subject: Subject, bounds: Bounds) -> Score:
    """The bound of `model`. ValueError for images that are not like its own, and for a model that has no likelihood."""
    return score(over_batches(subject, bounds, likelihood_of(model, bounds)), model.dims)


def iwae_of(model: VAE, subject: Subject, bounds: Bounds, draws: int) -> Score:
    """The importance-weighted bound of `draws` draws."""
    return score(over_batches(subject, bounds, partial(model.iwae, draws=draws)), model.dims)


def likelihood_of(model: Baseline, bounds: Bounds) -> Callable[[Tensor, Tensor, Context], Tensor]:
    """`log_likelihood` with the requested number of draws."""
    if isinstance(model, VAE):
        return partial(model.log_likelihood, samples=bounds.draws or VAE_DRAWS)
    if bounds.draws is None:
        return model.log_likelihood

    def with_draws(images: Tensor, labels: Tensor, context: Context) -> Tensor:
        own: Any = model.config
        model.config = replace(own, draws=bounds.draws)
        try:
            return model.log_likelihood(images, labels, context)
        finally:
            model.config = own

    return with_draws


def over_batches(subject: Subject, bounds: Bounds, nats: Callable[[Tensor, Tensor, Context], Tensor]) -> Tensor:
    """float64 (N,) on the CPU: `nats` of all images, batch by batch."""
    batches = zip(*(part.split(bounds.batch_size) for part in (subject.images, subject.labels, subject.places)))
    return torch.cat(
        [nats(images, labels, Context(bounds.seed, 0, places)).cpu() for images, labels, places in batches]
    )


def bound_name(model: Baseline, draws: int | None) -> str:
    """What the bits of `bits_of` are."""
    if isinstance(model, VAE):
        return f"ELBO, mean of {draws or VAE_DRAWS} draw(s)"
    count = draws or model.config.draws
    return "1 draw of u" if count == 1 else f"{count} draws of u inside the logarithm"


# ---- what needs no network ----


def uniform_score(subject: Subject, levels: int) -> Score:
    """log2 L, exactly."""
    return Score(math.log2(levels), 0.0, len(subject.images))


def histogram_score(train: Images, subject: Subject, levels: int) -> Score:
    """Each value by the histogram of its place in the training images, uint8 (N, C, H, W), every level counted once more."""
    counts = torch.ones(math.prod(train.shape[1:]), levels, dtype=torch.float64)
    for part in train.split(1024):
        theirs = to_levels(part, levels).flatten(1).T
        counts.scatter_add_(1, theirs, torch.ones(theirs.shape, dtype=torch.float64))
    log_p = counts.log() - math.log(len(train) + levels)
    own = (to_levels(part, levels).flatten(1).T for part in subject.images.split(1024))
    return score(torch.cat([log_p.gather(1, k).sum(0) for k in own]), len(log_p))


@dataclass(frozen=True)
class LikelihoodRow:
    """One model, or one reference without a network: `bits` per dimension on `n` held-out images of `levels` levels."""

    name: str
    kind: str
    bits: float | None
    """None for a model without a likelihood of images."""
    error: float | None
    n: int
    levels: int
    dims: int
    bound: str
    """What `bits` is: exact, or which bound by how many draws."""
    seed: int
    images: str
    iwae_bits: float | None = None
    iwae_draws: int | None = None
    parameters: int | None = None
    conditional: bool | None = None
    weights: str = ""
    model: str = ""
    """Hash of configuration and weights."""
    seconds: float | None = None
    """Of `bits`, for all images."""
    sample_nfe: int | None = None
    sampler: str = ""
    """Solver and grid, of models that need one."""
    sample_seconds: float | None = None
    """For 1000 samples, in batches."""
    distance: float | None = None
    """Fréchet distance of n samples to the training images, and its feature network."""
    floor: float | None = None
    features: str | None = None
    code_bits: float | None = None
    """Of a prior: bits of the codes of an image, mean over the same n images. Not of its pixels: codes are not the image."""
    code_error: float | None = None
    code_bound: str = ""
    """What `code_bits` is: exact, or a bound by how many masks."""
    code_fixed: float | None = None
    """Bits of the same codes at a fixed length, tokens times log2 of the codes of one."""
    code_independent: float | None = None
    """Bits under the frequencies of every digit of every position in the training codes, each counted once more."""
    code_independent_error: float | None = None
    code_tokens: int | None = None
    tokenizer: str = ""
    """Hash of the tokenizer whose codes they are: bits of codes of different tokenizers do not compare."""
