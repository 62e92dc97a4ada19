"""The windows of larger images: in the centre here, at random places in training (training/batches.py)."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.data.images import ImageData
from midway.gen.data.pixels import Images, LazyImages
from midway.gen.files.decoding import counted


@dataclass(frozen=True)
class Window:
    """The same window of all images of a set on the disk, cut out as they are read: rows from `top`, columns from `left`."""

    whole: LazyImages
    top: int
    left: int
    size: int

    @property
    def shape(self) -> torch.Size:
        """(N, C, size, size)."""
        return torch.Size((*self.whole.shape[:2], self.size, self.size))

    @property
    def dtype(self) -> torch.dtype:
        """torch.uint8."""
        return self.whole.dtype

    def __len__(self) -> int:
        return len(self.whole)

    def __getitem__(self, items: Tensor | slice, /) -> Tensor:
        """As of the whole images, in memory of its own size."""
        return cut(self.whole[items], self.top, self.left, self.size).contiguous()

    def split(self, split_size: int, /) -> Iterator[Tensor]:
        """All windows in order, `split_size` at once."""
        for part in self.whole.split(split_size):
            yield cut(part, self.top, self.left, self.size).contiguous()

    def at_places(self, items: Tensor) -> "Window":
        """The windows of some of the images; nothing is read."""
        return replace(self, whole=self.whole.at_places(items))


def cut(images: Tensor, top: int, left: int, size: int) -> Tensor:
    """A view (N, C, size, size) of images (N, C, H, W)."""
    return images[..., top : top + size, left : left + size]


def window(images: Images, top: int, left: int, size: int) -> Images:
    """The same window of all images; nothing is copied or read."""
    if isinstance(images, LazyImages):
        return Window(images, top, left, size)
    return cut(images[:], top, left, size)


def cropped(data: ImageData, size: int | None) -> ImageData:
    """With the centre windows of size x size pixels as `images`, and all pixels as `whole`; `data` if nothing is cut off.

    The window begins at row (H - size) // 2, and the column alike. UsageError where the images are smaller.
    """
    height, width = data.images.shape[2:]
    if size is None or (height, width) == (size, size):
        return data
    if size > min(height, width):
        fix = f"use --crop {min(height, width)} or less, or --resize {size} or more"
        raise UsageError(f"--crop {size}", f"the images of {data.name} are {width}x{height}", fix)
    top, left = (height - size) // 2, (width - size) // 2
    note = (
        f"{counted(len(data.images))}: {size}x{size} of {width}x{height}, in the centre, in training at random places"
    )
    return replace(
        data,
        images=window(data.images, top, left, size),
        whole=data.images,
        fingerprint=hashlib.sha256(f"{data.fingerprint}, centre {size}".encode()).hexdigest(),
        conversions=(*data.conversions, note),
    )
