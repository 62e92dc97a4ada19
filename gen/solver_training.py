"""The objective that distils a solver for a trained model; fit() runs it like any other model.

The teacher's trajectories are computed once, `trajectories` of them, and every step draws a batch of them.

    loss = sum over steps of log(error of the step + 1e-6)

so that every step's relative improvement counts the same, although errors of early and late steps differ by orders of
magnitude. The network evaluations spent on all this are part of the state, so that a resumed run reports what an
uninterrupted one does.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from midway.gen import randomness
from midway.gen.context import Context
from midway.gen.latent_model import LatentModel, start_state
from midway.samplers.amed import GAIN, AMEDConfig, Constants, DirectionRule, Directions, Predictor
from midway.samplers.distill import NEGLIGIBLE, TeacherNodes, step_errors, teacher_nodes
from midway.samplers.grids import GRIDS, Grid
from midway.samplers.sample import EvaluationCounter
from midway.samplers.solvers import SOLVERS, steps_for
from midway.samplers.table import Table


@dataclass(frozen=True)
class DistillConfig:
    """How a solver is distilled."""

    teacher: str = "dpmpp2m"
    """Any table solver; it gets its own evaluations, which are counted as training."""
    teacher_steps: int = 32
    """Least number of teacher steps; every step of the student holds the same whole number of them."""
    trajectories: int = 512
    """Teacher trajectories, computed once; training draws batches of them."""
    seed: int = 0
    """First trajectory's number; its noise is drawn for this purpose alone, never that of an evaluated seed."""
    analytic_first: bool | None = None
    """Whether the first slope is the analytic direction; by default only for odd budgets, which need it."""
    amed: AMEDConfig = field(default_factory=AMEDConfig)

    def __post_init__(self) -> None:
        if self.trajectories < 1 or self.teacher_steps < 1:
            raise ValueError(
                f"trajectories {self.trajectories} and teacher_steps {self.teacher_steps} must be 1 or more"
            )


@dataclass(frozen=True)
class SolverTarget:
    """What is learned: a solver of `nfe` evaluations on a named grid, for a model guided at this scale."""

    nfe: int
    grid: str
    guidance: float
    constants: bool
    """Constants per step, or a predictor per sample."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """Teacher nodes of B trajectories and their labels (B,)."""

    nodes: TeacherNodes
    labels: Tensor


class SolverObjective(nn.Module):
    """Trains `rule` (constants or a predictor); the model stays frozen and is kept out of the parameters.

    `counter` counts the network evaluations; the buffer `evaluations` int64 () holds its count after the newest step.
    """

    evaluations: Tensor

    def __init__(self, model: LatentModel, target: SolverTarget, config: DistillConfig) -> None:
        super().__init__()
        self.target, self.config = target, config
        odd = target.nfe % 2 == 1
        self.analytic_first = odd if config.analytic_first is None else config.analytic_first
        steps = steps_for(2, target.nfe, self.analytic_first)
        make = GRIDS[target.grid]
        schedule = model.schedule
        self.grid: Grid = make(schedule, steps)
        self.stride = math.ceil(config.teacher_steps / steps)
        fine = make(schedule, steps * self.stride)
        self.teacher: Table = SOLVERS[config.teacher].build(schedule, fine)
        self.feature_dim = model.config.dit.width
        self.rule = (
            Constants(steps, config.amed) if target.constants else Predictor(self.feature_dim, steps, config.amed)
        )
        self._model = (model,)  # a tuple: not a sub-module, so neither trained nor saved
        self.counter = EvaluationCounter(model.conditional_field)
        self.register_buffer("evaluations", torch.tensor(0))
        self.register_load_state_dict_post_hook(_restore_count)

    def run_teacher(self, labels: Tensor, batch_size: int = 256) -> TeacherNodes:
        """All trajectories: labels (M,) -> nodes stacked along the batch, on the labels' device."""
        model, config = self._model[0], self.config
        seeds = torch.arange(config.seed, config.seed + len(labels))
        noise = randomness.normal(0, "distill", 0, seeds, model.latent_shape).to(labels.device)
        parts = []
        for some, x in zip(labels.split(batch_size), noise.split(batch_size), strict=True):
            start = start_state(model.schedule, self.grid[0], x)
            guided = model.field(some, self.target.guidance, self.counter)
            schedule, analytic = model.schedule, self.analytic_first
            parts.append(teacher_nodes(guided, schedule, self.teacher, self.stride, start, analytic, self.feature_dim))
        return TeacherNodes(*(torch.cat(p, dim=1) for p in zip(*((t.states, t.eps, t.features) for t in parts))))

    @torch.no_grad()
    def warm_start(self, nodes: TeacherNodes, labels: Tensor) -> None:
        """Set every step's r to the best of a few, with c = a = 1.

        The error as a function of r has several basins on long steps, and from r = 1/2 the gradient may lead into a poor one.
        """
        batch = TrajectoryBatch(nodes.take(torch.arange(min(len(labels), 128), device=labels.device)), labels[:128])
        candidates = torch.linspace(0.05, 0.7, 14, device=labels.device)
        errors = torch.stack([self._errors(batch, _fixed(r)) for r in candidates])  # (14, N)
        best = candidates[errors.argmin(0)]
        self.rule.raw[:, 0] = torch.logit(best) / GAIN

    def _errors(self, batch: TrajectoryBatch, rule: DirectionRule) -> Tensor:
        """(N,): error of every step of the batch under `rule`."""
        model = self._model[0]
        guided = model.field(batch.labels.repeat(len(self.grid) - 1), self.target.guidance, self.counter)
        return step_errors(guided, model.schedule, self.grid, rule, batch.nodes)

    def loss(self, batch: TrajectoryBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of log errors; logs the root of each step's error, in units of the state's standard deviation."""
        errors = self._errors(batch, self.rule)
        logs = {f"rmse_step_{i}": e.detach().sqrt() for i, e in enumerate(errors)}
        return (errors + NEGLIGIBLE).log().sum(), logs

    def after_step(self, kept: Tensor) -> None:
        """Note the evaluations: those of a skipped step were made as well."""
        self.evaluations.fill_(self.counter.evaluations)


def _restore_count(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, SolverObjective)
    module.counter.evaluations = int(module.evaluations.item())


def _fixed(r: Tensor) -> DirectionRule:
    """The rule that always says r, c = 1, a = 1."""

    def rule(features: Tensor, step: Tensor, log_rho: Tensor) -> Directions:
        ones = torch.ones_like(log_rho[:, 0])
        return Directions(r * ones, ones, ones)

    return rule
