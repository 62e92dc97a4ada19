"""The field of a latent model for given labels.

A sampler knows the times of all evaluations: `at` embeds them all at once, beside the labels, and leaves each evaluation the
network and one scaling of its input (none where alpha^2 + sigma^2 = 1).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from midway.gen.diffusion.dit import DiT
from midway.samplers.prediction import Evaluations, Field, Prediction, Target, TimedField, on_device, x0_coefficients
from midway.samplers.schedule import Schedule


class Denoiser(Protocol):
    """What of a latent model the field uses."""

    network: DiT
    schedule: Schedule

    @property
    def target(self) -> Target: ...

    def noise_angle(self, t: Tensor) -> Tensor:
        """The network's time in [0, 1], shaped like t."""
        ...

    def output_scale(self, t: Tensor) -> Tensor:
        """target / F, with F the network's output of unit variance, shaped like t."""
        ...

    def conditional_field(self, x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        """One forward pass."""
        ...


@dataclass(frozen=True, eq=False)
class LatentField(TimedField):
    """The field of `model` for labels (B,)."""

    model: Denoiser
    labels: Tensor

    @property
    def schedule(self) -> Schedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.schedule

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        return self.model.conditional_field(x, t, self.labels)

    def copies(self, count: int) -> Field:
        return replace(self, labels=self.labels.repeat(count))

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        """In terms of F, the network's output of unit variance."""
        model, t = self.model, torch.tensor(times, dtype=torch.float64)
        pairs = x0_coefficients(model.target, model.schedule, times)
        coefficients = tuple(
            (p, q * scale) for (p, q), scale in zip(pairs, model.output_scale(t).tolist(), strict=True)
        )
        angles = on_device(tuple(model.noise_angle(t).tolist()), torch.float32, self.labels.device)
        conditions = model.network.conditions(angles, self.labels)
        scales = torch.hypot(model.schedule.alpha(t), model.schedule.sigma(t)).tolist()
        values = [_evaluation(model.network, *pair) for pair in zip(scales, conditions, strict=True)]
        return Evaluations(coefficients, values)


def _evaluation(network: DiT, scale: float, condition: Tensor) -> Callable[[Tensor], Tensor]:
    def evaluate(x: Tensor) -> Tensor:
        return network(x if abs(scale - 1) < 1e-12 else x / scale, condition=condition).value

    return evaluate
