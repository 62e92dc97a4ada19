"""A learned solver as an artefact: its numbers together with the grid, schedule and model they were learned for."""

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.card import SolverCard
from midway.samplers.grids import Grid
from midway.samplers.plugin import BASES, plugin_table
from midway.samplers.prediction import Field
from midway.samplers.rows import NoiseSource
from midway.samplers.schedule import SCHEDULES, Schedule
from midway.samplers.step_parameters import AMEDConfig, Constants, Predictor
from midway.samplers.table import Table, fingerprint, read_tensors, write_tensors

FORMAT = "midway-amed-1"


@dataclass(frozen=True)
class Learned:
    """The form that the name of a learned solver stands for."""

    base: str
    """Solver that AMED is plugged into, none for AMED-Solver."""
    constants: bool
    """Constants per step, or a predictor per sample."""


LEARNED: dict[str, Learned] = {
    ("amed" if base == "none" else f"amed-plugin-{base}") + form: Learned(base, bool(form))
    for base in BASES
    for form in ("", "-constants")
}
"""amed, amed-constants, and amed-plugin-<base>[-constants] for every base."""


def same_schedule(name: str, schedule: Schedule) -> bool:
    """Whether a card's `schedule` names this one."""
    return name == fingerprint(schedule) or (name in SCHEDULES and SCHEDULES[name]() == schedule)


@dataclass(frozen=True)
class LearnedSolver:
    """An AMED solver on the schedule that it was learned on.

    ValueError for another schedule, numbers that are not finite, or another number of steps than the grid's.
    """

    card: SolverCard
    grid: Grid
    rule: Constants | Predictor
    schedule: Schedule

    def __post_init__(self) -> None:
        steps = len(self.grid) - 1
        if len(self.rule.raw) != steps:
            raise ValueError(
                f"the rule has numbers for {len(self.rule.raw)} steps, the grid has {steps}: they do not match"
            )
        if not all(bool(value.isfinite().all()) for value in self.rule.parameters()):
            raise ValueError(
                f"{self.card.name} has learned numbers that are not finite: learn it again at a lower rate"
            )
        if not same_schedule(self.card.schedule, self.schedule):
            raise ValueError(
                f"{self.card.name} was learned on schedule {self.card.schedule}, this one is {fingerprint(self.schedule)}: "
                "learn a solver for the model that you sample"
            )

    @property
    def nfe(self) -> int:
        return self.card.nfe

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the card, the grid and all learned numbers."""
        return self._hash

    @cached_property
    def _hash(self) -> str:
        description = json.dumps([asdict(self.card), self.grid])
        state = {name: value.contiguous() for name, value in self.rule.state_dict().items()}
        return hashlib.sha256(description.encode() + save(state)).hexdigest()[:12]

    @property
    def table(self) -> Table | None:
        """The plain table that constants are; None for a predictor."""
        return self._table

    @cached_property
    def _table(self) -> Table | None:
        if isinstance(self.rule, Predictor):
            return None
        card = self.card
        return plugin_table(self.schedule, self.grid, card.base, self.rule.values(), card.analytic_first, card.name)

    @torch.no_grad()
    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) noise at `grid[0]` -> (B, *) at `grid[-1]`. ValueError for features that the predictor cannot read."""
        if self.table is not None:
            return self.table.run(field, x)
        assert isinstance(self.rule, Predictor)
        solver = AMEDSolver(self.schedule, self.grid, self.card.base, self.card.analytic_first, self.rule.feature_dim)
        return nodes(solver, field, self.rule.to(x.device), x)[-1]

    def save(self, path: Path) -> None:
        """One safetensors file, written beside `path` and renamed."""
        header = {
            "format": FORMAT,
            "card": json.dumps(asdict(self.card)),
            "config": json.dumps(asdict(self.rule.config)),
            "feature_dim": str(self.rule.feature_dim),
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.rule.state_dict().items()}
        tensors["grid"] = torch.tensor(self.grid, dtype=torch.float64)
        write_tensors(path, tensors, header)

    @staticmethod
    def load(path: Path, schedule: Schedule) -> "LearnedSolver":
        """Read what `save` wrote; ValueError for any other file, and for another schedule than it was learned on."""
        tensors, header = read_tensors(path, FORMAT, "a learned solver")
        grid = tuple(tensors.pop("grid").tolist())
        config = AMEDConfig(**json.loads(header["config"]))
        dim = int(header["feature_dim"])
        rule = Predictor(dim, len(grid) - 1, config) if dim else Constants(len(grid) - 1, config)
        rule.load_state_dict(tensors)
        return LearnedSolver(SolverCard(**json.loads(header["card"])), grid, rule.eval(), schedule)
