"""The windows of larger images: in the centre here, at random places in training (training/batches.py)."""

import hashlib
from dataclasses import replace

from midway.gen.core.errors import UsageError
from midway.gen.data.images import ImageData
from midway.gen.files.decoding import counted


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
        images=data.images[..., top : top + size, left : left + size],
        whole=data.images,
        fingerprint=hashlib.sha256(f"{data.fingerprint}, centre {size}".encode()).hexdigest(),
        conversions=(*data.conversions, note),
    )
