"""A learned solver as an artefact: its numbers together with the grid, schedule and model they were learned for."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from midway.samplers.amed import AMEDConfig, Constants, Predictor, nodes
from midway.samplers.grids import Grid
from midway.samplers.prediction import Field
from midway.samplers.sample import sample
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import amed
from midway.samplers.table import Table

FORMAT = "midway-amed-1"


@dataclass(frozen=True)
class SolverCard:
    """What a learned solver belongs to and what it cost."""

    name: str
    """`amed` (predictor) or `amed-constants`."""
    grid_name: str
    schedule: str
    model_hash: str
    nfe: int
    analytic_first: bool
    guidance: float
    training_nfe: int
    """Network evaluations spent on distillation, teacher included; an evaluation with gradient counts 1."""
    teacher: str


@dataclass(frozen=True)
class LearnedSolver:
    """An AMED-Solver ready to sample."""

    card: SolverCard
    grid: Grid
    rule: Constants | Predictor

    def table(self, schedule: Schedule) -> Table | None:
        """The plain table that constants are; None for a predictor."""
        if isinstance(self.rule, Constants):
            return amed(schedule, self.grid, self.rule.values(), self.card.analytic_first, name=self.card.name)
        return None

    @torch.no_grad()
    def sample(self, field: Field, schedule: Schedule, x: Tensor) -> Tensor:
        """x (B, *) noise at `grid[0]` -> (B, *) at `grid[-1]`."""
        table = self.table(schedule)
        if table is not None:
            return sample(field, table, x)
        assert isinstance(self.rule, Predictor)
        dim = self.rule.feature_dim
        return nodes(field, schedule, self.grid, self.rule.to(x.device), x, self.card.analytic_first, dim)[-1]

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
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        save_file(tensors, temporary, metadata=header)
        os.replace(temporary, path)

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
