"""Guidance as Field -> Field.

All guidance here moves from a weaker prediction through a better one, by the scale w, on all channels:

    D = D_weak + w (D - D_weak)

    classifier-free   weak: the network without a label             Ho & Salimans 2022, arXiv 2207.12598, eq. 6
    autoguidance      weak: a smaller or less trained network       Karras et al. 2024, arXiv 2406.02507, section 3
    interval          either, for noise levels rho in (low, high]   Kynkaanniemi et al. 2024, arXiv 2404.07724, section 3

x0, eps and the network's own output are affine in one another, so all follow the same rule. w = 1 is the better prediction alone.
Features are those of the better prediction. Where the host knows the times, as in a table, an interval evaluates only what a time
needs, and never reads a tensor back from the device.

Where there is nothing to guide (a scale or an interval that is none, two predictions that are one, fields of two processes), no
field is made: ValueError.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from midway.samplers.guidance_checks import check_interval, check_scale
from midway.samplers.prediction import Evaluations, Field, Prediction, TimedField, Value, at, copies, estimates, expand
from midway.samplers.schedule import Schedule

ConditionalField = Callable[[Tensor, Tensor, Tensor], Prediction]
"""(x_t (B, *), t (B,), labels (B,)) -> Prediction."""


@dataclass(frozen=True, eq=False)
class Conditional(TimedField):
    """The field of fixed labels (B, *)."""

    network: ConditionalField
    labels: Tensor

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        return self.network(x, t, self.labels)

    def copies(self, count: int) -> Field:
        return replace(self, labels=torch.cat([self.labels] * count))


def conditional(network: ConditionalField, labels: Tensor) -> Field:
    """The field of fixed labels (B, *)."""
    return Conditional(network, labels)


@dataclass(frozen=True, eq=False)
class _Guided(TimedField):
    """`weak` and `strong` mixed at `scale`; how the two are evaluated is the subclass's."""

    scale: float

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @abstractmethod
    def pair(self, x: Tensor, t: Tensor) -> tuple[Prediction, Prediction]:
        """The weaker and the better prediction."""

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        weak, strong = self.pair(x, t)
        x0, eps = torch.lerp(weak.x0, strong.x0, self.scale), torch.lerp(weak.eps, strong.eps, self.scale)
        return Prediction(x0, eps, strong.features)


@dataclass(frozen=True, eq=False)
class Together(_Guided):
    """Both branches in one batch of 2 B samples, the better half first: `field_of` labels, and `null` in their place."""

    field_of: Callable[[Tensor], Field]
    labels: Tensor
    null: Tensor

    def __post_init__(self) -> None:
        super().__post_init__()
        on_host = self.labels.device.type == self.null.device.type == "cpu"  # nothing waits for a device
        if self.labels.shape != self.null.shape or (on_host and torch.equal(self.labels, self.null)):
            raise ValueError(
                "classifier-free guidance compares labels with as many that stand for none, and these are "
                f"{tuple(self.labels.shape)} labels and {tuple(self.null.shape)} others"
                + (", all of them equal" if self.labels.shape == self.null.shape else "")
            )

    @cached_property
    def both(self) -> Field:
        """The field of the 2 B samples."""
        return self.field_of(torch.cat([self.labels, self.null]))

    @property
    def schedule(self) -> Schedule | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.both, "schedule", None)

    def copies(self, count: int) -> Field:
        labels, null = (torch.cat([own] * count) for own in (self.labels, self.null))
        return replace(self, labels=labels, null=null)

    def pair(self, x: Tensor, t: Tensor) -> tuple[Prediction, Prediction]:
        both = self.both(torch.cat([x, x]), torch.cat([t, t]))
        features = (None, None) if both.features is None else both.features.chunk(2)
        strong, weak = zip(both.x0.chunk(2), both.eps.chunk(2), features, strict=True)
        return Prediction(*weak), Prediction(*strong)

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        found = at(self.both, times, torch.cat([x, x]))
        return Evaluations(found.coefficients, [partial(self._mixed, value) for value in found.values])

    def _mixed(self, both: Value, x: Tensor) -> Tensor:
        strong, weak = both(torch.cat([x, x])).chunk(2)
        return torch.lerp(weak, strong, self.scale)


@dataclass(frozen=True, eq=False)
class Apart(_Guided):
    """The branches of two networks, one after the other."""

    strong: Field
    weak: Field

    def __post_init__(self) -> None:
        super().__post_init__()
        if _is_same(self.strong, self.weak):
            raise ValueError(
                "a field that guides itself stays what it is: guide with a smaller or less trained network"
            )
        check_schedules(self.strong, self.weak)

    @property
    def schedule(self) -> Schedule | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        return getattr(self.strong, "schedule", None)

    def copies(self, count: int) -> Field:
        return replace(self, strong=copies(self.strong, count), weak=copies(self.weak, count))

    def pair(self, x: Tensor, t: Tensor) -> tuple[Prediction, Prediction]:
        return self.weak(x, t), self.strong(x, t)

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        strong, weak = at(self.strong, times, x), at(self.weak, times, x)
        if strong.coefficients != weak.coefficients:  # networks of two targets: mix their clean estimates
            return super().at(times, x)
        values = [partial(self._mixed, *pair) for pair in zip(strong.values, weak.values, strict=True)]
        return Evaluations(strong.coefficients, values)

    def _mixed(self, strong: Value, weak: Value, x: Tensor) -> Tensor:
        return torch.lerp(weak(x), strong(x), self.scale)


