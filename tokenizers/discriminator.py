"""A discriminator of patches, PatchGAN (Isola et al. 2017, arXiv 1611.07004, app. 6.1.2), and spectral normalisation.

    4x4 convolution of stride 2 to `width` channels, LeakyReLU 0.2
    `layers` - 1 times: the same to twice the channels, up to 8 width, with a norm before the LeakyReLU
    once with stride 1; 4x4 convolution of stride 1 to one channel: the logits
    weights start from N(0, 0.02), biases at 0

Each logit judges one patch, 9 2^layers - 2 pixels a side: 16, 34, 70 for 1, 2, 3 layers.

The norm is GroupNorm, not the paper's BatchNorm: statistics of a batch would make a loss depend on accumulation, on the number of
processes and on whether real and fake images pass together. With `spectral_norm` there is none, as it would undo the bound.

Spectral normalisation (Miyato et al. 2018, arXiv 1802.05957, eq. 8 and algorithm 1), of a weight W as a matrix (out, in k k):

    W / sigma,  sigma = u^T W v         once per optimizer step:  v <- W^T u / |W^T u|,  u <- W v / |W v|

so that u and v approach the first singular vectors. `update` does that step. In torch's version every training forward does; the
result then depends on accumulation, on activation checkpointing and on the number of passes in a step.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.base import float32_island

_STD = 0.02
_FIRST_ITERATIONS = 20  # of the power method at construction


class PatchDiscriminator(nn.Module):
    """Images (B, in_channels, H, W) -> logits (B, 1, h, w), h = H // 2^layers - 2; high for real images.

    `layers` is the number of halvings, at least 1; fewer for small images, see `least_size`. Without `spectral_norm`
    `update` has nothing to do.
    """

    def __init__(self, in_channels: int, width: int = 64, layers: int = 3, spectral_norm: bool = False) -> None:
        super().__init__()
        if min(in_channels, width, layers) < 1:
            raise ValueError(f"in_channels {in_channels}, width {width}, layers {layers}: each must be at least 1")
        self.layers = layers
        convolution = SpectralConv2d if spectral_norm else PlainConv2d
        widths = [width * min(2**i, 8) for i in range(layers + 1)]
        parts: list[nn.Module] = [convolution(in_channels, width, stride=2), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            parts.append(convolution(widths[i - 1], widths[i], stride=2 if i < layers else 1))
            if not spectral_norm:
                parts.append(nn.GroupNorm(math.gcd(8, widths[i]), widths[i]))
            parts.append(nn.LeakyReLU(0.2))
        self.parts = nn.Sequential(*parts, convolution(widths[-1], 1, stride=1))

    @property
    def least_size(self) -> int:
        """Pixels a side below which no patch is left."""
        return 3 * 2**self.layers

    def check_size(self, *sides: int) -> None:
        """ValueError unless images with these `sides`, in pixels, have at least one patch."""
        if min(sides) < self.least_size:
            raise ValueError(
                f"images of {' x '.join(map(str, sides))} pixels leave no patch after {self.layers} halvings: give at least "
                f"{self.least_size} a side, or fewer layers of the discriminator"
            )

    def forward(self, images: Tensor) -> Tensor:
        self.check_size(*images.shape[2:])
        return self.parts(images)

    def update(self, step_ok: Tensor | None = None) -> None:
        """One power iteration of each normalised weight: call once per optimizer step, after it, on every process.

        Where `step_ok`, a bool () on the device, is False, nothing changes.
        """
        for part in self.parts:
            if isinstance(part, SpectralConv2d):
                part.update(step_ok)


class PlainConv2d(nn.Conv2d):
    """A 4x4 convolution with padding 1 and the start of this network."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, 4, stride, padding=1)
        nn.init.normal_(self.weight, std=_STD)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SpectralConv2d(PlainConv2d):
    """The same with weight / sigma. sigma has a gradient to the weight; u (out,) and v (in * 16,), float32, are constants."""

    u: Tensor
    v: Tensor

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, stride)
        matrix = self._matrix().detach()
        u, v = F.normalize(torch.randn(len(matrix)), dim=0), torch.zeros(matrix.shape[1])
        for _ in range(_FIRST_ITERATIONS):
            u, v = _power_iteration(matrix, u)
        self.register_buffer("u", u)
        self.register_buffer("v", v)

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.normalized(), self.bias)

    def normalized(self) -> Tensor:
        """weight / sigma, in the weight's dtype and shape."""
        with float32_island(self.weight):
            return self.weight / (self.u @ self._matrix() @ self.v)

    @torch.no_grad()
    def update(self, step_ok: Tensor | None = None) -> None:
        """See `PatchDiscriminator.update`."""
        with float32_island(self.weight):
            u, v = _power_iteration(self._matrix(), self.u)
        for buffer, value in ((self.u, u), (self.v, v)):
            buffer.copy_(value if step_ok is None else torch.where(step_ok, value, buffer))

    def _matrix(self) -> Tensor:
        return self.weight.flatten(1)


def _power_iteration(matrix: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """u, v nearer to the first singular vectors of `matrix` (out, n)."""
    v = F.normalize(u @ matrix, dim=0)
    return F.normalize(matrix @ v, dim=0), v
