"""A solver's arithmetic, written with the symbols of its paper and recorded as the rows of a table, in float64."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from midway.samplers.rows import Row
from midway.samplers.schedule import Schedule, fingerprint
from midway.samplers.table import Table
from midway.samplers.table_checks import check_grid


@dataclass(frozen=True)
class Combination:
    """A weighted sum of states ("x", i), clean estimates ("D", j) and fresh noise ("z", 0): what a row will form."""

    weights: Mapping[tuple[str, int], float]

    def __add__(self, other: "Combination") -> "Combination":
        a, b = self.weights, other.weights
        return Combination({k: a.get(k, 0.0) + b.get(k, 0.0) for k in {**a, **b}})

    def __mul__(self, scale: float) -> "Combination":
        return Combination({k: scale * w for k, w in self.weights.items()})

    __rmul__ = __mul__

    def __sub__(self, other: "Combination") -> "Combination":
        return self + -1.0 * other

    def __truediv__(self, scale: float) -> "Combination":
        return self * (1.0 / scale)


FRESH_NOISE = Combination({("z", 0): 1.0})


@dataclass(frozen=True)
class Symbols:
    """What an evaluation gives a solver to compute with, and the schedule's numbers there."""

    x: Combination
    x0: Combination
    eps: Combination
    velocity: Combination


class Recorder:
    """Records a solver's arithmetic as the rows of a table.

    `evaluate(t)` marks an evaluation of the newest state and gives its symbols; `advance(value, t)` closes the row and makes
    `value` the newest state.
    """

    def __init__(self, solver: str, schedule: Schedule, grid: tuple[float, ...]) -> None:
        check_grid(solver, grid)
        self.solver, self.schedule, self.grid = solver, schedule, grid
        self.rows: list[Row] = []
        self.nodes = [0]
        self.evaluations = 0
        self._pending: tuple[float | None, float | None] = None, None

    @property
    def x(self) -> Combination:
        """The newest state."""
        return Combination({("x", len(self.rows)): 1.0})

    def alpha(self, t: float) -> float:
        return self.schedule.alpha(scalar(t)).item()

    def sigma(self, t: float) -> float:
        return self.schedule.sigma(scalar(t)).item()

    def rho(self, t: float) -> float:
        return self.schedule.rho(scalar(t)).item()

    def log_rho(self, t: float) -> float:
        """log(sigma / alpha): infinite at pure noise, minus infinite at data."""
        rho = self.rho(t)
        return math.log(rho) if rho > 0 else -math.inf

    def time_of_rho(self, rho: float) -> float:
        return self.schedule.time_of_rho(scalar(rho)).item()

    def _symbols(self, t: float, x0: Combination, eps: Combination) -> Symbols:
        d_alpha, d_sigma = (rate.item() for rate in self.schedule.rates(scalar(t)))
        return Symbols(self.x, x0, eps, d_alpha * x0 + d_sigma * eps)

    def evaluate(self, t: float, to: float | None = None) -> Symbols:
        """Evaluate the network at the newest state and time `t`; with `to`, the velocity is the average one to there."""
        self._pending = t, to
        x0 = Combination({("D", self.evaluations): 1.0})
        self.evaluations += 1
        return self._symbols(t, x0, (self.x - self.alpha(t) * x0) / self.sigma(t))

    def analytic(self, t: float) -> Symbols:
        """The direction eps = x / sqrt(alpha^2 + sigma^2) instead of an evaluation (AFS: x / sqrt(1 + t^2) on `EDM`,
        Dockhorn et al. 2022, arXiv 2210.05475; Zhou et al. 2024, arXiv 2312.00094)."""
        alpha, sigma = self.alpha(t), self.sigma(t)
        norm = math.hypot(alpha, sigma)
        # x0 = (x - sigma eps) / alpha, written without the cancellation at alpha -> 0
        return self._symbols(t, self.x * (alpha / (norm * (norm + sigma))), self.x / norm)

    def first(self, t: float, analytic_first: bool) -> Symbols:
        """`analytic` for the first row of a table built so, else `evaluate`."""
        return self.analytic(t) if analytic_first and not self.rows else self.evaluate(t)

    def advance(self, value: Combination, t: float, node: bool = True) -> Combination:
        """Close the row: `value` becomes the newest state, living at `t`; a grid node unless it is an inner stage."""
        time, to = self._pending
        self.rows.append(
            Row(
                time=time,
                arrival=t,
                states=tuple(value.weights.get(("x", i), 0.0) for i in range(len(self.rows) + 1)),
                predictions=tuple(value.weights.get(("D", j), 0.0) for j in range(self.evaluations)),
                noise=value.weights.get(("z", 0), 0.0),
                to=to,
            )
        )
        self._pending = None, None
        if node:
            self.nodes.append(len(self.rows))
        return self.x

    def table(self, **metadata: str) -> Table:
        """The finished table."""
        made_for = fingerprint(self.schedule)
        return Table(self.solver, self.grid, tuple(self.nodes), tuple(self.rows), metadata, made_for)


def scalar(value: float) -> torch.Tensor:
    """A number () in float64."""
    return torch.tensor(value, dtype=torch.float64)
