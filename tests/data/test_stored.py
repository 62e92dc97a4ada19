"""Images on the disk are those in memory: the same pixels at every place, the same split, the same fingerprints."""

import io
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.data.images import load_images
from midway.gen.data.levels import values_of
from midway.gen.data.pixels import LazyImages, fingerprint, in_parts, part_length
from midway.gen.data.splits import split
from midway.gen.data.stored import KIND, Encoding, StoredImages
from midway.gen.files.record_writer import RecordFormat, seal, write_shard
from midway.gen.files.records import Records, open_records


def _records(folder: Path, items: list[Tensor], form: RecordFormat, per_shard: int = 100) -> Records:
    starts = range(0, max(len(items), 1), per_shard)
    indices = [write_shard(folder, i, form, [(items[at : at + per_shard], {})]) for i, at in enumerate(starts)]
    seal(folder, KIND, form, indices, {})
    return open_records(folder, KIND, "build it again")


def _stored(folder: Path, images: Tensor) -> StoredImages:
    form = RecordFormat("uint8", tuple(images.shape[1:]))
    return StoredImages(_records(folder, list(images), form), torch.arange(len(images)))


def test_a_split_on_the_disk_is_that_in_memory(tmp_path: Path) -> None:
    data = load_images("digits")
    stored = _stored(tmp_path, data.images[:])
    assert isinstance(stored, LazyImages) and not isinstance(data.images, LazyImages)
    assert stored.shape == data.images.shape and stored.dtype == torch.uint8 and len(stored) == len(data.images)
    assert fingerprint(stored, data.labels, data.classes) == data.fingerprint
    assert torch.equal(values_of(stored), values_of(data.images))
    for mine, theirs in zip(split(replace(data, images=stored)), split(data), strict=True):
        assert mine.fingerprint == theirs.fingerprint and isinstance(mine.images, StoredImages)
        items = torch.tensor([5, 2, 2, 300])
        marked = mine.labels == 3
        for some in (items, marked, slice(3, 17), slice(None)):
            assert torch.equal(mine.images[some], theirs.images[some])
        assert torch.equal(torch.cat(list(mine.images.split(100))), torch.cat(list(theirs.images.split(100))))
        assert torch.equal(pickle.loads(pickle.dumps(mine.images))[items], theirs.images[items])  # noqa: S301


def test_parts_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("midway.gen.data.pixels.PART_BYTES", 100)
    images = torch.arange(7 * 48).to(torch.uint8).view(7, 3, 4, 4)
    assert part_length(images) == 2
    assert [len(part) for part in in_parts(images)] == [2, 2, 2, 1]
    assert torch.equal(torch.cat(list(in_parts(images))), images)
    assert part_length(torch.empty(0, 1, 0, 0, dtype=torch.uint8)) == 100
    assert part_length(torch.empty(1, 3, 100, 100, dtype=torch.uint8)) == 1


def _png(pixels: Tensor) -> Tensor:
    """The bytes of a PNG of grey (H, W) or RGB (H, W, 3)."""
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)


def test_files_are_decoded_as_they_are_read(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    grey, rgb = (torch.randint(0, 256, shape, generator=generator).to(torch.uint8) for shape in ((4, 4), (4, 4, 3)))
    records = _records(tmp_path, [_png(grey), _png(rgb)], RecordFormat("uint8", None))
    images = StoredImages(records, torch.tensor([1, 0, 1]), Encoding(None, None, (3, 4, 4)))
    wanted = torch.stack([rgb.permute(2, 0, 1), grey.expand(3, 4, 4), rgb.permute(2, 0, 1)])
    assert images.shape == (3, 3, 4, 4) and torch.equal(images[:], wanted)
    small = StoredImages(records, torch.tensor([0, 1]), Encoding(1, 2, (1, 2, 2)))
    assert small[:].shape == (2, 1, 2, 2)
    for encoding in (Encoding(None, None, (1, 4, 4)), Encoding(None, 2, (3, 4, 4))):  # a decoder that has changed
        with pytest.raises(DataError, match=r"image 1 of .* has another size[\s\S]*build it again"):
            StoredImages(records, torch.tensor([1]), encoding)[:]


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    records = _records(tmp_path, [torch.arange(50, dtype=torch.uint8)], RecordFormat("uint8", None))
    with pytest.raises(DataError, match=r"image 0 of .* cannot be decoded[\s\S]*build it again"):
        StoredImages(records, torch.tensor([0]), Encoding(None, None, (1, 4, 4)))[:]
