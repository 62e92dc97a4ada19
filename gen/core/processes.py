"""Several processes that work together: which of them this is, on which device it computes, how it joins and leaves them.

What is needed only where there are several (`watch.py`) is imported there.
"""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NoReturn, TypeVar

import torch
from torch import distributed

from midway.gen.core import signals
from midway.gen.core.errors import MidwayError, UsageError
from midway.gen.core.terminal import exit_now

if TYPE_CHECKING:
    from midway.gen.core.watch import Watch

Item = TypeVar("Item")

PATIENCE, GRACE = 60.0, 5.0
"""Seconds that a process which leaves may take: after success, and after an error."""


@dataclass(frozen=True)
class ProcessInfo:
    """Which of how many processes this is; `wait` returns when all have called it."""

    rank: int = 0
    world_size: int = 1
    wait: Callable[[], None] = lambda: None

    def mine(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """(number, item) of those that this process makes."""
        return [(i, item) for i, item in enumerate(items) if i % self.world_size == self.rank]


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Within the block torch adds in one order on the CPU, whatever the number of threads: sums are the same bits on all."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def launched() -> tuple[int, int]:
    """Rank and number of processes as the launcher set them, (0, 1) without one; UsageError if they are not valid."""
    texts = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world_size = map(int, texts)
    except ValueError:
        rank, world_size = -1, 0
    if world_size < 1 or (world_size > 1 and not 0 <= rank < world_size):
        why = "ranks count from 0 to WORLD_SIZE - 1"
        raise UsageError(f"RANK={texts[0]} WORLD_SIZE={texts[1]}", why, "start with torchrun or accelerate launch")
    return rank, world_size


# ---- joining ----

_watch: "Watch | None" = None


def watch() -> "Watch | None":
    """The watch of this process, from the first call on; None in a program of one process. UsageError of the environment."""
    global _watch
    rank, world_size = launched()
    if _watch is None and world_size > 1:
        from midway.gen.core.watch import Limits, Watch

        host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
        if not host or not port.isdigit():
            what, why = f"WORLD_SIZE={world_size}", "MASTER_ADDR and MASTER_PORT do not name the first process"
            raise UsageError(what, why, "start with torchrun or accelerate launch")
        _watch = Watch(rank, world_size, host, int(port), Limits.read())
    return _watch


@contextlib.contextmanager
def joining() -> Iterator[timedelta]:
    """Within the block the process group is made; gives the time after which its operations end by themselves."""
    its = watch()
    if its is None:
        yield timedelta(minutes=30)
        return
    its.joining = True
    yield its.limits.last
    its.introduce()


def device_and_process() -> tuple[torch.device, ProcessInfo]:
    """Where this process computes, and which of several processes it is."""
    if launched()[1] == 1:
        return best_device(), ProcessInfo()
    from accelerate import PartialState

    with joining() as patience:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
    device = state.device or torch.device("cpu")
    return device, ProcessInfo(state.process_index, state.num_processes, state.wait_for_everyone)


# ---- working ----


@contextlib.contextmanager
def at_work(what: str) -> Iterator[None]:
    """Within the block this process does something for which the others may have to wait."""
    its = _watch
    if its is None:
        yield
        return
    before, its.work = its.work, what
    try:
        yield
    finally:
        its.work = before


@contextlib.contextmanager
def raised_by_all() -> Iterator[None]:
    """Within the block the first process does what all depend on, and the others wait at its end; a MidwayError that it
    raises there is raised by all of them."""
    failure = None
    try:
        yield
    except MidwayError as error:
        failure = error
    if distributed.is_available() and distributed.is_initialized():
        from midway.gen.core.partner_errors import PartnerError

        shared = [failure and (failure.what, failure.why, failure.fix, failure.exit_code)]
        distributed.broadcast_object_list(shared)
        if failure is None and shared[0] is not None:
            raise PartnerError(*shared[0])
    if failure is not None:
        raise failure


def first_of_all(value: Item) -> Item:
    """What the first process has of it, on every process; each has to call it."""
    shared = [value]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(shared)
    return shared[0]


def is_first(text: str) -> bool:
    """Whether no other process has printed this text."""
    return _watch is None or _watch.exchange(claim=text)


def explain(error: Exception) -> MidwayError | None:
    """The error of other processes behind an error of communication; None for any other error, and without other processes."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return None
    from midway.gen.core.partner_errors import communication_error

    return communication_error(error, dict if _watch is None else _watch.find_ended)


# ---- leaving ----


def leave_processes(code: int = 0) -> None:
    """Destroy the process group, whose threads would otherwise outlive the interpreter and abort it (exit code -6).

    Processes that succeeded (`code` 0) first wait for one another; one that failed does not, and the others learn its code. A
    process that cannot leave within PATIENCE or GRACE seconds, because a peer does not answer, exits at once with `code`.
    """
    joined = distributed.is_available() and distributed.is_initialized()
    if not joined and _watch is None:
        return
    limit = threading.Timer(GRACE if code else PATIENCE, exit_now, [code])
    limit.daemon = True
    limit.start()
    if code:
        _tell(code)
    with contextlib.suppress(RuntimeError):  # the work is done: a peer that failed meanwhile changes nothing
        if joined and code == 0:
            if _watch is not None:
                _watch.leaving = True
            distributed.barrier()
        if joined:
            distributed.destroy_process_group()
    _tell(code)
    signals.conclude(
        last=_watch is not None
    )  # a launcher that ends all of them does not change this one's code any more
    limit.cancel()


def _tell(code: int) -> None:
    if _watch is not None:
        _watch.leave(code)


def end(text: str, code: int) -> NoReturn:
    """Print a text unless another process has, and end this process, from any thread."""
    if _watch is not None:
        _watch.end(text, code)
    signals.end(text, code)
