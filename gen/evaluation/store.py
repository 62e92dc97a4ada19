"""Where a sweep keeps what it has measured, so that a killed one loses little and is never measured twice.

    cells/<id>.json                 a finished cell: its identity, its numbers, and a sha256 of both
    cells/<id>.png                  samples of its first seeds
    cells/<id>.parts/part-<k>       seeds [k PART, (k + 1) PART) of a cell that is being measured: their features and errors;
                                    after the last of them, the figures of each block

The id is a hash of everything that the numbers depend on. A part holds a fixed range of seeds and is whole or absent, so any
process can make any part, and the numbers do not depend on how many processes there were or how often they were killed.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DiskError
from midway.gen.core.files import clear_temporaries, state_hash, write_atomically
from midway.gen.core.runs import lock

SCHEMA = 2
"""Of all that makes and measures a cell: raise it with every change of code that changes a number."""
PART = 1024
"""Seeds of a part: what a killed process loses at most."""


@dataclass(frozen=True)
class Part:
    """Measured samples: named tensors of n rows each (features, errors, finite, ...), and what they cost, as JSON takes it."""

    tensors: dict[str, Tensor]
    costs: dict[str, Any]


def cell_id(identity: dict[str, Any]) -> str:
    """16 hexadecimal digits of an identity."""
    return hashlib.sha256(_canonical({"schema": SCHEMA, **identity})).hexdigest()[:16]


def _canonical(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, ensure_ascii=False).encode()


@dataclass(frozen=True)
class CellStore:
    """The folder `cells/` of a sweep."""

    folder: Path

    # ---- finished cells ----

    def record(self, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The numbers of a finished cell; None if it is not there. A damaged one is renamed and counts as not there."""
        path = self._path(identity)
        try:
            text = path.read_text()
        except FileNotFoundError:
            return None
        try:
            content = json.loads(text)
            body = {"identity": content["identity"], "numbers": content["numbers"]}
            if content["sha256"] != hashlib.sha256(_canonical(body)).hexdigest():
                raise ValueError("its sha256 does not match")
        except (ValueError, KeyError, TypeError) as error:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                path.replace(path.with_suffix(".damaged"))
            print(f"{path.name} is damaged ({error}): kept as {path.stem}.damaged, and measured again", flush=True)
            return None
        return content["numbers"]

    def finish(self, identity: dict[str, Any], numbers: dict[str, Any], png: bytes | None) -> None:
        """Write a cell's numbers, then drop its parts."""
        body = {"identity": identity, "numbers": numbers}
        content = {**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()}
        if png is not None:
            write_atomically(self._path(identity).with_suffix(".png"), png)
        write_atomically(self._path(identity), (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
        shutil.rmtree(self._parts(identity), ignore_errors=True)

    def png(self, identity: dict[str, Any]) -> bytes | None:
        """The picture of a finished cell."""
        path = self._path(identity).with_suffix(".png")
        return path.read_bytes() if path.exists() else None

    # ---- parts ----

    def part(self, identity: dict[str, Any], number: int) -> Part | None:
        """One part, None if it is not there or damaged."""
        try:
            with safe_open(self._part(identity, number), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header["hash"] != state_hash(header["costs"], tensors):
                return None
            return Part(tensors, json.loads(header["costs"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def write_part(self, identity: dict[str, Any], number: int, part: Part) -> None:
        """Keep one part, whole or not at all."""
        tensors = {name: value.contiguous() for name, value in part.tensors.items()}
        costs = json.dumps(part.costs)
        header = {"costs": costs, "hash": state_hash(costs, tensors)}
        write_atomically(self._part(identity, number), save(tensors, header))

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Within the block this sweep's own, tidied first; UsageError while another sweep writes here."""
        self._make()
        with lock(self.folder, "written"):
            self.tidy()
            yield

    def tidy(self) -> None:
        """Remove what killed processes left half-written. DiskError if the folder cannot be made."""
        self._make()
        for folder in (self.folder, *self.folder.glob("*.parts")):
            clear_temporaries(folder)

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.folder} cannot be made", str(error), "choose another --out") from None

    def _path(self, identity: dict[str, Any]) -> Path:
        return self.folder / f"{cell_id(identity)}.json"

    def _parts(self, identity: dict[str, Any]) -> Path:
        return self.folder / f"{cell_id(identity)}.parts"

    def _part(self, identity: dict[str, Any], number: int) -> Path:
        return self._parts(identity) / f"part-{number:05d}.safetensors"


def part_ranges(first: int, n: int, blocks: int) -> list[tuple[int, int, int]]:
    """(block, first seed, seeds) of every part of `blocks` blocks of n seeds; no part spans two blocks."""
    return [
        (block, first + block * n + start, min(PART, n - start))
        for block in range(blocks)
        for start in range(0, n, PART)
    ]


def seeds_of(first: int, count: int) -> Tensor:
    """int64 (count,): the seeds from `first` on."""
    return torch.arange(first, first + count)
