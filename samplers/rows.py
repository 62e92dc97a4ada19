"""The rows of a solver, and the one loop that runs down them.

The state stays in the dtype of `x` (float32); coefficients are Python floats, so nothing in the loop waits for the device. Where
the network's output is one target, a row weighs that itself:

    D_j = p x_j + q value_j,   so   w D_j = w p x_j + w q value_j

so a row is one weighted sum of states and values. Both are dropped after the last row that weighs them. `Execution` runs the rows
of everything that solves: `sample`; pipelines of diffusers, which call the network themselves; waves in parallel; and learning,
where weights are tensors with a gradient.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from midway.samplers.fused import combine, scalar

NoiseSource = Callable[[Tensor], Tensor]
"""`source(x)` gives standard normal noise shaped like x, one independent stream per sample, fresh at every call."""
Buffers = list[Any]
"""The states x_0 .. x_N, then the value of each evaluation; None before they are made and after their last use."""
Array = np.ndarray
Coefficients = tuple[tuple[float, float], ...]
"""(p, q) of every evaluation: x0 = p x + q value."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    time: where the newest state is evaluated, None for no evaluation. arrival: the time at which the new state lives.
    states: weights on x_0 .. x_i. predictions: weights on all D_j so far, this row's own last. noise: weight of fresh noise.
    to: where the jump ends whose average velocity is evaluated (jumps.py); None for an evaluation at one time.
    """

    time: float | None
    arrival: float
    states: tuple[float, ...]
    predictions: tuple[float, ...]
    noise: float = 0.0
    to: float | None = None

    @property
    def numbers(self) -> tuple[Any, ...]:
        """All of them, of which hashes are made."""
        plain = (self.time, self.arrival, self.states, self.predictions, self.noise)
        return plain if self.to is None else (*plain, self.to)


@dataclass(frozen=True, slots=True)
class CompiledRow:
    """A row, ready to run: the next state is the sum of weights[k] buffers[sources[k]], which `combine` computes, and noise.

    evaluation: the number of the evaluation of the newest state. last_use: the buffers that no later row reads.
    """

    evaluation: int | None
    weights: tuple[float, ...]
    """Empty where they are tensors with a gradient, which `combine` holds."""
    sources: tuple[int, ...]
    noise: float
    last_use: tuple[int, ...]
    combine: Callable[[Buffers], Tensor]


def compile_rows(rows: Sequence[Row], coefficients: Coefficients) -> tuple[CompiledRow, ...]:
    """The rows, for values with these coefficients."""
    owner = [i for i, row in enumerate(rows) if row.time is not None]
    terms = [_terms(row, i, len(rows) + 1, owner, coefficients) for i, row in enumerate(rows)]
    last_use = {i: i for i in range(len(rows))} | {len(rows) + 1 + j: i for j, i in enumerate(owner)}
    last_use |= {place: i for i, row in enumerate(terms) for place in row}
    compiled = []
    for i, row in enumerate(rows):
        weights, sources = tuple(terms[i].values()), tuple(terms[i])
        evaluation = len(row.predictions) - 1 if row.time is not None else None
        unused = tuple(place for place, last in last_use.items() if last == i)
        compiled.append(CompiledRow(evaluation, weights, sources, row.noise, unused, _sum(weights, sources)))
    return tuple(compiled)


def _terms(row: Row, i: int, first: int, owner: Sequence[int], coefficients: Coefficients) -> dict[int, float]:
    """buffer -> weight of a row's next state, a weight of 1 first if there is one: adding to it is one operation less."""
    states, values = list(row.states), {}
    for j, weight in enumerate(row.predictions):
        p, q = coefficients[j]
        states[owner[j]] += weight * p
        values[first + j] = weight * q
    terms = {place: weight for place, weight in {**dict(enumerate(states)), **values}.items() if weight != 0}
    ones = {place: 1.0 for place, weight in terms.items() if abs(weight - 1) < 1e-15}  # 1 but for rounding
    return {**ones, **{place: weight for place, weight in terms.items() if place not in ones}} or {i: 0.0}


