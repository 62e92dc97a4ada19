"""The objective that learns a table end to end; fit() runs it like any other model.

A fine solver maps the noise of `pairs` seeds to end states once. Every step takes a batch of them through the whole student:

    loss = mean over the batch of distance(student's end state, teacher's end state)

with the gradient through all evaluations, as in arXiv 2510.17699. The distance is in latents, or after decoding (`decoded`), or
any that the caller gives; it must never use the network whose features the result is measured with (LPIPS uses VGG-16).

One learning rate serves all parameters (samplers/learned.py). Evaluations are counted at the network, the teacher's included;
one with a gradient counts 1, and running it again for gradient checkpointing does not count.
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from midway.gen.core import randomness
from midway.gen.diffusion.model import LatentModel, start_state
from midway.gen.training.batches import Context
from midway.samplers.grids import GRIDS, Grid
from midway.samplers.learned import LearnedTable, checkpointed, rollout
from midway.samplers.prediction import Field
from midway.samplers.sample import EvaluationCounter, sample
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table
from midway.tokenizers.perceptual import Perceptual
from midway.tokenizers.tokenizer import ImageTokenizer

BEST = "best"
"""Instead of a grid's name: the one of grids.GRIDS on which the unlearned table ends nearest to the teacher."""
CHOOSING = 128  # pairs that the choice looks at

Distance = Callable[[Tensor, Tensor], Tensor]
"""(student's, teacher's end states (B, *)) -> scalar, a mean over the batch."""


@dataclass(frozen=True)
class TableConfig:
    """How a table is learned."""

    teacher: str = "dpmpp3m"
    """Any deterministic solver of SOLVERS."""
    teacher_grid: str = "logsnr"
    teacher_steps: int = 48
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


class TableObjective(nn.Module):
    """Trains `learned`; the model stays frozen and is kept out of the parameters.

    `counter` counts the network evaluations; the buffer `evaluations` int64 () holds its count after the newest step, the buffer
    `chosen` int64 () the number of the grid that learning started from. `distance` replaces the config's loss. ValueError for a
    teacher that draws noise.
    """

    evaluations: Tensor
    chosen: Tensor

    def __init__(
        self, model: LatentModel, target: TableTarget, config: TableConfig, distance: Distance | None = None
    ) -> None:
        super().__init__()
        if distance is None and config.loss not in DISTANCES:
            raise ValueError(f"loss '{config.loss}' needs a tokenizer: pass distance=make_distance(config, tokenizer)")
        self.target, self.config = target, config
        self.analytic_first = config.analytic_first
        self.distance = distance or DISTANCES[config.loss]
        self.schedule = model.schedule
        self.candidates = tuple(GRIDS) if target.grid == BEST else (target.grid,)
        self.learned = LearnedTable(self.schedule, self._candidate(0), config.order, config.analytic_first)
        fine = GRIDS[config.teacher_grid](self.schedule, config.teacher_steps)
        self.teacher: Table = SOLVERS[config.teacher].build(self.schedule, fine)
        if self.teacher.stochastic:
            raise ValueError(f"the teacher {config.teacher} draws noise: choose a deterministic solver")
        self._model = (model,)  # a tuple: not a sub-module, so neither trained nor saved
        network = checkpointed(model.conditional_field) if config.gradient_checkpointing else model.conditional_field
        self.counter = EvaluationCounter(network)
        self.register_buffer("evaluations", torch.tensor(0))
        self.register_buffer("chosen", torch.tensor(0))
        self.register_load_state_dict_post_hook(_restore_count)

    @property
    def grid_name(self) -> str:
        """The grid that learning started from."""
        return self.candidates[self.chosen]

    @property
    def grid(self) -> Grid:
        """Its times."""
        return tuple(self.learned.grid.tolist())

    def _candidate(self, number: int) -> Grid:
        return GRIDS[self.candidates[number]](self.schedule, self.target.nfe + self.analytic_first)

    def _field(self, labels: Tensor) -> Field:
        return self._model[0].field(labels, self.target.guidance, self.counter)

    @torch.no_grad()
    def run_teacher(self, labels: Tensor, batch_size: int = 256) -> EndPairs:
        """All pairs, for labels (M,), on the labels' device."""
        seeds = torch.arange(self.config.seed, self.config.seed + len(labels))
        noise = randomness.normal(0, "distill", 0, seeds, self._model[0].latent_shape).to(labels.device)
        starts = start_state(self.schedule, self.teacher.grid[0], noise)
        parts = zip(labels.split(batch_size), starts.split(batch_size), strict=True)
        ends = [sample(self._field(some), self.teacher, x) for some, x in parts]
        return EndPairs(starts, torch.cat(ends), labels)

    @torch.no_grad()
    def warm_start(self, pairs: EndPairs) -> None:
        """Start from the candidate grid on which the unlearned table ends nearest to the teacher, on the first pairs."""
        if len(self.candidates) == 1:
            return
        some = pairs.take(torch.arange(min(len(pairs.labels), CHOOSING), device=pairs.labels.device))
        errors = []
        for number in range(len(self.candidates)):
            self.learned.restart(self._candidate(number))
            end = sample(self._field(some.labels), self.learned.table(), some.starts)
            errors.append(l2(end, some.ends))
        self.chosen.fill_(int(torch.stack(errors).nan_to_num(nan=torch.inf).argmin()))
        self.learned.restart(self._candidate(int(self.chosen)))

    def loss(self, batch: EndPairs, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of the end states; logs their root mean square difference, `rmse`."""
        end = rollout(self._field(batch.labels), self.learned, batch.starts)
        return self.distance(end, batch.ends), {"rmse": l2(end.detach(), batch.ends).sqrt()}

    def after_step(self, step_ok: Tensor) -> None:
        """Note the evaluations: those of a skipped step were made as well."""
        self.evaluations.fill_(self.counter.evaluations)

    def export(self, averaged: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Table:
        """The table of `averaged` (named as this module's state), with `metadata`."""
        learned = copy.deepcopy(self.learned).cpu()
        learned.load_state_dict(
            {k.removeprefix("learned."): v for k, v in averaged.items() if k.startswith("learned.")}
        )
        return learned.table(metadata)


def _restore_count(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, TableObjective)
    module.counter.evaluations = int(module.evaluations.item())
