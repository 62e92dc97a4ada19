"""Tensors of one shape, or byte strings, in a folder of few large files, read by index from any thread without a copy in memory.

    manifest.json        format, kind, dtype, shape, counts and sha256 of the shards, sha256 of the index, facts; written last
    index.safetensors    per record: crc32, length (of byte strings), and whatever its writer adds, such as labels
    records-00000.npy    the records of shard 0, one after another, as numpy.load reads them (bfloat16 as uint16)

A folder without a manifest is unfinished and never read. Records are read with `pread`, not mapped: a file that vanishes or
shrinks then raises an error instead of ending the process by a signal, pages of the file are not counted as this process's
memory, and threads need no lock. Every record is compared with its crc32 as it is read.

`record_writer.py` writes such folders.
"""

import json
import os
import threading
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midway.gen.core.errors import DataError, one_line, raising
from midway.gen.core.files import DAMAGE, file_hash, read_json, read_tensors, regular_file

FORMAT = "midway-records-1"
MANIFEST, INDEX = "manifest.json", "index.safetensors"
HEADER = 128
"""Bytes of the header of a shard, numpy's format 1.0."""
DTYPES = {
    name: getattr(torch, name) for name in ("uint8", "uint16", "int32", "int64", "float16", "bfloat16", "float32")
}
"""Those that records may have, by their names in a manifest."""

_NUMPY = {
    "uint8": "|u1",
    "uint16": "<u2",
    "bfloat16": "<u2",
    "float16": "<f2",
    "float32": "<f4",
    "int32": "<i4",
    "int64": "<i8",
}


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"records-{number:05}.npy"


def npy_header(dtype: str, shape: Sequence[int]) -> bytes:
    """The first `HEADER` bytes of a .npy file of an array (C order)."""
    text = f"{{'descr': '{_NUMPY[dtype]}', 'fortran_order': False, 'shape': {tuple(shape)}, }}"
    return b"\x93NUMPY\x01\x00" + (HEADER - 10).to_bytes(2, "little") + text.ljust(HEADER - 11).encode() + b"\n"


@dataclass(frozen=True)
class Shard:
    """One file: `count` records, and the sha256 of the whole file."""

    count: int
    sha256: str


