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
from midway.samplers.artefacts import check_tensors, read_record, read_tensors, write_tensors
from midway.samplers.card import SolverCard
from midway.samplers.grids import Grid, is_grid
from midway.samplers.hub import Shared
from midway.samplers.plugin import BASES, plugin_table
from midway.samplers.prediction import Field
from midway.samplers.rows import NoiseSource
from midway.samplers.schedule import SCHEDULES, Schedule, fingerprint
from midway.samplers.step_parameters import AMEDConfig, Constants, Predictor
from midway.samplers.table import Table

FORMAT = "midway-amed-1"


@dataclass(frozen=True)
class Learned:
    """The form that the name of a learned solver stands for."""

    base: str
    """Solver that AMED is plugged into, none for AMED-Solver."""
    constants: bool
    """Constants per step, or a predictor per sample."""


def _names(suffix: str, constants: bool) -> dict[str, Learned]:
    return {("amed" if base == "none" else f"amed-plugin-{base}") + suffix: Learned(base, constants) for base in BASES}


EARLIER = _names("-constants", True)
"""Earlier names of constants, which solvers of earlier versions have: they are learned and loaded under both."""
LEARNED: dict[str, Learned] = {**_names("", True), **_names("-predictor", False), **EARLIER}
"""amed and amed-plugin-<base> for every base: constants per step; with -predictor, numbers per sample."""


def _holds(card: SolverCard, form: Learned) -> bool:
    """Whether the name stands for this form; without a suffix an earlier version meant a predictor."""
    plain = not card.name.endswith(("-constants", "-predictor"))
    return LEARNED.get(card.name) in ({form, Learned(form.base, True)} if plain else {form})


def same_schedule(name: str, schedule: Schedule) -> bool:
    """Whether a card's `schedule` names this one."""
    return name == fingerprint(schedule) or (name in SCHEDULES and SCHEDULES[name]() == schedule)


@dataclass(frozen=True)
class LearnedSolver(Shared):
    """An AMED solver on the schedule that it was learned on.

    ValueError for another schedule, numbers that are not finite, a grid that does not fall between finite noise levels, and for
    another name, number of steps or NFE than those of the numbers.
    """

    card: SolverCard
    grid: Grid
    rule: Constants | Predictor
    schedule: Schedule

    def __post_init__(self) -> None:
        card, steps = self.card, len(self.grid) - 1
        if len(self.rule.raw) != steps:
            raise ValueError(
                f"the rule has numbers for {len(self.rule.raw)} steps, the grid has {steps}: they do not match"
            )
        if not all(bool(value.isfinite().all()) for value in self.rule.parameters()):
            raise ValueError(f"{card.name} has learned numbers that are not finite: learn it again at a lower rate")
        if not same_schedule(card.schedule, self.schedule):
            raise ValueError(
                f"{card.name} was learned on schedule {card.schedule}, this one is {fingerprint(self.schedule)}: "
                "learn a solver for the model that you sample"
            )
        form = Learned(card.base, isinstance(self.rule, Constants))
        if not _holds(card, form):
            raise ValueError(f"{card.name} is no {form}: a solver's name, its base and its form go together")
        if card.nfe != 2 * steps - card.analytic_first:
            raise ValueError(
                f"the card of {card.name} has NFE {card.nfe}, its {steps} steps make {2 * steps - card.analytic_first}"
            )
        if not is_grid(self.grid):
            raise ValueError(f"{card.name} needs a falling grid within [0, 1], got {self.grid}")
        _ = self._solver, self._table  # which check their own numbers

    @cached_property
    def _solver(self) -> AMEDSolver:
        card = self.card
        return AMEDSolver(
            self.schedule, self.grid, card.base, card.analytic_first, self.rule.feature_dim, card.analytic_history
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
        card = asdict(self.card)
        if card["analytic_history"]:  # which earlier cards have not, and so not in their hashes
            del card["analytic_history"]
        description = json.dumps([card, self.grid])
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
        card, values = self.card, self.rule.values()
        return plugin_table(
            self.schedule, self.grid, card.base, values, card.analytic_first, card.name, card.analytic_history
        )

    @torch.no_grad()
    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) noise at `grid[0]` -> (B, *) at `grid[-1]`. ValueError for features that the predictor cannot read."""
        if self.table is not None:
            return self.table.run(field, x)
        assert isinstance(self.rule, Predictor)
        return nodes(self._solver, field, self.rule.to(x.device), x)[-1]

    def save(self, path: Path) -> None:
        """One safetensors file, written beside `path` and renamed."""
        header = {
            "format": FORMAT,
            "card": json.dumps(asdict(self.card)),
            "config": json.dumps(asdict(self.rule.config)),
            "feature_dim": str(self.rule.feature_dim),
            "hash": self.hash,
        }
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.rule.state_dict().items()}
        tensors["grid"] = torch.tensor(self.grid, dtype=torch.float64)
        write_tensors(path, tensors, header)

    @staticmethod
    def load(path: Path, schedule: Schedule) -> "LearnedSolver":
        """Read what `save` wrote; ValueError for any other file, and for another schedule than it was learned on."""
        tensors, header = read_tensors(path, FORMAT, "a learned solver", ("card", "config", "feature_dim"))
        grid = tensors.pop("grid", torch.zeros(0))
        check_tensors({"grid": grid}, {"grid": (torch.float64, (grid.numel(),))})
        config, dim = read_record(AMEDConfig, header["config"], "the config"), int(header["feature_dim"])
        if dim < 0 or grid.numel() < 2:
            raise ValueError(f"{path} has {dim} features and a grid of {grid.numel()} times")
        rule = Predictor(dim, len(grid) - 1, config) if dim else Constants(len(grid) - 1, config)
        check_tensors(tensors, {name: (value.dtype, tuple(value.shape)) for name, value in rule.state_dict().items()})
        rule.load_state_dict(tensors)
        card = read_record(SolverCard, header["card"], "the card")
        solver = LearnedSolver(card, tuple(grid.tolist()), rule.eval(), schedule)
        if header.get("hash", solver.hash) != solver.hash:
            raise ValueError(f"the numbers of {path} have hash {solver.hash}, they were saved with {header['hash']}")
        return solver
