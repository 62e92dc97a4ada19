"""Write a folder of records (record_writer.py) by one process or several, and on after a kill.

A computation is made in batches that are counted from the first item, so that each item always has the same others beside it:
networks round other batches differently in the last digits. A shard is a whole number of batches, and process r of P makes
shards r, r + P, ...; the first process then seals the folder. Its bytes are therefore the same for any number of processes and
however often it was interrupted, on the same kind of hardware.

The plan, a file in the folder, is what the records depend on; shards of another plan are removed.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from midway.gen.core.errors import DataError, MidwayError, UsageError
from midway.gen.core.files import read_json, write_atomically
from midway.gen.core.locks import LOCK, claimed, empty
from midway.gen.core.processes import ProcessInfo, at_work, raised_by_all
from midway.gen.files.record_writer import (
    RecordFormat,
    ShardIndex,
    clear_unfinished,
    read_shard_index,
    records_per_shard,
    seal,
    write_shard,
)
from midway.gen.files.records import is_records, record_bytes
from midway.gen.progress.bar import Progress

SHARDS = 64
"""As many at least where there are as many batches, so that processes have equal shares."""
Span = tuple[int, int]
"""First item of a shard, and the one after its last."""


class Batches(Protocol):
    """The batches of a shard, for `write_shard`; `facts` is filled on the way."""

    facts: dict[str, Any]

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]: ...


@dataclass(frozen=True)
class RecordWork:
    """What is written where: `count` records in batches of `batch`, by `plan` in the file `plan_file`."""

    folder: Path
    kind: str
    form: RecordFormat
    count: int
    batch: int
    plan_file: str
    plan: dict[str, Any]
    verb: tuple[str, str]
    """What is done, for progress and for errors: ("encoding", "encoded")."""
    unit: str
    remake: str
    """What to do about a folder that lost a file, for an error."""

    @property
    def spans(self) -> list[Span]:
        """Of every shard."""
        fits = records_per_shard(self.count, record_bytes(self.form.dtype, self.form.shape or ()))
        size = self.batch * max(1, min(fits // self.batch, -(-self.count // (self.batch * SHARDS))))
        return [(first, min(first + size, self.count)) for first in range(0, self.count, size)]


def write_records(
    work: RecordWork,
    process: ProcessInfo,
    batches: Callable[[Span, Progress], Batches],
    facts: Callable[[list[ShardIndex]], dict[str, Any]],
) -> None:
    """Write the folder, together with the other processes; what an interrupted call of the same plan has written is kept.

    `facts`, called by the first process, gives what the manifest has beside the plan. UsageError where the folder has other files
    or is being written by another command; DiskError; whatever `batches` and `facts` raise.
    """
    folder, form = work.folder, work.form
    with ExitStack() as stack, at_work(work.verb[0]):
        with raised_by_all():
            if process.rank == 0:
                check_own(folder, work.plan_file, work.kind)
                stack.enter_context(claimed(folder, work.verb[1]))
                _prepare(work)
        mine = [(number, span) for number, span in process.mine(work.spans)]
        missing = [(number, span) for number, span in mine if read_shard_index(folder, number, form) is None]
        counts = [sum(end - first for _, (first, end) in some) for some in (mine, missing)]
        try:
            with Progress(work.verb[0], counts[0], work.unit, done=counts[0] - counts[1]) as progress:
                for number, span in missing:
                    made = batches(span, progress)
                    write_shard(folder, number, form, made, made.facts)
        except MidwayError:
            if process.world_size == 1 and not list(folder.glob("records-*")):
                empty(folder)
            raise
        process.wait()
        with raised_by_all():
            if process.rank == 0:
                _finish(work, facts)


def check_own(folder: Path, plan_file: str, kind: str) -> None:
    """UsageError for a folder, or a file, that `write_records` would not have made."""
    if folder.is_dir() and ((folder / plan_file).is_file() or not [p for p in folder.iterdir() if p.name != LOCK]):
        return
    if folder.exists():
        raise UsageError(
            f"{folder} is no folder of {kind}", "it would be replaced", "choose another folder, or move it away"
        )


def _prepare(work: RecordWork) -> None:
    """An empty folder with this plan, or the unfinished one of the same plan."""
    folder, file = work.folder, work.folder / work.plan_file
    try:
        same = read_json(file) == work.plan and not is_records(folder)
    except (OSError, ValueError):
        same = False
    clear_unfinished(folder)
    if not same:
        empty(folder)
        write_atomically(file, (json.dumps(work.plan, indent=1) + "\n").encode())


def _finish(work: RecordWork, facts: Callable[[list[ShardIndex]], dict[str, Any]]) -> None:
    """Seal. DataError if another program took a shard away."""
    found: Sequence[ShardIndex | None] = [
        read_shard_index(work.folder, number, work.form) for number in range(len(work.spans))
    ]
    indices = [index for index in found if index is not None]
    if len(indices) < len(found):
        raise DataError(f"{work.folder} lost a file while it was written", "another program removed it", work.remake)
    seal(work.folder, work.kind, work.form, indices, {**work.plan, **facts(indices)})
