"""How the codes of an image are a sequence of tokens, and a token a few digits.

    indices as the tokenizer has them (B, *S) or (B, *S, G)   <->   tokens (B, L, D), digit d in {0, ..., sizes_d - 1}

A token is one position: a grid is read row by row, two levels the top first. Its digits are the codes of the position (stages,
groups), and of FSQ with more codes than one softmax should have the digits of each code, in mixed radix with the least
significant first (tokenizers/fsq.py).
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.tokenizers.base import Quantizer
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.grouped import Grouped
from midway.tokenizers.residual import Residual
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.two_level import TwoLevel

ONE_SOFTMAX = 2**14
"""Most codes of one softmax."""


@dataclass(frozen=True)
class CodeLayout:
    """The sequence of an image.

    grids: (rows, columns) of each level, in the order of the sequence. radices: of each code of a position, the sizes of its
    digits.
    """

    grids: tuple[tuple[int, int], ...]
    radices: tuple[tuple[int, ...], ...]
    flat: bool = False
    """Whether indices have one axis for the sequence, as those of two levels have, and not one for rows and one for columns."""

    def __post_init__(self) -> None:
        numbers = [*(n for grid in self.grids for n in grid), *(n for radix in self.radices for n in radix)]
        if not self.grids or not self.radices or not all(self.radices) or min(numbers) < 1:
            raise ValueError(f"a sequence has grids {self.grids} and digits {self.radices}: give sizes of at least 1")
        if len(self.grids) > 1 and not self.flat:
            raise ValueError("codes of several levels are a sequence")

    @property
    def length(self) -> int:
        """L, tokens of an image."""
        return sum(rows * columns for rows, columns in self.grids)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the D digits of a token."""
        return tuple(size for radix in self.radices for size in radix)

    @property
    def width(self) -> int:
        """D, numbers of a token."""
        return len(self.sizes)

    @property
    def about(self) -> str:
        """In words."""
        return f"codes {self.length} x {self.sizes}"

    @property
    def bits(self) -> float:
        """L log2 of the codes of a position: what an image takes without a prior."""
        return self.length * sum(map(math.log2, self.sizes))

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an image's indices."""
        places = (self.length,) if self.flat else self.grids[0]
        return (*places, len(self.radices)) if len(self.radices) > 1 else places

    @cached_property
    def places(self) -> Tensor:
        """float32 (L, 2): row and column of each token's centre, in positions of the finest level from 1 on."""
        return places_of(self.grids)

    def tokens(self, indices: Tensor) -> Tensor:
        """int64 (B, *shape) -> digits int64 (B, L, D). ValueError for another shape, or a code that does not exist."""
        self._check(indices, self.shape, "indices")
        codes = indices.long().reshape(len(indices), self.length, len(self.radices))
        digits = []
        for code, radix in zip(codes.unbind(-1), self.radices, strict=True):
            if code.numel() and not 0 <= int(code.min()) <= int(code.max()) < math.prod(radix):
                raise ValueError(f"codes are {int(code.min())} to {int(code.max())}, there are {math.prod(radix)}")
            for size in radix:
                digits.append(code % size)
                code = code.div(size, rounding_mode="floor")
        return torch.stack(digits, dim=-1)

    def indices(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        self._check(tokens, (self.length, len(self.sizes)), "tokens")
        self.check_digits(tokens)
        digits, codes = iter(tokens.unbind(-1)), []
        for radix in self.radices:
            code, unit = torch.zeros_like(tokens[..., 0]), 1
            for size in radix:
                code, unit = code + unit * next(digits), unit * size
            codes.append(code)
        joined = codes[0] if len(codes) == 1 else torch.stack(codes, dim=-1)
        return joined.reshape(len(tokens), *self.shape)

    def check_digits(self, tokens: Tensor) -> None:
        """ValueError for digits (*, D) that do not exist."""
        if not bool(((tokens >= 0) & (tokens < torch.tensor(self.sizes, device=tokens.device))).all()):
            raise ValueError(f"tokens have digits outside their sizes, {self.sizes}")

    def _check(self, x: Tensor, shape: tuple[int, ...], name: str) -> None:
        if tuple(x.shape[1:]) != shape:
            raise ValueError(f"{name} have shape {tuple(x.shape)}; this prior takes (B, {', '.join(map(str, shape))})")


@dataclass(frozen=True)
class LatentLayout:
    """The sequence of an image whose tokens are the latents of its positions, row by row: (B, C, rows, columns) <-> (B, L, C)."""

    channels: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        if min(self.channels, self.rows, self.columns) < 1:
            raise ValueError(f"latents of shape {self.shape}: give sizes of at least 1")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """As of codes."""
        return ((self.rows, self.columns),)

    @property
    def length(self) -> int:
        """L, tokens of an image."""
        return self.rows * self.columns

    @property
    def width(self) -> int:
        """Numbers of a token: its channels."""
        return self.channels

    @property
    def about(self) -> str:
        """In words."""
        return f"latents {self.shape}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an image's latents."""
        return self.channels, self.rows, self.columns

    @cached_property
    def places(self) -> Tensor:
        """As of codes."""
        return places_of(self.grids)

    def tokens(self, latents: Tensor) -> Tensor:
        """(B, C, rows, columns) -> (B, L, C). ValueError for another shape."""
        if tuple(latents.shape[1:]) != self.shape:
            raise ValueError(f"latents have shape {tuple(latents.shape)}; this prior takes (B, {self.shape})")
        return latents.flatten(2).transpose(1, 2)

    def latents(self, tokens: Tensor) -> Tensor:
        """The inverse of `tokens`."""
        return tokens.transpose(1, 2).reshape(len(tokens), *self.shape)


REGIONS = ("top", "bottom", "left", "right", "center", "border")
"""Halves of the plane, its middle (half of the rows and of the columns), and what is around that."""


def region(layout: CodeLayout | LatentLayout, name: str) -> Tensor:
    """bool (L,): the tokens whose centres are in one of `REGIONS`."""
    rows, columns = (max(sizes) for sizes in zip(*layout.grids, strict=True))
    y, x = ((layout.places - 0.5) / torch.tensor([rows, columns])).unbind(1)
    middle = ((y - 0.5).abs() < 0.25) & ((x - 0.5).abs() < 0.25)
    return {"top": y < 0.5, "bottom": y > 0.5, "left": x < 0.5, "right": x > 0.5, "center": middle, "border": ~middle}[
        name
    ]


def covered(layout: CodeLayout | LatentLayout, mask: Tensor) -> Tensor:
    """bool (L,): the tokens all of whose pixels are in a mask, bool (H, W)."""
    outside = 1 - mask.float()[None, None]
    found = [F.adaptive_max_pool2d(outside, grid).flatten() for grid in layout.grids]
    return torch.cat(found) == 0


def places_of(grids: tuple[tuple[int, int], ...]) -> Tensor:
    """float32 (L, 2): row and column of each token's centre, in positions of the finest level from 1 on."""
    finest = max(rows for rows, _ in grids), max(columns for _, columns in grids)
    found = []
    for rows, columns in grids:
        a, b = finest[0] / rows, finest[1] / columns
        y, x = torch.meshgrid(*(torch.arange(n, device="cpu") for n in (rows, columns)), indexing="ij")
        found.append(torch.stack([(y.flatten() + 0.5) * a + 0.5, (x.flatten() + 0.5) * b + 0.5], dim=1))
    return torch.cat(found)


def layout_of(tokenizer: ImageTokenizer, split: str = "auto") -> CodeLayout:
    """That of a tokenizer. split: `joint` has one softmax over all codes, `digits` those of FSQ, `auto` what has at most 16,384.

    ValueError for a continuous quantizer, for codes without digits, and for more codes than a softmax can have.
    """
    quantizer, (_, rows, columns) = tokenizer.quantizer, tokenizer.latent_shape
    if quantizer.codebook_size is None:
        raise ValueError("the tokenizer is continuous and has no codes: give one of fsq, vq, lfq or bsq")
    radices = tuple(radix for _, radix in _codes(quantizer, split))
    if isinstance(quantizer, TwoLevel):
        return CodeLayout(((rows // 2, columns // 2), (rows, columns)), radices, flat=True)
    return CodeLayout(((rows, columns),), radices)


@torch.no_grad()
def digit_vectors(tokenizer: ImageTokenizer, split: str = "auto") -> list[Tensor]:
    """float32 (sizes_d, C) of each digit of a token: the code vectors with this digit, whose other digits are 0.

    Of two levels, which share their digits, those of the finer one.
    """
    found = []
    for quantizer, radix in _codes(tokenizer.quantizer, split):
        unit = 1
        for size in radix:
            codes = unit * torch.arange(size, device=next(tokenizer.parameters()).device)
            found.append(quantizer.indices_to_codes(codes[None])[0].T.float())
            unit *= size
    return found


def _codes(quantizer: Quantizer, split: str) -> list[tuple[Quantizer, tuple[int, ...]]]:
    """The quantizers of a position's codes, and the sizes of the digits of each."""
    if isinstance(quantizer, Grouped | Residual | TwoLevel):  # all their members have as many codes
        members = quantizer.members[-1:] if isinstance(quantizer, TwoLevel) else quantizer.members
        return [found for member in members for found in _codes(member, split)]
    size = quantizer.codebook_size or 0
    if split == "joint" or (split == "auto" and size <= ONE_SOFTMAX):
        if size > 2**20:
            raise ValueError(f"{size} codes are too many for one softmax: take --model.split digits")
        return [(quantizer, (size,))]
    if isinstance(quantizer, FSQ):
        return [(quantizer, tuple(quantizer.levels.tolist()))]
    bits = _bits(size)
    if bits is None:
        raise ValueError(f"{size} codes of {type(quantizer).__name__} have no digits: take --model.split joint")
    return [(quantizer, (2,) * bits)]


def _bits(size: int) -> int | None:
    """log2 of a power of two."""
    return size.bit_length() - 1 if size > 1 and size & (size - 1) == 0 else None
