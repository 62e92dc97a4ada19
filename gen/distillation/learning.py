"""What every objective that learns a solver for a trained model shares.

Training NFE is counted at the network, teacher and warm start included: every pass of a sample counts 1, recomputation in a
backward pass does not. The count is part of the state, so that a resumed run reports what an uninterrupted one does.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from midway.gen.core import randomness
from midway.gen.diffusion.field import start_state
from midway.gen.training.batches import Context
from midway.samplers.card import SolverCard
from midway.samplers.grids import Grid
from midway.samplers.guidance import ConditionalField
from midway.samplers.learned import checkpointed
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.prediction import Field, Prediction
from midway.samplers.residual_solver import ResidualTable
from midway.samplers.sample import EvaluationCounter
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table


class SampledModel(Protocol):
    """All that learning a solver needs of a model: a `LatentModel`, or a mixture whose field is exact."""

    @property
    def schedule(self) -> Schedule: ...

    @property
    def latent_shape(self) -> tuple[int, ...]: ...

    @property
    def feature_dim(self) -> int:
        """Length of the features of its predictions."""
        ...

    @property
    def shift(self) -> float:
        """Of the noise levels that it was trained on, which the grid `shift` has, too; 1: none."""
        ...

    def conditional_field(self, x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        """One pass through the network, for labels (B,)."""
        ...

    def field(self, labels: Tensor, guidance: float, network: ConditionalField | None) -> Field:
        """The guided field for labels (B,), with `network` in place of `conditional_field`."""
        ...


class Distillation(nn.Module):
    """Learns a solver from `teacher`; the model stays frozen and is kept out of the parameters.

    `counter` counts the network evaluations; the buffer `evaluations` int64 () holds its count after the newest step.
    recompute: keep the activations of one evaluation at a time, and run each again in the backward pass.
    """

    evaluations: Tensor
    taught = 0
    """Of the counter's evaluations, those of a teacher that other solvers share."""

    def __init__(self, model: SampledModel, teacher: Table, guidance: float, recompute: bool) -> None:
        super().__init__()
        self._model = (model,)  # a tuple: not a sub-module, so neither trained nor saved
        self.teacher, self.guidance = teacher, guidance
        self.counter = EvaluationCounter(
            checkpointed(model.conditional_field) if recompute else model.conditional_field
        )
        self.register_buffer("evaluations", torch.tensor(0))
        self.register_load_state_dict_post_hook(_restore_count)

    @property
    @abstractmethod
    def grid(self) -> Grid:
        """The student's times."""

    @abstractmethod
    def prepare(self, labels: Tensor, shared: dict[Any, Any]) -> Callable[[Tensor], Any]:
        """Run the teacher for labels (M,), warm-start, and return items int64 (b,) -> batch.

        shared: results of the teacher that objectives of other budgets can use.
        """

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """The fields of a `SolverCard` that the objective decides."""

    @abstractmethod
    def sampler(self, averaged: Mapping[str, Tensor], card: SolverCard) -> LearnedSolver | ResidualTable | Table:
        """The solver of the weights `averaged` (named as this module's state)."""

    @abstractmethod
    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Of a batch of teacher's trajectories, and what to log."""

    def save(self, path: Path, averaged: Mapping[str, Tensor], card: SolverCard) -> None:
        """Write the solver of the weights `averaged`."""
        self.sampler(averaged, card).save(path)

    def field(self, labels: Tensor) -> Field:
        """The guided field of labels (B,), counted."""
        return self._model[0].field(labels, self.guidance, self.counter)

    def starts(self, first: int, labels: Tensor, time: float) -> Tensor:
        """States (M, *) at `time` of noise drawn for this purpose alone, numbers `first` on."""
        model, seeds = self._model[0], torch.arange(first, first + len(labels))
        noise = randomness.normal(0, "distill", 0, seeds, model.latent_shape).to(labels.device)
        return start_state(model.schedule, time, noise)

    def after_step(self, step_ok: Tensor) -> None:
        """Store the count: evaluations of a skipped step were made as well."""
        self.evaluations.fill_(self.counter.evaluations)


@dataclass(frozen=True)
class Lesson:
    """How `learn` learns: Adam with a cosine rate, gradients clipped to a norm."""

    steps: int = 60
    batch: int = 32
    lr: float = 5e-3
    clip: float = 1e6
    seed: int = 0
    validate_every: int = 50


def learn(
    objective: Distillation,
    take: Callable[[Tensor], Any],
    count: int,
    lesson: Lesson,
    validate: Callable[[], float] | None = None,
) -> None:
    """Train `objective` in memory on batches of its `count` trajectories, `take` (from `prepare`) making one of items (b,).

    validate: called every `lesson.validate_every` steps and before the first; the weights of its least value are kept.
    For solvers of a field that takes no time; `fit` adds runs, checkpoints and processes.
    """
    optimizer = torch.optim.Adam(objective.parameters(), lesson.lr)
    kept: tuple[float, dict[str, Tensor]] = (math.inf, {})
    for step in range(lesson.steps + 1):
        if validate is not None and (step % lesson.validate_every == 0 or step == lesson.steps):
            value = validate()
            if value < kept[0]:
                kept = (value, {name: p.detach().clone() for name, p in objective.named_parameters()})
        if step == lesson.steps:
            break
        items = randomness.permutation(lesson.seed, "distill", step, count)[: lesson.batch]
        optimizer.param_groups[0]["lr"] = lesson.lr * 0.5 * (1 + math.cos(math.pi * step / lesson.steps))
        loss, _ = objective.loss(take(items), Context(lesson.seed, step, items))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), lesson.clip)
        optimizer.step()
        objective.after_step(torch.tensor(True))
    if kept[1]:
        objective.load_state_dict({**objective.state_dict(), **kept[1]})
    objective.zero_grad()  # nothing is left for whoever trains it next


def part(averaged: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in averaged.items() if name.startswith(prefix)}


def _restore_count(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, Distillation)
    module.counter.evaluations = int(module.evaluations.item())
