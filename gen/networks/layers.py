"""What transformers over places in the plane share: positions, rotations, modulation, dropout and norms."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.training.batches import Context
from midway.tokenizers.precision import widened

PERIOD = 100.0
"""Of the slowest rotation, in positions over 2 pi: a grid has tens of positions a side."""


def sinusoid(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """(N,) -> (N, dim): cosines and sines at `dim / 2` geometric frequencies, in float32 or float64."""
    half, values = dim // 2, widened(values)
    steps = torch.arange(half, device=values.device, dtype=values.dtype)
    angles = values[:, None] * torch.exp(-math.log(max_period) * steps / half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions_2d(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim): half of the channels encode the row, half the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sinusoid(rows.flatten(), dim // 2), sinusoid(columns.flatten(), dim // 2)], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, W) under shift, scale (B, W)."""
    return x * (1 + scale[:, None]) + shift[:, None]


def drop(x: Tensor, share: float, context: Context | None, purpose: str) -> Tensor:
    """x (B, *) with a `share` of its numbers set to 0 and the others divided by 1 - share; without a context, x itself."""
    if context is None or share == 0:
        return x
    return torch.where(context.keep(purpose, x.shape[1:], 1 - share), x / (1 - share), 0)


def rotation(places: Tensor, channels: int) -> Tensor:
    """Cosines and sines (2, *, channels / 2) of places (*, 2): rows, then columns, each at channels / 4 geometric frequencies.

    In float32 or float64, whatever is rotated.
    """
    places, quarter = widened(places), channels // 4
    steps = torch.arange(quarter, device=places.device, dtype=places.dtype)
    angles = (places[..., None] * torch.exp(-math.log(PERIOD) * steps / quarter)).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, turn: Tensor) -> Tensor:
    """x (B, heads, N, C), as C / 2 pairs (i, i + C / 2), by a `rotation` (2, N, C / 2) or (2, B, N, C / 2)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = turn.unsqueeze(-3).to(x.dtype)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`norm` in float32 or float64, the result in x's dtype."""
    return F.rms_norm(widened(x), norm.normalized_shape, widened(norm.weight), norm.eps).to(x.dtype)


def number_embedding(width: int) -> nn.Sequential:
    """Of the 256 sinusoids of a number."""
    return nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))


def start_at_zero(embedding: nn.Sequential) -> None:
    """Output 0, whatever its input: a network that gets one more input predicts what it did before."""
    first, _, last = embedding
    nn.init.normal_(first.weight, std=0.02)  # pyright: ignore[reportArgumentType]
    nn.init.zeros_(first.bias)  # pyright: ignore[reportArgumentType]
    nn.init.zeros_(last.weight)  # pyright: ignore[reportArgumentType]
    nn.init.zeros_(last.bias)  # pyright: ignore[reportArgumentType]
