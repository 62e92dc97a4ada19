"""Guidance as Field -> Field.

All guidance here moves from a weaker prediction through a better one, by the scale w, on all channels:

    D = D_weak + w (D - D_weak)

    classifier-free   weak: the network without a label             Ho & Salimans 2022, arXiv 2207.12598, eq. 6
    autoguidance      weak: a smaller or less trained network       Karras et al. 2024, arXiv 2406.02507, section 3
    interval          either, for noise levels rho in (low, high]   Kynkaanniemi et al. 2024, arXiv 2404.07724, section 3

x0 and eps are both affine in a network's output, so both follow the same rule. w = 1 is the better prediction alone. Features
are those of the better prediction.

A field may have an `at(time)`: the field to evaluate where all samples are at one time that the host knows, as in a table. So
`interval` evaluates what the time needs without reading a tensor back from the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.schedule import Schedule

ConditionalField = Callable[[Tensor, Tensor, Tensor], Prediction]
"""(x_t (B, *), t (B,), labels (B,)) -> Prediction."""


@runtime_checkable
class TimedField(Protocol):
    """A field that is cheaper where the time is known to the host.

    It may be called as any field. `at` gives equal fields for times whose states may share a batch.
    """

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction: ...

    def at(self, time: float) -> Field: ...


def at_time(field: Field, time: float) -> Field:
    """What to evaluate where all samples are at `time`: `field.at(time)` if it has that, else the field."""
    return field.at(time) if isinstance(field, TimedField) else field


def conditional(network: ConditionalField, labels: Tensor) -> Field:
    """The field of fixed labels (B,)."""
    return lambda x, t: network(x, t, labels)


def _guided(weak: Prediction, strong: Prediction, scale: float) -> Prediction:
    x0, eps = torch.lerp(weak.x0, strong.x0, scale), torch.lerp(weak.eps, strong.eps, scale)
    return Prediction(x0, eps, strong.features)


def _halves(both: Prediction) -> tuple[Prediction, Prediction]:
    features = (None, None) if both.features is None else both.features.chunk(2)
    first, second = zip(both.x0.chunk(2), both.eps.chunk(2), features, strict=True)
    return Prediction(*first), Prediction(*second)


def classifier_free(network: ConditionalField, labels: Tensor, null: Tensor, scale: float) -> Field:
    """Guided field; both branches in one batch of 2 B. At scale 1 it is `conditional`, at half the evaluations.

    labels, null: int64 (B,), the classes asked for and the "no class" label. Features are the conditional branch's.
    """
    if scale == 1:
        return conditional(network, labels)

    def guided(x: Tensor, t: Tensor) -> Prediction:
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null]))
        strong, weak = _halves(both)
        return _guided(weak, strong, scale)

    return guided


def autoguidance(strong: Field, weak: Field, scale: float) -> Field:
    """The field `strong` guided away from `weak`, another network's for the same states: both are evaluated.

    At scale 1 it is `strong`. Both fields may have labels of their own (`conditional`).
    """
    if scale == 1:
        return strong
    return lambda x, t: _guided(weak(x, t), strong(x, t), scale)


def interval(guided: Field, plain: Field, schedule: Schedule, low: float, high: float) -> Field:
    """`guided` where rho = sigma / alpha is in (low, high], `plain` (the conditional branch alone) elsewhere: a `TimedField`.

    Where times are only known on the device, as per-sample times are, it evaluates both and chooses for each sample.
    """
    if not 0 <= low < high:
        raise ValueError(f"guidance needs 0 <= low < high noise levels rho, got ({low}, {high}]: high may be infinite")
    return _Interval(guided, plain, schedule, low, high)


@dataclass(frozen=True)
class _Interval:
    guided: Field
    plain: Field
    schedule: Schedule
    low: float
    high: float

    def at(self, time: float) -> Field:
        rho = self.schedule.rho(torch.tensor(time, dtype=torch.float64)).item()
        return self.guided if self.low < rho <= self.high else self.plain

    def __call__(self, x: Tensor, t: Tensor) -> Prediction:
        rho = self.schedule.rho(t.double())
        inside = (rho > self.low) & (rho <= self.high)
        return _choose(inside, self.guided(x, t), self.plain(x, t))


def _choose(first: Tensor, a: Prediction, b: Prediction) -> Prediction:
    """`a` for the samples where `first` (B,) holds, else `b`."""
    x0 = torch.where(expand(first, a.x0), a.x0, b.x0)
    eps = torch.where(expand(first, a.eps), a.eps, b.eps)
    if a.features is None or b.features is None:
        return Prediction(x0, eps)
    return Prediction(x0, eps, torch.where(expand(first, a.features), a.features, b.features))