@dataclass(frozen=True)
class Records:
    """A finished folder, from `open_records`. Safe in several threads, after a fork, and small when pickled."""

    folder: Path
    kind: str
    dtype: str
    shape: tuple[int, ...] | None
    """Of one record; None: byte strings."""
    shards: tuple[Shard, ...]
    facts: Mapping[str, Any]
    """What the writer recorded of the whole."""
    remake: str
    """How a damaged folder is made again, for errors."""
    index_sha256: str
    _files: dict[int, int] = field(default_factory=dict, init=False, repr=False, compare=False)
    """Descriptors of opened shards."""
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return sum(shard.count for shard in self.shards)

    def read(self, items: Tensor) -> Tensor:
        """int64 (n,) on the CPU -> (n, *shape) of `dtype`, in a new tensor.

        DataError naming a shard that cannot be read or has changed; IndexError.
        """
        if self.shape is None:
            raise ValueError("these records are byte strings: use read_bytes")
        out = torch.empty((len(items), *self.shape), dtype=DTYPES[self.dtype])
        rows: NDArray[np.uint8] = (
            out.view(torch.uint8).numpy().reshape(len(items), record_bytes(self.dtype, self.shape))
        )
        for first, last, start in self._runs(items.numpy()):
            self._fill(rows[first:last], start)
        return out

    def read_bytes(self, item: int) -> bytes:
        """One record of byte strings; errors as `read`."""
        row = np.empty(int(self._lengths[item]), np.uint8)
        self._fill(row[None], item)
        return row.tobytes()

    def tensor(self, name: str) -> Tensor:
        """What the index has of every record under this name, (N, ...). KeyError if it has none."""
        return self._index[name]

    def tensors(self) -> Mapping[str, Tensor]:
        """All that the index has."""
        return self._index

    def verify(self) -> None:
        """Compare the sha256 of every shard; DataError naming one that differs."""
        for number, shard in enumerate(self.shards):
            path = self.folder / shard_name(number)
            with raising(DataError, f"{path} cannot be read", self.remake, OSError, why=one_line):
                found = file_hash(path)
            if found != shard.sha256:
                raise DataError(
                    f"{path} has changed", f"its sha256 is {found[:12]}, not {shard.sha256[:12]}", self.remake
                )

    def __reduce__(self) -> tuple[type["Records"], tuple[Any, ...]]:
        """Without open files, and without the index, which is read again."""
        given = (self.folder, self.kind, self.dtype, self.shape, self.shards, self.facts, self.remake)
        return Records, (*given, self.index_sha256)

    # ---- where records lie ----

    @cached_property
    def _index(self) -> dict[str, Tensor]:
        path = self.folder / INDEX
        with raising(DataError, f"{path} cannot be read", self.remake, *DAMAGE, why=one_line):
            tensors, _ = read_tensors(path)
            if file_hash(path) != self.index_sha256:
                raise ValueError("it has changed")
            if any(len(tensor) != len(self) for tensor in tensors.values()):
                raise ValueError("its tensors are not those of the records")
        return tensors

    @cached_property
    def _crc(self) -> NDArray[np.int64]:
        return self._index["crc"].numpy()

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        """Bytes of each record."""
        if self.shape is None:
            return self._index["length"].numpy()
        return np.broadcast_to(np.int64(record_bytes(self.dtype, self.shape)), len(self))

    @cached_property
    def _firsts(self) -> NDArray[np.int64]:
        """The number of the first record of each shard, and of one beyond the last."""
        return np.cumsum([0, *(shard.count for shard in self.shards)])

    @cached_property
    def _offsets(self) -> NDArray[np.int64]:
        """Where each byte string begins in its shard, without the header."""
        begins = np.cumsum(self._lengths) - self._lengths
        counts = np.diff(self._firsts)
        firsts = self._firsts[:-1][counts > 0]
        return begins - np.repeat(begins[firsts], counts[counts > 0])

    def _place(self, item: int) -> tuple[int, int]:
        """Shard and byte of a record."""
        number = int(np.searchsorted(self._firsts, item, "right")) - 1
        if self.shape is None:
            return number, HEADER + int(self._offsets[item])
        return number, HEADER + (item - int(self._firsts[number])) * record_bytes(self.dtype, self.shape)

    def _runs(self, items: NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """(first row, row after the last, first record) of rows whose records follow one another in one shard."""
        if not len(items):
            return
        if items.min() < 0 or items.max() >= len(self):
            raise IndexError(f"records {items.min()} .. {items.max()} of {len(self)}")
        shards = np.searchsorted(self._firsts, items, "right")
        breaks = np.flatnonzero((np.diff(items) != 1) | (np.diff(shards) != 0)) + 1
        for first, last in zip([0, *breaks], [*breaks, len(items)], strict=True):
            yield int(first), int(last), int(items[first])

    # ---- reading ----

    def _fill(self, rows: NDArray[np.uint8], start: int) -> None:
        """Read the records from `start` on into contiguous rows, and compare each with its checksum."""
        number, at = self._place(start)
        path = self.folder / shard_name(number)
        with raising(DataError, f"{path} cannot be read", self.remake, OSError, why=one_line):
            _read_at(self._open(number), rows.reshape(-1).data, at)
        for item, row in enumerate(rows, start):
            if zlib.crc32(row.data) != self._crc[item]:
                raise DataError(f"{path} has changed", f"record {item} does not match its checksum", self.remake)

    def _open(self, number: int) -> int:
        """The descriptor of a shard, opened at its first use."""
        with self._lock:
            if number not in self._files:
                self._files[number] = os.open(
                    self.folder / shard_name(number), os.O_RDONLY | getattr(os, "O_BINARY", 0)
                )
            return self._files[number]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_files", {}).values():
            os.close(descriptor)


_seeking = threading.Lock()


def _read_at(descriptor: int, buffer: memoryview, at: int) -> None:
    """Fill a buffer from this byte of a file on; OSError if the file ends before."""
    done = 0
    while done < len(buffer):
        if hasattr(os, "preadv"):
            count = os.preadv(descriptor, [buffer[done:]], at + done)
        else:  # Windows
            with _seeking:
                os.lseek(descriptor, at + done, os.SEEK_SET)
                found = os.read(descriptor, len(buffer) - done)
            count = len(found)
            buffer[done : done + count] = found
        if not count:
            raise OSError(f"it ends at byte {at + done}")
        done += count


def record_bytes(dtype: str, shape: Sequence[int]) -> int:
    """Bytes of a record."""
    return int(np.prod(shape, dtype=np.int64)) * DTYPES[dtype].itemsize


# ---- opening ----


def is_records(path: Path, kind: str | None = None) -> bool:
    """Whether `path` is a finished folder of records, of this kind if one is named."""
    if not (path / MANIFEST).is_file():
        return False
    try:
        found = read_json(path / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("format") == FORMAT and kind in (None, found.get("kind"))


def open_records(path: Path, kind: str, remake: str) -> Records:
    """A finished folder of this kind. DataError: none, unfinished, or a shard, named, that is missing or has another size."""
    if not (path / MANIFEST).is_file():
        why = f"it has no {MANIFEST}, which is written when all is there" if path.is_dir() else "it is no folder"
        raise DataError(f"{path} is no finished set of {kind}", why, remake)
    with raising(DataError, f"{path / MANIFEST} cannot be read", remake, *DAMAGE, why=one_line):
        manifest = read_json(path / MANIFEST)
        if manifest["format"] != FORMAT or manifest["kind"] != kind:
            raise ValueError(f"it is {manifest['kind']!r} of format {manifest['format']!r}")
        shards = tuple(Shard(int(one["count"]), str(one["sha256"])) for one in manifest["shards"])
        shape = None if manifest["shape"] is None else tuple(map(int, manifest["shape"]))
        dtype, facts, index = str(manifest["dtype"]), manifest["facts"], str(manifest["index"])
        records = Records(path, kind, dtype, shape, shards, facts, remake, index)
        if records.dtype not in DTYPES:
            raise ValueError(f"its dtype is {records.dtype!r}")
        sizes = [int(one["bytes"]) for one in manifest["shards"]]
    for number, size in enumerate(sizes):
        _check_shard(path / shard_name(number), size, remake)
    return records


def _check_shard(path: Path, size: int, remake: str) -> None:
    with raising(DataError, f"{path} cannot be read", remake, OSError, why=one_line):
        found = regular_file(path).stat().st_size
        if found != size:
            raise OSError(f"it has {found:,} bytes, and was written with {size:,}")


def manifest_bytes(records: Records, sizes: Sequence[int]) -> bytes:
    """The manifest of a folder whose shards have these sizes in bytes."""
    shards = [
        {"count": shard.count, "bytes": size, "sha256": shard.sha256}
        for shard, size in zip(records.shards, sizes, strict=True)
    ]
    shape = None if records.shape is None else list(records.shape)
    found = {
        "format": FORMAT,
        "kind": records.kind,
        "dtype": records.dtype,
        "shape": shape,
        "facts": dict(records.facts),
    }
    return (json.dumps({**found, "index": records.index_sha256, "shards": shards}, indent=1) + "\n").encode()
