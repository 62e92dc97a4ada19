"""A solver as numbers.

Row i of a table evaluates the network at the newest state x_i (or does not, for analytic rows) and forms the next state

    x_{i+1} = sum_j states[j] x_j + sum_j predictions[j] D_j + noise z,

with D_j the j-th clean estimate x0 that the network gave. Every explicit solver is of this form: the stages of a Runge-Kutta
step are states of their own, multistep solvers weigh earlier predictions, analytic first steps are rows without an evaluation.
x0 is the estimate kept because only division by sigma > 0 is then ever needed, never by alpha, which is 0 at the noise end.

`Recorder` lets a solver be written with the symbols of its paper; it records the resulting weights in float64.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from midway.samplers.schedule import Schedule

FORMAT = "midway-table-1"


@dataclass(frozen=True)
class Row:
    """One line of a table.

    time: where the newest state is evaluated, None for no evaluation. arrival: the time at which the new state lives.
    states: weights on x_0 .. x_i. predictions: weights on all D_j so far, this row's own last. noise: weight of fresh noise.
    """

    time: float | None
    arrival: float
    states: tuple[float, ...]
    predictions: tuple[float, ...]
    noise: float = 0.0


@dataclass(frozen=True)
class Table:
    """A solver on one grid. `nodes[k]` is the index of the state that lives at `grid[k]`."""

    solver: str
    grid: tuple[float, ...]
    nodes: tuple[int, ...]
    rows: tuple[Row, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    schedule: str = ""
    """`fingerprint` of the schedule it was made for; empty if it does not say."""

    def __post_init__(self) -> None:
        evaluations = 0
        for i, row in enumerate(self.rows):
            evaluations += row.time is not None
            if len(row.states) != i + 1 or len(row.predictions) != evaluations:
                raise ValueError(
                    f"row {i} of table '{self.solver}' has {len(row.states)} state and {len(row.predictions)} prediction "
                    f"weights; it needs {i + 1} and {evaluations}: one for every state and evaluation so far"
                )
            if not all(math.isfinite(w) for w in (*row.states, *row.predictions, row.noise, row.arrival)):
                raise ValueError(
                    f"row {i} of table '{self.solver}' has a weight that is not finite: start the grid where alpha > 0 "
                    "and end it where sigma > 0"
                )
        if len(self.nodes) != len(self.grid) or self.nodes[0] != 0 or self.nodes[-1] != len(self.rows):
            raise ValueError(f"table '{self.solver}' must have one node per grid time, from state 0 to the last state")

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """When the evaluations are made."""
        return tuple(row.time for row in self.rows if row.time is not None)

    @functools.cached_property
    def plans(self) -> dict[Any, Any]:
        """What samplers have made of this table, so that they do it once."""
        return {}

    @property
    def nfe(self) -> int:
        """Evaluations of the field per sample (the counter at the network is the authority; a test compares them)."""
        return sum(row.time is not None for row in self.rows)

    @functools.cached_property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(row.noise != 0 for row in self.rows)

    def save(self, path: Path) -> None:
        """Write the table as safetensors: dense float64 arrays, the rest as JSON metadata. Atomic."""
        n = len(self.rows)
        arrays = {
            "time": torch.tensor([math.nan if r.time is None else r.time for r in self.rows], dtype=torch.float64),
            "arrival": torch.tensor([r.arrival for r in self.rows], dtype=torch.float64),
            "noise": torch.tensor([r.noise for r in self.rows], dtype=torch.float64),
            "states": torch.tensor([[*r.states, *[0.0] * (n - len(r.states))] for r in self.rows], dtype=torch.float64),
            "predictions": torch.tensor(
                [[*r.predictions, *[0.0] * (n - len(r.predictions))] for r in self.rows], dtype=torch.float64
            ),
            "grid": torch.tensor(self.grid, dtype=torch.float64),
            "nodes": torch.tensor(self.nodes, dtype=torch.int64),
        }
        header = {"format": FORMAT, "solver": self.solver, "schedule": self.schedule}
        header["metadata"] = json.dumps(dict(self.metadata))
        write_tensors(path, arrays, header)

    @staticmethod
    def load(path: Path) -> "Table":
        """Read a table that `save` wrote; ValueError for any other file."""
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} is not a solver table ({FORMAT}): it says {header.get('format')!r}")
            arrays = {name: file.get_tensor(name).tolist() for name in file.keys()}  # noqa: SIM118 (safe_open has no iter)
        rows, evaluations = [], 0
        for i, time in enumerate(arrays["time"]):
            evaluations += not math.isnan(time)
            rows.append(
                Row(
                    time=None if math.isnan(time) else time,
                    arrival=arrays["arrival"][i],
                    states=tuple(arrays["states"][i][: i + 1]),
                    predictions=tuple(arrays["predictions"][i][:evaluations]),
                    noise=arrays["noise"][i],
                )
            )
        return Table(
            solver=header["solver"],
            grid=tuple(arrays["grid"]),
            nodes=tuple(arrays["nodes"]),
            rows=tuple(rows),
            metadata=json.loads(header["metadata"]),
            schedule=header.get("schedule", ""),
        )


@dataclass(frozen=True)
class Combination:
    """A weighted sum of states, clean estimates and fresh noise: what a row will form."""

    states: Mapping[int, float]
    predictions: Mapping[int, float]
    noise: float = 0.0

    def __add__(self, other: "Combination") -> "Combination":
        return Combination(
            _add(self.states, other.states), _add(self.predictions, other.predictions), self.noise + other.noise
        )

    def __mul__(self, scale: float) -> "Combination":
        return Combination(
            {k: scale * w for k, w in self.states.items()},
            {k: scale * w for k, w in self.predictions.items()},
            scale * self.noise,
        )

    __rmul__ = __mul__

    def __sub__(self, other: "Combination") -> "Combination":
        return self + -1.0 * other

    def __truediv__(self, scale: float) -> "Combination":
        return self * (1.0 / scale)


FRESH_NOISE = Combination({}, {}, 1.0)


def _add(a: Mapping[int, float], b: Mapping[int, float]) -> dict[int, float]:
    return {k: a.get(k, 0.0) + b.get(k, 0.0) for k in {**a, **b}}


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
        if len(grid) < 2 or not (_falls(grid) or _falls(grid[::-1])) or min(grid) < 0 or max(grid) > 1:
            raise ValueError(
                f"'{solver}' needs a grid of at least two times within [0, 1] that falls all the way (or rises, for inversion), "
                f"got {grid}"
            )
        self.solver, self.schedule, self.grid = solver, schedule, grid
        self.rows: list[Row] = []
        self.nodes = [0]
        self.evaluations = 0
        self._pending: float | None = None

    @property
    def x(self) -> Combination:
        """The newest state."""
        return Combination({len(self.rows): 1.0}, {})

    def alpha(self, t: float) -> float:
        return self.schedule.alpha(_scalar(t)).item()

    def sigma(self, t: float) -> float:
        return self.schedule.sigma(_scalar(t)).item()

    def rho(self, t: float) -> float:
        return self.schedule.rho(_scalar(t)).item()

    def time_of_rho(self, rho: float) -> float:
        return self.schedule.time_of_rho(_scalar(rho)).item()

    def _symbols(self, t: float, x0: Combination, eps: Combination) -> Symbols:
        d_alpha, d_sigma = (rate.item() for rate in self.schedule.rates(_scalar(t)))
        return Symbols(self.x, x0, eps, d_alpha * x0 + d_sigma * eps)

    def evaluate(self, t: float) -> Symbols:
        """Evaluate the network at the newest state and time `t`."""
        self._pending = t
        x0 = Combination({}, {self.evaluations: 1.0})
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
        """`analytic` for the first row of a table that asks for it, else `evaluate`."""
        return self.analytic(t) if analytic_first and not self.rows else self.evaluate(t)

    def advance(self, value: Combination, t: float, node: bool = True) -> Combination:
        """Close the row: `value` becomes the newest state, living at `t`; a grid node unless it is an inner stage."""
        self.rows.append(
            Row(
                time=self._pending,
                arrival=t,
                states=tuple(value.states.get(j, 0.0) for j in range(len(self.rows) + 1)),
                predictions=tuple(value.predictions.get(j, 0.0) for j in range(self.evaluations)),
                noise=value.noise,
            )
        )
        self._pending = None
        if node:
            self.nodes.append(len(self.rows))
        return self.x

    def table(self, **metadata: str) -> Table:
        """The finished table."""
        made_for = fingerprint(self.schedule)
        return Table(self.solver, self.grid, tuple(self.nodes), tuple(self.rows), metadata, made_for)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: Mapping[str, str]) -> None:
    """A safetensors file, written completely or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(save(dict(tensors), dict(header)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@functools.lru_cache
def fingerprint(schedule: Schedule) -> str:
    """A short text that tells schedules apart: what the schedule prints, hashed if that is long."""
    text = repr(schedule)
    return text if len(text) <= 100 else f"{type(schedule).__name__}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def _falls(grid: tuple[float, ...]) -> bool:
    return all(a > b for a, b in pairwise(grid))


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)
