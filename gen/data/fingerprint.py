"""The name of a set of images by their content: sha256 of shape, class names, labels and pixels, in the order of the images."""

import hashlib
import json
from collections.abc import Sequence

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
