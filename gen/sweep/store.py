"""Where a sweep keeps what it has measured, so that a killed one loses little and is never measured twice.

    cells/<id>.json                 a finished cell: its identity, its numbers, and a sha256 of both
    cells/<id>.png                  samples of its first seeds
    cells/<id>.parts/part-<k>       seeds [k PART, (k + 1) PART) of a cell that is being measured: their features and errors;
                                    after the last of them, the figures of each block

The id is a hash of everything that the numbers depend on. A part holds a fixed range of seeds and is whole or absent, so any
process can make any part, and the numbers do not depend on how many processes there were or how often they were killed.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.config import from_dict, to_dict
from midway.gen.core.errors import DiskError, UsageError, one_line, raising
from midway.gen.core.files import DAMAGE, clear_temporaries, read_json, read_tensors, state_hash, write_atomically
from midway.gen.core.locks import check_no_link, lock, made, remove
from midway.gen.core.text import echo, json_text
from midway.gen.sweep.figures import Seconds

SCHEMA = 4
"""Of all that makes and measures a cell: raise it with every change of code that changes a number."""
PART = 1024
"""Seeds of a part: what a killed process loses at most."""
_CELL = re.compile(r"[0-9a-f]{16}\.(json|png|damaged|parts)")


@dataclass(frozen=True)
class Part:
    """Measured samples: named tensors of n rows each (features, errors, finite, ...), and what they cost, as JSON takes it."""

    tensors: dict[str, Tensor]
    costs: dict[str, Any]


Check = Callable[[int, Part], object]
"""Of the part of this number; an error of `DAMAGE` or UsageError unless it is what its reader needs."""


def check_rows(part: Part, count: int, *names: str) -> None:
    """ValueError unless the part has tensors of these names, each with `count` rows."""
    for name in names:
        rows = len(part.tensors[name]) if name in part.tensors and part.tensors[name].dim() else 0
        if rows != count:
            raise ValueError(f"{name} has {rows} rows of {count}")


@dataclass(frozen=True)
class Numbers:
    """What a finished cell holds: of each block a distance, None of samples that diverged, and of every other metric a value."""

    nfe: int
    distances: tuple[float | None, ...]
    nonfinite: int
    metrics: dict[str, tuple[float, ...]]
    seconds: Seconds
    """Of all blocks."""
    timing: str
    block_seconds: tuple[Seconds, ...] = ()
    """Of each block; empty in cells of earlier versions, which have the sum alone."""
    token_evaluations: int = 0
    """Tokens of a sample that went through the network; 0 where the source does not count them."""
    head_nfe: float = 0.0
    """Evaluations of a diffusion head for a token; 0 where there is none, and in cells of earlier versions."""

    def __post_init__(self) -> None:
        if not self.distances or any(len(values) != len(self.distances) for values in self.metrics.values()):
            raise ValueError("a distance and the metrics have one value for each block")
        if {value is None for value in self.distances} != {self.nonfinite > 0}:
            raise ValueError("there is a distance where all samples are finite, and nowhere else")
        times = dataclasses.astuple(self.seconds)
        if min(self.nfe, self.nonfinite, *times, *filter(None, self.distances)) < 0:
            raise ValueError("a count, a distance or a time is negative")


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


def _hash(value: object) -> str:
    return hashlib.sha256(_canonical(value)).hexdigest()


@dataclass(frozen=True)
class Cell:
    """One measurement in the store: parts while it is measured, numbers and a picture when it is finished."""

    folder: Path
    identity: dict[str, Any]
    """Everything that the numbers depend on, as JSON takes it."""

    @cached_property
    def id(self) -> str:
        """16 hexadecimal digits of the identity."""
        return _hash({"schema": SCHEMA, **self.identity})[:16]

    @property
    def is_finished(self) -> bool:
        """Whether there are numbers, which may be damaged."""
        return self._path.exists()

    def numbers(self) -> Numbers | None:
        """None if the cell is not finished. A damaged file is renamed and counts as absent."""
        path = self._path
        if not self.is_finished:
            return None
        try:
            identity, numbers = _verified(path)
            if _canonical(identity) != _canonical(self.identity):
                raise ValueError("it is of another identity")
            if "seeds" in self.identity and len(numbers.distances) != self.identity["seeds"][-1]:
                raise ValueError(f"it has {len(numbers.distances)} blocks")
            return numbers
        except (*DAMAGE, UsageError) as error:
            with contextlib.suppress(OSError):  # another process was first
                path.replace(path.with_suffix(".damaged"))
            echo(f"{path.name} is damaged ({one_line(error)}): kept as {path.stem}.damaged, and measured again")
            return None

    def finish(self, numbers: Numbers, png: bytes | None) -> None:
        """Write the numbers, then drop the parts."""
        body = {"identity": self.identity, "numbers": to_dict(numbers)}
        content = {**body, "sha256": _hash(body)}
        if png is not None:
            write_atomically(self._path.with_suffix(".png"), png)
        write_atomically(self._path, (json_text(content, indent=1) + "\n").encode())
        shutil.rmtree(self._parts, ignore_errors=True)

    def png(self) -> bytes | None:
        """The picture of a finished cell."""
        path = self._path.with_suffix(".png")
        return path.read_bytes() if path.exists() else None

    def has_part(self, number: int) -> bool:
        """Whether that part is there; it is not read."""
        return self._part(number).exists()

    def part(self, number: int, check: Check | None = None) -> Part | None:
        """None if it is absent or damaged, also by `check`."""
        path = self._part(number)
        if not self.has_part(number):
            return None
        try:
            tensors, header = read_tensors(path)
            costs = json.loads(header["costs"])
            if header["hash"] != state_hash(header["costs"], tensors) or not isinstance(costs, dict):
                raise ValueError("its hash does not match")
            part = Part(tensors, costs)
            if check is not None:
                check(number, part)
            return part
        except (*DAMAGE, UsageError) as error:
            echo(f"{path.parent.name}/{path.name} is damaged ({one_line(error)}): made again")
            return None

    def parts(self, numbers: Iterable[int], check: Check | None = None) -> list[Part]:
        """Parts that were written before. RuntimeError if one is gone."""
        found = {number: self.part(number, check) for number in numbers}
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
                _verified(parts.with_suffix(".json"))
            except (*DAMAGE, UsageError):
                clear_temporaries(parts)
            else:
                shutil.rmtree(parts, ignore_errors=True)


def _verified(path: Path) -> tuple[Any, Numbers]:
    """Identity and numbers in the file of a finished cell; an error of `DAMAGE` or UsageError if it is damaged."""
    content = read_json(path)
    body = {"identity": content["identity"], "numbers": content["numbers"]}
    if content["sha256"] != _hash(body):
        raise ValueError("its sha256 does not match")
    return body["identity"], from_dict(Numbers, body["numbers"], "numbers")
