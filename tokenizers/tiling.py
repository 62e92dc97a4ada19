"""Encoding and decoding in tiles, for images larger than those a convolutional tokenizer was trained on, or than memory.

Tiles of equal size are spread evenly over an axis, each neighbour starting at least `overlap` before its predecessor ends. The
one after a seam takes over along a ramp in the middle of what both cover, from start s to end e:

    R_i(x) = clamp((x - (s_i + e_{i-1}) / 2) / (overlap - 2 margin) + 1/2, 0, 1)        R_0 = 1,  R_n = 0
    w_i = R_i - R_{i+1},  sum_i w_i = 1                                                 out = sum_ij w_i(y) w_j(x) tile_ij

So w_i is 0 within `margin` of an edge of tile i where the image goes on: there the network has seen its padding instead of the
image. If what it computes at a position depends on no position further away than `margin`, the result is that of the whole image.

A norm over the whole map, as GroupNorm in networks.py, or self-attention, depends on all of it: then tiles are only near the
whole, the larger the nearer, and the ramp hides the seams. Networks that know their positions (vit.py) cannot be tiled.

All lengths are in code positions, of which one stands for f x f pixels.
"""

from collections.abc import Callable
from itertools import pairwise, product

import torch
from torch import Tensor

Network = Callable[[Tensor], Tensor]


@torch.no_grad()
def decode_tiled(
    decode: Network, codes: Tensor, tile: int, overlap: int, margin: int | None = None, batch: int = 1
) -> Tensor:
    """Codes (B, D, h, w), of any h and w, -> images (B, C, h f, w f) in tiles of at most `tile` x `tile`; no gradient.

    `decode`: (N, D, th, tw) -> (N, C, th f, tw f), for example `ImageTokenizer.decode`, with `tile` its own h. `margin`, a
    quarter of the overlap by default, is 0 to overlap / 2: with 0 all of it is blended, with half of it tiles are cut. `batch`
    tiles are decoded together, N = B batch: memory is theirs and that of the image, float32 or wider.
    """
    return _in_tiles(decode, codes, 1, tile, overlap, overlap // 4 if margin is None else margin, batch)


@torch.no_grad()
def encode_tiled(
    encode: Network,
    images: Tensor,
    tile: int,
    overlap: int,
    downsample: int,
    margin: int | None = None,
    batch: int = 1,
) -> Tensor:
    """Images (B, C, h f, w f) -> z (B, D, h, w) in tiles; `downsample` is f. Lengths, still in codes, as in `decode_tiled`.

    ValueError unless f divides both sides.
    """
    return _in_tiles(encode, images, downsample, tile, overlap, overlap // 4 if margin is None else margin, batch)


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where the fewest tiles start that cover `size` with at least `overlap` in common, spread evenly; [0] if one is enough."""
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


def _in_tiles(network: Network, x: Tensor, pixels: int, tile: int, overlap: int, margin: int, batch: int) -> Tensor:
    """`network` over x (B, C, h pixels, w pixels), `batch` tiles at a time."""
    _check(x, pixels, tile, overlap, margin, batch)
    height, width = x.shape[2] // pixels, x.shape[3] // pixels
    shape = min(tile, height), min(tile, width)
    tops, lefts = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    places = list(product(range(len(tops)), range(len(lefts))))
    out, rows, columns, scale = x, x, x, 0  # all four are known as soon as one tile has been made
    for first in range(0, len(places), batch):
        some = places[first : first + batch]
        crops = torch.cat([_window(x, (tops[i], lefts[j]), shape, pixels) for i, j in some])
        made = network(crops).unflatten(0, (len(some), len(x)))
        if first == 0:
            scale = _scale(made, shape)
            dtype = torch.promote_types(made.dtype, torch.float32)
            out = made.new_zeros(*made.shape[1:3], height * scale, width * scale, dtype=dtype)
            rows, columns = (tile_weights(side, tile, overlap, margin, scale).to(out) for side in (height, width))
        for (i, j), part in zip(some, made, strict=True):
            _window(out, (tops[i], lefts[j]), shape, scale).add_(rows[i][:, None] * columns[j] * part)
    return out


def _window(x: Tensor, corner: tuple[int, int], shape: tuple[int, int], scale: int) -> Tensor:
    """A tile of x (B, C, H, W), a view: corner and shape in positions of `scale` pixels."""
    rows, columns = (slice(a * scale, (a + n) * scale) for a, n in zip(corner, shape, strict=True))
    return x[:, :, rows, columns]


def _scale(made: Tensor, shape: tuple[int, int]) -> int:
    """Pixels a position of what the network made of a tile, (N, B, C, th scale, tw scale)."""
    scale = made.shape[-1] // shape[1]
    if made.ndim != 5 or scale < 1 or tuple(made.shape[3:]) != (shape[0] * scale, shape[1] * scale):
        raise ValueError(
            f"a tile of {shape[0]}x{shape[1]} codes became {tuple(made.shape[2:])}; only networks that keep a place for every "
            "code, convolutional ones, can be tiled (and `downsample` must be the encoder's)"
        )
    return scale


def _check(x: Tensor, pixels: int, tile: int, overlap: int, margin: int, batch: int) -> None:
    if not 0 <= overlap < tile:
        raise ValueError(f"tile {tile}, overlap {overlap}: tiles must be larger than what they share with the next")
    if not 0 <= margin <= overlap / 2:
        raise ValueError(f"margin {margin}, overlap {overlap}: two margins must fit into an overlap")
    if pixels < 1 or batch < 1:
        raise ValueError(f"downsample {pixels}, batch {batch}: both must be at least 1")
    if x.ndim != 4 or x.shape[2] % pixels or x.shape[3] % pixels or 0 in x.shape[2:]:
        raise ValueError(
            f"shape {tuple(x.shape)} with downsample {pixels}; give (B, C, H, W) with H and W multiples of it: pad or crop"
        )
