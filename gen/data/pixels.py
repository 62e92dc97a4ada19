"""Images as everything here takes them: a tensor in memory, or a set on the disk that is read by index (stored.py).

The name of a set is its fingerprint: sha256 of shape, class names, labels and pixels, in the order of the images.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
    yield from reported(images.split(part_length(images)), "reading", len(images))


def part_length(images: Images) -> int:
    """How many images are at most `PART_BYTES`; at least one."""
    return max(1, PART_BYTES // max(1, images.shape[1:].numel()))


# ---- fingerprints ----


class Fingerprinter:
    """The fingerprint of images that come part by part."""

    def __init__(self, shape: Sequence[int], labels: Tensor, classes: Sequence[str]) -> None:
        """Of images (N, C, H, W) with labels int64 (N,)."""
        self._digest = hashlib.sha256(json.dumps({"shape": list(shape), "classes": list(classes)}).encode())
        self._digest.update(labels.numpy().astype("<i8").tobytes())

    def add(self, images: Tensor) -> None:
        """The next images, uint8 (n, C, H, W)."""
        self._digest.update(images.contiguous().view(-1).numpy().data)

    def result(self) -> str:
        """64 hexadecimal digits."""
        return self._digest.hexdigest()


def fingerprint(images: Images, labels: Tensor, classes: Sequence[str]) -> str:
    """Of a whole set, labels int64 (N,), little-endian in the hash; 64 hexadecimal digits."""
    found = Fingerprinter(images.shape, labels, classes)
    for part in in_parts(images):
        found.add(part)
    return found.result()


class PartFingerprints:
    """The fingerprints of several parts of a set in one pass over it."""

    def __init__(
        self, shape: Sequence[int], labels: Tensor, parts: Iterable[tuple[Tensor | None, Sequence[str]]]
    ) -> None:
        """Of images (N, C, H, W) with labels int64 (N,); each part: marks bool (N,), None for all, and its class names."""
        self._parts = [
            (marks, Fingerprinter((len(own), *shape[1:]), own, classes))
            for marks, classes in parts
            for own in [labels if marks is None else labels[marks]]
        ]
        self._at, self._count = 0, shape[0]

    def add(self, images: Tensor) -> None:
        """The next images, uint8 (n, C, H, W)."""
        end = self._at + len(images)
        for marks, found in self._parts:
            found.add(images if marks is None else images[marks[self._at : end]])
        self._at = end

    def results(self) -> list[str]:
        """Of each part. ValueError unless all images were added."""
        if self._at != self._count:
            raise ValueError(f"{self._at} of {self._count} images were added")
        return [found.result() for _, found in self._parts]


def key_of(places: Tensor, labels: Tensor, classes: Sequence[str], decoder: object) -> str:
    """32 hexadecimal digits for images at places of a stored set, int64 (n,): what their fingerprint is recorded under.

    `decoder`: versions of what decodes them, or None.
    """
    digest = hashlib.sha256(json.dumps({"classes": list(classes), "decoder": decoder}, sort_keys=True).encode())
    for numbers in (labels, places):
        digest.update(numbers.to(torch.int64).numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:32]
