"""The name of a set of images by their content: sha256 of shape, class names, labels and pixels, in the order of the images."""

import hashlib
import json
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from midway.gen.data.pixels import Images, in_parts


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
