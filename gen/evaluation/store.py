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
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DiskError, raising
from midway.gen.core.files import clear_temporaries, state_hash, write_atomically
from midway.gen.core.locks import check_no_link, lock, made, remove
from midway.gen.core.text import echo, json_text

SCHEMA = 2
"""Of all that makes and measures a cell: raise it with every change of code that changes a number."""
PART = 1024
"""Seeds of a part: what a killed process loses at most."""
_CELL = re.compile(r"[0-9a-f]{16}\.(json|png|damaged|parts)")


@dataclass(frozen=True)
class Part:
    """Measured samples: named tensors of n rows each (features, errors, finite, ...), and what they cost, as JSON takes it."""

    tensors: dict[str, Tensor]
    costs: dict[str, Any]


@dataclass(frozen=True)
class Seeds:
    """`blocks` disjoint blocks of n seeds from `first` on."""

    first: int
    n: int
    blocks: int

    @property
    def parts(self) -> list[tuple[int, Tensor]]:
        """(block, its seeds int64 (<= PART,)) of every part; no part spans two blocks."""
        ends = [(block, self.first + block * self.n) for block in range(self.blocks)]
        return [(block, part) for block, first in ends for part in torch.arange(first, first + self.n).split(PART)]

    @property
    def all(self) -> Tensor:
        """int64 (n * blocks,)."""
        return torch.arange(self.first, self.first + self.n * self.blocks)

    def __str__(self) -> str:
        return f"{self.first}-{self.first + self.n * self.blocks - 1}"


def _canonical(value: object) -> bytes:
    return json_text(value, sort_keys=True).encode()


@dataclass(frozen=True)
class Cell:
    """One measurement in the store: parts while it is measured, numbers and a picture when it is finished."""

    folder: Path
    identity: dict[str, Any]
    """Everything that the numbers depend on, as JSON takes it."""

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the identity."""
        return hashlib.sha256(_canonical({"schema": SCHEMA, **self.identity})).hexdigest()[:16]

    # ---- finished ----

    def numbers(self) -> dict[str, Any] | None:
        """None if the cell is not finished. A damaged file is renamed and counts as absent."""
        path = self._path
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            return _verified(text)
        except (ValueError, KeyError, TypeError) as error:
            with contextlib.suppress(FileNotFoundError):  # another process was first
                path.replace(path.with_suffix(".damaged"))
            echo(f"{path.name} is damaged ({error}): kept as {path.stem}.damaged, and measured again")
            return None

    def finish(self, numbers: dict[str, Any], png: bytes | None) -> None:
        """Write the numbers, then drop the parts."""
        body = {"identity": self.identity, "numbers": numbers}
        content = {**body, "sha256": hashlib.sha256(_canonical(body)).hexdigest()}
        if png is not None:
            write_atomically(self._path.with_suffix(".png"), png)
        write_atomically(self._path, (json_text(content, indent=1) + "\n").encode())
        shutil.rmtree(self._parts, ignore_errors=True)

    def png(self) -> bytes | None:
        """The picture of a finished cell."""
        path = self._path.with_suffix(".png")
        return path.read_bytes() if path.exists() else None

    # ---- parts ----

    def part(self, number: int) -> Part | None:
        """None if it is absent or damaged."""
        try:
            with safe_open(self._part(number), framework="pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header["hash"] != state_hash(header["costs"], tensors):
                return None
            return Part(tensors, json.loads(header["costs"]))
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    def parts(self, numbers: Iterable[int]) -> list[Part]:
        """Parts that were written before. RuntimeError if one is gone."""
        found = {number: self.part(number) for number in numbers}
        missing = [number for number, part in found.items() if part is None]
        if missing:
            raise RuntimeError(f"parts {missing} of {self._parts} are gone: run again")
        return [part for part in found.values() if part is not None]

    def write(self, number: int, part: Part) -> None:
        """Write one part, whole or not at all."""
        tensors = {name: value.contiguous() for name, value in part.tensors.items()}
        costs = json.dumps(part.costs)
        header = {"costs": costs, "hash": state_hash(costs, tensors)}
        write_atomically(self._part(number), save(tensors, header))

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.id}.json"

    @property
    def _parts(self) -> Path:
        return self.folder / f"{self.id}.parts"

    def _part(self, number: int) -> Path:
        return self._parts / f"part-{number:05d}.safetensors"


@dataclass(frozen=True)
class CellStore:
    """The folder `cells/` of a sweep."""

    folder: Path

    def cell(self, identity: dict[str, Any]) -> Cell:
        """The cell of this identity, finished or not."""
        return Cell(self.folder, identity)

    @contextlib.contextmanager
    def claimed(self, fresh: bool = False) -> Iterator[None]:
        """Within the block this sweep's own, tidied first, and emptied if `fresh`; UsageError while another sweep writes here.

        With `fresh` UsageError for links too, which may lead to the measurements of another sweep. DiskError.
        """
        for folder in (self.folder.parent, self.folder) if fresh else ():
            check_no_link(folder)
        with made(self.folder), lock(self.folder, "written"):
            if fresh:
                self._forget()
            self._tidy()
            yield

    def _forget(self) -> None:
        """Remove all cells, and nothing else."""
        with raising(DiskError, f"{self.folder} cannot be emptied", "empty it by hand", OSError):
            for path in filter(lambda path: _CELL.fullmatch(path.name), [*self.folder.iterdir()]):
                remove(path)

    def _tidy(self) -> None:
        """Remove what killed processes left: half-written files, and the parts of finished cells."""
        clear_temporaries(self.folder)
        for parts in self.folder.glob("*.parts"):
            try:
                _verified(parts.with_suffix(".json").read_text())
            except (OSError, ValueError, KeyError, TypeError):
                clear_temporaries(parts)
            else:
                shutil.rmtree(parts, ignore_errors=True)


def _verified(text: str) -> dict[str, Any]:
    """The numbers in the file of a finished cell; ValueError, KeyError or TypeError if it is damaged."""
    content = json.loads(text)
    body = {"identity": content["identity"], "numbers": content["numbers"]}
    if content["sha256"] != hashlib.sha256(_canonical(body)).hexdigest():
        raise ValueError("its sha256 does not match")
    return content["numbers"]
