"""A stored set of as many images as wanted, of which few are on the disk."""

from pathlib import Path

import torch

from midway.gen.data.images import ImageData
from midway.gen.data.stored import KIND, StoredImages
from midway.gen.files.record_writer import RecordFormat, seal, write_shard
from midway.gen.files.records import open_records


def store(folder: Path, images: torch.Tensor) -> StoredImages:
    """uint8 images (N, C, H, W) in one shard."""
    folder.mkdir(parents=True, exist_ok=True)
    form = RecordFormat("uint8", tuple(images.shape[1:]))
    seal(folder, KIND, form, [write_shard(folder, 0, form, [(images, {})])], {})
    return StoredImages(open_records(folder, KIND, "make it again"), torch.arange(len(images)))


def many(folder: Path, count: int, side: int = 256) -> ImageData:
    """`count` images of side x side in ten classes, which are 20 images of noise again and again."""
    noise = torch.randint(0, 256, (20, 3, side, side), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    stored = store(folder, noise).at_places(torch.arange(count) % 20)
    classes = tuple(map(str, range(10)))
    return ImageData(stored, torch.arange(count) % 10, classes, f"{count} images", f"{count:064}")
