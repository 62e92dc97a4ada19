"""The only sampling loop: it walks down a table's rows.

The state stays in the dtype of `x` (float32); coefficients are Python floats, so nothing in the loop waits for the device.
States and predictions are dropped after the last row that weighs them.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from midway.samplers.prediction import Field, Prediction
from midway.samplers.table import Row, Table

NoiseSource = Callable[[Tensor], Tensor]
"""`source(x)` gives standard normal noise shaped like x, one independent stream per sample, fresh at every call."""


def combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j weights[j] tensors[j], skipping zeros; at least one weight must not be zero."""
    terms = [(w, x) for w, x in zip(weights, tensors, strict=True) if w != 0]
    (weight, first), *rest = terms
    total = first * weight
    for w, x in rest:
        total = torch.add(total, x, alpha=w)
    return total


def _last_use(table: Table) -> tuple[dict[int, int], dict[int, int]]:
    """For every state and every prediction, the last row that weighs it."""
    states, predictions = {}, {}
    for i, row in enumerate(table.rows):
        states[i] = i
        states.update({j: i for j, w in enumerate(row.states) if w != 0})
        predictions.update({j: i for j, w in enumerate(row.predictions) if w != 0})
    return states, predictions


def _next_state(row: Row, states: dict[int, Tensor], predictions: dict[int, Tensor], noise: Tensor | None) -> Tensor:
    used = [(w, states[j]) for j, w in enumerate(row.states) if w != 0]
    used += [(w, predictions[j]) for j, w in enumerate(row.predictions) if w != 0]
    if noise is not None:
        used.append((row.noise, noise))
    return combine([w for w, _ in used], [x for _, x in used])


def walk(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> Iterator[tuple[int, Tensor]]:
    """Yield (index, state) of every state, the start included. x: (B, *) at time `table.grid[0]`."""
    if table.stochastic and noise is None:
        raise ValueError(f"table '{table.solver}' draws noise: pass a noise source, or build it with eta=0")
    state_use, prediction_use = _last_use(table)
    states, predictions = {0: x}, {}
    yield 0, x
    for i, row in enumerate(table.rows):
        if row.time is not None:
            predictions[len(row.predictions) - 1] = field(states[i], x.new_full((x.shape[0],), row.time)).x0
        fresh = noise(x) if row.noise != 0 and noise is not None else None
        states[i + 1] = _next_state(row, states, predictions, fresh)
        yield i + 1, states[i + 1]
        states = {j: s for j, s in states.items() if state_use.get(j, i + 1) > i}
        predictions = {j: p for j, p in predictions.items() if prediction_use.get(j, i) > i}


def sample(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
    """Solve from noise to data. x: (B, *) noise at `table.grid[0]`; returns (B, *) at `table.grid[-1]`."""
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
