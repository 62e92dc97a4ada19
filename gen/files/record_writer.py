"""Write a folder of records (records.py), shard by shard, by several processes, and on after a kill.

A shard is written beside its place and moved there when it is whole and on the disk; its own index follows, and a shard counts
only with it. `seal` merges the indices and writes the manifest last. What a killed process left is removed by the next.
"""

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DiskError, raising
from midway.gen.core.files import DAMAGE, clear_temporaries, read_tensors, replacing, write_atomically
from midway.gen.files.records import (
    DTYPES,
    HEADER,
    INDEX,
    MANIFEST,
    Records,
    Shard,
    manifest_bytes,
    npy_header,
    record_bytes,
    shard_name,
)

SHARD_BYTES, MOST_SHARDS = 256 << 20, 200
"""Of a shard, unless there would be more of them than a process may hold open."""


@dataclass(frozen=True)
class ShardIndex:
    """What is known of a written shard: a tensor (count, ...) per name, facts of its writer, and the sha256 of its file."""

    count: int
    sha256: str
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class RecordFormat:
    """Of all records of a folder; `shape` None: byte strings, one-dimensional uint8 tensors."""

    dtype: str
    shape: tuple[int, ...] | None


def records_per_shard(total: int, size: int) -> int:
    """How many of `total` records of `size` bytes a shard holds: what fits `SHARD_BYTES`, more above `MOST_SHARDS` shards."""
    return max(1, SHARD_BYTES // max(size, 1), -(-total // MOST_SHARDS))


def write_shard(
    folder: Path,
    number: int,
    form: RecordFormat,
    batches: Iterable[tuple[Sequence[Tensor] | Tensor, Mapping[str, Tensor]]],
    facts: Mapping[str, Any] | None = None,
) -> ShardIndex:
    """Write one shard from batches of records (on the CPU, of the format), each with a tensor per name of its index.

    `facts` (JSON) may be filled while the batches are made. DiskError if it cannot be written; nothing is left of it then.
    """
    path, collected = folder / shard_name(number), list[Mapping[str, Tensor]]()
    fix = "free disk space, or choose another --out; the same command goes on where it stopped"
    count, crcs, lengths = 0, list[int](), list[int]()
    with raising(DiskError, f"cannot write {path}", fix, OSError), replacing(path) as temporary:
        with temporary.open("wb") as file:
            file.write(bytes(HEADER))
            for records, named in batches:
                for row in _rows(records, form):
                    crcs.append(zlib.crc32(row.data))
                    lengths.append(row.nbytes)
                    file.write(row.data)
                count += len(records)
                collected.append(named)
            header = npy_header(form.dtype, (sum(lengths),) if form.shape is None else (count, *form.shape))
            file.seek(0)
            file.write(header)
        with temporary.open("rb") as file:  # from the page cache; the header is known only at the end
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    own = {"crc": torch.tensor(crcs, dtype=torch.int64)}
    if form.shape is None:
        own["length"] = torch.tensor(lengths, dtype=torch.int64)
    names = collected[0].keys() if collected else ()
    tensors = own | {name: torch.cat([each[name] for each in collected]) for name in names}
    index = ShardIndex(count, digest, tensors, dict(facts or {}))
    text = {"count": str(count), "sha256": index.sha256, "facts": json.dumps(index.facts)}
    write_atomically(_index_path(folder, number), save({k: v.contiguous() for k, v in tensors.items()}, text))
    return index


def _rows(records: Sequence[Tensor] | Tensor, form: RecordFormat) -> Iterable[NDArray[np.uint8]]:
    """The bytes of each record. ValueError for another dtype or shape than those of the format."""
    for record in records:
        if record.dtype != DTYPES[form.dtype] or (form.shape is not None and tuple(record.shape) != form.shape):
            raise ValueError(f"a record is {record.dtype} {tuple(record.shape)}, not {form.dtype} {form.shape}")
        yield record.contiguous().reshape(-1).view(torch.uint8).numpy()


def _index_path(folder: Path, number: int) -> Path:
    return folder / f"{shard_name(number)}.index"


def read_shard_index(folder: Path, number: int, form: RecordFormat) -> ShardIndex | None:
    """The index of a shard that was written whole; None if there is none, or it does not fit the format."""
    try:
        tensors, text = read_tensors(_index_path(folder, number))
        count = int(text["count"])
        size = int(tensors["length"].sum()) if form.shape is None else count * record_bytes(form.dtype, form.shape)
        if (folder / shard_name(number)).stat().st_size != HEADER + size:
            return None
        return ShardIndex(count, text["sha256"], tensors, json.loads(text["facts"]))
    except DAMAGE:
        return None


def seal(folder: Path, kind: str, form: RecordFormat, indices: Sequence[ShardIndex], facts: Mapping[str, Any]) -> None:
    """Finish a folder: merge the indices of its shards, in order, then write the manifest. DiskError if that fails."""
    finish(merged(folder, kind, form, indices), facts)


def merged(folder: Path, kind: str, form: RecordFormat, indices: Sequence[ShardIndex]) -> Records:
    """Merge the indices of shards, in order. The records can be read; the folder is not finished. DiskError."""
    names = indices[0].tensors.keys() if indices else ()
    data = save({name: torch.cat([index.tensors[name] for index in indices]) for name in names})
    write_atomically(folder / INDEX, data)
    shards = tuple(Shard(index.count, index.sha256) for index in indices)
    return Records(folder, kind, form.dtype, form.shape, shards, {}, "", hashlib.sha256(data).hexdigest())


def finish(records: Records, facts: Mapping[str, Any]) -> None:
    """Write the manifest, with which a folder is finished. DiskError."""
    folder, numbers = records.folder, range(len(records.shards))
    sizes = [(folder / shard_name(number)).stat().st_size for number in numbers]
    write_atomically(folder / MANIFEST, manifest_bytes(replace(records, facts=facts), sizes))
    clear_unfinished(folder)


def clear_unfinished(folder: Path) -> None:
    """Remove what killed writers left half-written, and what only they need from a finished folder."""
    clear_temporaries(folder)
    for path in folder.glob("records-*.index") if (folder / MANIFEST).exists() else ():
        path.unlink(missing_ok=True)
