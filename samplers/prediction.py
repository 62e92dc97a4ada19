"""Predictions of a network, whatever its target.

A network's target is a known combination of clean data and noise, and so is its input:

    value = a x0 + b eps
    x_t   = alpha x0 + sigma eps

    target     a                  b
    x0         1                  0
    eps        0                  1
    velocity   d alpha/dt         d sigma/dt
    v          -sigma / s         alpha / s          s = sqrt(alpha^2 + sigma^2)
    score      0                  -1 / sigma

`v` is the v-prediction of Salimans & Ho 2022 (arXiv 2202.00512) wherever s = 1 (variance preserving); on `EDM` it is minus
the preconditioned output F of Karras et al. 2022 (arXiv 2206.00364, eq. 7) for unit-variance data.
One 2x2 solve serves every pair of target and schedule.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from midway.samplers.schedule import Schedule

Target = Literal["x0", "eps", "velocity", "v", "score"]
TARGETS: tuple[str, ...] = get_args(Target)


@dataclass(frozen=True)
class Prediction:
    """Clean estimate x0 (B, *), noise estimate eps (B, *), and the network's hidden features (B, F), if any."""

    x0: Tensor
    eps: Tensor
    features: Tensor | None = None


Field = Callable[[Tensor, Tensor], Prediction]
"""All that a solver sees of a model: (x_t (B, *), t (B,)) -> Prediction. A `TimedField` also prepares for known times."""
ONE_TIME = (
    "this field predicts average velocities of jumps, not the velocity at one time: sample with `jump` or `consistency`, or pass "
    "its `velocity`, that of jumps of length 0"
)
"""What a solver that evaluates at one time raises of a `JumpField`."""


def expand(t: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1) with as many dimensions as `like`."""
    return t.view(-1, *[1] * (like.dim() - 1))


def target_coefficients(target: Target, t: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """(a, b) of `value = a x0 + b eps`, shaped like `t`."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    if target == "x0":
        return one, zero
    if target == "eps":
        return zero, one
    if target == "velocity":
        return schedule.rates(t)
    if target == "v":
        scale = (alpha.square() + sigma.square()).sqrt()
        return -sigma / scale, alpha / scale
    if target == "score":
        return zero, -1 / sigma
    raise ValueError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")


