"""What every sampler has in common."""

from typing import Protocol

from torch import Tensor

from midway.samplers.card import SolverCard
from midway.samplers.prediction import Field
from midway.samplers.rows import NoiseSource
from midway.samplers.table import Table


class Sampler(Protocol):
    """From noise at the first time of `grid` to data at the last: a `Table`, a `LearnedSolver`, a `ParallelSampler`."""

    @property
    def grid(self) -> tuple[float, ...]: ...

    @property
    def nfe(self) -> int:
        """Evaluations of the field per sample; of a sampler that decides on the way, the least."""
        ...

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of all its numbers, computed once."""
        ...

    @property
    def card(self) -> SolverCard | None:
        """Origin and training cost; None if it was not learned."""
        ...

    @property
    def table(self) -> Table | None:
        """The fixed rows that it runs one after the other; None if it does not."""
        ...

    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) at `grid[0]` -> (B, *) at `grid[-1]`; `noise` for samplers that draw some."""
        ...
