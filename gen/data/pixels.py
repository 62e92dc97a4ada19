"""Images as everything here takes them: a tensor in memory, or a set on the disk that is read by index (stored.py)."""

from collections.abc import Iterable, Iterator
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from midway.gen.progress.bar import reported

PART_BYTES = 32 << 20
"""Of pixels that a pass over all images takes at once."""


class Images(Protocol):
    """uint8 images (N, C, H, W) on the CPU. A torch tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """(N, C, H, W)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """torch.uint8."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, items: Tensor | slice, /) -> Tensor:
        """The images at places, int64 (n,), that are marked, bool (N,), or of a slice: uint8 (n, C, H, W).

        Safe in several threads. What is on the disk is read into new memory: DataError where it cannot be, or has changed.
        """
        ...

    def split(self, split_size: int, /) -> Iterable[Tensor]:
        """All images in order, `split_size` at once."""
        ...


@runtime_checkable
class LazyImages(Images, Protocol):
    """Images that are read when they are indexed, so a part of them is a view."""

    def at_places(self, items: Tensor) -> "LazyImages":
        """The images at places, int64 (n,): none of them is read."""
        ...


def part_of(images: Images, items: Tensor) -> Images:
    """The images at places, int64 (n,), or marked, bool (N,): of a tensor a copy, of images on the disk a view."""
    if isinstance(images, LazyImages):
        return images.at_places(items.nonzero()[:, 0] if items.dtype == torch.bool else items)
    return images[items]


def in_parts(images: Images) -> Iterator[Tensor]:
    """All images in order, at most `PART_BYTES` at once."""
    yield from reported(images.split(part_length(images)), "going through", len(images))


def part_length(images: Images) -> int:
    """How many images are at most `PART_BYTES`; at least one."""
    return max(1, PART_BYTES // max(1, images.shape[1:].numel()))
