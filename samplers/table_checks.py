"""What the numbers of a table must satisfy, whoever made them; ValueError otherwise.

Every table: a grid that falls, or rises for inversion, within [0, 1]; nodes that live at its times; one finite weight for every
state and evaluation so far, not all zero.

A table of a fixed method, too: every row maps exact states of one of two problems to the exact next state, inner stages included,

    constant x0 and eps    x_i = alpha_i x0 + sigma_i eps      D_j = x0                   (solvers in rho)
    constant velocity      x_i = x_0 + (t_i - t_0) v           D_j of slope v             (solvers in t)

which are one where alpha and sigma are straight in t. An analytic first step is exact for one ratio x0 / eps alone, that of its
own estimate. Fresh noise and what is left of the start's add up to sigma_i. The D_j of a jump from t to r is the x0 of the
average velocity (x_t - x_r) / (t - r) of the exact states.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import numpy as np
import torch

from midway.samplers.grids import is_grid
from midway.samplers.rows import Array, Row, lines, propagate
from midway.samplers.schedule import Schedule, fingerprint

TOLERANCE = 1e-6
"""Greatest relative error of a state."""
ROUNDING = 1e-10
"""Greatest error relative to what cancels in a state: high orders on uneven steps have large weights."""


def is_number(value: object) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_grid(solver: str, grid: Sequence[float]) -> None:
    """ValueError for what is no grid, falling or rising."""
    if not all(map(is_number, grid)) or not (is_grid(grid) or is_grid(grid[::-1])):
        raise ValueError(
            f"'{solver}' needs a grid of at least two times within [0, 1] that falls all the way (or rises, for inversion), "
            f"got {grid}"
        )


def check_rows(solver: str, rows: Sequence[Row]) -> None:
    """ValueError for weights that are missing, left over, not finite or all zero, and for times outside [0, 1]."""
    evaluations, jumps = 0, any(row.to is not None for row in rows)
    for i, row in enumerate(rows):
        evaluations += row.time is not None
        if jumps and row.time is not None and row.to is None:
            raise ValueError(f"row {i} of table '{solver}' evaluates at one time, and other rows jump")
        if len(row.states) != i + 1 or len(row.predictions) != evaluations:
            raise ValueError(
                f"row {i} of table '{solver}' has {len(row.states)} state and {len(row.predictions)} prediction "
                f"weights; it needs {i + 1} and {evaluations}: one for every state and evaluation so far"
            )
        if not all(map(is_number, (*row.states, *row.predictions, row.noise, row.arrival))):
            raise ValueError(
                f"row {i} of table '{solver}' has a weight that is not finite: start the grid where alpha > 0 "
                "and end it where sigma > 0"
            )
        if not all(is_number(t) and 0 <= t <= 1 for t in (row.arrival, *([] if row.time is None else [row.time]))):
            raise ValueError(
                f"row {i} of table '{solver}' goes from t = {row.time} to {row.arrival}: times are in [0, 1]"
            )
        if row.to is not None and (row.time is None or not is_number(row.to) or not 0 <= row.to <= row.time):
            raise ValueError(
                f"row {i} of table '{solver}' jumps from t = {row.time} to {row.to}: a jump ends in [0, t]"
            )
        if not any((*row.states, *row.predictions, row.noise)):
            raise ValueError(f"row {i} of table '{solver}' weighs nothing, so that its state would be 0")
        if row.noise < 0:
            raise ValueError(f"row {i} of table '{solver}' has a weight of noise below 0: {row.noise}")


def check_nodes(solver: str, grid: Sequence[float], nodes: Sequence[int], rows: Sequence[Row]) -> None:
    """ValueError unless one state lives at each time of the grid, from the first to the last."""
    if len(nodes) != len(grid) or not rows or nodes[0] != 0 or nodes[-1] != len(rows):
        raise ValueError(f"table '{solver}' must have one node per grid time, from state 0 to the last state")
    if not all(isinstance(node, int) for node in nodes) or not all(a < b for a, b in pairwise(nodes)):
        raise ValueError(f"the nodes of table '{solver}' are no rising numbers of states: {nodes}")
    for time, node in zip(grid[1:], nodes[1:], strict=True):
        if rows[node - 1].arrival != time:
            raise ValueError(
                f"state {node} of table '{solver}' lives at t = {rows[node - 1].arrival}, its grid has {time} there"
            )


def check_consistent(solver: str, grid: Sequence[float], rows: Sequence[Row], schedule: Schedule) -> None:
    """ValueError unless the rows are those of a fixed method on this schedule (module docstring)."""
    arrivals = (grid[0], *(row.arrival for row in rows))
    for i, row in enumerate(rows):
        if row.time is not None and row.time != arrivals[i]:
            raise ValueError(f"row {i} of table '{solver}' evaluates at t = {row.time} the state of t = {arrivals[i]}")
        if row.to is not None and row.to not in arrivals[i + 1 :]:
            raise ValueError(f"row {i} of table '{solver}' jumps to t = {row.to}, where no later state lives")
    noisy, ends = any(row.noise for row in rows), [row.to for row in rows]
    wrong = _wrong_row(rows, _PointMass(schedule, arrivals, ends), noisy)
    if wrong is not None and not noisy:
        wrong = wrong if _wrong_row(rows, _Straight(schedule, arrivals, ends)) is not None else None
    elif wrong is None and noisy:
        wrong = _wrong_variance(rows, schedule, arrivals)
    if wrong is not None:
        raise ValueError(
            f"row {wrong} of table '{solver}' keeps neither a constant x0 nor a constant velocity: its weights are of no "
            f"solver on {fingerprint(schedule)}"
        )


class _Problem(ABC):
    """Exact states at the arrivals, of every pair (x0, eps) at the start; `ends` of the jumps from each but the last."""

    def __init__(self, schedule: Schedule, arrivals: Sequence[float], ends: Sequence[float | None]) -> None:
        self.t, self.ends, self.schedule = torch.tensor(arrivals, dtype=torch.float64), ends, schedule
        self.alpha, self.sigma, self.rates = schedule.alpha(self.t), schedule.sigma(self.t), schedule.rates(self.t)

    @property
    def analytic(self) -> tuple[float, float]:
        """The pair whose eps is x / sqrt(alpha^2 + sigma^2) at the start."""
        alpha, sigma = self.alpha[0].item(), self.sigma[0].item()
        return alpha / (math.hypot(alpha, sigma) + sigma), 1.0

    @abstractmethod
    def line(self, x0: float, eps: float) -> tuple[list[float], list[float]]:
        """The states, and the x0 that an evaluation of each gives."""


class _PointMass(_Problem):
    def line(self, x0: float, eps: float) -> tuple[list[float], list[float]]:
        states = self.alpha * x0 + self.sigma * eps
        return states.tolist(), [*map(partial(self._estimate, states, x0, eps), range(len(self.ends))), x0]

    def _estimate(self, states: torch.Tensor, x0: float, eps: float, i: int) -> float:
        """D of state i: x0, or that of the average velocity of a jump."""
        end = self.ends[i]
        if end is None or end == self.t[i].item():
            return x0
        r = torch.tensor(end, dtype=torch.float64)
        slope = (states[i] - self.schedule.alpha(r) * x0 - self.schedule.sigma(r) * eps) / (self.t[i] - r)
        d_alpha, d_sigma = (rate[i] for rate in self.rates)
        return (
            (self.sigma[i] * slope - d_sigma * states[i]) / (d_alpha * self.sigma[i] - d_sigma * self.alpha[i])
        ).item()


class _Straight(_Problem):
    def line(self, x0: float, eps: float) -> tuple[list[float], list[float]]:
        d_alpha, d_sigma = self.rates
        velocity = d_alpha[0] * x0 + d_sigma[0] * eps
        x = self.alpha[0] * x0 + self.sigma[0] * eps + (self.t - self.t[0]) * velocity
        estimates = (self.sigma * velocity - d_sigma * x) / (d_alpha * self.sigma - d_sigma * self.alpha)
        return x.tolist(), estimates.tolist()


def _wrong_row(rows: Sequence[Row], problem: _Problem, noisy: bool = False) -> int | None:
    """The first row that does not map exact states to the next; None if all do. Of noisy rows, the mean alone."""
    free = [problem.line(1.0, 0.0), *([] if noisy else [problem.line(0.0, 1.0)])]
    tied = [] if noisy else [problem.line(*problem.analytic)]
    evaluated: list[int] = []
    for i, row in enumerate(rows):
        evaluated += [i] * (row.time is not None)
        weights = _weights(row)
        analytic = rows[0].time is None and (i == 0 or row.states[0] != 0)  # it weighs what is exact for one pair only
        for states, estimates in tied if analytic else free:
            terms = [weight * states[j] for j, weight in weights[0]]
            terms += [weight * estimates[evaluated[j]] for j, weight in weights[1]]
            size = abs(states[i]) + math.fsum(map(abs, terms))
            if abs(math.fsum(terms) - states[i + 1]) > TOLERANCE * abs(states[i + 1]) + ROUNDING * size:
                return i
    return None


def _weights(row: Row) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Those of the states and of the predictions that are not 0, with their numbers."""
    states, predictions = ([(j, w) for j, w in enumerate(own) if w != 0] for own in (row.states, row.predictions))
    return states, predictions


