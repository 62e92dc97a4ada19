"""What transformers over places in the plane share: positions, rotations, dropout, norms and gated layers.

    LayerNorm  (x - mean) / std        RMSNorm  x / rms        DyT  tanh(alpha x)        each times gamma, plus beta
    SwiGLU     down(silu(a) * b),      (a, b) = up(x)

RMSNorm: Zhang & Sennrich 2019, arXiv 1910.07467 (without beta). DyT: Zhu et al. 2025, arXiv 2503.10622, eq. 1. SwiGLU: Shazeer
2020, arXiv 2002.05202.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.networks.elementwise import times
from midway.gen.training.batches import Context
from midway.tokenizers.precision import widened

Norm = Literal["layer", "rms", "dyt"]
Pairs = Literal["halves", "neighbours"]
PERIOD = 100.0
"""Of the slowest rotation, in positions over 2 pi: a grid has tens of positions a side."""


def sinusoid(values: Tensor, dim: int, max_period: float = 10000.0, intervals: int | None = None) -> Tensor:
    """(N,) -> (N, dim): cosines and sines at frequencies max_period^(-i / intervals), i < dim / 2, in float32 or float64.

    `intervals` is dim / 2 by default.
    """
    half, values = dim // 2, widened(values)
    steps = torch.arange(half, device=values.device, dtype=values.dtype)
    angles = values[:, None] * torch.exp(-math.log(max_period) * steps / (intervals or half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions_2d(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim): half of the channels encode the row, half the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sinusoid(rows.flatten(), dim // 2), sinusoid(columns.flatten(), dim // 2)], dim=1)


def drop(x: Tensor, share: float, context: Context | None, purpose: str) -> Tensor:
    """x (B, *) with a `share` of its numbers set to 0 and the others divided by 1 - share; without a context, x itself."""
    if context is None or share == 0:
        return x
    return torch.where(context.keep(purpose, x.shape[1:], 1 - share), x / (1 - share), 0)


def places_2d(height: int, width: int) -> Tensor:
    """(height * width, 2): row and column of every place of a grid, row by row."""
    return torch.cartesian_prod(torch.arange(height), torch.arange(width))


def rotation(places: Tensor, channels: int) -> Tensor:
    """Cosines and sines (2, *, channels / 2) of places (*, 2): rows, then columns, each at channels / 4 geometric frequencies.

    In float32 or float64, whatever is rotated.
    """
    places, quarter = widened(places), channels // 4
    steps = torch.arange(quarter, device=places.device, dtype=places.dtype)
    angles = (places[..., None] * torch.exp(-math.log(PERIOD) * steps / quarter)).flatten(-2)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, turn: Tensor, pairs: Pairs = "halves") -> Tensor:
    """x (B, heads, N, C), as C / 2 pairs of channels, by a `rotation` (2, N, C / 2) or (2, B, N, C / 2)."""
    a, b = x.chunk(2, dim=-1) if pairs == "halves" else x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turn.unsqueeze(-3).to(x.dtype)
    both = [a * cos - b * sin, a * sin + b * cos]
    return torch.cat(both, dim=-1) if pairs == "halves" else torch.stack(both, dim=-1).flatten(-2)


def normed(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    """`norm` in float32 or float64, the result in x's dtype."""
    weight = None if norm.weight is None else widened(norm.weight)
    return F.rms_norm(widened(x), norm.normalized_shape, weight, norm.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """RMSNorm in float32 or float64, the result in x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self)


class DyT(nn.Module):
    """Dynamic tanh in place of a norm, in float32 or float64: alpha, one number, starts as 1/2."""

    def __init__(self, width: int, affine: bool) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.weight = nn.Parameter(torch.ones(width)) if affine else None
        self.bias = nn.Parameter(torch.zeros(width)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        squashed = torch.tanh(widened(self.alpha) * widened(x))
        if self.weight is not None and self.bias is not None:
            squashed = widened(self.weight) * squashed + widened(self.bias)
        return squashed.to(x.dtype)


def make_norm(kind: Norm, width: int, affine: bool, eps: float = 1e-6) -> nn.Module:
    """A norm of the last axis; `affine`: with gamma and, but for rms, beta of its own."""
    if kind == "dyt":
        return DyT(width, affine)
    norm = RMSNorm if kind == "rms" else nn.LayerNorm
    return norm(width, elementwise_affine=affine, eps=eps)


def swiglu_width(width: int, ratio: float = 4.0) -> int:
    """Hidden width with as many weights as a layer of `ratio` times the width: 2/3 of that, up to the next multiple of 8."""
    return math.ceil(width * ratio * 2 / 24) * 8


def swiglu(x: Tensor, up: nn.Linear, down: nn.Linear) -> Tensor:
    """x (*, W), up W -> 2 H and down H -> W."""
    gate, value = up(x).chunk(2, dim=-1)
    return down(times(F.silu(gate), value))


class SwiGLU(nn.Module):
    """Gated layers (*, width) -> (*, width) with `hidden` channels between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return swiglu(x, self.up, self.down)


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
