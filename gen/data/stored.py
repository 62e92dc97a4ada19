"""Images on the disk as `midway data build` writes them: read, and decoded where files are kept, when they are indexed.

A built set is a folder of records (files/records.py) with `names.jsonl`, the name of each image in its source, one a line, and
`fingerprints.json`, fingerprints of parts of it that were computed later than the build.
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midway.gen.core.errors import DataError, DiskError, UsageError, one_line, raising
from midway.gen.core.files import DAMAGE, file_hash, read_json, regular_file, write_atomically
from midway.gen.core.locks import lock
from midway.gen.core.text import echo
from midway.gen.data.pixels import fingerprint, key_of
from midway.gen.files.decoding import Undecodable, decode, decoder_versions
from midway.gen.files.records import INDEX, MANIFEST, Records, is_records, open_records

KIND = "images"
"""Of the records of a built set."""
NAMES, FINGERPRINTS, PLAN = "names.jsonl", "fingerprints.json", "unfinished-build.json"
"""Files beside the records; the last is there while a set is built."""


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

    @property
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
        data = self.records.read_bytes(place)  # its errors name the shard
        found = decode(f"image {place}", lambda _: data, encoding.channels, encoding.resize)
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

    def key(self, labels: Tensor, classes: Sequence[str]) -> str:
        """What the fingerprint of these images with labels int64 (N,) is recorded under."""
        return key_of(self.places, labels, classes, None if self.encoding is None else decoder_versions())

    def fingerprint(self, labels: Tensor, classes: Sequence[str]) -> str:
        """As of `fingerprint`, from the folder; computed in one pass and recorded there at its first use."""
        key, folder = self.key(labels, classes), self.records.folder
        while key not in (known := {**_recorded(folder), **self.records.facts.get("fingerprints", {})}):
            try:
                with lock(folder, "read"):
                    if key not in _recorded(folder):  # another process may have been here
                        self._record(key, fingerprint(self._announced(), labels, classes))
            except UsageError:  # another process computes one
                time.sleep(0.2)
            except DiskError as error:
                echo(f"fingerprint  computed at every start, since {error.what}")
                return fingerprint(self._announced(), labels, classes)
        return str(known[key])

    def _announced(self) -> "StoredImages":
        echo(f"fingerprint  of {len(self):,} images of {self.records.folder}: one pass over them")
        return self

    def _record(self, key: str, found: str) -> None:
        folder = self.records.folder
        known = {**_recorded(folder), key: found}
        text = {"manifest": file_hash(folder / MANIFEST), "fingerprints": known}
        write_atomically(folder / FINGERPRINTS, (json.dumps(text, indent=1) + "\n").encode())


def _recorded(folder: Path) -> dict[str, str]:
    """Fingerprints that were recorded after the build; those of another build are not taken."""
    try:
        text = read_json(folder / FINGERPRINTS)
        return dict(text["fingerprints"]) if text["manifest"] == file_hash(folder / MANIFEST) else {}
    except DAMAGE:
        return {}


# ---- whole sets ----


@dataclass(frozen=True)
class StoredSet:
    """A built set: images, labels int64 (N,), and what its build recorded."""

    images: StoredImages
    labels: Tensor
    classes: tuple[str, ...]
    name: str
    conversions: tuple[str, ...]
    left_out: tuple[str, ...]
    plan: Mapping[str, Any]

    def names(self) -> list[str]:
        """The name of each image in its source. DataError if they cannot be read."""
        path = self.images.records.folder / NAMES
        with raising(DataError, f"{path} cannot be read", self.images.records.remake, *DAMAGE, why=one_line):
            if file_hash(path) != self.images.records.facts["names"]:
                raise ValueError("it has changed")
            with regular_file(path).open(encoding="utf-8") as file:
                return [str(json.loads(line)) for line in file]


def is_stored(path: Path) -> bool:
    """Whether this is a folder of records, or the beginning of one, or what is left of one."""
    return is_records(path) or any((path / name).is_file() for name in (PLAN, INDEX))


def open_stored(path: Path) -> StoredSet:
    """The set in a folder. DataError where it is unfinished or damaged, with the file's name."""
    remake = f"build it again: midway data build SOURCE --out {path} --overwrite"
    if (path / PLAN).is_file() and not (path / MANIFEST).is_file():
        raise DataError(f"{path} is an unfinished set of images", "its build was ended", "run the same build again")
    records = open_records(path, KIND, remake)
    with raising(DataError, f"{path / MANIFEST} cannot be read", remake, *DAMAGE, why=one_line):
        facts = records.facts
        (channels, height, width), plan = map(int, facts["shape"]), dict(facts["plan"])
        encoding = Encoding(plan["channels"], plan["resize"], (channels, height, width))
        images = StoredImages(records, torch.arange(len(records)), None if records.shape is not None else encoding)
        lines = [tuple(map(str, facts[name])) for name in ("classes", "conversions", "left_out")]
        name = str(facts["name"])
    with raising(DataError, f"{path} cannot be read", remake, KeyError, ValueError, why=one_line):
        labels = records.tensor("label")
        if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < len(lines[0])):
            raise ValueError("its labels are not those of its classes")
    return StoredSet(images, labels, lines[0], name, lines[1], lines[2], plan)
