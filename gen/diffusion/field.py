"""The fields of a latent model: what solvers see of it, at one time or from one time to another.

A sampler knows the times of all evaluations: `at` and `jumps` embed them all at once, beside the labels, and leave each
evaluation the network and one scaling of its input (none where alpha^2 + sigma^2 = 1).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.diffusion.description import LatentModelConfig
from midway.gen.diffusion.inputs import network_time
from midway.gen.networks.network import Network
from midway.gen.objectives.weights import LossLevel
from midway.gen.training.batches import Context
from midway.samplers.prediction import (
    Evaluations,
    Field,
    JumpField,
    Prediction,
    TimedField,
    expand,
    on_device,
    x0_coefficients,
)
from midway.samplers.schedule import Schedule
from midway.tokenizers.precision import widened

if TYPE_CHECKING:
    from midway.gen.objectives.alignment import Alignment

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(z_t (B, *), t (B,), labels (B,)) -> velocity (B, *)."""


class Denoiser(Protocol):
    """What fields and losses need of a `LatentModel`."""

    network: Network
    config: LatentModelConfig
    schedule: Schedule
    classes: int
    teacher: Velocity | None
    alignment: "Alignment | None"
    level: LossLevel | None

    @property
    def time_range(self) -> tuple[float, float]: ...

    def time_of(self, u: Tensor) -> Tensor: ...

    def forward_network(
        self,
        x: Tensor,
        t: Tensor,
        labels: Tensor,
        context: Context | None = None,
        r: Tensor | None = None,
        guidance: Tensor | None = None,
        bare: bool = False,
    ) -> tuple[Tensor, Tensor]: ...

    def further(self, t: Tensor, r: Tensor, guidance: Tensor | float | None = None) -> dict[str, Tensor]: ...

    def output_scale(self, t: Tensor) -> Tensor: ...

    def conditional_field(self, x: Tensor, t: Tensor, labels: Tensor) -> Prediction: ...

    def null_labels(self, labels: Tensor) -> Tensor: ...

    def pixels(self, x0: Tensor, context: Context) -> Tensor: ...


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
        return _evaluations(self.model, self.labels, times, {})


@dataclass(frozen=True, eq=False)
class LatentJumpField(JumpField):
    """The average velocities of `model` for labels (B,), at a `guidance` scale that it was trained with; 1 for none."""

    model: Denoiser
    labels: Tensor
    guidance: float = 1.0

    @property
    def schedule(self) -> Schedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.model.schedule

    def average(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        output, _ = self.model.forward_network(x, t, self.labels, r=r, guidance=torch.full_like(t, self.guidance))
        return output.to(x.dtype) * expand(self.model.output_scale(t), x)

    def copies(self, count: int) -> Field:
        return replace(self, labels=self.labels.repeat(count))

    def jumps(self, times: tuple[float, ...], ends: tuple[float, ...], x: Tensor) -> Evaluations:
        """In terms of F, the network's output of unit variance. ValueError for a jump that rises."""
        if any(end > time for time, end in zip(times, ends, strict=True)):
            raise ValueError(f"jumps go from noise to data, and these go from {times} to {ends}")
        t, r = (torch.tensor(each, dtype=torch.float64) for each in (times, ends))
        more = self.model.further(t, r, self.guidance)
        return _evaluations(self.model, self.labels, times, more)


def _evaluations(model: Denoiser, labels: Tensor, times: tuple[float, ...], more: Mapping[str, Tensor]) -> Evaluations:
    """At times, with further inputs (E,) of the network, float64 on the host."""
    t = torch.tensor(times, dtype=torch.float64)
    alpha, sigma = model.schedule.alpha(t), model.schedule.sigma(t)
    own = model.config.inputs == "own"
    pairs = x0_coefficients(model.config.target, model.schedule, times)
    scales = zip(pairs, model.output_scale(t).tolist(), strict=True)
    coefficients = tuple((p, q * scale) for (p, q), scale in scales) if own else tuple(pairs)
    dtype = torch.promote_types(model.network.dtype, torch.float32)

    def placed(values: Tensor) -> Tensor:
        return on_device(tuple(values.tolist()), dtype, labels.device)

    inputs = {name: placed(values) for name, values in more.items()}
    clock = network_time(model.config.inputs, t, alpha, sigma)
    conditions = model.network.conditions(placed(clock), labels, inputs)
    norms = torch.hypot(alpha, sigma).tolist() if own else [1.0] * len(times)
    values = [_evaluation(model.network, *pair) for pair in zip(norms, conditions, strict=True)]
    return Evaluations(coefficients, values)


def _evaluation(network: Network, scale: float, condition: Tensor) -> Callable[[Tensor], Tensor]:
    def evaluate(x: Tensor) -> Tensor:
        return network(x if abs(scale - 1) < 1e-12 else x / scale, condition=condition).value

    return evaluate


def pool(hidden: Tensor) -> Tensor:
    """Tokens (B, N, W) -> features (B, W): the mean token, normalised to zero mean and unit variance."""
    return F.layer_norm(widened(hidden).mean(1), hidden.shape[-1:])


def start_state(schedule: Schedule, t: float, noise: Tensor) -> Tensor:
    """Standard normal noise -> the state at time `t`, with the standard deviation that unit-variance data has there."""
    time = torch.tensor(t, dtype=torch.float64)
    return noise * torch.hypot(schedule.alpha(time), schedule.sigma(time)).item()
