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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from midway.samplers.artefacts import check_tensors, read_object, read_record, read_tensors, write_tensors
from midway.samplers.card import SolverCard
from midway.samplers.hub import Shared
from midway.samplers.prediction import Evaluations, Field, JumpField, at
from midway.samplers.rows import Coefficients, CompiledRow, NoiseSource, Row, compile_rows, run_rows
from midway.samplers.schedule import Schedule, fingerprint, schedule_of
from midway.samplers.table_checks import check_consistent, check_grid, check_nodes, check_rows
from midway.samplers.table_text import table_text

FORMAT = "midway-table-1"
NOISY = "adasde"
"""The one learned solver that draws noise."""


@dataclass(frozen=True)
class Table(Shared):
    """A solver on one grid. `nodes[k]` is the index of the state that lives at `grid[k]`."""

    solver: str
    grid: tuple[float, ...]
    nodes: tuple[int, ...]
    rows: tuple[Row, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)
    schedule: str = ""
    """`fingerprint` of the schedule that it was made for; empty for any."""

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) for text in (self.solver, self.schedule, *self.metadata.values())):
            raise ValueError(f"solver, schedule and metadata of table '{self.solver}' are texts, got {self.metadata}")
        check_rows(self.solver, self.rows)
        check_grid(self.solver, self.grid)
        check_nodes(self.solver, self.grid, self.nodes, self.rows)
        if self.is_learned and self.stochastic and self.solver != NOISY:
            raise ValueError(f"table '{self.solver}' has weights of noise, and no learned solver but {NOISY} draws any")
        if self.card is not None and (self.card.name, self.card.nfe) != (self.solver, self.nfe):
            raise ValueError(
                f"table '{self.solver}' makes {self.nfe} evaluations, its card is of {self.card.name} at NFE {self.card.nfe}"
            )
        schedule = schedule_of(self.schedule)
        if schedule is not None:
            self._check_method(schedule)

    def __repr__(self) -> str:
        """A few readable lines (table_text.py)."""
        return table_text(self.solver, self.nfe, self.schedule, self.grid, self.rows)

    @property
    def is_learned(self) -> bool:
        """Whether its weights were learned: then they are of no method, and right for one model alone."""
        return self.solver in ("table", NOISY) or self.solver.startswith("amed")

    @functools.cached_property
    def times(self) -> tuple[float, ...]:
        """When the evaluations are made."""
        return tuple(row.time for row in self.rows if row.time is not None)

    @functools.cached_property
    def ends(self) -> tuple[float, ...]:
        """Where the jump of each evaluation ends; () where evaluations are at one time."""
        return tuple(row.to for row in self.rows if row.to is not None)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of all numbers."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> str:
        numbers = [self.grid, self.nodes, [row.numbers for row in self.rows], self.schedule]
        return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:12]

    @property
    def card(self) -> SolverCard | None:
        """Of a learned table, its origin and cost."""
        return read_record(SolverCard, self.metadata["card"], "the card") if "card" in self.metadata else None

    @property
    def table(self) -> "Table":
        """Itself: its rows are the same for all samples."""
        return self

    def states(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Iterator[Tensor]:
        """Every state from x (B, *) at `grid[0]`, the start included.

        ValueError for a table that draws noise without a source, for a field of another schedule, and for jumps of a field that
        predicts at one time, or the other way round.
        """
        self.check(getattr(field, "schedule", None), noise)
        coefficients, values = self.evaluations(field, x)
        return run_rows(self.rows_for(coefficients), values, x, noise)

    def evaluations(self, field: Field, x: Tensor) -> Evaluations:
        """Those of a field at the table's times, for states like x (B, *); ValueError for jumps of a field without any."""
        if not self.ends:
            return at(field, self.times, x)
        if isinstance(field, JumpField):
            return field.jumps(self.times, self.ends, x)
        raise ValueError(
            f"table '{self.solver}' jumps from one time to another by an average velocity, and this field predicts at one "
            "time: pass the field of a model that was trained to jump, or use another solver, say euler"
        )

    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) at `grid[0]` -> (B, *) at `grid[-1]`; errors as `states`."""
        for state in self.states(field, x, noise):
            x = state
        return x

    def check_plain(self, who: str) -> None:
        """ValueError for a table that jumps, which `who` cannot."""
        if self.ends:
            raise ValueError(
                f"table '{self.solver}' jumps by average velocities, and {who} evaluates at one time: sample by the table "
                "itself, or use a solver of another kind, say euler"
            )

    def rows_for(self, coefficients: Coefficients) -> tuple[CompiledRow, ...]:
        """The rows compiled for values with these coefficients, once for each."""
        compiled = self._compiled.get(coefficients)
        if compiled is None:
            compiled = self._compiled[coefficients] = compile_rows(self.rows, coefficients)
        return compiled

    @functools.cached_property
    def _compiled(self) -> dict[Coefficients, tuple[CompiledRow, ...]]:
        return {}

    def _check_method(self, schedule: Schedule) -> None:
        """ValueError for a table that is not learned and of no method on this schedule; checked once for each."""
        if not self.is_learned and schedule not in self._checked:
            check_consistent(self.solver, self.grid, self.rows, schedule)
            self._checked.add(schedule)

    @functools.cached_property
    def _checked(self) -> set[Schedule]:
        return set()

    def check(self, schedule: Schedule | None, noise: NoiseSource | None) -> None:
        """ValueError for a table that draws noise without a source, and for another schedule than the table's."""
        if self.stochastic and noise is None:
            raise ValueError(f"table '{self.solver}' draws noise: pass a noise source, or build it with eta=0")
        if schedule is not None:
            self.check_schedule(schedule)

    def check_schedule(self, schedule: Schedule) -> None:
        """ValueError for another schedule than the table's, and for weights that are of no method on it."""
        if not self.schedule:
            return
        if self.schedule != fingerprint(schedule):
            raise ValueError(
                f"table '{self.solver}' was made for {self.schedule}, the field is of {fingerprint(schedule)}: "
                "build the table with the field's schedule"
            )
        self._check_method(schedule)

    @property
    def nfe(self) -> int:
        """Evaluations of the field per sample (the counter at the network is the authority; a test compares them)."""
        return len(self.times)

    @functools.cached_property
    def stochastic(self) -> bool:
        """Whether any row draws noise."""
        return any(row.noise != 0 for row in self.rows)

    def packed(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """All numbers as dense float64 arrays, and the rest as the header of a file."""
        n = len(self.rows)
        numbers = {
            "time": [math.nan if r.time is None else r.time for r in self.rows],
            "arrival": [r.arrival for r in self.rows],
            "noise": [r.noise for r in self.rows],
            **({"to": [math.nan if r.to is None else r.to for r in self.rows]} if self.ends else {}),
            "states": [[*r.states, *[0.0] * (n - len(r.states))] for r in self.rows],
            "predictions": [[*r.predictions, *[0.0] * (n - len(r.predictions))] for r in self.rows],
            "grid": self.grid,
        }
        arrays = {name: torch.tensor(values, dtype=torch.float64) for name, values in numbers.items()}
        arrays["nodes"] = torch.tensor(self.nodes, dtype=torch.int64)
        header = {"format": FORMAT, "solver": self.solver, "schedule": self.schedule}
        return arrays, header | {"metadata": json.dumps(dict(self.metadata)), "hash": self.hash}

    def save(self, path: Path) -> None:
        """Write the table as safetensors. Atomic."""
        write_tensors(path, *self.packed())

    @staticmethod
    def load(path: Path, schedule: Schedule | None = None) -> "Table":
        """Read a table that `save` wrote.

        ValueError for any other file, for a table of another schedule, and for weights that are of no method on it.
        """
        table = Table.unpacked(*read_tensors(path, FORMAT, "a solver table", ("solver", "metadata")), path)
        if schedule is not None:
            table.check_schedule(schedule)
            table._check_method(schedule)  # also of a file that names no schedule
        return table

    @staticmethod
    def unpacked(tensors: Mapping[str, Tensor], header: Mapping[str, str], path: Path) -> "Table":
        """The table of what `packed` gave, read from `path`; ValueError for anything else."""
        check_tensors(tensors, _layout(tensors))
        arrays = {name: tensor.tolist() for name, tensor in tensors.items()}
        rows, evaluations = [], 0
        ends = arrays.get("to", [math.nan] * len(arrays["time"]))
        for i, time in enumerate(arrays["time"]):
            evaluations += not math.isnan(time)
            weights = arrays["states"][i], arrays["predictions"][i]
            if any(weight != 0 for weight in (*weights[0][i + 1 :], *weights[1][evaluations:])):
                raise ValueError(f"row {i} of {path} weighs a state or a prediction that is not there yet")
            rows.append(
                Row(
                    time=None if math.isnan(time) else time,
                    arrival=arrays["arrival"][i],
                    states=tuple(weights[0][: i + 1]),
                    predictions=tuple(weights[1][:evaluations]),
                    noise=arrays["noise"][i],
                    to=None if math.isnan(ends[i]) else ends[i],
                )
            )
        table = Table(
            solver=header["solver"],
            grid=tuple(arrays["grid"]),
            nodes=tuple(arrays["nodes"]),
            rows=tuple(rows),
            metadata=read_object(header["metadata"], "metadata"),
            schedule=header.get("schedule", ""),
        )
        if header.get("hash", table.hash) != table.hash:
            raise ValueError(f"the numbers of {path} have hash {table.hash}, they were saved with {header['hash']}")
        return table


def _layout(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of each array, for the numbers of rows and nodes that there are."""
    n, k = (tensors[name].numel() if name in tensors else 0 for name in ("time", "grid"))
    shapes = {"time": (n,), "arrival": (n,), "noise": (n,), "states": (n, n), "predictions": (n, n), "grid": (k,)}
    shapes |= {"to": (n,)} if "to" in tensors else {}
    return {**{name: (torch.float64, shape) for name, shape in shapes.items()}, "nodes": (torch.int64, (k,))}
