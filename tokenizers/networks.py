"""A convolutional encoder and decoder that do nearly all their work at the lowest resolution.

    encoder: space to depth by f, 3x3 convolution, residual blocks, norm, SiLU, 3x3 convolution
    decoder: 3x3 convolution, residual blocks, log2 f doublings with half the width each, norm, SiLU, 3x3 convolution
    residual block: x + conv(silu(norm(conv(silu(norm(x))))))
    both: plus a linear map from space to depth (or back) around everything

The linear shortcut (after DC-AE, Chen et al. 2024, arXiv 2410.10733, section 3.1) is all there is at initialisation, since the
last convolutions start at zero: latents begin as local linear functions of the pixels and keep their smooth geometry, which a
latent model needs more than the decoder does.

A block costs f^2 times less there than at full resolution; the wide doublings of the decoder end light, never below
8 channels. "pixel_shuffle" learns its up-sampling (Shi et al. 2016, arXiv 1609.05158); "nearest" and "bilinear" resize
before the convolution, without the checkerboard (Odena et al. 2016).
"""

import math
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Upsample = Literal["pixel_shuffle", "nearest", "bilinear"]

_LIGHTEST = 8


class ResidualBlock(nn.Module):
    """(B, width, h, w) -> the same; the identity at initialisation.

    With `gradient_checkpointing` the backward pass computes the branch again instead of keeping its activations.
    """

    gradient_checkpointing: bool = False

    def __init__(self, width: int) -> None:
        super().__init__()
        last = conv(width, width)
        self.branch = nn.Sequential(*activation(width), conv(width, width), *activation(width), last)
        nn.init.zeros_(last.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Nothing in the branch draws random numbers, so no generator has to be put back.
            again = checkpoint(self.branch, x, use_reentrant=False, preserve_rng_state=False)
            return x + cast(Tensor, again)
        return x + self.branch(x)


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> z (B, out_channels, H / downsample, W / downsample)."""

    def __init__(self, in_channels: int, width: int, downsample: int, blocks: int, out_channels: int) -> None:
        super().__init__()
        check_downsample(downsample)
        depth = in_channels * downsample**2
        last = conv(width, out_channels)
        nn.init.zeros_(last.weight)
        self.unshuffle = nn.PixelUnshuffle(downsample)
        self.shortcut = linear(depth, out_channels)
        self.layers = nn.Sequential(
            conv(depth, width), *(ResidualBlock(width) for _ in range(blocks)), *activation(width), last
        )

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.unshuffle(images)
        return self.shortcut(pixels) + self.layers(pixels)


class Decoder(nn.Module):
    """Codes (B, in_channels, h, w) -> images (B, out_channels, h upscale, w upscale), unbounded, meant for [-1, 1]."""

    def __init__(
        self, in_channels: int, width: int, upscale: int, blocks: int, out_channels: int, upsample: Upsample
    ) -> None:
        super().__init__()
        check_downsample(upscale)
        if upsample not in get_args(Upsample):
            raise ValueError(f"upsample is {upsample!r}; choose one of: {', '.join(get_args(Upsample))}")
        widths = [width, *(max(width >> i, _LIGHTEST) for i in range(1, upscale.bit_length()))]
        last = conv(widths[-1], out_channels)
        nn.init.zeros_(last.weight)
        self.shortcut = nn.Sequential(linear(in_channels, out_channels * upscale**2), nn.PixelShuffle(upscale))
        self.layers = nn.Sequential(
            conv(in_channels, width),
            *(ResidualBlock(width) for _ in range(blocks)),
            *(doubling(wide, narrow, upsample) for wide, narrow in pairwise(widths)),
            *activation(widths[-1]),
            last,
        )

    def forward(self, codes: Tensor) -> Tensor:
        return self.shortcut(codes) + self.layers(codes)


def conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution; its bias starts at zero."""
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def linear(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 1x1 convolution that starts orthogonal, with zero bias."""
    layer = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.orthogonal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def activation(width: int) -> tuple[nn.Module, nn.Module]:
    """GroupNorm with up to 8 groups, as many as divide `width`; then SiLU."""
    return nn.GroupNorm(math.gcd(8, width), width), nn.SiLU()


def doubling(in_channels: int, out_channels: int, upsample: Upsample) -> nn.Module:
    """(B, in, h, w) -> (B, out, 2h, 2w)."""
    if upsample == "pixel_shuffle":
        expand = conv(in_channels, 4 * out_channels)
        with torch.no_grad():  # the four sub-pixels start equal, which is nearest-neighbour: no checkerboard
            expand.weight.copy_(expand.weight[::4].repeat_interleave(4, 0))
        return nn.Sequential(*activation(in_channels), expand, nn.PixelShuffle(2))
    resize = nn.Upsample(scale_factor=2, mode=upsample)
    return nn.Sequential(*activation(in_channels), resize, conv(in_channels, out_channels))


def check_downsample(factor: int) -> None:
    """ValueError unless `factor` is 1, 2, 4, ..."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"downsample is {factor}; give a power of two: 1, 2, 4, 8, ...")
