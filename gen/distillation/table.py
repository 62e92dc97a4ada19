"""The objective that learns a table end to end; fit() runs it like any other model.

A fine solver maps the noise of `pairs` seeds to end states once. Every step takes a batch of them through the whole student:

    loss = mean over the batch of distance(student's end state, teacher's end state)

with the gradient through all evaluations, as in arXiv 2510.17699. The distance is in latents, or after decoding (`decoded`), or
any that the caller gives; it must never use the network whose features the result is measured with (LPIPS uses VGG-16).

One learning rate serves all parameters (samplers/learned.py).
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from midway.gen.core.ranges import COUNT, SEED, STEPS, check_ranges
from midway.gen.diffusion.load import BEST
from midway.gen.distillation.learning import Distillation, Lesson, SampledModel, learn, part
from midway.gen.training.batches import Context
from midway.samplers.card import SolverCard
from midway.samplers.distill import need_no_noise
from midway.samplers.grids import GRIDS, Grid, named
from midway.samplers.learned import LearnedTable, rollout
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table
from midway.tokenizers.perceptual import Perceptual
from midway.tokenizers.tokenizer import ImageTokenizer

CHOOSING = 128
"""Pairs that judge unlearned tables."""
NEAR = 2.25
"""A grid whose squared error is within this factor of the least is tried too."""
TRIAL = Lesson(steps=60, batch=32, lr=5e-3, clip=1.0)
"""How a grid to start from is tried."""
BATCH = 256
"""Pairs that are sampled together."""

Distance = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's end states (B, *)) -> scalar, a mean over the batch."""


@dataclass(frozen=True)
class TableConfig:
    """How a table is learned."""

    teacher: str = "dpmpp3m"
    """Any deterministic solver of SOLVERS."""
    teacher_grid: str = "logsnr"
    """The teacher's time grid."""
    teacher_steps: int = 48
    """The teacher's steps."""
    pairs: int = 512
    """Teacher's end states, computed once; training draws batches of them."""
    seed: int = 0
    """First pair's number; its noise is drawn for this purpose alone, never that of an evaluated seed."""
    analytic_first: bool = True
    """Whether the first clean estimate is the analytic one of unit-variance data, which buys one more step."""
    order: int = 3
    """Order of the DPM-Solver++ that learning starts from."""
    loss: Literal["l2", "l1", "lpips"] = "l2"
    """Mean squared or mean absolute difference of latents, or LPIPS of decoded images."""
    perceptual_weights: Path | None = None
    """lpips: torchvision's file of VGG-16's weights, or the same as safetensors (default: download)."""
    gradient_checkpointing: bool = False
    """Keep the activations of one evaluation at a time, and run each again in the backward pass."""

    def __post_init__(self) -> None:
        if min(self.pairs, self.teacher_steps) < 1 or self.seed < 0:
            raise ValueError(
                f"pairs {self.pairs} and teacher_steps {self.teacher_steps} must be 1 or more, seed {self.seed} 0 or more"
            )
        for what, name, known in (
            ("teacher", self.teacher, SOLVERS),
            ("teacher_grid", self.teacher_grid, GRIDS),
            ("loss", self.loss, (*DISTANCES, "lpips")),
        ):
            if name not in known:
                raise ValueError(f"unknown {what} '{name}': choose one of {', '.join(known)}")
        check_ranges(self, teacher_steps=STEPS, pairs=COUNT, seed=SEED, order=(1, 4))


@dataclass(frozen=True)
class TableTarget:
    """What is learned: a table of `nfe` evaluations that starts from a named grid (or the best of them), for a model guided at
    this scale."""

    nfe: int
    grid: str = BEST
    guidance: float = 1.0

    def __post_init__(self) -> None:
        if self.nfe < 1:
            raise ValueError(f"a table needs at least 1 evaluation, got nfe {self.nfe}")
        if self.grid not in (BEST, *GRIDS):
            raise ValueError(f"unknown grid '{self.grid}': choose one of {', '.join((BEST, *GRIDS))}")


@dataclass(frozen=True)
class EndPairs:
    """Start states and the teacher's end states, (B, *) each, and labels (B,)."""

    starts: Tensor
    ends: Tensor
    labels: Tensor

    def take(self, items: Tensor) -> "EndPairs":
        """The pairs `items` int64 (b,)."""
        return EndPairs(self.starts[items], self.ends[items], self.labels[items])


