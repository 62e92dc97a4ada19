"""The objective that distils AMED for a trained model; fit() runs it like any other model.

The teacher's trajectories are computed once, `trajectories` of them, and every step draws a batch of them.

    end_to_end    loss = log(error of the end state + 1e-6)
    per_step      loss = sum over steps of log(error of the step + 1e-6), as published

End to end needs the teacher's end states alone: one fine teacher on its own grid serves every student, whatever its grid and its
budget. Per step the teacher passes the student's nodes, so its grid is the rule of the student's, refined.

The logarithm lets every step's relative improvement count the same, although errors of early and late steps differ by orders of
magnitude.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from midway.gen.core.errors import DivergedError
from midway.gen.core.ranges import COUNT, SEED, STEPS, check_ranges
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.samplers import gits_for
from midway.gen.distillation.learning import Distillation, SampledModel, part
from midway.gen.training.batches import Context
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.card import SolverCard
from midway.samplers.distill import (
    NEGLIGIBLE,
    TeacherNodes,
    best_positions,
    check_nested,
    end_error,
    need_no_noise,
    node_errors,
    only_ends,
    refined,
    step_errors,
    teacher_nodes,
)
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS, NAMED, Grid, named
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.plugin import BASES, unlearned
from midway.samplers.prediction import Field
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS, steps_for
from midway.samplers.step_parameters import GAIN, AMEDConfig, Constants, Predictor, StepRule


@dataclass(frozen=True)
class DistillConfig:
    """How a solver is distilled."""

    teacher: str = "unipc3"
    """Any table solver that draws no noise; it gets its own evaluations, which are counted as training."""
    teacher_grid: str = "logsnr"
    """end_to_end: the teacher's grid; per step it is the student's, refined."""
    teacher_steps: int = 32
    """Teacher steps; per step the least number, since every step of the student holds the same whole number of them."""
    trajectories: int = 512
    """Teacher trajectories, computed once; training draws batches of them."""
    seed: int = 0
    """First trajectory's number; its noise is drawn for this purpose alone, never that of an evaluated seed."""
    analytic_first: bool | None = None
    """Whether the first slope is the analytic direction; by default only for odd budgets, which need it."""
    mode: Literal["per_step", "end_to_end"] = "end_to_end"
    """end_to_end: the whole trajectory meets the teacher's end; per_step: every step meets its next node, as published."""
    checkpointing: bool = True
    """end_to_end only: keep one evaluation in memory at a time, and compute it twice."""
    amed: AMEDConfig = field(default_factory=AMEDConfig)

    def __post_init__(self) -> None:
        if self.trajectories < 1 or self.teacher_steps < 1:
            raise ValueError(
                f"trajectories {self.trajectories} and teacher_steps {self.teacher_steps} must be 1 or more"
            )
        if self.teacher_grid not in GRIDS:
            raise ValueError(f"unknown teacher_grid '{self.teacher_grid}': choose one of {', '.join(GRIDS)}")
        check_ranges(self, teacher_steps=STEPS, trajectories=COUNT, seed=SEED)

    def steps(self, nfe: int) -> tuple[int, bool]:
        """How many make this budget, and whether the first is analytic; ValueError for a budget that cannot be reached."""
        analytic_first = nfe % 2 == 1 if self.analytic_first is None else self.analytic_first
        return steps_for(2, nfe, analytic_first), analytic_first


@dataclass(frozen=True)
class SolverTarget:
    """What is learned: a solver of `nfe` evaluations on a grid, for a model guided at this scale."""

    nfe: int
    grid: str
    """Its name."""
    guidance: float
    constants: bool
    """Constants per step, or a predictor per sample."""
    base: str = "none"
    """Solver that AMED is plugged into, a name in `plugin.BASES`."""
    times: Grid | None = None
    """The grid itself where no rule makes it, as one that was fitted; None: that of the name."""

    def grid_for(self, model: SampledModel, steps: int) -> Grid:
        """The times for this model. ValueError for a name without a rule, and for another number of times."""
        if self.times is None and self.grid not in NAMED:
            raise ValueError(f"grid '{self.grid}' has no rule: give its times, or choose one of {', '.join(NAMED)}")
        grid = self.times or named(self.grid, model.schedule, steps, trained=model.shift)
        if len(grid) != steps + 1:
            raise ValueError(f"{self.nfe} evaluations are {steps} steps, the grid has {len(grid) - 1}: they must agree")
        return grid


