"""A solver as numbers.

Row i of a table evaluates the network at the newest state x_i (or does not, for analytic rows) and forms the next state

    x_{i+1} = sum_j states[j] x_j + sum_j predictions[j] D_j + noise z,

with D_j the j-th clean estimate x0 by the network. Every explicit solver is of this form: the stages of a Runge-Kutta
step are states of their own, multistep solvers weigh earlier predictions, analytic first steps are rows without an evaluation.
x0 is the estimate kept because only division by sigma > 0 is then ever needed, never by alpha, which is 0 at the noise end.

`recorder.Recorder` lets a solver be written with the symbols of its paper; it records the resulting weights in float64.
"""

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from midway.samplers.card import SolverCard
from midway.samplers.prediction import Field, at
from midway.samplers.rows import Coefficients, CompiledRow, NoiseSource, Row, compile_rows, run_rows
from midway.samplers.schedule import Schedule

FORMAT = "midway-table-1"
FILE_LIMIT = 1 << 30
"""Bytes of a saved solver. Tables have some kB, the largest predictors of numbers per sample some MB."""


@dataclass(frozen=True)
class Table:
    """A solver on one grid. `nodes[k]` is the index of the state that lives at `grid[k]`."""

    solver: str
    grid: tuple[float, ...]
    nodes: tuple[int, ...]
    rows: tuple[Row, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    schedule: str = ""
    """`fingerprint` of the schedule that it was made for; empty for any."""

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

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of all numbers."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        numbers = [self.grid, self.nodes, [astuple(row) for row in self.rows], self.schedule]
        return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]

    @property
    def card(self) -> SolverCard | None:
        """Of a learned table, its origin and cost."""
        return SolverCard(**json.loads(self.metadata["card"])) if "card" in self.metadata else None

    @property
    def table(self) -> "Table":
        """Itself: its rows are the same for all samples."""
        return self

    def states(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Iterator[Tensor]:
        """Every state from x (B, *) at `grid[0]`, the start included.

        ValueError for a table that draws noise without a source, and for a field of another schedule.
        """
        self.check(getattr(field, "schedule", None), noise)
        coefficients, values = at(field, self.times, x)
        return run_rows(self.rows_for(coefficients), values, x, noise)

    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) at `grid[0]` -> (B, *) at `grid[-1]`; errors as `states`."""
        for state in self.states(field, x, noise):
            x = state
        return x

    def rows_for(self, coefficients: Coefficients) -> tuple[CompiledRow, ...]:
        """The rows compiled for values with these coefficients, once for each."""
        compiled = self._compiled.get(coefficients)
        if compiled is None:
            compiled = self._compiled[coefficients] = compile_rows(self.rows, coefficients)
        return compiled

    @functools.cached_property
    def _compiled(self) -> dict[Coefficients, tuple[CompiledRow, ...]]:
        return {}

    def check(self, schedule: Schedule | None, noise: NoiseSource | None) -> None:
        """ValueError for a table that draws noise without a source, and for another schedule than the table's."""
        if self.stochastic and noise is None:
            raise ValueError(f"table '{self.solver}' draws noise: pass a noise source, or build it with eta=0")
        if schedule is not None and self.schedule and self.schedule != fingerprint(schedule):
            raise ValueError(
                f"table '{self.solver}' was made for {self.schedule}, the field is of {fingerprint(schedule)}: "
                "build the table with the field's schedule"
            )

    @property
    def nfe(self) -> int:
        """Evaluations of the field per sample (the counter at the network is the authority; a test compares them)."""
        return len(self.times)

    @functools.cached_property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(row.noise != 0 for row in self.rows)

    def save(self, path: Path) -> None:
        """Write the table as safetensors: dense float64 arrays, the rest as JSON metadata. Atomic."""
        n = len(self.rows)
        numbers = {
            "time": [math.nan if r.time is None else r.time for r in self.rows],
            "arrival": [r.arrival for r in self.rows],
            "noise": [r.noise for r in self.rows],
            "states": [[*r.states, *[0.0] * (n - len(r.states))] for r in self.rows],
            "predictions": [[*r.predictions, *[0.0] * (n - len(r.predictions))] for r in self.rows],
            "grid": self.grid,
        }
        arrays = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
        arrays["nodes"] = torch.tensor(self.nodes, dtype=torch.int64)
        header = {"format": FORMAT, "solver": self.solver, "schedule": self.schedule}
        header["metadata"] = json.dumps(dict(self.metadata))
        write_tensors(path, arrays, header)

    @staticmethod
    def load(path: Path) -> "Table":
        """Read a table that `save` wrote; ValueError for any other file."""
        tensors, header = read_tensors(path, FORMAT, "a solver table")
        arrays = {name: tensor.tolist() for name, tensor in tensors.items()}
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


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
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


def readable(path: Path) -> Path:
    """`path`, if it is a regular file of at most `FILE_LIMIT` bytes; ValueError: pipes and devices never end."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: give a file that a solver was saved to")
    if size > FILE_LIMIT:
        raise ValueError(f"{path} has {size:,} bytes, more than the limit of {FILE_LIMIT:,}: it is no solver")
    return path


def read_tensors(path: Path, form: str, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file by `write_tensors` whose format is `form`; ValueError for any other, which is not `what`."""
    with safe_open(readable(path), framework="pt") as file:
        header = file.metadata() or {}
        if header.get("format") != form:
            raise ValueError(f"{path} is not {what} ({form}): its format is {header.get('format')!r}")
        return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118 (safe_open has no iter)


@functools.lru_cache
def fingerprint(schedule: Schedule) -> str:
    """A short text that tells schedules apart: what the schedule prints, hashed if that is long."""
    text = repr(schedule)
    return text if len(text) <= 100 else f"{type(schedule).__name__}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"
