"""What blocks do to each number between their matrix products, in the input's memory where no gradient is needed.

Inputs are results that nothing else reads: of a norm, or of a linear layer. Fresh memory costs more here than the arithmetic, so
sampling takes none; the results are the same bit for bit.
"""

import torch
from torch import Tensor, nn


def overwrites(x: Tensor, other: Tensor) -> bool:
    """Whether a result of x and another tensor may take x's memory: without gradients, and in x's dtype."""
    return not torch.is_grad_enabled() and torch.promote_types(x.dtype, other.dtype) == x.dtype


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, W) under shift, scale (B, W)."""
    if overwrites(x, scale):
        return x.mul_(1 + scale[:, None]).add_(shift[:, None])
    return x * (1 + scale[:, None]) + shift[:, None]


def gated(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch for x, branch (B, N, W) and a gate (B, W); x is kept."""
    if not overwrites(branch, gate):
        return x + gate[:, None] * branch
    branch.mul_(gate[:, None])
    return branch.add_(x) if overwrites(branch, x) else x + branch


class GELU(nn.GELU):
    """GELU by tanh."""

    def __init__(self) -> None:
        super().__init__(approximate="tanh")

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        return torch.ops.aten.gelu_(input, approximate=self.approximate)
