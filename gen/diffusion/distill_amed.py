"""The objective that distils a solver for a trained model; fit() runs it like any other model.

The teacher's trajectories are computed once, `trajectories` of them, and every step draws a batch of them.

    per_step      loss = sum over steps of log(error of the step + 1e-6)
    end_to_end    loss = log(error of the end state + 1e-6), or the sum over all nodes

The logarithm lets every step's relative improvement count the same, although errors of early and late steps differ by orders of
magnitude. The network evaluations spent on all this are part of the state, so that a resumed run reports what an uninterrupted
one does.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from midway.gen.core import randomness
from midway.gen.core.errors import DivergedError
from midway.gen.diffusion.model import LatentModel, start_state
from midway.gen.training.batches import Context
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.distill import (
    NEGLIGIBLE,
    TeacherNodes,
    best_positions,
    check_teacher,
    checkpointed,
    node_errors,
    step_errors,
    teacher_nodes,
)
from midway.samplers.grids import GRIDS, Grid
from midway.samplers.prediction import Field
from midway.samplers.sample import EvaluationCounter
from midway.samplers.solvers import SOLVERS, steps_for
from midway.samplers.step_parameters import GAIN, AMEDConfig, Constants, Predictor, StepRule
from midway.samplers.table import Table


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


class SolverObjective(nn.Module):
    """Trains `rule` (constants or a predictor); the model stays frozen and is kept out of the parameters.

    `counter` counts the network evaluations; the buffer `evaluations` int64 () holds its count after the newest step.
    ValueError for a budget, base, teacher or grid with which there is no such solver.
    """

    evaluations: Tensor

    def __init__(self, model: LatentModel, target: SolverTarget, config: DistillConfig) -> None:
        super().__init__()
        self.target, self.config = target, config
        odd = target.nfe % 2 == 1
        analytic_first = odd if config.analytic_first is None else config.analytic_first
        steps = steps_for(2, target.nfe, analytic_first)
        feature_dim = 0 if target.constants else model.config.dit.width
        grid = GRIDS[target.grid](model.schedule, steps)
        self.solver = AMEDSolver(model.schedule, grid, target.base, analytic_first, feature_dim)
        self.stride = math.ceil(config.teacher_steps / steps)
        fine = GRIDS[target.grid](model.schedule, steps * self.stride)
        self.teacher: Table = SOLVERS[config.teacher].build(model.schedule, fine)
        check_teacher(self.solver, self.teacher, self.stride)
        self.rule = Constants(steps, config.amed) if target.constants else Predictor(feature_dim, steps, config.amed)
        self._model = (model,)  # a tuple: not a sub-module, so neither trained nor saved
        self.counter = EvaluationCounter(model.conditional_field)
        self.register_buffer("evaluations", torch.tensor(0))
        self.register_load_state_dict_post_hook(_restore_count)

    @property
    def grid(self) -> Grid:
        """The student's times."""
        return self.solver.grid

    @property
    def restarts(self) -> bool:
        """Whether every step starts from the teacher's node: one-step bases, distilled per step."""
        return self.config.mode == "per_step" and not self.solver.plugin.multistep

    def _field(self, labels: Tensor) -> Field:
        """The guided field of labels (B,), counted."""
        return self._model[0].field(labels, self.target.guidance, self.counter)

    def run_teacher(self, labels: Tensor, batch_size: int = 256) -> TeacherNodes:
        """All trajectories: labels (M,) -> nodes stacked along the batch, on the labels' device.

        DivergedError if one of them is not finite.
        """
        model, config = self._model[0], self.config
        seeds = torch.arange(config.seed, config.seed + len(labels))
        noise = randomness.normal(0, "distill", 0, seeds, model.latent_shape).to(labels.device)
        parts = []
        for some, x in zip(labels.split(batch_size), noise.split(batch_size), strict=True):
            start = start_state(model.schedule, self.grid[0], x)
            parts.append(teacher_nodes(self._field(some), self.solver, self.teacher, self.stride, start, self.restarts))
        whole = TeacherNodes(*(torch.cat(p, dim=1) for p in zip(*((t.states, t.eps, t.features) for t in parts))))
        if not whole.states.isfinite().all():
            raise DivergedError(
                f"the teacher's trajectories ({config.teacher}, {len(self.teacher.grid) - 1} steps) are not finite",
                "a solver cannot be distilled from them",
                "raise --distill.teacher-steps, or choose another --distill.teacher",
            )
        return whole

    def warm_start(self, teacher: TeacherNodes, labels: Tensor) -> None:
        """Set every step's r to the best of a few, with c = a = 1, judged on at most 128 trajectories."""
        some = teacher.take(torch.arange(min(len(labels), 128), device=labels.device))
        candidates = torch.linspace(0.05, 0.7, 14, device=labels.device)
        best = best_positions(self._field(labels[:128]), self.solver, some, candidates, self.restarts)
        with torch.no_grad():
            self.rule.raw[:, 0] = torch.logit(best) / GAIN

    def errors(self, batch: TrajectoryBatch, rule: StepRule) -> Tensor:
        """(N,): error at every node but the first under `rule`, in units of the state's variance."""
        if self.restarts:
            return step_errors(self._field(batch.labels.repeat(self.solver.steps)), self.solver, rule, batch.nodes)
        guided = self._field(batch.labels)
        if self.config.mode == "end_to_end" and self.config.checkpointing:
            guided = checkpointed(guided)
        detached = self.config.mode == "per_step"
        states = nodes(self.solver, guided, rule, batch.nodes.states[0], detached)
        return node_errors(states, self.solver, batch.nodes)

    def loss(self, batch: TrajectoryBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of log errors; logs the root of the error after each step, in units of the state's standard deviation."""
        errors = self.errors(batch, self.rule)
        logs = {f"rmse_step_{i}": e.detach().sqrt() for i, e in enumerate(errors)}
        end_only = self.config.mode == "end_to_end" and not self.config.all_nodes
        return ((errors[-1:] if end_only else errors) + NEGLIGIBLE).log().sum(), logs

    def after_step(self, step_ok: Tensor) -> None:
        """Note the evaluations: those of a skipped step were made as well."""
        self.evaluations.fill_(self.counter.evaluations)


def _restore_count(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, SolverObjective)
    module.counter.evaluations = int(module.evaluations.item())