def l2(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference."""
    return (student - teacher).square().mean()


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean absolute difference, the published loss in latents."""
    return (student - teacher).abs().mean()


DISTANCES: dict[str, Distance] = {"l2": l2, "l1": l1}


def decoded(tokenizer: ImageTokenizer, distance: Distance) -> Distance:
    """`distance` between decoded images (B, C, H, W) in [-1, 1]; codes are not snapped, which would have no gradient."""
    return lambda student, teacher: distance(
        tokenizer.decode_latents(student, snap=False), tokenizer.decode_latents(teacher, snap=False)
    )


def make_distance(config: TableConfig, tokenizer: ImageTokenizer) -> Distance:
    """The loss that `config` names. ValueError if the network of LPIPS cannot be had, or its images are too small."""
    if config.loss != "lpips":
        return DISTANCES[config.loss]
    perceptual = Perceptual("vgg", config.perceptual_weights).to(tokenizer.device)
    perceptual.check_size(*tokenizer.image_shape[1:])
    return decoded(tokenizer, lambda student, teacher: perceptual(student, teacher).mean())


def fine_teacher(model: SampledModel, config: TableConfig) -> Table:
    """The teacher that `config` names, for this model. ValueError for one that draws noise."""
    times = named(config.teacher_grid, model.schedule, config.teacher_steps, trained=model.shift)
    teacher = SOLVERS[config.teacher].build(model.schedule, times)
    need_no_noise(teacher)
    return teacher


@torch.no_grad()
def end_pairs(objective: Distillation, first: int, labels: Tensor) -> EndPairs:
    """What the teacher of an objective makes of the noise of numbers `first` on, for labels (M,), on their device."""
    starts = objective.starts(first, labels, objective.teacher.grid[0])
    parts = zip(labels.split(BATCH), starts.split(BATCH), strict=True)
    ends = [sample(objective.field(some), objective.teacher, x) for some, x in parts]
    return EndPairs(starts, torch.cat(ends), labels)


class TableObjective(Distillation):
    """Trains `learned`. The buffer `chosen` int64 () holds the number of the grid that learning started from.

    `distance` replaces the config's loss. ValueError for a teacher that draws noise.
    """

    chosen: Tensor

    def __init__(
        self, model: SampledModel, target: TableTarget, config: TableConfig, distance: Distance | None = None
    ) -> None:
        if distance is None and config.loss not in DISTANCES:
            raise ValueError(f"loss '{config.loss}' needs a tokenizer: pass distance=make_distance(config, tokenizer)")
        teacher = fine_teacher(model, config)
        super().__init__(model, teacher, target.guidance, config.gradient_checkpointing)
        self.target, self.config, self.schedule, self.shift = target, config, model.schedule, model.shift
        self.distance = distance or DISTANCES[config.loss]
        self.candidates = tuple(GRIDS) if target.grid == BEST else (target.grid,)
        self.learned = LearnedTable(self.schedule, self._candidate(0), config.order, config.analytic_first)
        self.register_buffer("chosen", torch.tensor(0))

    @property
    def grid_name(self) -> str:
        """The grid that learning started from."""
        return self.candidates[self.chosen]

    @property
    def grid(self) -> Grid:
        return tuple(self.learned.grid.tolist())

    def _candidate(self, number: int) -> Grid:
        steps = self.target.nfe + self.config.analytic_first
        return named(self.candidates[number], self.schedule, steps, trained=self.shift)

    def prepare(self, labels: Tensor, shared: dict[Any, Any]) -> Callable[[Tensor], EndPairs]:
        """The teacher's pairs are the same at every budget; every table counts them, as if it were learned alone."""
        if self.config not in shared:
            shared[self.config] = (self.run_teacher(labels), self.counter.evaluations)
        pairs, self.counter.evaluations = shared[self.config]
        self.warm_start(pairs)
        return pairs.take

    def facts(self) -> dict[str, Any]:
        return {
            "analytic_first": self.config.analytic_first,
            "teacher": f"{self.config.teacher}, {len(self.teacher.grid) - 1} steps on {self.config.teacher_grid}",
            "base": f"dpmpp{self.config.order}m on {self.grid_name}",
            "mode": "end_to_end",
        }

    def sampler(self, averaged: Mapping[str, Tensor], card: SolverCard) -> Table:
        return self.export(averaged, {"card": json.dumps(asdict(card))})

    def run_teacher(self, labels: Tensor) -> EndPairs:
        """All pairs, for labels (M,), on the labels' device."""
        return end_pairs(self, self.config.seed, labels)

    def warm_start(self, pairs: EndPairs) -> None:
        """Start from the candidate grid on which the unlearned table ends nearest to the teacher, on the first pairs.

        The next one, if it is not far behind, is tried against it by a short lesson each: what is best unlearned need not be
        best to learn from. All pairs judge then, since few far-off samples decide.
        """
        if len(self.candidates) == 1:
            return
        some = pairs.take(torch.arange(min(len(pairs.labels), CHOOSING), device=pairs.labels.device))
        errors = {number: self._error_on(number, some) for number in range(len(self.candidates))}
        first, second = sorted(errors, key=lambda number: errors[number])[:2]
        tried = (first, second) if errors[second] < NEAR * errors[first] else (first,)
        if len(tried) == 2:
            errors = {number: self._error_on(number, pairs, TRIAL) for number in tried}
        self.chosen.fill_(min(tried, key=lambda number: errors[number]))
        self.learned.restart(self._candidate(int(self.chosen)))

    def _error_on(self, number: int, pairs: EndPairs, lesson: Lesson | None = None) -> float:
        """Mean squared difference from the teacher's ends on a candidate grid, unlearned or after a lesson; inf for no number."""
        self.learned.restart(self._candidate(number))
        if lesson is not None:
            learn(self, pairs.take, len(pairs.labels), lesson)
        with torch.no_grad():
            table, parts = self.learned.table(), torch.arange(len(pairs.labels)).split(BATCH)
            ends = [sample(self.field((some := pairs.take(part)).labels), table, some.starts) for part in parts]
            return float(l2(torch.cat(ends), pairs.ends).nan_to_num(nan=torch.inf))

    def loss(self, batch: EndPairs, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of the end states; logs their root mean square difference, `rmse`."""
        end = rollout(self.field(batch.labels), self.learned, batch.starts)
        return self.distance(end, batch.ends), {"rmse": l2(end.detach(), batch.ends).sqrt()}

    def export(self, averaged: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Table:
        """The table of `averaged` (named as this module's state), with `metadata`."""
        learned = copy.deepcopy(self.learned).cpu()
        learned.load_state_dict(part(averaged, "learned."))
        return learned.table(metadata)
