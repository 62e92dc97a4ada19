"""The only sampling loop: it walks down a table's rows.

The state stays in the dtype of `x` (float32); coefficients are Python floats, so nothing in the loop waits for the device. All
times are known before the loop: a field that can do work for all of them at once does it there (`TargetField.prepare`), and one
that differs between times says what it is at each (`at`). Where the network's output is one target, rows weigh that itself:

    D_j = p x_j + q value_j,   so   w D_j = w p x_j + w q value_j

so a row is one weighted sum of states and outputs. Both are dropped after the last row that weighs them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from midway.samplers.fused import combine, scalar
from midway.samplers.guidance import at_time
from midway.samplers.prediction import Field, Prediction, TargetField, times_of
from midway.samplers.table import Row, Table, fingerprint

NoiseSource = Callable[[Tensor], Tensor]
"""`source(x)` gives standard normal noise shaped like x, one independent stream per sample, fresh at every call."""


Places = list[Any]
"""The states x_0 .. x_N, then what the network said at each evaluation; None before and after their time."""


@dataclass(frozen=True, slots=True)
class Step:
    """A row, ready to run: the next state is the sum of weights[k] places[sources[k]], which `form` gives, and noise.

    done: the places that no later row reads.
    """

    evaluation: int | None
    weights: tuple[float, ...]
    sources: tuple[int, ...]
    noise: float
    done: tuple[int, ...]
    form: Callable[[Places], Tensor]


def plan(table: Table, coefficients: Sequence[tuple[float, float]] | None) -> tuple[Step, ...]:
    """The rows as steps. coefficients: (p, q) of every evaluation, None for a field that gives D itself."""
    rows, owner = table.rows, [i for i, row in enumerate(table.rows) if row.time is not None]
    terms = [
        _terms(row, i, len(rows) + 1, owner, coefficients or [(0.0, 1.0)] * len(owner)) for i, row in enumerate(rows)
    ]
    last_use = {i: i for i in range(len(rows))} | {len(rows) + 1 + j: i for j, i in enumerate(owner)}
    last_use |= {place: i for i, row in enumerate(terms) for place in row}
    steps = []
    for i, row in enumerate(rows):
        weights, sources = tuple(terms[i].values()), tuple(terms[i])
        steps.append(
            Step(
                evaluation=len(row.predictions) - 1 if row.time is not None else None,
                weights=weights,
                sources=sources,
                noise=row.noise,
                done=tuple(place for place, last in last_use.items() if last == i),
                form=_sum(weights, sources),
            )
        )
    return tuple(steps)


def _terms(
    row: Row, i: int, first: int, owner: Sequence[int], coefficients: Sequence[tuple[float, float]]
) -> dict[int, float]:
    """place -> weight of a row's next state, a weight of 1 first if there is one: adding to it is one operation less."""
    states, outputs = list(row.states), {}
    for j, weight in enumerate(row.predictions):
        p, q = coefficients[j]
        states[owner[j]] += weight * p
        outputs[first + j] = weight * q
    terms = {place: weight for place, weight in {**dict(enumerate(states)), **outputs}.items() if weight != 0}
    ones = {place: 1.0 for place, weight in terms.items() if abs(weight - 1) < 1e-15}  # 1 but for rounding
    return {**ones, **{place: weight for place, weight in terms.items() if place not in ones}} or {i: 0.0}


def _sum(weights: tuple[float, ...], sources: tuple[int, ...]) -> Callable[[Places], Tensor]:
    """The weighted sum, with as little as possible between it and torch: on small states that is what a step costs."""
    first, rest = sources[0], tuple(zip(sources[1:], weights[1:], strict=True))
    lead, wide = scalar(weights[0], torch.float32), scalar(weights[0], torch.float64)
    if len(rest) == 1 and weights[0] == 1:
        ((other, weight),) = rest
        return lambda places: torch.add(places[first], places[other], alpha=weight)

    def form(places: Places) -> Tensor:
        x = places[first]
        if x.is_cuda:
            return combine(weights, [places[j] for j in sources])
        total = torch.mul(x, wide if x.dtype is torch.float64 else lead)
        for j, weight in rest:
            total.add_(places[j], alpha=weight)
        return total

    return form


def walk(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, state) of every state, the start included. x: (B, *) at time `table.grid[0]`.

    ValueError for a table that draws noise without a source, and for a field of another schedule than the table's.
    """
    if table.stochastic and noise is None:
        raise ValueError(f"table '{table.solver}' draws noise: pass a noise source, or build it with eta=0")
    evaluate, steps = _prepared(field, table, x)
    first, dtype = len(steps) + 1, x.dtype
    places: Places = [None] * (first + len(evaluate))
    places[0] = x
    yield 0, x
    for i, step in enumerate(steps):
        if step.evaluation is not None:
            value = evaluate[step.evaluation](places[i])
            places[first + step.evaluation] = value if value.dtype == dtype else value.to(dtype)
        if step.noise != 0 and noise is not None:
            used = [places[j] for j in step.sources]
            state = combine((*step.weights, step.noise), [*used, noise(x)])
        else:
            state = step.form(places)
        places[i + 1] = state
        yield i + 1, state
        for j in step.done:
            places[j] = None


def _prepared(field: Field, table: Table, x: Tensor) -> tuple[Sequence[Callable[[Tensor], Tensor]], tuple[Step, ...]]:
    """One function of the state per evaluation, and the table's steps for what those functions give."""
    times, plans = table.times, table.plans
    if isinstance(field, TargetField):
        if table.schedule and table.schedule != fingerprint(field.schedule):
            raise ValueError(
                f"table '{table.solver}' was made for {table.schedule}, the field is of {fingerprint(field.schedule)}: "
                "build the table with the field's schedule"
            )
        coefficients = field.coefficients(times)
        if coefficients not in plans:
            plans[coefficients] = plan(table, coefficients)
        return field.prepare(times, x), plans[coefficients]
    if None not in plans:
        plans[None] = plan(table, None)
    pairs = zip(times, times_of(times, x), strict=True)
    return [partial(_estimate, at_time(field, time), t) for time, t in pairs], plans[None]


def _estimate(field: Field, t: Tensor, x: Tensor) -> Tensor:
    return field(x, t).x0


def sample(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
    """Solve from noise to data. x: (B, *) noise at `table.grid[0]`; returns (B, *) at `table.grid[-1]`.

    On a table built for a rising grid it is the inversion, from data to noise.
    """
    for _, state in walk(field, table, x, noise):
        x = state
    return x


def trajectory(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> list[Tensor]:
    """The states at the grid's nodes, `len(table.grid)` tensors (B, *), the start included."""
    nodes = set(table.nodes)
    return [state for i, state in walk(field, table, x, noise) if i in nodes]


class EvaluationCounter:
    """Counts forward passes where they happen: wrap the network, not the guided field.

    A batch of B counts B; classifier-free guidance runs 2 B samples through it and so counts twice.
    """

    def __init__(self, network: Callable[..., Prediction]) -> None:
        self.network = network
        self.evaluations = 0

    def __call__(self, x: Tensor, *arguments: Tensor) -> Prediction:
        self.evaluations += x.shape[0]
        return self.network(x, *arguments)


class ForwardCounter:
    """Counts the samples that go through the forward of these modules, whoever calls it, while the `with` block lasts."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules, self.evaluations = modules, 0

    def __enter__(self) -> "ForwardCounter":
        self._hooks = [module.register_forward_pre_hook(self._count) for module in self.modules]
        return self

    def _count(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.evaluations += arguments[0].shape[0]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
