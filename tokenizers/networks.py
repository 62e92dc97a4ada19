"""A convolutional encoder and decoder that do nearly all their work at the lowest resolution.

    encoder: space to depth by f, 3x3 convolution, residual blocks, norm, SiLU, 3x3 convolution
    decoder: 3x3 convolution, residual blocks, log2 f doublings with half the width each, norm, SiLU, 3x3 convolution
    residual block: x + conv(silu(norm(conv(silu(norm(x))))))
    both: plus a linear map from space to depth (or back) around everything

At initialisation only the linear shortcut (after DC-AE, Chen et al. 2024, arXiv 2410.10733, section 3.1) is nonzero, since the
last convolutions start at zero: latents begin as local linear functions of the pixels, whose smooth geometry helps latent models.

A block costs f^2 times less there than at full resolution; the decoder's doublings halve the width, to at least 8 channels.
Two options trade time for quality:

    multipliers (m_1, ..., m_k)   residual blocks at k resolutions too, of width m_i times the width, the finest first, with a
                                  halving (a doubling) between them; space to depth only by f / 2^(k - 1). (1,) is the above
    attention                     self-attention among the residual blocks at the lowest resolution (attention.py)

Ways of up-sampling. All of them start without a checkerboard: a constant map stays constant, away from the border.

    "pixel_shuffle"         convolution, then depth to space (Shi et al. 2016, arXiv 1609.05158); starts as nearest neighbour
    "transposed"            4x4 transposed convolution of stride 2, the adjoint of a halving; starts as nearest neighbour
    "nearest", "bilinear"   resize, then a convolution: free of it even when trained (Odena et al. 2016)
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from midway.tokenizers.attention import AttentionBlock
from midway.tokenizers.recomputed import Recomputed
from midway.tokenizers.shuffle import PixelShuffle, pixel_unshuffle

Upsample = Literal["pixel_shuffle", "nearest", "bilinear", "transposed"]

_LIGHTEST = 8
Layer = TypeVar("Layer", nn.Conv2d, nn.ConvTranspose2d)


class ResidualBlock(Recomputed):
    """(B, width, h, w) -> the same; the identity at initialisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        last = conv(width, width)
        self.branch = nn.Sequential(*activation(width), conv(width, width), *activation(width), last)
        nn.init.zeros_(last.weight)

    def compute(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Encoder(nn.Module):
    """Images (B, in_channels, H, W) -> z (B, out_channels, H / downsample, W / downsample)."""

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        downsample: int,
        blocks: int,
        out_channels: int,
        attention: bool = False,
        multipliers: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        *finer, lowest = widths_of(width, multipliers, downsample)
        self.folded = downsample >> len(finer)  # pixels a side that become channels before the first convolution
        last = conv(lowest, out_channels)
        nn.init.zeros_(last.weight)
        self.downsample = downsample
        self.shortcut = linear(in_channels * downsample**2, out_channels)
        layers: list[nn.Module] = [conv(in_channels * self.folded**2, (*finer, lowest)[0])]
        for narrow, wide in pairwise([*finer, lowest]):
            layers += [*residual_blocks(narrow, blocks), halving(narrow, wide)]
        layers += residual_blocks(lowest, blocks, attention)
        self.layers = nn.Sequential(*layers, *activation(lowest), last)

    def forward(self, images: Tensor) -> Tensor:
        pixels = pixel_unshuffle(images, self.downsample)
        folded = pixels if self.folded == self.downsample else pixel_unshuffle(images, self.folded)
        return self.shortcut(pixels) + self.layers(folded)


class Decoder(nn.Module):
    """Codes (B, in_channels, h, w) -> images (B, out_channels, h upscale, w upscale), unbounded, meant for [-1, 1]."""

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    def __init__(
        self,
        in_channels: int,
        width: int,
        upscale: int,
        blocks: int,
        out_channels: int,
        upsample: Upsample,
        attention: bool = False,
        multipliers: Sequence[int] = (1,),
    ) -> None:
        super().__init__()
        if upsample not in get_args(Upsample):
            raise ValueError(f"upsample is {upsample!r}; choose one of: {', '.join(get_args(Upsample))}")
        lowest, *finer = widths_of(width, multipliers, upscale)[::-1]
        finest = (lowest, *finer)[-1]
        light = [finest, *(max(finest >> i, _LIGHTEST) for i in range(1, upscale.bit_length() - len(finer)))]
        last = conv(light[-1], out_channels)
        nn.init.zeros_(last.weight)
        self.shortcut = nn.Sequential(linear(in_channels, out_channels * upscale**2), PixelShuffle(upscale))
        layers: list[nn.Module] = [conv(in_channels, lowest), *residual_blocks(lowest, blocks, attention)]
        for wide, narrow in pairwise([lowest, *finer]):
            layers += [doubling(wide, narrow, upsample), *residual_blocks(narrow, blocks)]
        layers += [doubling(wide, narrow, upsample) for wide, narrow in pairwise(light)]
        self.layers = nn.Sequential(*layers, *activation(light[-1]), last)

    def forward(self, codes: Tensor) -> Tensor:
        return self.shortcut(codes) + self.layers(codes)


def widths_of(width: int, multipliers: Sequence[int], factor: int) -> list[int]:
    """Channels of each stage, the finest first. ValueError unless `factor` is a power of two of that many stages."""
    check_downsample(factor)
    if not 1 <= len(multipliers) <= factor.bit_length() or min(multipliers) < 1 or width < 1:
        raise ValueError(
            f"width {width}, multipliers {list(multipliers)} with downsample {factor}; give 1 to "
            f"{factor.bit_length()} of them, one a resolution, each at least 1, and a width of at least 1"
        )
    return [width * multiplier for multiplier in multipliers]


def residual_blocks(width: int, blocks: int, attention: bool = False) -> list[nn.Module]:
    """`blocks` residual blocks, with self-attention after half of them if `attention`."""
    first, rest = ([ResidualBlock(width) for _ in range(count)] for count in (blocks - blocks // 2, blocks // 2))
    return [*first, *([AttentionBlock(width)] if attention else []), *rest]


def conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the resolution; its bias starts at zero."""
    return _zero_bias(nn.Conv2d(in_channels, out_channels, 3, padding=1))


def linear(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 1x1 convolution that starts orthogonal, with zero bias."""
    layer = nn.Conv2d(in_channels, out_channels, 1)
    nn.init.orthogonal_(layer.weight)
    return _zero_bias(layer)


def activation(width: int) -> tuple[nn.Module, nn.Module]:
    """GroupNorm with up to 8 groups, as many as divide `width`; then SiLU."""
    return nn.GroupNorm(math.gcd(8, width), width), nn.SiLU()


def halving(in_channels: int, out_channels: int) -> nn.Module:
    """(B, in, h, w) -> (B, out, h / 2, w / 2). Its 4x4 kernels lie about the middle of an output and use all inputs alike."""
    reduce = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1)
    return nn.Sequential(*activation(in_channels), _zero_bias(reduce))


def doubling(in_channels: int, out_channels: int, upsample: Upsample) -> nn.Module:
    """(B, in, h, w) -> (B, out, 2h, 2w)."""
    if upsample == "pixel_shuffle":
        expand = conv(in_channels, 4 * out_channels)
        with torch.no_grad():  # the four sub-pixels start equal, which is nearest-neighbour: no checkerboard
            expand.weight.copy_(expand.weight[::4].repeat_interleave(4, 0))
        return nn.Sequential(*activation(in_channels), expand, PixelShuffle(2))
    if upsample == "transposed":
        return nn.Sequential(*activation(in_channels), transposed(in_channels, out_channels))
    resize = nn.Upsample(scale_factor=2, mode=upsample)
    return nn.Sequential(*activation(in_channels), resize, conv(in_channels, out_channels))


def transposed(in_channels: int, out_channels: int) -> nn.ConvTranspose2d:
    """A 4x4 transposed convolution, (h, w) -> (2h, 2w), that starts as a linear map and nearest-neighbour doubling."""
    layer = _zero_bias(nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1))
    nn.init.uniform_(layer.weight, -(in_channels**-0.5), in_channels**-0.5)  # as a 1x1 convolution of torch begins
    with torch.no_grad():  # of the 4 taps a side the middle two reach an input's own pixels, the others its neighbours'
        middle = layer.weight[:, :, :1, :1].clone()
        layer.weight.zero_()[:, :, 1:3, 1:3] = middle
    return layer


def check_downsample(factor: int) -> None:
    """ValueError unless `factor` is 1, 2, 4, ..."""
    if factor < 1 or factor & (factor - 1):
        raise ValueError(f"downsample is {factor}; give a power of two: 1, 2, 4, 8, ...")


def _zero_bias(layer: Layer) -> Layer:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
