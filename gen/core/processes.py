"""Which share of a list of tasks is this process's."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState

Item = TypeVar("Item")


@dataclass(frozen=True)
class ProcessInfo:
    """Which of how many processes this is; `wait` returns when all have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None

    def mine(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """(number, item) of those that this process makes."""
        return [(i, item) for i, item in enumerate(items) if i % self.world == self.rank]


def best_device() -> torch.device:
    """The GPU if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_and_shard() -> tuple[torch.device, ProcessInfo]:
    """Where this process computes, and its share of what several processes do together."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu"), ProcessInfo()
    patience = timedelta(hours=12)  # a process that is done waits for one that still measures
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=patience)
    return state.device or torch.device("cpu"), ProcessInfo(
        state.process_index, state.num_processes, state.wait_for_everyone
    )
