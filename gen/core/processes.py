"""Several processes that work together: which of them this is, on which device it computes, and how it leaves them."""

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from midway.gen.core import partners
from midway.gen.core.terminal import exit_now

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


def device_and_process() -> tuple[torch.device, ProcessInfo]:
    """Where this process computes, and which of several processes it is."""
    if partners.launched()[1] == 1:
        return best_device(), ProcessInfo()
    from accelerate import PartialState

    with partners.joining() as seconds:
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(seconds=seconds))
    device = state.device or torch.device("cpu")
    return device, ProcessInfo(state.process_index, state.num_processes, state.wait_for_everyone)


def leave_processes(code: int = 0) -> None:
    """Destroy the process group, whose threads would otherwise outlive the interpreter and abort it (exit code -6).

    Processes that succeeded (`code` 0) first wait for one another; one that failed does not, and the others learn its code. A
    process that cannot leave within PATIENCE or GRACE seconds, because a peer does not answer, exits at once with `code`.
    """
    limit = threading.Timer(GRACE if code else PATIENCE, exit_now, [code])
    limit.daemon = True
    limit.start()
    if code:
        partners.leave(code)
    if distributed.is_available() and distributed.is_initialized():
        with contextlib.suppress(RuntimeError):  # the work is done: a peer that failed meanwhile changes nothing
            if code == 0:
                partners.finish()
                distributed.barrier()
            distributed.destroy_process_group()
    partners.leave(code)
    limit.cancel()
