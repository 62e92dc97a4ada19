"""The objective that learns a solver with noise (samplers/learned_noise.py); fit() runs it like any other model.

The teacher, deterministic and finer, leaves its states at the student's nodes. A student that draws noise cannot end where it
does: of its squared distance the noise is a part, E|x - x*|^2 = |E x - x*|^2 + Var x, so squared distance alone learns g = 0.
Hence

    loss = weight sum over the inner nodes of mean |x_n - x_n*|^2 / s_n^2 + distance(batch of ends, batch of the teacher's ends)

with s_n^2 = alpha^2 + sigma^2 and the distance one of distributions (batch_distance.py). States carry the gradient from node to
node, so that the end teaches every step.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from midway.gen.core.ranges import COUNT, SEED, STEPS, check_ranges
from midway.gen.distillation.learning import Distillation, SampledModel, part
from midway.gen.distillation.table import l2
from midway.gen.metrics.batch_distance import BatchDistance
from midway.gen.training.batches import Context
from midway.samplers.card import SolverCard
from midway.samplers.distill import check_nested
from midway.samplers.grids import Grid, named
from midway.samplers.learned_noise import LearnedNoise, NoiseRange, states
from midway.samplers.sample import trajectory
from midway.samplers.solvers import SOLVERS, steps_for
from midway.samplers.step_parameters import GAIN
from midway.samplers.table import Table

CHOOSING = 128
"""Trajectories that the warm start looks at."""
CANDIDATES = torch.linspace(0.05, 0.7, 14)
"""Values of r that it tries."""


@dataclass(frozen=True)
class NoiseConfig:
    """How a solver with noise is learned."""

    teacher: str = "dpmpp3m"
    """Any deterministic solver of SOLVERS, on the student's kind of grid."""
    teacher_steps: int = 48
    """Least number of teacher steps; every step of the student holds the same whole number of them."""
    trajectories: int = 2048
    """Teacher trajectories, computed once; training draws batches of them."""
    seed: int = 0
    """First trajectory's number; its noise is drawn for this purpose alone, never that of an evaluated seed."""
    analytic_first: bool | None = None
    """Whether the first slope is the analytic direction; by default only for odd budgets, which need it."""
    loss: Literal["distribution", "l2"] = "distribution"
    """Of the end states: a distance of the batches' distributions, or the squared difference, which learns the noise away."""
    node_weight: float = 0.1
    """Weight of the squared distances at the inner nodes."""
    start: float = 0.25
    """Share of its limit that g begins with."""
    ranges: NoiseRange = field(default_factory=NoiseRange)

    def __post_init__(self) -> None:
        if not 0 <= self.start < 1 or not 0 <= self.node_weight < math.inf:
            raise ValueError(f"start must be in [0, 1) and node_weight 0 or more, got {self.start}, {self.node_weight}")
        check_ranges(self, teacher_steps=STEPS, trajectories=(2, COUNT[1]), seed=SEED)
        if self.teacher not in SOLVERS:
            raise ValueError(f"unknown teacher '{self.teacher}': choose one of {', '.join(SOLVERS)}")


@dataclass(frozen=True)
class NodeBatch:
    """The teacher's states at the student's nodes, (N + 1, B, *), and labels (B,)."""

    states: Tensor
    labels: Tensor

    def take(self, items: Tensor) -> "NodeBatch":
        """The trajectories `items` int64 (b,)."""
        return NodeBatch(self.states[:, items], self.labels[items])


class NoiseObjective(Distillation):
    """Trains `learned` on the grid of this name. ValueError for an impossible budget, teacher or grid."""

    def __init__(self, model: SampledModel, nfe: int, grid: str, guidance: float, config: NoiseConfig) -> None:
        analytic_first = nfe % 2 == 1 if config.analytic_first is None else config.analytic_first
        steps = steps_for(2, nfe, analytic_first)
        stride = math.ceil(config.teacher_steps / steps)
        times, fine = (named(grid, model.schedule, n, trained=model.shift) for n in (steps, steps * stride))
        teacher = SOLVERS[config.teacher].build(model.schedule, fine)
        check_nested(teacher, times, stride)
        super().__init__(model, teacher, guidance, False)
        self.config, self.stride = config, stride
        self.learned = LearnedNoise(model.schedule, times, analytic_first, config.ranges)
        self.learned.begin_with(config.start)
        self.distance = BatchDistance(model.latent_shape)

    @property
    def grid(self) -> Grid:
        return self.learned.grid

    def prepare(self, labels: Tensor, shared: dict[Any, Any]) -> Callable[[Tensor], NodeBatch]:
        """The teacher's states for labels (M,), on their device, and a warm start on the first of them."""
        found = self.run_teacher(labels)
        self.warm_start(found.take(torch.arange(min(len(labels), CHOOSING), device=labels.device)))
        return found.take

    @torch.no_grad()
    def warm_start(self, batch: NodeBatch) -> None:
        """Set every step's r to the best of a few, with c = k = 1, by the distance to the teacher's next node without noise."""
        learned = copy.deepcopy(self.learned)
        learned.noise.zero_()
        field, x = self.field(batch.labels), batch.states[0]
        for i in range(len(self.grid) - 1):
            found = []
            for raw in torch.logit(CANDIDATES) / GAIN:
                learned.raw[i, 0] = raw
                found.append(states(field, learned, x, torch.zeros_like, i, i + 1)[-1])
            best = torch.stack([l2(end, batch.states[i + 1]) for end in found]).nan_to_num(torch.inf).argmin()
            learned.raw[i, 0], x = torch.logit(CANDIDATES)[best] / GAIN, found[int(best)]
        self.learned.raw.copy_(learned.raw)

    @torch.no_grad()
    def run_teacher(self, labels: Tensor, batch_size: int = 256) -> NodeBatch:
        """All trajectories."""
        starts = self.starts(self.config.seed, labels, self.grid[0])
        found = [
            torch.stack(trajectory(self.field(some), self.teacher, x)[:: self.stride])
            for some, x in zip(labels.split(batch_size), starts.split(batch_size), strict=True)
        ]
        return NodeBatch(torch.cat(found, dim=1), labels)

    def facts(self) -> dict[str, Any]:
        return {
            "analytic_first": self.learned.analytic_first,
            "teacher": f"{self.config.teacher}, {len(self.teacher.grid) - 1} steps",
            "mode": self.config.loss,
        }

    def sampler(self, averaged: Mapping[str, Tensor], card: SolverCard) -> Table:
        learned = copy.deepcopy(self.learned).cpu()
        learned.load_state_dict(part(averaged, "learned."))
        return learned.export(card)

    def loss(self, batch: NodeBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """As above; logs its last term, `end`, and the root mean square difference of the end states, `rmse`."""
        draws = iter(range(len(self.grid)))

        def noise(x: Tensor) -> Tensor:
            return context.normal(f"learned-noise-{next(draws)}", tuple(x.shape[1:])).to(x)

        found = states(self.field(batch.labels), self.learned, batch.states[0], noise)
        errors = [(a - b).square().mean() for a, b in zip(found[1:], batch.states[1:], strict=True)]
        end = errors[-1] if self.config.loss == "l2" else self.distance(found[-1], batch.states[-1])
        t = torch.tensor(self.grid, dtype=torch.float64)
        units = (self.learned.schedule.alpha(t).square() + self.learned.schedule.sigma(t).square()).tolist()
        inner = [error / unit for error, unit in zip(errors[:-1], units[1:-1], strict=True)]
        loss = end + self.config.node_weight * sum(inner, torch.zeros_like(end))
        return loss, {"end": end.detach(), "rmse": errors[-1].detach().sqrt()}
