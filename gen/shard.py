"""Which share of a list of tasks is this process's."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shard:
    """Which of how many processes this is; `wait` returns when all have called it."""

    rank: int = 0
    world: int = 1
    wait: Callable[[], None] = lambda: None

    def mine(self, items: Sequence[Item]) -> list[tuple[int, Item]]:
        """(number, item) of those that this process makes."""
        return [(i, item) for i, item in enumerate(items) if i % self.world == self.rank]
