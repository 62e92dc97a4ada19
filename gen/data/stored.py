"""Images on the disk as `scripts/data.py build` writes them: read, and decoded where files are kept, when they are indexed."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.files.decoding import Undecodable, decode
from midway.gen.files.records import Records

KIND = "images"
"""Of the records of a built set."""


@dataclass(frozen=True)
class Encoding:
    """How stored files become pixels (C, H, W): the options of the build, and the channels and size of all images."""

    channels: int | None
    resize: int | None
    shape: tuple[int, int, int]


@dataclass(frozen=True)
class StoredImages:
    """uint8 (N, C, H, W): records at places. Small when pickled, but for the places; safe in several threads."""

    records: Records
    places: Tensor
    """int64 (N,)."""
    encoding: Encoding | None = None
    """None: the records are pixels."""

    @cached_property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        one = self.records.shape if self.encoding is None else self.encoding.shape
        return torch.Size((len(self.places), *(one or ())))

    @property
    def dtype(self) -> torch.dtype:
        """torch.uint8."""
        return torch.uint8

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, items: Tensor | slice, /) -> Tensor:
        """uint8 (n, C, H, W) in new memory; DataError where a file cannot be read, or has changed."""
        places = self.places[items]
        if self.encoding is None:
            return self.records.read(places)
        out = torch.empty(len(places), *self.shape[1:], dtype=torch.uint8)
        for row, place in zip(out.numpy(), places.tolist(), strict=True):
            row[:] = self._decoded(place, self.encoding)  # by numpy, which starts no threads of its own
        return out

    def _decoded(self, place: int, encoding: Encoding) -> NDArray[np.uint8]:
        """(C, H, W), or (1, H, W) of a grey file."""
        found = decode(f"image {place}", lambda _: self.records.read_bytes(place), encoding.channels, encoding.resize)
        remake, where = self.records.remake, f"image {place} of {self.records.folder}"
        if isinstance(found, Undecodable):
            raise DataError(f"{where} cannot be decoded", found.reason, remake)
        planes = found.pixels[None] if found.pixels.ndim == 2 else found.pixels.transpose(2, 0, 1)
        if planes.shape[1:] != encoding.shape[1:] or len(planes) > encoding.shape[0]:
            raise DataError(f"{where} has another size", f"it is {tuple(planes.shape)}, not {encoding.shape}", remake)
        return planes

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        """All images in order, `split_size` at once."""
        for start in range(0, len(self), split_size):
            yield self[start : start + split_size]

    def at_places(self, items: Tensor) -> "StoredImages":
        """Those at `items`, int64 (n,), of these; nothing is read."""
        return StoredImages(self.records, self.places[items], self.encoding)