def _wrong_variance(rows: Sequence[Row], schedule: Schedule, arrivals: Sequence[float]) -> int | None:
    """The first row after which the noise in the state of a point mass, the start's and fresh, is not sigma."""
    ends = [row.to for row in rows]
    problem = _PointMass(schedule, arrivals, ends)
    x0 = problem.analytic[0] if rows[0].time is None else 0.0
    start, predictions, draws = _noise_of_jumps(rows, problem) if any(end is not None for end in ends) else lines(rows)
    left = start * problem.line(x0, 1.0)[0][0] + predictions.sum(1) * x0
    own, sigma = left - problem.alpha.numpy() * x0, problem.sigma.numpy()
    rounding = ROUNDING * (1 + np.abs(left))
    noise = np.hypot(own, np.linalg.norm(draws, axis=1))
    wrong = (own < -rounding) | (np.abs(noise - sigma) > TOLERANCE * sigma + rounding)
    return int(wrong[1:].argmax()) if wrong[1:].any() else None


def _noise_of_jumps(rows: Sequence[Row], problem: _PointMass) -> tuple[Array, Array, Array]:
    """`lines` where a prediction is a share of the noise in its state, as for a point mass at 0."""
    shares = [d / x if x else 0.0 for x, d in zip(*problem.line(0.0, 1.0), strict=True)]
    owner = [i for i, row in enumerate(rows) if row.time is not None]
    states = propagate(rows, lambda j, state: shares[owner[j]] * state)
    evaluations = len(owner)
    return states[:, 0], states[:, 1 : 1 + evaluations], states[:, 1 + evaluations :]
