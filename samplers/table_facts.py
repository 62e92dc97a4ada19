"""What the numbers of a table do, without sampling.

Normal form. Back-substitution turns any table into

    x_n = a_n x_0 + sum_j b_nj D_j + sum_k c_nk z_k

for its states n. Two tables are the same sampler if and only if these lines agree at the evaluated states and the end, and the
times of the evaluations do: weights on past states are otherwise free.

Gain and clock. If every D_j is 1, x_n has the mean alpha_n, and the noise in it the deviation sigma_n:

    gain   (a_n alpha_0 + sum_j b_nj) / alpha_n                   1 for a method in rho, and for one in t where x is straight in t
    clock  sqrt((a_n sigma_0)^2 + sum_k c_nk^2) / sigma_n         1 likewise: else the state is not as noisy as its time says

Covariance. On data N(0, s^2) the exact estimate is D_j = alpha s^2 / (alpha^2 s^2 + sigma^2) x, so every state is a sum of
independent normals, x_0 and the draws.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from midway.samplers.rows import Array, lines, propagate
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table


@dataclass(frozen=True)
class NormalForm:
    """Lines of states: start (S,), predictions (S, E), draws (S, K); times (E,) of the evaluations, and the ends of jumps, if it
    jumps. All float64."""

    start: Array
    predictions: Array
    draws: Array
    times: tuple[float, ...]
    ends: tuple[float, ...] = ()

    def equals(self, other: "NormalForm", tolerance: float = 1e-12) -> bool:
        """Whether both are one sampler: to `tolerance` of the largest number of a line."""
        if (self.times, self.ends) != (other.times, other.ends) or self.draws.shape != other.draws.shape:
            return False
        mine, its = (np.column_stack([each.start, each.predictions, each.draws]) for each in (self, other))
        return bool((np.abs(mine - its) <= tolerance * np.maximum(1, np.abs(its).max(1, keepdims=True))).all())


def normal_form(table: Table) -> NormalForm:
    """The lines of the evaluated states and of the end."""
    some = [i for i, row in enumerate(table.rows) if row.time is not None] + [len(table.rows)]
    start, predictions, draws = (part[some] for part in lines(table.rows))
    return NormalForm(start, predictions, draws, table.times, table.ends)


def levels(schedule: Schedule, times: Sequence[float]) -> tuple[Array, Array]:
    """alpha and sigma at times."""
    t = torch.tensor(times, dtype=torch.float64)
    return schedule.alpha(t).numpy(), schedule.sigma(t).numpy()


def arrivals(table: Table) -> tuple[float, ...]:
    """When every state lives."""
    return (table.grid[0], *(row.arrival for row in table.rows))


def gain_and_clock(table: Table, schedule: Schedule) -> tuple[Array, Array]:
    """(S,) each, of every state: 1 where it has the signal and the noise that its time says. sigma may be 0 nowhere.

    ValueError for a table that jumps, as of `variance_ratios`."""
    table.check_plain("an estimate of clean data")
    alpha, sigma = levels(schedule, arrivals(table))
    start, predictions, draws = lines(table.rows)
    signal, noise = start * alpha[0] + predictions.sum(1), np.hypot(start * sigma[0], np.linalg.norm(draws, axis=1))
    return np.divide(signal, alpha, out=np.ones_like(alpha), where=alpha > 0), noise / sigma


def variance_ratios(table: Table, schedule: Schedule, deviation: float) -> Array:
    """(S,) the variance of every state on data N(0, deviation^2), relative to alpha^2 deviation^2 + sigma^2: 1 is exact."""
    table.check_plain("an estimate of clean data")
    at, evaluated = levels(schedule, arrivals(table)), levels(schedule, table.times)
    marginal, at_evaluation = (alpha**2 * deviation**2 + sigma**2 for alpha, sigma in (at, evaluated))
    slopes = evaluated[0] * deviation**2 / at_evaluation
    states = propagate(table.rows, lambda j, state: slopes[j] * state)
    return (states[:, 0] ** 2 * marginal[0] + (states[:, 1:] ** 2).sum(1)) / marginal


def summary(table: Table, schedule: Schedule) -> str:
    """Gain and clock of all states, and the variance that the end gives data N(0, 1), in one line."""
    both = zip(("gain", "clock"), gain_and_clock(table, schedule), strict=True)
    ranges = ", ".join(f"{name} {each.min():.3g} to {each.max():.3g}" for name, each in both)
    variance = variance_ratios(table, schedule, 1.0)[-1]
    return f"{ranges} (1 for a fixed solver), variance of data N(0, 1) {variance:.3g} of the exact one"
