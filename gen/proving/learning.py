"""Solvers learned for a mixture: the objectives of trained models, in memory, and on the grid where learning starts best."""

from dataclasses import dataclass, field, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from midway.gen.distillation.amed import DistillConfig, SolverObjective, SolverTarget
from midway.gen.distillation.learning import Distillation, Lesson, learn
from midway.gen.distillation.noise import NoiseConfig, NoiseObjective
from midway.gen.distillation.residual import ResidualConfig, ResidualObjective
from midway.gen.distillation.table import TableConfig, TableObjective, TableTarget
from midway.gen.proving.model import Block, MixtureModel, figures
from midway.samplers.card import SolverCard
from midway.samplers.learned_solver import EARLIER, LEARNED, LearnedSolver
from midway.samplers.residual_solver import ResidualTable
from midway.samplers.sampler import Sampler
from midway.samplers.table import NOISY, Table

TABLE = "table"
RESIDUAL = "table-residual"
"""Dense here: a vector has no grid, and the 1x1 control would be the same."""
NAMES = (TABLE, RESIDUAL, NOISY, *(name for name in LEARNED if name not in EARLIER))
GRIDS_LEARNED_ON = ("vp", "karras", "logsnr")
"""Grids that AMED and the solver with noise are offered."""

_BUILDING = Lock()
"""Held while torch's own random numbers are used, which all threads share."""


@dataclass(frozen=True)
class Teaching:
    """How solvers are learned here: by the objectives of training them for a model, in a minute or less for each."""

    amed: DistillConfig = field(default_factory=lambda: DistillConfig(trajectories=128, checkpointing=False))
    table: TableConfig = field(default_factory=lambda: TableConfig(pairs=1024))
    amed_lesson: Lesson = field(default_factory=lambda: Lesson(steps=80, batch=32, lr=0.01))
    residual: ResidualConfig = field(default_factory=lambda: ResidualConfig(held_out=512))
    pairs: int = 4096
    """That a residual is trained on."""
    noise: NoiseConfig = field(default_factory=lambda: NoiseConfig(teacher_steps=24, trajectories=1024))
    residual_lesson: Lesson = field(default_factory=lambda: Lesson(steps=600, batch=64, lr=1e-3, clip=1.0))
    noise_lesson: Lesson = field(default_factory=lambda: Lesson(steps=300, batch=64, lr=5e-3, clip=1.0))
    table_lesson: Lesson = field(default_factory=lambda: Lesson(steps=500, batch=32, lr=0.01, clip=1.0))


@dataclass(frozen=True)
class Taught:
    """A learned solver and the grid it was learned on."""

    sampler: LearnedSolver | ResidualTable | Table
    grid: str


def teach(
    model: MixtureModel, name: str, nfe: int, unscored: Block, teaching: Teaching, shared: dict[Any, Any]
) -> Taught:
    """Learn a solver of `NAMES`. AMED and the solver with noise begin on every grid, and go on where the RMSE on the block
    `unscored` is least then; a residual is learned beside the table of its budget.

    A warm start alone does not tell: learning gains three times as much on one grid as on another.

    shared: what the teachers of several budgets have in common. ValueError for an impossible budget.
    """
    if name == TABLE:
        return _table(model, nfe, teaching, shared)
    if name == RESIDUAL:
        return _residual(model, nfe, teaching, shared)
    noisy = name == NOISY
    count = teaching.noise.trajectories if noisy else teaching.amed.trajectories
    objectives: dict[str, Distillation] = {
        grid: NoiseObjective(model, nfe, grid, 1.0, teaching.noise)
        if noisy
        else _amed(model, name, nfe, grid, teaching.amed)
        for grid in GRIDS_LEARNED_ON
    }
    takes = {grid: one.prepare(torch.zeros(count, dtype=torch.long), shared) for grid, one in objectives.items()}
    lesson = teaching.noise_lesson if noisy else teaching.amed_lesson
    trial = replace(lesson, steps=lesson.steps // 4)
    for grid, one in objectives.items():
        learn(one, takes[grid], count, trial)
    errors = {grid: _error(model, _finished(model, name, nfe, grid, one), unscored) for grid, one in objectives.items()}
    grid = min(errors, key=lambda one: errors[one])
    learn(objectives[grid], takes[grid], count, lesson)
    spent = sum(one.counter.evaluations - one.taught for one in objectives.values()) + objectives[grid].taught
    return Taught(_finished(model, name, nfe, grid, objectives[grid], spent), grid)


def _table(model: MixtureModel, nfe: int, teaching: Teaching, shared: dict[Any, Any]) -> Taught:
    """The learned table, one per budget of `shared`."""
    if (TABLE, nfe) not in shared:
        objective = TableObjective(model, TableTarget(nfe), teaching.table)
        take = objective.prepare(torch.zeros(teaching.table.pairs, dtype=torch.long), shared)
        learn(objective, take, teaching.table.pairs, teaching.table_lesson)
        grid = objective.grid_name
        shared[TABLE, nfe] = Taught(_finished(model, TABLE, nfe, grid, objective), grid)
    return shared[TABLE, nfe]


def _residual(model: MixtureModel, nfe: int, teaching: Teaching, shared: dict[Any, Any]) -> Taught:
    """Beside that table."""
    base = _table(model, nfe, teaching, shared)
    assert isinstance(base.sampler, Table)
    with _BUILDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(teaching.table.seed)
        objective = ResidualObjective(model, RESIDUAL, base.sampler, 1.0, teaching.residual, teaching.table)
    labels = torch.zeros(teaching.pairs + teaching.residual.held_out, dtype=torch.long)
    take = objective.prepare(labels, shared)
    learn(objective, take, teaching.pairs, teaching.residual_lesson, objective.validate)
    return Taught(_finished(model, RESIDUAL, nfe, base.grid, objective), base.grid)


def _error(model: MixtureModel, sampler: Sampler, block: Block) -> float:
    """RMSE on a block, infinite if it is not finite."""
    return figures(model, block, model.run(sampler, block.seeds)).rmse


def _amed(model: MixtureModel, name: str, nfe: int, grid: str, config: DistillConfig) -> SolverObjective:
    kind = LEARNED[name]
    with _BUILDING, torch.random.fork_rng(devices=[]):  # a predictor starts from random weights
        torch.manual_seed(config.seed)
        return SolverObjective(model, SolverTarget(nfe, grid, 1.0, kind.constants, kind.base), config)


def _finished(
    model: MixtureModel, name: str, nfe: int, grid: str, objective: Distillation, spent: int | None = None
) -> LearnedSolver | ResidualTable | Table:
    """What was learned so far, at a cost of `spent` evaluations, by default the objective's own."""
    state: dict[str, Tensor] = {key: value.detach() for key, value in objective.state_dict().items()}
    card = SolverCard(
        name=name,
        grid_name=grid,
        schedule="edm",
        model_hash=model.mixture.hash,
        nfe=nfe,
        guidance=1.0,
        training_nfe=objective.counter.evaluations if spent is None else spent,
        **objective.facts(),
    )
    return objective.sampler(state, card)
