"""The objective that learns a residual beside a learned table (samplers/residual.py); fit() runs it like any other model.

The table stays as it is. As for tables, every step takes a batch of start states through the whole sampler, and

    loss = mean over the batch of distance(student's end state, teacher's end state)

A residual has thousands of numbers where a table has dozens, and learns a few hundred pairs by heart: `held_out` further pairs
are never trained on, and the weights that end nearest to the teacher there are the ones to keep (`--validate-every`).
"""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.ranges import COUNT, WIDTH, check_ranges
from midway.gen.distillation.learning import Distillation, SampledModel, part
from midway.gen.distillation.table import DISTANCES, Distance, EndPairs, TableConfig, end_pairs, fine_teacher, l2
from midway.gen.training.batches import Context
from midway.samplers.card import SolverCard
from midway.samplers.grids import Grid
from midway.samplers.operations import Costs, network_flops
from midway.samplers.residual import Residual, ResidualShape, Step, pointwise, span_shares, steps
from midway.samplers.residual_solver import NAMES, ResidualTable, residual_flops
from midway.samplers.table import Table


@dataclass(frozen=True)
class ResidualConfig:
    """The residual's size, and how it is judged."""

    width: int = 64
    """Channels of the 3x3 residual; the 1x1 control has as many parameters."""
    blocks: int = 2
    """Residual blocks of the network."""
    held_out: int = 256
    """Pairs, after those of training, that choose the weights."""

    def __post_init__(self) -> None:
        check_ranges(self, width=WIDTH, blocks=(1, 100), held_out=(2, COUNT[1]))


def residual_shape(name: str, latent: tuple[int, ...], config: ResidualConfig) -> ResidualShape:
    """Of a name in `NAMES`."""
    full = ResidualShape(latent, 3, config.width, config.blocks)
    return full if NAMES[name] == 3 else pointwise(full)


@dataclass(frozen=True)
class HeldOut:
    """On pairs that nothing was trained on: RMSE of the end states with and without the residual, and the share of what it adds
    that is outside the span of the start and the clean estimates (`residual.span_shares`)."""

    rmse: float
    base: float
    outside: float


class ResidualObjective(Distillation):
    """Trains `residual` beside `base`, a learned table of this model. ValueError for another, and for a teacher that draws noise.

    teaching: of the teacher and its pairs, as for tables. `distance` replaces its loss.
    """

    def __init__(
        self,
        model: SampledModel,
        name: str,
        base: Table,
        guidance: float,
        config: ResidualConfig,
        teaching: TableConfig,
        distance: Distance | None = None,
    ) -> None:
        if distance is None and teaching.loss not in DISTANCES:
            raise ValueError(
                f"loss '{teaching.loss}' needs a tokenizer: pass distance=make_distance(config, tokenizer)"
            )
        teacher = fine_teacher(model, teaching)
        super().__init__(model, teacher, guidance, teaching.gradient_checkpointing)
        self.name, self.base, self.config, self.teaching = name, base, config, teaching
        self.schedule, self.distance = model.schedule, distance or DISTANCES[teaching.loss]
        self.residual = Residual(residual_shape(name, model.latent_shape, config))
        self.held_out: EndPairs | None = None

    @property
    def grid(self) -> Grid:
        return self.base.grid

    def prepare(self, labels: Tensor, shared: dict[Any, Any]) -> Callable[[Tensor], EndPairs]:
        """For labels (M,), of which the last `config.held_out` are held out; the rest are for training.

        What the base cost and what the teacher does count as training, as if each solver were learned alone.
        """
        key = (replace(self.teaching, order=3, analytic_first=True), len(labels))
        own = 0 if self.base.card is None else self.base.card.training_nfe
        if key not in shared:
            before = self.counter.evaluations
            shared[key] = (self.run_teacher(labels), self.counter.evaluations - before)
        pairs, spent = shared[key]
        self.counter.evaluations = own + spent
        count = len(labels) - self.config.held_out
        self.held_out = pairs.take(torch.arange(count, len(labels), device=labels.device))
        with torch.no_grad():
            self.residual.unit.copy_(pairs.ends[:count].std())
        return pairs.take

    def run_teacher(self, labels: Tensor) -> EndPairs:
        """All pairs, for labels (M,), on the labels' device: those of a table's teacher."""
        return end_pairs(self, self.teaching.seed, labels)

    def facts(self) -> dict[str, Any]:
        card = self.base.card
        teacher = f"{self.teaching.teacher}, {len(self.teacher.grid) - 1} steps on {self.teaching.teacher_grid}"
        analytic = self.base.rows[0].time is None
        return {
            "analytic_first": analytic,
            "teacher": teacher,
            "base": "table" if card is None else f"table, {card.base}",
            "mode": "end_to_end",
        }

    def _run(self, batch: EndPairs) -> list[Step]:
        field, unit = self.field(batch.labels), self.residual.unit
        return list(steps(field, self.base, self.residual, unit, batch.starts, self.schedule))

    def loss(self, batch: EndPairs, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Distance of the end states; logs their root mean square difference, `rmse`."""
        end = self._run(batch)[-1].state
        return self.distance(end, batch.ends), {"rmse": l2(end.detach(), batch.ends).sqrt()}

    @torch.no_grad()
    def validate(self) -> float:
        """RMSE on the held-out pairs. Its evaluations count as training."""
        assert self.held_out is not None, "prepare() first"
        end = self._run(self.held_out)[-1].state
        self.evaluations.fill_(self.counter.evaluations)
        return l2(end, self.held_out.ends).sqrt().item()

    def sampler(self, averaged: Mapping[str, Tensor], card: SolverCard) -> ResidualTable:
        residual = copy.deepcopy(self.residual).cpu().eval().requires_grad_(False)
        residual.load_state_dict(part(averaged, "residual."))
        return ResidualTable(card, self.base, residual, self.schedule, self.costs())

    def costs(self) -> Costs:
        """Of one sample."""
        model, device = self._model[0], self.residual.unit.device
        network = network_flops(model.conditional_field, model.latent_shape, device)
        return Costs(network, residual_flops(copy.deepcopy(self.residual), len(self.base.rows)))

    @torch.no_grad()
    def on_held_out(self, sampler: ResidualTable) -> HeldOut:
        """Of a sampler of this objective."""
        pairs = self.held_out
        assert pairs is not None, "prepare() first"
        field, residual = (
            self._model[0].field(pairs.labels, self.guidance, None),
            sampler.residual.to(pairs.starts.device),
        )
        found = list(steps(field, self.base, residual, residual.unit, pairs.starts, self.schedule))
        base = self.base.run(field, pairs.starts)
        rmse, without = (l2(end, pairs.ends).sqrt().item() for end in (found[-1].state, base))
        return HeldOut(rmse, without, span_shares(found, pairs.starts))