def classifier_free(network: ConditionalField, labels: Tensor, null: Tensor, scale: float) -> Field:
    """Guided field; both branches in one batch of 2 B. At scale 1 it is `conditional`, at half the evaluations.

    labels, null: int64 (B,), the classes and the "no class" label. Features are the conditional branch's. ValueError for labels
    that all stand for no class (on the host), and for a scale that is not finite.
    """
    if scale == 1:
        return conditional(network, labels)
    return Together(scale, partial(conditional, network), labels, null)


def autoguidance(strong: Field, weak: Field, scale: float) -> Field:
    """The field `strong` guided away from `weak`, another network's for the same states: both are evaluated.

    At scale 1 it is `strong`. Both fields may have labels of their own (`conditional`).
    ValueError for fields of two schedules, and for one field twice.
    """
    return strong if scale == 1 else Apart(scale, strong, weak)


def interval(guided: Field, plain: Field, schedule: Schedule, low: float, high: float) -> Field:
    """`guided` where rho = sigma / alpha is in (low, high], `plain` (the conditional branch alone) elsewhere.

    Where times are only known on the device, as per-sample times are, it evaluates both and chooses for each sample.
    ValueError for an interval without a noise level of the schedule, for two fields that are one, and for another schedule's.
    """
    return Interval(guided, plain, schedule, low, high)


@dataclass(frozen=True, eq=False)
class Interval(TimedField):
    """Two fields of one schedule, one inside and one outside an interval of noise levels."""

    guided: Field
    plain: Field
    schedule: Schedule  # pyright: ignore[reportIncompatibleVariableOverride]
    low: float
    high: float

    def __post_init__(self) -> None:
        check_interval(self.low, self.high)
        most = self.schedule.rho(torch.ones((), dtype=torch.float64)).item()
        if self.low >= most:
            raise ValueError(f"no noise level of {self.schedule} is above {self.low}: it ends at rho = {most:g}")
        if _is_same(self.guided, self.plain):
            raise ValueError("both fields of an interval are one, as at scale 1: there is nothing to guide")
        check_schedules(self.guided, self.plain, self.schedule)

    def copies(self, count: int) -> Field:
        return replace(self, guided=copies(self.guided, count), plain=copies(self.plain, count))

    def acting(self, time: float) -> Field:
        rho = self.schedule.rho(torch.tensor(time, dtype=torch.float64)).item()
        return self.guided if self.low < rho <= self.high else self.plain

    def at(self, times: tuple[float, ...], x: Tensor) -> Evaluations:
        guided, plain = at(self.guided, times, x), at(self.plain, times, x)
        fields = [self.acting(time) for time in times]
        if guided.coefficients != plain.coefficients:  # their values cannot stand for one another
            return estimates(fields, times, x)
        pairs = zip(fields, guided.values, plain.values, strict=True)
        return Evaluations(
            plain.coefficients, [inside if field is self.guided else out for field, inside, out in pairs]
        )

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        rho = self.schedule.rho(t.double())
        inside = (rho > self.low) & (rho <= self.high)
        return _choose(inside, self.guided(x, t), self.plain(x, t))


def check_schedules(*things: Field | Schedule) -> None:
    """ValueError for fields, or fields and a schedule, of different processes."""
    known = [thing if isinstance(thing, Schedule) else getattr(thing, "schedule", None) for thing in things]
    known = [schedule for schedule in known if schedule is not None]
    if any(schedule != known[0] for schedule in known):
        raise ValueError(f"guidance mixes fields of one schedule, and these are of {' and '.join(map(repr, known))}")


def _is_same(a: Field, b: Field) -> bool:
    """Whether both are one object, or one network with one set of labels."""
    if isinstance(a, Conditional) and isinstance(b, Conditional):
        return a.network is b.network and a.labels is b.labels
    return a is b


def _choose(first: Tensor, a: Prediction, b: Prediction) -> Prediction:
    """`a` for the samples where `first` (B,) holds, else `b`."""
    x0 = torch.where(expand(first, a.x0), a.x0, b.x0)
    eps = torch.where(expand(first, a.eps), a.eps, b.eps)
    if a.features is None or b.features is None:
        return Prediction(x0, eps)
    return Prediction(x0, eps, torch.where(expand(first, a.features), a.features, b.features))


def scale_of(field: Field) -> float:
    """The guidance scale of a field, 1 where it is not guided."""
    if isinstance(field, Interval):
        return scale_of(field.guided)
    return field.scale if isinstance(field, _Guided) else 1.0