TRIED = (GITS, "vp", "logsnr")
"""Grids among which `best` chooses; without the first where no rule refines the student's."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """Teacher nodes of B trajectories and their labels (B,)."""

    nodes: TeacherNodes
    labels: Tensor


def objective_for(trained: TrainedModel, target: SolverTarget, config: DistillConfig) -> "SolverObjective":
    """The objective. A grid `gits` is fitted for the unlearned solver, to noise that no evaluated seed has; its cost counts.

    A base of one step is so far from what it learns, before it does, that iPNDM(3) stands for it.
    """
    if target.grid != GITS:
        return SolverObjective(trained.model, target, config)
    steps, analytic_first = config.steps(target.nfe)
    judge = target.base if BASES[target.base].multistep else "ipndm3"
    build = partial(unlearned, trained.model.schedule, base=judge, analytic_first=analytic_first)
    times, cost = gits_for(trained, target.guidance, steps, build)
    objective = SolverObjective(trained.model, replace(target, times=times), config)
    objective.counter.evaluations = cost
    return objective


class SolverObjective(Distillation):
    """Trains `rule` (constants or a predictor). ValueError for an impossible budget, base, teacher or grid."""

    def __init__(self, model: SampledModel, target: SolverTarget, config: DistillConfig) -> None:
        steps, analytic_first = config.steps(target.nfe)
        feature_dim = 0 if target.constants else model.feature_dim
        grid = target.grid_for(model, steps)
        solver = AMEDSolver(model.schedule, grid, target.base, analytic_first, feature_dim)
        self.stride = math.ceil(config.teacher_steps / steps)
        teacher = SOLVERS[config.teacher].build(model.schedule, self._teacher_grid(solver, model.shift, target, config))
        end_to_end = config.mode == "end_to_end"
        if end_to_end:
            need_no_noise(teacher)
        else:
            check_nested(teacher, solver.grid, self.stride)
        super().__init__(model, teacher, target.guidance, end_to_end and config.checkpointing)
        self.target, self.config, self.solver = target, config, solver
        self.rule = Constants(steps, config.amed) if target.constants else Predictor(feature_dim, steps, config.amed)

    def _teacher_grid(self, solver: AMEDSolver, shift: float, target: SolverTarget, config: DistillConfig) -> Grid:
        schedule = solver.schedule
        if config.mode == "end_to_end":
            ends = schedule.rho(torch.tensor([solver.grid[0], solver.grid[-1]], dtype=torch.float64)).tolist()
            return named(config.teacher_grid, schedule, config.teacher_steps, *ends, trained=shift)
        if target.times is not None:
            raise ValueError(
                f"per_step needs a teacher that passes the student's nodes, and grid '{target.grid}' has no rule that refines "
                "it: use mode end_to_end"
            )
        return named(target.grid, schedule, solver.steps * self.stride, trained=shift)

    @property
    def grid(self) -> Grid:
        return self.solver.grid

    @property
    def restarts(self) -> bool:
        """Whether every step starts from the teacher's node: one-step bases, distilled per step."""
        return self.config.mode == "per_step" and not self.solver.plugin.multistep

    def prepare(self, labels: Tensor, shared: dict[Any, Any]) -> Callable[[Tensor], TrajectoryBatch]:
        """The end states of one teacher are the same at every budget; every solver counts them, as if it were learned alone."""
        before, key = self.counter.evaluations, (self.teacher.hash, self.config.trajectories, self.config.seed)
        if self.config.mode == "per_step" or key not in shared:
            shared[key] = (self.run_teacher(labels), self.counter.evaluations - before)
        teacher, self.taught = shared[key]
        self.counter.evaluations = before + self.taught
        self.warm_start(teacher, labels)
        return lambda items: TrajectoryBatch(teacher.take(items), labels[items])

    def facts(self) -> dict[str, Any]:
        on = f" on {self.config.teacher_grid}" if self.config.mode == "end_to_end" else ""
        return {
            "analytic_first": self.solver.analytic_first,
            "analytic_history": self.solver.analytic_history,
            "teacher": f"{self.config.teacher}, {len(self.teacher.grid) - 1} steps{on}",
            "base": self.target.base,
            "mode": self.config.mode,
        }

    def sampler(self, averaged: Mapping[str, Tensor], card: SolverCard) -> LearnedSolver:
        rule = copy.deepcopy(self.rule).cpu().eval()
        rule.load_state_dict(part(averaged, "rule."))
        return LearnedSolver(card, self.grid, rule, self.solver.schedule)

    def run_teacher(self, labels: Tensor, batch_size: int = 256) -> TeacherNodes:
        """All trajectories: labels (M,) -> nodes (end to end: both ends alone) stacked along the batch, on the labels' device.

        DivergedError if one of them is not finite.
        """
        starts = self.starts(self.config.seed, labels, self.grid[0])
        parts = [
            self._teach(self.field(some), start)
            for some, start in zip(labels.split(batch_size), starts.split(batch_size), strict=True)
        ]
        whole = TeacherNodes(*(torch.cat(p, dim=1) for p in zip(*((t.states, t.eps, t.features) for t in parts))))
        if not whole.states.isfinite().all():
            raise DivergedError(
                f"the teacher's trajectories ({self.config.teacher}, {len(self.teacher.grid) - 1} steps) are not finite",
                "a solver cannot be distilled from them",
                "raise --distill.teacher-steps, or choose another --distill.teacher",
            )
        return whole

    def _teach(self, field: Field, x: Tensor) -> TeacherNodes:
        if self.config.mode == "per_step":
            return teacher_nodes(field, self.solver, self.teacher, self.stride, x, self.restarts)
        with torch.no_grad():
            return only_ends(x, sample(field, self.teacher, x))

    def warm_start(self, teacher: TeacherNodes, labels: Tensor) -> None:
        """Set every step's r to the best of a few, with c = a = 1, on at most 128 trajectories.

        The error has several basins, and the gradient leaves none, so end to end starts per step too, from a teacher of its own.
        It also decides whether later steps of iPNDM(4) weigh an analytic first slope: their weights magnify what that slope
        misses, a mean of the data. Lower orders end nearer with it, or no farther (docs/solvers.md).
        """
        some = teacher.take(torch.arange(min(len(labels), 128), device=labels.device))
        field, candidates = self.field(labels[:128]), torch.linspace(0.05, 0.7, 14, device=labels.device)
        alone, forms = not self.solver.plugin.multistep, [self.solver]
        if self.config.mode == "end_to_end":
            fine = refined(self.solver.schedule, self.grid, self.stride)
            table = SOLVERS[self.config.teacher].build(self.solver.schedule, fine)
            some = teacher_nodes(field, self.solver, table, self.stride, some.states[0], alone)
            if self.solver.plugin.order > 3 and self.solver.analytic_first:
                forms.append(replace(self.solver, analytic_history=False))
        found = [best_positions(field, form, some, candidates, alone) for form in forms]
        (best, _), self.solver = min(zip(found, forms, strict=True), key=lambda one: one[0][1])
        with torch.no_grad():
            self.rule.raw[:, 0] = torch.logit(best) / GAIN

    def errors(self, batch: TrajectoryBatch, rule: StepRule) -> Tensor:
        """Under `rule`, (N,) at every node but the first, end to end (1,) at the last; in units of the state's variance."""
        if self.restarts:
            return step_errors(self.field(batch.labels.repeat(self.solver.steps)), self.solver, rule, batch.nodes)
        detached = self.config.mode == "per_step"
        states = nodes(self.solver, self.field(batch.labels), rule, batch.nodes.states[0], detached)
        if detached:
            return node_errors(states, self.solver, batch.nodes)
        return end_error(states[-1], self.solver, batch.nodes.states[-1])[None]

    @torch.no_grad()
    def end_rmse(self, take: Callable[[Tensor], TrajectoryBatch], count: int) -> float:
        """Of `count` trajectories, in units of the state's standard deviation; infinite if one is not finite."""
        squares = 0.0
        for items in torch.arange(count).split(256):
            batch = take(items.to(self.rule.raw.device))
            states = nodes(self.solver, self.field(batch.labels), self.rule, batch.nodes.states[0], detached=False)
            squares += len(items) * float(end_error(states[-1], self.solver, batch.nodes.states[-1]))
        return math.sqrt(squares / count) if math.isfinite(squares) else math.inf

    def loss(self, batch: TrajectoryBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of log errors; logs the root of every error, in units of the state's standard deviation."""
        errors = self.errors(batch, self.rule)
        last = self.solver.steps - len(errors)
        logs = {f"rmse_step_{last + i}": e.detach().sqrt() for i, e in enumerate(errors)}
        return (errors + NEGLIGIBLE).log().sum(), logs
