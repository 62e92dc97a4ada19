"""A learned solver as an artefact: its numbers together with the grid, schedule and model they were learned for."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.directions import AMEDConfig, Constants, Predictor
from midway.samplers.grids import Grid
from midway.samplers.plugin import BASES, plugin_table
from midway.samplers.prediction import Field
from midway.samplers.sample import sample
from midway.samplers.schedule import SCHEDULES, Schedule
from midway.samplers.table import Table, fingerprint, write_tensors

FORMAT = "midway-amed-1"


@dataclass(frozen=True)
class Learned:
    """What the name of a learned solver says."""

    base: str
    """Solver that AMED is plugged into, none for AMED-Solver."""
    constants: bool
    """Constants per step, or a predictor per sample."""


def _plugins() -> dict[str, Learned]:
    forms = {"": False, "-constants": True}
    return {f"amed-plugin-{b}{f}": Learned(b, c) for b in BASES if b != "none" for f, c in forms.items()}


LEARNED: dict[str, Learned] = {"amed": Learned("none", False), "amed-constants": Learned("none", True), **_plugins()}
"""amed, amed-constants, and amed-plugin-<base>[-constants] for every base."""


@dataclass(frozen=True)
class SolverCard:
    """What a learned solver belongs to and what it cost."""

    name: str
    """A name in `LEARNED`."""
    grid_name: str
    schedule: str
    """Its name in `SCHEDULES`, or `table.fingerprint` of any other."""
    model_hash: str
    nfe: int
    analytic_first: bool
    guidance: float
    training_nfe: int
    """Network evaluations spent on distillation, teacher included; each run of the network counts 1, with gradient or without."""
    teacher: str
    base: str = "none"
    """Solver that AMED is plugged into, a name in `plugin.BASES`."""
    mode: str = "per_step"
    """How it was distilled: per_step or end_to_end."""


def same_schedule(name: str, schedule: Schedule) -> bool:
    """Whether a card's `schedule` names this one."""
    return name == fingerprint(schedule) or (name in SCHEDULES and SCHEDULES[name]() == schedule)


@dataclass(frozen=True)
class LearnedSolver:
    """An AMED solver ready to sample. ValueError for numbers that are not finite or another number of steps than the grid's."""

    card: SolverCard
    grid: Grid
    rule: Constants | Predictor

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

    def table(self, schedule: Schedule) -> Table | None:
        """The plain table that constants are; None for a predictor. ValueError for another schedule than it was learned on."""
        self._check(schedule)
        if isinstance(self.rule, Predictor):
            return None
        card = self.card
        return plugin_table(schedule, self.grid, card.base, self.rule.values(), card.analytic_first, card.name)

    @torch.no_grad()
    def sample(self, field: Field, schedule: Schedule, x: Tensor) -> Tensor:
        """x (B, *) noise at `grid[0]` -> (B, *) at `grid[-1]`.

        ValueError for another schedule, and for a field whose features the predictor cannot read.
        """
        table = self.table(schedule)
        if table is not None:
            return sample(field, table, x)
        assert isinstance(self.rule, Predictor)
        solver = AMEDSolver(schedule, self.grid, self.card.base, self.card.analytic_first, self.rule.feature_dim)
        return nodes(solver, field, self.rule.to(x.device), x)[-1]

    def _check(self, schedule: Schedule) -> None:
        if not same_schedule(self.card.schedule, schedule):
            raise ValueError(
                f"{self.card.name} was learned on schedule {self.card.schedule}, this one is {fingerprint(schedule)}: "
                "learn a solver for the model that you sample"
            )

    def save(self, path: Path) -> None:
        """One safetensors file, written beside `path` and renamed."""
        feature_dim = self.rule.feature_dim if isinstance(self.rule, Predictor) else 0
        header = {
            "format": FORMAT,
            "card": json.dumps(asdict(self.card)),
            "config": json.dumps(asdict(self.rule.config)),
            "feature_dim": str(feature_dim),
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.rule.state_dict().items()}
        tensors["grid"] = torch.tensor(self.grid, dtype=torch.float64)
        write_tensors(path, tensors, header)

    @staticmethod
    def load(path: Path) -> "LearnedSolver":
        """Read what `save` wrote; ValueError for any other file."""
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != FORMAT:
                raise ValueError(f"{path} is not a learned solver ({FORMAT}): it says {header.get('format')!r}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open has no iter)
        grid = tuple(tensors.pop("grid").tolist())
        config = AMEDConfig(**json.loads(header["config"]))
        dim = int(header["feature_dim"])
        rule = Predictor(dim, len(grid) - 1, config) if dim else Constants(len(grid) - 1, config)
        rule.load_state_dict(tensors)
        return LearnedSolver(SolverCard(**json.loads(header["card"])), grid, rule.eval())
