"""What solvers see of a latent model: its velocity, noise or clean estimate for given labels, under guidance.

    value = value_weak + w (value_strong - value_weak)

strong is the model told the class; weak is the model not told it (classifier-free guidance, Ho & Salimans 2022, arXiv 2207.12598)
or another, worse model told the class as well (autoguidance, Karras et al. 2024, arXiv 2406.02507). Outside the `interval` of
noise levels rho = sigma / alpha the strong value stands alone, at half the evaluations (Kynkäänniemi et al. 2024, arXiv
2404.07724).

A sampler knows the times of all evaluations: `prepare` embeds them all at once, beside the labels, and leaves each evaluation
the network, one scaling of its input (none where alpha^2 + sigma^2 = 1) and the guidance.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from midway.samplers.guidance import autoguidance, classifier_free, conditional, interval
from midway.samplers.prediction import Field, Prediction, Target, TargetField, on_device, x0_coefficients
from midway.samplers.schedule import Schedule

if TYPE_CHECKING:
    from midway.gen.diffusion.model import LatentModel


EVERYWHERE = (0.0, math.inf)


@dataclass(frozen=True)
class Guidance:
    """How the class, or another model, is made to count more."""

    scale: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    """Noise levels rho with low < rho <= high are guided."""
    weak: "LatentModel | None" = None
    """The worse model of autoguidance; None for classifier-free guidance."""

    def acts_at(self, rho: float) -> bool:
        """Whether an evaluation at this noise level is guided."""
        return self.scale != 1 and self.interval[0] < rho <= self.interval[1]


@dataclass(frozen=True, eq=False)
class LatentField(TargetField):
    """The field of `model` for labels (B,); `guidance` is checked by `LatentModel.field`."""

    model: "LatentModel"
    labels: Tensor
    guidance: Guidance

    @property
    def target(self) -> Target:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.config.target

    @property
    def schedule(self) -> Schedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.schedule

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        """At any t (B,); features are the strong branch's."""
        return self._field()(x, t)

    def _field(self) -> Field:
        model, guidance = self.model, self.guidance
        strong = conditional(model.conditional_field, self.labels)
        if guidance.scale == 1:
            return strong
        if guidance.weak is not None:
            weak = conditional(guidance.weak.conditional_field, self.labels)
            guided = autoguidance(strong, weak, guidance.scale)
        else:
            null = model.null_labels(self.labels)
            guided = classifier_free(model.conditional_field, self.labels, null, guidance.scale)
        everywhere = guidance.interval == EVERYWHERE
        return guided if everywhere else interval(guided, strong, model.schedule, *guidance.interval)

    def at(self, time: float) -> "LatentField":
        """The field where all samples are at `time`: inside the interval guided, outside not; one object for each."""
        inside = self.guidance.acts_at(self.schedule.rho(torch.tensor(time, dtype=torch.float64)).item())
        return self._sides[inside]

    @cached_property
    def _sides(self) -> "tuple[LatentField, LatentField]":
        """Outside and inside the interval."""
        everywhere = replace(self.guidance, interval=EVERYWHERE)
        return replace(self, guidance=Guidance()), replace(self, guidance=everywhere)

    def coefficients(self, times: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
        """(p, q) of `x0 = p x_t + q F`, with F the network's output of unit variance."""
        t = torch.tensor(times, dtype=torch.float64)
        scales = self.model.output_scale(t).tolist()
        pairs = x0_coefficients(self.target, self.schedule, times)
        return tuple((p, q * scale) for (p, q), scale in zip(pairs, scales, strict=True))

    def prepare(self, times: Sequence[float], x: Tensor) -> list[Callable[[Tensor], Tensor]]:
        """x_t (B, *) -> F, one function for each time."""
        strong = _branch(self.model, times, self.labels)
        if self.guidance.scale == 1:
            return strong
        rho = self.schedule.rho(torch.tensor(times, dtype=torch.float64)).tolist()
        if self.guidance.weak is None:
            both = _branch(self.model, times, torch.cat([self.labels, self.model.null_labels(self.labels)]))
            guided = [_guided_at_once(f, self.guidance.scale) for f in both]
        else:
            weak = _branch(self.guidance.weak, times, self.labels)
            guided = [_guided(f, g, self.guidance.scale) for f, g in zip(strong, weak, strict=True)]
        return [g if self.guidance.acts_at(r) else f for f, g, r in zip(strong, guided, rho, strict=True)]


def _branch(model: "LatentModel", times: Sequence[float], labels: Tensor) -> list[Callable[[Tensor], Tensor]]:
    """The network at each time for labels (B,), its conditions computed all at once."""
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    clock = on_device(tuple((2 / math.pi * torch.atan2(sigma, alpha)).tolist()), torch.float32, labels.device)
    conditions = model.network.conditions(clock, labels)
    return [
        _evaluation(model, scale, condition)
        for scale, condition in zip(torch.hypot(alpha, sigma).tolist(), conditions, strict=True)
    ]


def _evaluation(model: "LatentModel", scale: float, condition: Tensor) -> Callable[[Tensor], Tensor]:
    def evaluate(x: Tensor) -> Tensor:
        return model.network(x if abs(scale - 1) < 1e-12 else x / scale, condition=condition).value

    return evaluate


def _guided_at_once(both: Callable[[Tensor], Tensor], scale: float) -> Callable[[Tensor], Tensor]:
    """Strong and weak branch in one batch of 2 B."""

    def evaluate(x: Tensor) -> Tensor:
        strong, weak = both(torch.cat([x, x])).chunk(2)
        return torch.lerp(weak, strong, scale)

    return evaluate


def _guided(
    strong: Callable[[Tensor], Tensor], weak: Callable[[Tensor], Tensor], scale: float
) -> Callable[[Tensor], Tensor]:
    """The branches of two networks."""
    return lambda x: torch.lerp(weak(x), strong(x), scale)
