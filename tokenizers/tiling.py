"""Encoding and decoding in tiles, for images whose activations do not fit into memory.

Tiles of equal size are spread evenly over an axis; neighbours share at least `overlap` positions. Between neighbours, the
weights follow a linear ramp in the middle of the shared part. With tile i from start s_i to end e_i:

    R_i(x) = clamp((x - (s_i + e_{i-1}) / 2) / (overlap - 2 margin) + 1/2, 0, 1)        R_0 = 1,  R_n = 0
    w_i = R_i - R_{i+1},  sum_i w_i = 1                                                 out = sum_ij w_i(y) w_j(x) tile_ij

So w_i is 0 within `margin` of an inner edge of tile i, where the network's padding replaces the image. The result equals that of
the whole image if the network's receptive field reaches no further than `margin`. GroupNorm (networks.py) and self-attention
depend on the whole map: with them tiles are an approximation, better the larger they are. ViTs (vit.py) cannot be tiled.

All lengths are in code positions of f x f pixels, except those of `tile_networks`, which are in pixels.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor

from midway.tokenizers.tokenizer import ImageTokenizer

Network = Callable[[Tensor], Tensor]


def tile_networks(tokenizer: ImageTokenizer, tile: int, margin: int) -> None:
    """From now on `tokenizer` encodes and decodes in tiles of `tile` x `tile` pixels that overlap by 4 `margin` pixels.

    ValueError unless its network is convolutional and both are multiples of its downsampling factor, with 4 margin < tile.
    """
    f = tokenizer.downsample
    if tokenizer.config["network"] == "vit":
        raise ValueError("a ViT depends on absolute positions and cannot be tiled")
    if tile % f or margin % f:
        raise ValueError(f"tile {tile}, margin {margin}: both must be multiples of the downsampling factor {f}")
    check_tiles(tile // f, 4 * margin // f, margin // f)
    for network, pixels in ((tokenizer.encoder, f), (tokenizer.decoder, 1)):
        lengths = {"pixels": pixels, "tile": tile // f, "overlap": 4 * margin // f, "margin": margin // f}
        network.forward = partial(apply_tiled, network.forward, **lengths)  # parameters and their names stay the same
    tokenizer.tiles = tile, margin


@torch.no_grad()
def apply_tiled(network: Network, x: Tensor, pixels: int, tile: int, overlap: int, margin: int) -> Tensor:
    """`network` over x (B, C, h pixels, w pixels), one tile of at most `tile` x `tile` positions at a time; no gradient.

    `network`: (B, C, th pixels, tw pixels) -> (B, D, th scale, tw scale); an encoder has `pixels` f and scale 1, a decoder 1
    and f. Returns (B, D, h scale, w scale), float32 or wider.
    """
    check_tiles(tile, overlap, margin)
    if pixels < 1 or x.ndim != 4 or x.shape[2] % pixels or x.shape[3] % pixels or 0 in x.shape[2:]:
        raise ValueError(f"shape {tuple(x.shape)} is not (B, C, H, W) with H and W multiples of {pixels}: pad or crop")
    height, width = x.shape[2] // pixels, x.shape[3] // pixels
    shape = min(tile, height), min(tile, width)
    tops, lefts = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    out, rows, columns, scale = x, x, x, 0  # set by the first tile
    for i, j in product(range(len(tops)), range(len(lefts))):
        corner = tops[i], lefts[j]
        part = network(_window(x, corner, shape, pixels))
        if not scale:
            scale = _scale(part, shape)
            dtype = torch.promote_types(part.dtype, torch.float32)
            out = part.new_zeros(*part.shape[:2], height * scale, width * scale, dtype=dtype)
            rows, columns = (tile_weights(side, tile, overlap, margin, scale).to(out) for side in (height, width))
        _window(out, corner, shape, scale).add_(rows[i][:, None] * columns[j] * part)
    return out


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Starts of the fewest, evenly spread tiles that cover `size` and overlap by at least `overlap`; [0] if one is enough."""
    if size <= tile:
        return [0]
    gaps = -(-(size - tile) // (tile - overlap))
    return [i * (size - tile) // gaps for i in range(gaps + 1)]


def tile_weights(size: int, tile: int, overlap: int, margin: int, scale: int) -> Tensor:
    """w_i at every pixel of every tile along an axis of `size` positions of `scale` pixels: (tiles, tile scale) float64."""
    starts, length = tile_starts(size, tile, overlap), min(tile, size)
    middles = [(start + before + length) / 2 for before, start in pairwise(starts)]
    pixels = (torch.arange(size * scale, dtype=torch.float64) + 0.5) / scale
    steepness = 1 / max(overlap - 2 * margin, 1e-9)
    ramps = [((pixels - middle) * steepness + 0.5).clamp(0, 1) for middle in middles]
    weights = [up - down for up, down in pairwise([torch.ones_like(pixels), *ramps, torch.zeros_like(pixels)])]
    cut = [w[s * scale : (s + length) * scale] for w, s in zip(weights, starts, strict=True)]
    return torch.stack(cut)


def _window(x: Tensor, corner: tuple[int, int], shape: tuple[int, int], scale: int) -> Tensor:
    """A tile of x (B, C, H, W), a view: corner and shape in positions of `scale` pixels."""
    rows, columns = (slice(a * scale, (a + n) * scale) for a, n in zip(corner, shape, strict=True))
    return x[:, :, rows, columns]


def _scale(part: Tensor, shape: tuple[int, int]) -> int:
    """Output pixels per position, from the output (B, D, th scale, tw scale) for one tile."""
    scale = part.shape[-1] // shape[1]
    if part.ndim != 4 or scale < 1 or tuple(part.shape[2:]) != (shape[0] * scale, shape[1] * scale):
        raise ValueError(
            f"a tile of {shape[0]}x{shape[1]} codes became {tuple(part.shape[1:])}; only networks whose output grid is "
            "proportional to the input grid, convolutional ones, can be tiled"
        )
    return scale


def check_tiles(tile: int, overlap: int, margin: int) -> None:
    """ValueError unless 0 <= 2 margin <= overlap < tile."""
    if not 0 <= overlap < tile:
        raise ValueError(f"tile {tile}, overlap {overlap}: tiles must be larger than their overlap")
    if not 0 <= margin <= overlap / 2:
        raise ValueError(f"margin {margin}, overlap {overlap}: two margins must fit into an overlap")
