"""Solvers learned for a mixture: the objectives of trained models, in memory, and on the grid where learning starts best."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from midway.gen.diffusion.distill_amed import DistillConfig, SolverObjective, SolverTarget
from midway.gen.diffusion.distill_table import TableConfig, TableObjective, TableTarget
from midway.gen.diffusion.distillation import Distillation, Lesson, learn
from midway.gen.proving.model import Block, MixtureModel, sample_rmse
from midway.samplers.card import SolverCard
from midway.samplers.learned_solver import LEARNED, LearnedSolver
from midway.samplers.table import Table

TABLE = "table"
NAMES = (TABLE, *LEARNED)
GRIDS_LEARNED_ON = ("vp", "karras", "logsnr")
"""Grids that AMED is offered."""

_BUILDING = Lock()
"""Held while torch's own random numbers are used, which all threads share."""


@dataclass(frozen=True)
class Teaching:
    """How solvers are learned here: as the defaults of training them for a model, with fewer trajectories."""

    amed: DistillConfig = field(
        default_factory=lambda: DistillConfig(teacher_steps=24, trajectories=128, checkpointing=False)
    )
    table: TableConfig = field(default_factory=TableConfig)
    amed_lesson: Lesson = field(default_factory=lambda: Lesson(steps=60, batch=32, lr=5e-3))
    table_lesson: Lesson = field(default_factory=lambda: Lesson(steps=500, batch=16, lr=0.01, clip=1.0))


@dataclass(frozen=True)
class Taught:
    """A learned solver and the grid it was learned on."""

    sampler: LearnedSolver | Table
    grid: str


def teach(
    model: MixtureModel,
    name: str,
    nfe: int,
    unscored: Block,
    teaching: Teaching,
    shared: dict[Any, Any],
    grids: Sequence[str] = GRIDS_LEARNED_ON,
) -> Taught:
    """Learn a solver of `NAMES`. AMED is learned on that of `grids` whose warm start has the least RMSE on the block `unscored`.

    shared: what the teachers of several budgets have in common. ValueError for an impossible budget.
    """
    if name == TABLE:
        objective = TableObjective(model, TableTarget(nfe), teaching.table)
        take = objective.prepare(torch.zeros(teaching.table.pairs, dtype=torch.long), shared)
        learn(objective, take, teaching.table.pairs, teaching.table_lesson)
        return Taught(_finished(model, name, nfe, objective.grid_name, objective), objective.grid_name)
    count, started = teaching.amed.trajectories, {}
    for grid in grids:
        objective = _amed(model, name, nfe, grid, teaching.amed)
        take = objective.prepare(torch.zeros(count, dtype=torch.long), shared)
        found = model.run(_finished(model, name, nfe, grid, objective), unscored.seeds)
        started[grid] = (sample_rmse(found, unscored.exact), objective, take)
    grid = min(started, key=lambda one: started[one][0])
    _, objective, take = started[grid]
    learn(objective, take, count, teaching.amed_lesson)
    return Taught(_finished(model, name, nfe, grid, objective), grid)


def _amed(model: MixtureModel, name: str, nfe: int, grid: str, config: DistillConfig) -> SolverObjective:
    kind = LEARNED[name]
    with _BUILDING, torch.random.fork_rng(devices=[]):  # a predictor starts from random weights
        torch.manual_seed(config.seed)
        return SolverObjective(model, SolverTarget(nfe, grid, 1.0, kind.constants, kind.base), config)


def _finished(model: MixtureModel, name: str, nfe: int, grid: str, objective: Distillation) -> LearnedSolver | Table:
    """What was learned so far."""
    state: dict[str, Tensor] = {key: value.detach() for key, value in objective.state_dict().items()}
    card = SolverCard(
        name=name,
        grid_name=grid,
        schedule="edm",
        model_hash=model.mixture.hash,
        nfe=nfe,
        guidance=1.0,
        training_nfe=objective.counter.evaluations,
        **objective.facts(),
    )
    return objective.sampler(state, card)
