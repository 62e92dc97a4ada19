"""Space to depth and back (Shi et al. 2016, arXiv 1609.05158), of batches without samples too.

torch's kernels on the CPU return those with the shape of the input, forward or in the gradient.
"""

from torch import Tensor, nn
from torch.nn import functional as F


def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """(B, C, h factor, w factor) -> (B, C factor^2, h, w)."""
    if x.numel():
        return F.pixel_unshuffle(x, factor)
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels * factor**2, height // factor, width // factor)


def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """(B, C factor^2, h, w) -> (B, C, h factor, w factor)."""
    if x.numel():
        return F.pixel_shuffle(x, factor)
    batch, channels, height, width = x.shape
    return x.reshape(batch, channels // factor**2, height * factor, width * factor)


class PixelShuffle(nn.Module):
    """`pixel_shuffle` as a layer."""

    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(x, self.factor)

    def extra_repr(self) -> str:
        return str(self.factor)
