"""The only sampling loop: it walks down a table's rows.

The state stays in the dtype of `x` (float32); coefficients are Python floats, so nothing in the loop waits for the device. All
times are known before the loop: a field that can do work for all of them at once does it there (`TargetField.prepare`), and one
that differs between times says which it is (`at`). Where the network's output is one target, a row weighs that output itself:

    D_j = p x_j + q value_j,   so   w D_j = w p x_j + w q value_j

and D_j is formed only if later rows need it. States and estimates are dropped after the last row that weighs them.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from midway.samplers.fused import combine
from midway.samplers.guidance import at_time
from midway.samplers.prediction import Field, Prediction, TargetField, times_of
from midway.samplers.table import Row, Table, fingerprint

NoiseSource = Callable[[Tensor], Tensor]
"""`source(x)` gives standard normal noise shaped like x, one independent stream per sample, fresh at every call."""


@dataclass(frozen=True, slots=True)
class Step:
    """A row, ready to run on a list of tensors: the states, then the estimates D_j, then the network's newest output.

    weights, sources: what makes the next state. estimate: (p, q) if D_j is to be formed from the output, else the output is D_j.
    done: places that no later row reads.
    """

    evaluation: int | None
    estimate: tuple[float, float] | None
    weights: tuple[float, ...]
    sources: tuple[int, ...]
    noise: float
    done: tuple[int, ...]


def plan(table: Table, coefficients: Sequence[tuple[float, float]] | None) -> tuple[Step, ...]:
    """The rows as steps. coefficients: (p, q) of every evaluation, None for a field that gives D itself."""
    rows, first = table.rows, len(table.rows) + 1  # the place of D_0
    owner = [i for i, row in enumerate(rows) if row.time is not None]  # the state of each evaluation
    use = {first + j: i for j, i in enumerate(owner)}  # the last row that reads a place
    use |= {first + j: i for i, row in enumerate(rows) for j, w in enumerate(row.predictions) if w != 0}
    folded = {j for j, i in enumerate(owner) if coefficients is not None and use[first + j] == i}
    terms = [_terms(row, i, first, folded, coefficients) for i, row in enumerate(rows)]
    use |= {i: i for i in range(len(rows))}
    use |= {place: i for i, row in enumerate(terms) for _, place in row}
    steps = []
    for i, row in enumerate(rows):
        j = len(row.predictions) - 1 if row.time is not None else None
        own = coefficients[j] if j is not None and coefficients is not None and j not in folded else None
        steps.append(
            Step(
                evaluation=j,
                estimate=own,
                weights=tuple(weight for weight, _ in terms[i]),
                sources=tuple(place for _, place in terms[i]),
                noise=row.noise,
                done=tuple(place for place, last in use.items() if last == i and place < first + len(owner)),
            )
        )
    return tuple(steps)


def _terms(
    row: Row, i: int, first: int, folded: set[int], coefficients: Sequence[tuple[float, float]] | None
) -> list[tuple[float, int]]:
    """(weight, place) of a row's next state, a weight of 1 first if there is one: adding to it is one operation less."""
    states = dict(enumerate(row.states))
    terms = []
    for j, weight in enumerate(row.predictions):
        if j in folded and weight != 0 and coefficients is not None:
            p, q = coefficients[j]
            states[i] += weight * p
            terms.append((weight * q, -1))
        elif weight != 0:
            terms.append((weight, first + j))
    own = [(_round(w), j) for j, w in states.items() if w != 0]
    return sorted([*own, *terms], key=lambda term: term[0] != 1) or [(0.0, i)]


def _round(weight: float) -> float:
    """1 where only rounding separates a weight from it."""
    return 1.0 if abs(weight - 1) < 1e-15 else weight


def walk(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, state) of every state, the start included. x: (B, *) at time `table.grid[0]`.

    ValueError for a table that draws noise without a source, and for a field of another schedule than the table's.
    """
    if table.stochastic and noise is None:
        raise ValueError(f"table '{table.solver}' draws noise: pass a noise source, or build it with eta=0")
    evaluate, steps = _prepared(field, table, x)
    first = len(steps) + 1
    places: list[Any] = [None] * (first + len(evaluate) + 1)
    places[0] = x
    yield 0, x
    for i, step in enumerate(steps):
        if step.evaluation is not None:
            value = evaluate[step.evaluation](places[i])
            if value.dtype != x.dtype:
                value = value.to(x.dtype)
            places[-1] = value
            formed = value if step.estimate is None else combine(step.estimate, (places[i], value))
            places[first + step.evaluation] = formed
        used = [places[j] for j in step.sources]
        if step.noise != 0 and noise is not None:
            state = combine((*step.weights, step.noise), (*used, noise(x)))
        else:
            state = combine(step.weights, used)
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
