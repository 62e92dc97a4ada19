"""Transformers as encoder and decoder: one token a patch, or a short sequence of latent tokens.

    encoder: linear(patches) + positions, [learned latent tokens in front], blocks, norm, linear; of the latent tokens alone
    decoder: linear(codes) + positions, [a mask token + position for every patch behind], blocks, norm, linear to pixels

With `tokens` = L (TiTok, Yu et al. 2024, arXiv 2406.07550, equations 3 and 4) an image is L codes without positions:
z (B, D, L), which attention reads from the patches and decodes into mask tokens. With `tokens` = None every patch has its
own code (ViT-VQGAN, Yu et al. 2021, arXiv 2110.04627): z (B, D, h, w), as from a convolutional encoder.

Positions of patches are fixed 2-D sinusoids, those of latent tokens are learned; in the encoder they are the latent tokens
themselves. Blocks: attention.py. The encoder's last layer starts orthogonal, so that latents have about unit variance, as
quantizers expect; the decoder's starts near zero, a grey image.

Attention is global and the image size fixed, so these networks cannot be tiled (tiling.py).
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from midway.tokenizers.attention import TransformerBlock, check_heads, linear
from midway.tokenizers.shuffle import pixel_shuffle, pixel_unshuffle

_SPREAD = 0.5**0.5  # root mean square of a sinusoid


@dataclass(frozen=True)
class ViTConfig:
    """Of encoder and decoder: `patch` pixels a side make one patch; `width` is a multiple of 4 and of `heads`.

    tokens: the number L of latent tokens, None for one code a patch. ValueError for sizes that do not fit.
    """

    image_size: int
    patch: int
    width: int
    depth: int
    heads: int
    tokens: int | None = None

    def __post_init__(self) -> None:
        if self.patch < 1 or self.image_size < 1 or self.image_size % self.patch:
            raise ValueError(
                f"image_size {self.image_size} cannot be cut into patches of {self.patch}: choose a divisor"
            )
        check_heads(self.width, self.heads)
        if self.width % 4:
            raise ValueError(f"width is {self.width}; give a multiple of 4, since 2-D positions have four parts")
        if self.depth < 1 or (self.tokens is not None and self.tokens < 1):
            raise ValueError(
                f"depth {self.depth}, tokens {self.tokens}: give at least 1 of each, or tokens=None for one a patch"
            )


class _Transformer(nn.Module):
    """The layers of encoder and decoder: linear, blocks, norm, linear; latent tokens, if any, and a mask token if `masked`."""

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    positions: Tensor

    def __init__(self, in_features: int, config: ViTConfig, out_features: int, masked: bool) -> None:
        super().__init__()
        width, side = config.width, config.image_size // config.patch
        self.patch, self.tokens, self.grid = config.patch, config.tokens, (side, side)
        self.embed = linear(in_features, width)
        self.register_buffer("positions", positions_2d(side, width), persistent=False)
        self.latents = None if config.tokens is None else _learned(config.tokens, width)
        self.mask = None if config.tokens is None or not masked else _learned(1, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(width)
        self.head = linear(width, out_features)


class ViTEncoder(_Transformer):
    """Images (B, in_channels, image_size, image_size) -> z (B, out_dim, L), or (B, out_dim, h, w) without latent tokens.

    h = w = image_size / patch.
    """

    def __init__(self, in_channels: int, config: ViTConfig, out_dim: int) -> None:
        super().__init__(in_channels * config.patch**2, config, out_dim, masked=False)
        self.image_shape = (in_channels, config.image_size, config.image_size)
        nn.init.orthogonal_(self.head.weight)

    def forward(self, images: Tensor) -> Tensor:
        _check_shape(images, self.image_shape, "images")
        positions = self.positions.to(self.embed.weight.dtype)  # from_pretrained(torch_dtype=) converts parameters only
        x = self.embed(patchify(images, self.patch)) + positions
        if self.latents is not None:
            x = torch.cat([self.latents.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        z = self.head(self.norm(x[:, : self.tokens])).transpose(1, 2)
        return z.unflatten(2, self.grid) if self.tokens is None else z


class ViTDecoder(_Transformer):
    """Codes (B, in_dim, L), or (B, in_dim, h, w) without latent tokens -> images (B, out_channels, image_size, image_size).

    Images are unbounded, meant for [-1, 1].
    """

    def __init__(self, in_dim: int, config: ViTConfig, out_channels: int) -> None:
        super().__init__(in_dim, config, out_channels * config.patch**2, masked=True)
        self.code_shape = (in_dim, *self.grid) if config.tokens is None else (in_dim, config.tokens)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, codes: Tensor) -> Tensor:
        _check_shape(codes, self.code_shape, "codes")
        positions = self.positions.to(self.embed.weight.dtype)
        x = self.embed(codes.flatten(2).transpose(1, 2)) + (positions if self.latents is None else self.latents)
        if self.mask is not None:
            x = torch.cat([x, (self.mask + positions).expand(len(x), -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        return unpatchify(self.head(self.norm(x[:, -len(positions) :])), self.grid, self.patch)


def patchify(images: Tensor, patch: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C p p): the patches of p pixels a side, row by row."""
    return pixel_unshuffle(images, patch).flatten(2).transpose(1, 2)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch: int) -> Tensor:
    """The inverse of `patchify`, for a `grid` of (H / p, W / p) patches."""
    return pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), patch)


def positions_2d(side: int, width: int) -> Tensor:
    """(side * side, width): half of the channels are sinusoids of the row, half of the column (`width` a multiple of 4).

    Frequencies from 1 down to 1 / 10000, geometric (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).
    """
    quarter = width // 4
    frequencies = torch.exp(-math.log(10000) * torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.cos(), angles.sin()], dim=1).float()
    return torch.cat([line.repeat_interleave(side, 0), line.repeat(side, 1)], dim=1)


def _learned(count: int, width: int) -> nn.Parameter:
    return nn.Parameter(_SPREAD * torch.randn(count, width))


def _check_shape(x: Tensor, shape: tuple[int, ...], name: str) -> None:
    if x.shape[1:] != shape:
        raise ValueError(f"{name} have shape {tuple(x.shape)}; this network takes (B, {', '.join(map(str, shape))})")