def target_value(target: Target, x0: Tensor, eps: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """The output that a network with this target is trained towards, for (x0, eps) (B, *) at t (B,)."""
    a, b = target_coefficients(target, t, schedule)
    return expand(a, x0) * x0 + expand(b, x0) * eps


def solve(value: Tensor, target: Target, x_t: Tensor, t: Tensor, schedule: Schedule) -> Prediction:
    """Invert `value = a x0 + b eps, x_t = alpha x0 + sigma eps` for (B, *) tensors by Cramer's rule.

    Singular where the target does not determine both: `x0` at sigma = 0, `eps` and `score` at alpha = 0.
    """
    a, b = target_coefficients(target, t, schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    determinant = a * sigma - b * alpha
    a, b, alpha, sigma = (expand(c / determinant, x_t) for c in (a, b, alpha, sigma))
    return Prediction(x0=sigma * value - b * x_t, eps=a * x_t - alpha * value)


@functools.lru_cache(maxsize=256)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers on a device, sent there once: a transfer would make the host wait, and cannot be part of a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=dtype).to(device)


def times_of(times: tuple[float, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Each time as a tensor (B,) beside x (B, *)."""
    return _times_of(times, x.shape[0], x.dtype, x.device)


@functools.lru_cache(maxsize=256)
def _times_of(times: tuple[float, ...], batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    with torch.inference_mode(False):
        return on_device(times, dtype, device)[:, None].expand(-1, batch).unbind(0)


@functools.lru_cache
def x0_coefficients(target: Target, schedule: Schedule, times: tuple[float, ...]) -> tuple[tuple[float, float], ...]:
    """(p, q) of `x0 = p x_t + q value` at each time. ValueError where the target does not determine x0."""
    t = torch.tensor(times, dtype=torch.float64)
    ones, zeros = torch.ones_like(t), torch.zeros_like(t)
    p, q = solve(zeros, target, ones, t, schedule).x0, solve(ones, target, zeros, t, schedule).x0
    pairs = tuple(zip(p.tolist(), q.tolist(), strict=True))
    if not all(math.isfinite(number) for pair in pairs for number in pair):
        raise ValueError(
            f"target '{target}' does not determine x0 at one of the times {times}: start the grid where alpha > 0 and end it "
            "where sigma > 0"
        )
    return pairs


Value = Callable[[Tensor], Tensor]
"""x_t (B, *) -> value (B, *) at one time."""


class Evaluations(NamedTuple):
    """A field at times that are known beforehand: at the j-th, with (p, q) = coefficients[j], x0 = p x_t + q values[j](x_t)."""

    coefficients: tuple[tuple[float, float], ...]
    values: Sequence[Value]


class TimedField(ABC):
    """A field that prepares evaluations at times which the host knows, as those of a table. It may be called as any field."""

    schedule: Schedule | None
    """The process that it belongs to, if it is of one only."""

    @abstractmethod
    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        """x_t (B, *), t (B,) -> Prediction."""

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        """All that depends on the times alone is done here, once; x (B, *) shows shape, dtype and device."""
        return estimates([self] * len(times), times, x)

    def acting(self, time: float) -> Field:
        """The field without what has no effect at `time`; equal for times whose states may share a batch."""
        return self

    def copies(self, count: int) -> Field:
        """The field of `count` copies of the batch, (count B, *): conditions repeat."""
        return self


class JumpField(TimedField):
    """A field of average velocities u(z_t, t, r) = (z_t - z_r) / (t - r), with z_r on the trajectory of z_t and r <= t.

    Its predictions are those whose velocity at t is u: x_r = x_t - (t - r) u. Solvers that evaluate at one time raise ValueError;
    they take `velocity`.
    """

    schedule: Schedule  # pyright: ignore[reportIncompatibleVariableOverride]

    @abstractmethod
    def average(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u (B, *) for x_t (B, *), t (B,) and r (B,)."""

    @abstractmethod
    def jumps(self, times: tuple[float, ...], ends: tuple[float, ...], x: Tensor) -> Evaluations:
        """The evaluations of jumps from known times to known ends, as `at`."""

    @property
    def velocity(self) -> TimedField:
        """The field of jumps of length 0: the velocity at one time."""
        return Velocity(self)

    def __call__(self, x: Tensor, t: Tensor, /, r: Tensor | None = None) -> Prediction:
        """x_t (B, *), t (B,), r (B,) -> Prediction; ValueError without r, and, on the host, for r > t."""
        if r is None:
            raise ValueError(ONE_TIME)
        if t.device.type == r.device.type == "cpu" and bool((r > t).any()):  # nothing waits for a device
            raise ValueError("a jump goes from noise to data, r <= t, and these rise: exchange t and r")
        return solve(self.average(x, t, r), "velocity", x, t, self.schedule)

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        raise ValueError(ONE_TIME)


@dataclass(frozen=True, eq=False)
class Velocity(TimedField):
    """The jumps of length 0 of a jump field."""

    jump: JumpField

    @property
    def schedule(self) -> Schedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.jump.schedule

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        return self.jump(x, t, t)

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        return self.jump.jumps(times, times, x)

    def copies(self, count: int) -> Field:
        found = self.jump.copies(count)
        assert isinstance(found, JumpField)
        return Velocity(found)


def at(field: Field, times: tuple[float, ...], x: Tensor) -> Evaluations:
    """The evaluations of any field at known times, for states like x (B, *)."""
    return field.at(times, x) if isinstance(field, TimedField) else estimates([field] * len(times), times, x)


def estimates(fields: Sequence[Field], times: tuple[float, ...], x: Tensor) -> Evaluations:
    """x0 itself as the value: each time by a field of its own."""
    values = [partial(_estimate, field, t) for field, t in zip(fields, times_of(times, x), strict=True)]
    return Evaluations(((0.0, 1.0),) * len(times), values)


def _estimate(field: Field, t: Tensor, x: Tensor) -> Tensor:
    return field(x, t).x0


def acting(field: Field, time: float) -> Field:
    """`field.acting(time)` where it has that, else the field."""
    return field.acting(time) if isinstance(field, TimedField) else field


def copies(field: Field, count: int) -> Field:
    """`field.copies(count)` where it has that, else the field: a plain function has no conditions."""
    return field.copies(count) if isinstance(field, TimedField) else field


@dataclass(frozen=True)
class NetworkField(TimedField):
    """The field of a plain network: (x_t (B, *), t (B,)) -> value (B, *)."""

    network: Callable[[Tensor, Tensor], Tensor]
    target: Target
    schedule: Schedule  # pyright: ignore[reportIncompatibleVariableOverride]

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        return solve(self.network(x, t), self.target, x, t, self.schedule)

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        values = [partial(self._value, t) for t in times_of(times, x)]
        return Evaluations(x0_coefficients(self.target, self.schedule, times), values)

    def _value(self, t: Tensor, x: Tensor) -> Tensor:
        return self.network(x, t)
