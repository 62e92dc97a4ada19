"""What blocks do to each number between their matrix products, in the input's memory where no gradient is needed.

The first arguments are results that nothing else reads, of a norm or of a linear layer. Fresh memory takes longer than such
arithmetic; the results are the same bit for bit.
"""

import torch
from torch import Tensor, nn


def times(x: Tensor, factor: Tensor) -> Tensor:
    """x * factor, which broadcasts to x."""
    return x.mul_(factor) if _overwrites(x, factor) else x * factor


def plus(x: Tensor, other: Tensor) -> Tensor:
    """x + other, which broadcasts to x."""
    return x.add_(other) if _overwrites(x, other) else x + other


def _overwrites(x: Tensor, other: Tensor) -> bool:
    return not torch.is_grad_enabled() and torch.promote_types(x.dtype, other.dtype) == x.dtype


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, W) under shift, scale (B, W)."""
    return plus(times(x, 1 + scale[:, None]), shift[:, None])


def gated(branch: Tensor, gate: Tensor, x: Tensor) -> Tensor:
    """x + gate * branch for branch, x (B, N, W) and a gate (B, W)."""
    return plus(times(branch, gate[:, None]), x)


class GELU(nn.GELU):
    """GELU by tanh."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if torch.is_grad_enabled() else torch.ops.aten.gelu_(input, approximate="tanh")
