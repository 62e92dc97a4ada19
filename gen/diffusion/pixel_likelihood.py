"""Bits per dimension of a pixel model, by the density of its probability-flow ODE (cnf.py).

Level k is the cell of width 2 / (L - 1) around its value in [-1, 1]. With x = (k + u) / L,

    pixel = (2 L x - L) / (L - 1),   z = (pixel - mean) / std,   ln p(x) = ln p(z) + D ln(2 L / (L - 1)) - sum ln std

where p(z) is the density of x_t / alpha = x0 + rho eps at rho_min, the same on every schedule. It is a valid bound, but
a model trained on the levels themselves puts its mass on them, not across their cells, and scores the worse the better it has
learned them: train on dequantised pixels, or choose rho_min near a quarter of a cell, 1 / (2 (L - 1) std).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.data import levels as grey
from midway.gen.diffusion.cnf import COSINE, Cost, Probe, Trace, cosine_table, log_likelihood, on_cosine
from midway.gen.diffusion.model import LatentModel
from midway.gen.training.batches import Context
from midway.samplers.grids import RHO_MIN
from midway.tokenizers.tokenizer import ImageTokenizer

EXACT_DIMS = 32
"""Values of an image up to which the exact trace is the default."""


@dataclass(frozen=True)
class LikelihoodConfig:
    """How `bits_per_dim` integrates."""

    solver: str = "rk4"
    steps: int = 20
    grid: str = "quadratic"
    rho_min: float = RHO_MIN
    """Noise level, in standard deviations of the data, of the density that is reported."""
    trace: Trace | Literal["auto"] = "auto"
    """exact: one backward pass for every value of an image; hutchinson: one for every probe, an unbiased estimate. auto: exact
    for images of at most 32 values."""
    probes: int = 4
    probe: Probe = "rademacher"
    """rademacher is exact for diagonal Jacobians, and never has the larger variance."""

    def trace_for(self, dims: int) -> Trace:
        """The trace for images of `dims` values."""
        if self.trace == "auto":
            return "exact" if dims <= EXACT_DIMS else "hutchinson"
        return self.trace


def bits_per_dim(
    model: LatentModel,
    tokenizer: ImageTokenizer,
    images: Tensor,
    labels: Tensor | None,
    levels: int,
    context: Context,
    config: LikelihoodConfig | None = None,
) -> tuple[Tensor, Cost]:
    """Bits per dimension, float64 (B,), of the integers of uint8 images (B, C, H, W), an upper bound; and what it cost.

    Of a pixel model: its tokenizer is the identity. Given labels (B,) it is of p(x | label); an unconditional model ignores
    them. levels: what levels_of finds in the training images. One uniform u for each value, and the probes, are
    drawn from the context by sample; the mean over contexts is a bound too. UsageError for a learned tokenizer, labels that the
    model does not have, and what `log_likelihood` refuses; ValueError for values that are no levels.
    """
    config = config or LikelihoodConfig()
    _check_pixels(tokenizer)
    labels = _labels(model, labels, images)
    z, log_det = dequantised_latents(tokenizer, images, levels, context)
    table = cosine_table(model.schedule, config.solver, config.steps, config.grid, config.rho_min)
    alpha = COSINE.alpha(torch.tensor(table.grid[0], dtype=torch.float64)).item()
    nats, cost = log_likelihood(
        on_cosine(model.field(labels), model.schedule),
        COSINE,
        table,
        alpha * z,
        trace=config.trace_for(z[0].numel()),
        probes=config.probes,
        ids=context.sample_ids,
        probe=config.probe,
        seed=context.seed,
    )
    dims = z[0].numel()
    log_density = nats + dims * math.log(alpha) + log_det
    return grey.bits_per_dim(grey.dequantised_bound(log_density, dims, levels), dims), cost


def dequantised_latents(
    tokenizer: ImageTokenizer, images: Tensor, levels: int, context: Context
) -> tuple[Tensor, float]:
    """z (B, C, H, W) float32 of x = (k + u) / L, u from the context, and ln|det dz/dx|, the same for all images."""
    device = tokenizer.latent_std.device
    k = grey.to_levels(images, levels).to(device)
    u = context.uniform("dequantise 0", images.shape[1:]).to(device)
    x = grey.uniform_dequantise(k, u, levels)
    z = tokenizer.encode_latents((2 * levels * x - levels) / (levels - 1))
    shrinking = tokenizer.latent_std.double().log().sum().item() * math.prod(z.shape[2:])
    return z, z[0].numel() * math.log(2 * levels / (levels - 1)) - shrinking


def _check_pixels(tokenizer: ImageTokenizer) -> None:
    if not tokenizer.passes_through:
        raise UsageError(
            "this model has no bits per dimension",
            "its tokenizer is learned, so its density is one of latents, which says nothing of pixels",
            "train a pixel model: scripts/train_tokenizer.py digits-pixels, then scripts/train_latent.py on that tokenizer",
        )


def _labels(model: LatentModel, labels: Tensor | None, images: Tensor) -> Tensor:
    """int64 (B,) on the model's device."""
    device, count = next(model.parameters()).device, len(images)
    if not model.classes:
        return torch.zeros(count, dtype=torch.int64, device=device)
    if labels is None or labels.shape != (count,):
        found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
        raise UsageError(
            f"{found} for {count} images", "the model is conditional: ln p(x | label)", "give one an image"
        )
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < model.classes:
        found = f"labels {int(labels.min())} to {int(labels.max())}"
        raise UsageError(found, f"the model has classes 0 to {model.classes - 1}", "use labels of its training data")
    return labels.clone().to(device)
