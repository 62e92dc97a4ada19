"""The objective that distils a solver for a trained model; fit() runs it like any other model.

The teacher's trajectories are computed once, `trajectories` of them, and every step draws a batch of them.

    per_step      loss = sum over steps of log(error of the step + 1e-6)
    end_to_end    loss = log(error of the end state + 1e-6), or the sum over all nodes

The logarithm lets every step's relative improvement count the same, although errors of early and late steps differ by orders of
magnitude.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from midway.gen.core.errors import DivergedError
from midway.gen.core.ranges import COUNT, SEED, STEPS, check_ranges
from midway.gen.diffusion.distillation import Distillation, SampledModel, part
from midway.gen.training.batches import Context
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.card import SolverCard
from midway.samplers.distill import (
    NEGLIGIBLE,
    TeacherNodes,
    best_positions,
    check_teacher,
    node_errors,
    step_errors,
    teacher_nodes,
)
from midway.samplers.grids import GRIDS, Grid
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.solvers import SOLVERS, steps_for
from midway.samplers.step_parameters import GAIN, AMEDConfig, Constants, Predictor, StepRule


@dataclass(frozen=True)
class DistillConfig:
    """How a solver is distilled."""

    teacher: str = "dpmpp2m"
    """Any table solver that draws no noise; it gets its own evaluations, which are counted as training."""
    teacher_steps: int = 32
    """Least number of teacher steps; every step of the student holds the same whole number of them."""
    trajectories: int = 512
    """Teacher trajectories, computed once; training draws batches of them."""
    seed: int = 0
    """First trajectory's number; its noise is drawn for this purpose alone, never that of an evaluated seed."""
    analytic_first: bool | None = None
    """Whether the first slope is the analytic direction; by default only for odd budgets, which need it."""
    mode: Literal["per_step", "end_to_end"] = "per_step"
    """per_step: every step meets the teacher's next node, as published; end_to_end: the whole trajectory meets its end."""
    all_nodes: bool = False
    """end_to_end only: meet the teacher at all nodes."""
    checkpointing: bool = True
    """end_to_end only: keep one evaluation in memory at a time, and compute it twice."""
    amed: AMEDConfig = field(default_factory=AMEDConfig)

    def __post_init__(self) -> None:
        if self.trajectories < 1 or self.teacher_steps < 1:
            raise ValueError(
                f"trajectories {self.trajectories} and teacher_steps {self.teacher_steps} must be 1 or more"
            )
        if self.all_nodes and self.mode == "per_step":
            raise ValueError("all_nodes belongs to mode end_to_end: per_step always meets the teacher at all nodes")
        check_ranges(self, teacher_steps=STEPS, trajectories=COUNT, seed=SEED)


@dataclass(frozen=True)
class SolverTarget:
    """What is learned: a solver of `nfe` evaluations on a named grid, for a model guided at this scale."""

    nfe: int
    grid: str
    guidance: float
    constants: bool
    """Constants per step, or a predictor per sample."""
    base: str = "none"
    """Solver that AMED is plugged into, a name in `plugin.BASES`."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """Teacher nodes of B trajectories and their labels (B,)."""

    nodes: TeacherNodes
    labels: Tensor


class SolverObjective(Distillation):
    """Trains `rule` (constants or a predictor). ValueError for an impossible budget, base, teacher or grid."""

    def __init__(self, model: SampledModel, target: SolverTarget, config: DistillConfig) -> None:
        odd = target.nfe % 2 == 1
        analytic_first = odd if config.analytic_first is None else config.analytic_first
        steps = steps_for(2, target.nfe, analytic_first)
        feature_dim = 0 if target.constants else model.feature_dim
        grid = GRIDS[target.grid](model.schedule, steps)
        solver = AMEDSolver(model.schedule, grid, target.base, analytic_first, feature_dim)
        stride = math.ceil(config.teacher_steps / steps)
        teacher = SOLVERS[config.teacher].build(model.schedule, GRIDS[target.grid](model.schedule, steps * stride))
        check_teacher(solver, teacher, stride)
        super().__init__(model, teacher, target.guidance, config.mode == "end_to_end" and config.checkpointing)
        self.target, self.config, self.solver, self.stride = target, config, solver, stride
        self.rule = Constants(steps, config.amed) if target.constants else Predictor(feature_dim, steps, config.amed)

    @property
    def grid(self) -> Grid:
        return self.solver.grid

    @property
    def restarts(self) -> bool:
        """Whether every step starts from the teacher's node: one-step bases, distilled per step."""
        return self.config.mode == "per_step" and not self.solver.plugin.multistep

    def prepare(self, labels: Tensor, shared: dict[Any, Any]) -> Callable[[Tensor], TrajectoryBatch]:
        teacher = self.run_teacher(labels)
        self.warm_start(teacher, labels)
        return lambda items: TrajectoryBatch(teacher.take(items), labels[items])

    def facts(self) -> dict[str, Any]:
        return {
            "analytic_first": self.solver.analytic_first,
            "teacher": f"{self.config.teacher}, {len(self.teacher.grid) - 1} steps",
            "base": self.target.base,
            "mode": self.config.mode,
        }

    def sampler(self, averaged: Mapping[str, Tensor], card: SolverCard) -> LearnedSolver:
        rule = copy.deepcopy(self.rule).cpu().eval()
        rule.load_state_dict(part(averaged, "rule."))
        return LearnedSolver(card, self.grid, rule, self.solver.schedule)

    def run_teacher(self, labels: Tensor, batch_size: int = 256) -> TeacherNodes:
        """All trajectories: labels (M,) -> nodes stacked along the batch, on the labels' device.

        DivergedError if one of them is not finite.
        """
        starts = self.starts(self.config.seed, labels, self.grid[0])
        parts = [
            teacher_nodes(self.field(some), self.solver, self.teacher, self.stride, start, self.restarts)
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

    def warm_start(self, teacher: TeacherNodes, labels: Tensor) -> None:
        """Set every step's r to the best of a few, with c = a = 1, judged on at most 128 trajectories."""
        some = teacher.take(torch.arange(min(len(labels), 128), device=labels.device))
        candidates = torch.linspace(0.05, 0.7, 14, device=labels.device)
        best = best_positions(self.field(labels[:128]), self.solver, some, candidates, self.restarts)
        with torch.no_grad():
            self.rule.raw[:, 0] = torch.logit(best) / GAIN

    def errors(self, batch: TrajectoryBatch, rule: StepRule) -> Tensor:
        """(N,): error at every node but the first under `rule`, in units of the state's variance."""
        if self.restarts:
            return step_errors(self.field(batch.labels.repeat(self.solver.steps)), self.solver, rule, batch.nodes)
        detached = self.config.mode == "per_step"
        states = nodes(self.solver, self.field(batch.labels), rule, batch.nodes.states[0], detached)
        return node_errors(states, self.solver, batch.nodes)

    def loss(self, batch: TrajectoryBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of log errors; logs the root of the error after each step, in units of the state's standard deviation."""
        errors = self.errors(batch, self.rule)
        logs = {f"rmse_step_{i}": e.detach().sqrt() for i, e in enumerate(errors)}
        end_only = self.config.mode == "end_to_end" and not self.config.all_nodes
        return ((errors[-1:] if end_only else errors) + NEGLIGIBLE).log().sum(), logs
