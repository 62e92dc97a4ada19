"""One pass over a source of images, which fills a folder with shards: in their order, each whole or not at all.

Images are decoded by several threads, taken in their order, and go into the fingerprints as they are written. Shards that an
earlier build has finished are kept.
"""

import contextlib
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from midway.gen.core.errors import DiskError
from midway.gen.data.build_source import BuildSource
from midway.gen.data.pixels import PartFingerprints
from midway.gen.files.decoding import Decoded, Undecodable, Unusable, sizes_differ
from midway.gen.files.file_set import check_bad, map_files
from midway.gen.files.record_writer import RecordFormat, ShardIndex, read_shard_index, records_per_shard, write_shard

Result = tuple[Decoded | Undecodable, bytes]
_AT_ONCE = 16
SPACE = "free disk space, or choose another --out; the same command goes on where it stopped"


class Coloured(Exception):
    """An RGB image came after grey ones, which are RGB too then."""


@dataclass
class _Shape:
    """Of all images, from the first on."""

    first: Decoded | None = None
    planes: int = 0
    smallest: int = 0

    def check(self, image: Decoded) -> None:
        """DataError for another size than that of the first image; Coloured for RGB after grey."""
        size = image.pixels.shape[:2]
        if self.first is None:
            self.first, self.smallest = image, min(size)
            self.planes = max(self.planes, _planes(image))
        self.smallest = min(self.smallest, *size)
        if size != self.first.pixels.shape[:2]:
            raise sizes_differ(self.first, image, self.smallest)
        if _planes(image) > self.planes:
            raise Coloured

    @property
    def one(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        height, width = (0, 0) if self.first is None else self.first.pixels.shape[:2]
        return (self.planes or 1, height, width)


@dataclass
class BuildPass:
    """One pass over a source, which fills a folder with shards."""

    source: BuildSource
    folder: Path
    policy: Literal["error", "skip"]
    encoded: bool
    workers: int | None
    shape: _Shape = field(default_factory=_Shape)
    hashes: PartFingerprints | None = None
    bad: list[Undecodable] = field(default_factory=list)

    def first_shape(self, planes: int) -> None:
        """Begin with the shape of the first image that can be used, and at least so many planes."""
        self.shape, self.bad = _Shape(planes=planes), []
        for item in range(len(self.source.names)):
            image, _ = self.source.image(item)
            if isinstance(image, Decoded):
                self.shape.check(image)
                break
            self._bad([image])
        self.bad = []

    @property
    def form(self) -> RecordFormat:
        """Of the records."""
        return RecordFormat("uint8", None if self.encoded else self.shape.one)

    def shards(self) -> list[ShardIndex]:
        """Write what is missing; the indices of all."""
        total, form = len(self.source.names), self.form
        size = int(self.source.sizes.mean()) if self.encoded else math.prod(self.shape.one)
        per_shard = records_per_shard(total, size)
        bounds = [(at, min(at + per_shard, total)) for at in range(0, total, per_shard)]
        found = [_finished(self.folder, number, form, some) for number, some in enumerate(bounds)]
        for index in filter(None, found):
            self._bad([_undecodable(*item) for item in index.facts["bad"]])
        if any(found):
            self.hashes = None
        items = [item for index, some in zip(found, bounds, strict=True) if index is None for item in range(*some)]
        _check_space(self.folder, len(items) * size)
        with contextlib.closing(map_files(items, self.source.image, self.workers)) as results:
            for number, (first, last) in enumerate(bounds):
                if found[number] is None:
                    facts: dict[str, Any] = {"items": [first, last], "bad": [], "notes": {}, "grey": 0}
                    batches = self._batches(islice(results, last - first), first, facts)
                    found[number] = write_shard(self.folder, number, form, batches, facts)
        return [index for index in found if index is not None]

    def _batches(
        self, results: Iterator[Result], first: int, facts: dict[str, Any]
    ) -> Iterator[tuple[list[Tensor], dict[str, Tensor]]]:
        """Records and labels, some at once; `facts` is filled. Errors of images that cannot be used."""
        notes, at = Counter[str](), first
        while some := list(islice(results, _AT_ONCE)):
            records, places = list[Tensor](), list[int]()
            for place, (image, data) in enumerate(some, at):
                if isinstance(image, Undecodable):
                    facts["bad"].append([image.name, image.reason, isinstance(image, Unusable)])
                    self._bad([image])
                    continue
                self.shape.check(image)
                notes.update(image.notes)
                facts["grey"] += _planes(image) == 1
                planes = as_planes(image, self.shape.planes)
                if self.hashes is not None:
                    self.hashes.add(planes[None])
                records.append(torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.encoded else planes)
                places.append(place)
            facts["notes"] = dict(notes)
            at += len(some)
            yield records, {"label": self.source.labels[torch.tensor(places, dtype=torch.int64)]}

    def _bad(self, found: Sequence[Undecodable]) -> None:
        """Note them; DataError once they are too many."""
        if found:
            self.bad += found
            self.hashes = None  # the number of images is in the fingerprint
            check_bad(self.bad, len(self.source.names), self.policy)


def _check_space(folder: Path, needed: int) -> None:
    """DiskError before hours of work rather than after."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        why = f"the images need {needed / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free"
        raise DiskError(f"cannot write {folder}", why, f"{SPACE}, or keep files as they are with --keep-encoded")


def _undecodable(name: str, reason: str, unusable: bool) -> Undecodable:
    return Unusable(name, reason) if unusable else Undecodable(name, reason)


def _planes(image: Decoded) -> int:
    return 1 if image.pixels.ndim == 2 else 3


def as_planes(image: Decoded, planes: int) -> Tensor:
    """uint8 (planes, H, W) of one image; grey is repeated."""
    pixels = np.atleast_3d(image.pixels).transpose(2, 0, 1)
    return torch.from_numpy(np.array(np.broadcast_to(pixels, (planes, *pixels.shape[1:])), order="C"))


def _finished(folder: Path, number: int, form: RecordFormat, bounds: tuple[int, int]) -> ShardIndex | None:
    """The index of a shard of these items that was written before."""
    found = read_shard_index(folder, number, form)
    return found if found is not None and found.facts.get("items") == list(bounds) else None