def _sum(weights: tuple[float, ...], sources: tuple[int, ...]) -> Callable[[Buffers], Tensor]:
    """The weighted sum, with as little as possible between it and torch: on small states that is what a step costs."""
    first, rest = sources[0], tuple(zip(sources[1:], weights[1:], strict=True))
    lead, wide = scalar(weights[0], torch.float32), scalar(weights[0], torch.float64)
    if len(rest) == 1 and weights[0] == 1:
        ((other, weight),) = rest
        return lambda buffers: torch.add(buffers[first], buffers[other], alpha=weight)

    def form(buffers: Buffers) -> Tensor:
        x = buffers[first]
        if x.is_cuda:
            return combine(weights, [buffers[j] for j in sources])
        total = torch.mul(x, wide if x.dtype is torch.float64 else lead)
        for j, weight in rest:
            total.add_(buffers[j], alpha=weight)
        return total

    return form


class Execution:
    """Compiled rows being run from x (B, *): `state` is the newest, `row` the number of the next row."""

    __slots__ = ("_dtype", "_first", "buffers", "row", "rows")

    def __init__(self, rows: Sequence[CompiledRow], x: Tensor) -> None:
        self.rows, self.row, self._first, self._dtype = rows, 0, len(rows) + 1, x.dtype
        self.buffers: Buffers = [None] * (2 * len(rows) + 1)
        self.buffers[0] = x

    @property
    def state(self) -> Tensor:
        return self.buffers[self.row]

    @property
    def finished(self) -> bool:
        return self.row == len(self.rows)

    def advance(self, value: Tensor | None = None, draw: Callable[[], Tensor] | None = None) -> Tensor:
        """Form the next state from the value (B, *) of this row's evaluation, if it has one, and fresh noise (B, *)."""
        number, buffers, dtype = self.row, self.buffers, self._dtype
        row = self.rows[number]
        if value is not None:
            buffers[self._first + row.evaluation] = value if value.dtype is dtype else value.to(dtype)  # pyright: ignore
        if draw is None or not row.noise:
            state = row.combine(buffers)
        else:
            state = combine((*row.weights, row.noise), [*[buffers[j] for j in row.sources], draw()])
        self.row = number = number + 1
        buffers[number] = state
        for j in row.last_use:
            buffers[j] = None
        return state


def run_rows(
    rows: Sequence[CompiledRow],
    values: Sequence[Callable[[Tensor], Tensor]],
    x: Tensor,
    noise: NoiseSource | None = None,
) -> Iterator[Tensor]:
    """Yield every state, the start included. values: what evaluates, one for each evaluation; noise: for rows that draw some."""
    advance, draw = Execution(rows, x).advance, None if noise is None else partial(noise, x)
    yield x
    for row in rows:
        number = row.evaluation
        x = advance(None if number is None else values[number](x), draw)
        yield x


def propagate(rows: Sequence[Row], estimate: Callable[[int, Array], Array]) -> Array:
    """Every state (S, 1 + E + K) as weights on x_0, the predictions and the draws; `estimate(j, state)` are those of D_j."""
    evaluations = sum(row.time is not None for row in rows)
    drawing = [i for i, row in enumerate(rows) if row.noise != 0]
    units = np.eye(1 + evaluations + len(drawing))
    states, predictions = [units[0]], []
    for i, row in enumerate(rows):
        if row.time is not None:
            predictions.append(estimate(len(predictions), states[-1]))
        terms = [w * x for w, x in zip((*row.states, *row.predictions), (*states, *predictions), strict=True) if w]
        draw = [row.noise * units[1 + evaluations + drawing.index(i)]] if row.noise else []
        states.append(sum((*terms, *draw), np.zeros(len(units))))
    return np.array(states)


def lines(rows: Sequence[Row]) -> tuple[Array, Array, Array]:
    """(a (S,), b (S, E), c (S, K)) of every state."""
    evaluations = sum(row.time is not None for row in rows)
    units = np.eye(1 + evaluations + sum(row.noise != 0 for row in rows))
    states = propagate(rows, lambda j, _: units[1 + j])
    return states[:, 0], states[:, 1 : 1 + evaluations], states[:, 1 + evaluations :]
