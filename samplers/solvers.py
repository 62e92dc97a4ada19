"""Solvers as builders `(schedule, grid) -> Table`.

One step goes from t to s < t. With rho = sigma / alpha, y = x / alpha and lambda = -log rho:

    euler    x_s = x + (s - t) v(x, t)
    ddim     x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z          (eta = 0: Euler of dy / d rho = eps)
    heun     x_s = x + (s - t) (v(x, t) + v(x + (s - t) v(x, t), s)) / 2
    dpm2     y_s = y + (rho_s - rho_t) eps(y_m, rho_m),  rho_m = sqrt(rho_t rho_s),  y_m = y + (rho_m - rho_t) eps(y, rho_t)
    dpmpp2m  x_s = sigma_s / sigma_t x - alpha_s (e^-h - 1) D,  D = (1 + 1/2q) x0_t - 1/2q x0_before,  q = h_before / h

`SOLVERS` holds them by name, with the number of evaluations of a step; `plan` turns a budget into steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from midway.samplers.grids import Grid
from midway.samplers.schedule import Schedule
from midway.samplers.table import FRESH_NOISE, Combination, Recorder, Symbols, Table


def euler(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """Euler's method on dx/dt = v. Order 1."""
    record = Recorder("euler", schedule, grid)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        record.advance(now.x + (s - t) * now.velocity, s)
    return record.table()


def exponential_step(record: Recorder, now: Symbols, t: float, s: float) -> Combination:
    """The step that is exact if x0 does not change: alpha_s x0 + sigma_s eps, written without division by alpha."""
    ratio = record.sigma(s) / record.sigma(t)
    if not now.x0.predictions:  # an analytic direction holds eps, not x0
        return record.alpha(s) * now.x0 + record.sigma(s) * now.eps
    return ratio * now.x + (record.alpha(s) - ratio * record.alpha(t)) * now.x0


def ddim(schedule: Schedule, grid: Grid, analytic_first: bool = False, eta: float = 0.0) -> Table:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16). Order 1 at eta = 0; eta = 1 is ancestral sampling.

    c = eta sigma_s sqrt(1 - rho_s^2 / rho_t^2) is eq. 16 on variance-preserving schedules and the same process on the others.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}: 0 is deterministic DDIM, 1 is ancestral sampling")
    record = Recorder("ddim", schedule, grid)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        if eta == 0:
            record.advance(exponential_step(record, now, t, s), s)
            continue
        sigma_s = record.sigma(s)
        c = eta * sigma_s * math.sqrt(1 - (record.rho(s) / record.rho(t)) ** 2)
        kept = math.sqrt(sigma_s**2 - c**2)
        record.advance(record.alpha(s) * now.x0 + kept * now.eps + c * FRESH_NOISE, s)
    return record.table(eta=repr(eta))


def heun(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """Heun's method on dx/dt = v (Karras et al. 2022, arXiv 2206.00364, section 3). Order 2.

    EDM's algorithm 1 ends at sigma = 0, with an Euler step. Grids here end at rho = 0.002, so the last step is corrected like the
    others and even budgets are reached; its corrector divides by that small sigma, which shows when the last step is long.
    """
    record = Recorder("heun", schedule, grid)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        record.advance(now.x + (s - t) * now.velocity, s, node=False)
        then = record.evaluate(s)
        record.advance(now.x + (s - t) * (now.velocity + then.velocity) / 2, s)
    return record.table()


@dataclass(frozen=True)
class MeanDirection:
    """AMED's numbers for one step: inner position r in (0, 1), direction scale c, evaluation-time scale a."""

    r: float = 0.5
    c: float = 1.0
    a: float = 1.0


def amed(
    schedule: Schedule,
    grid: Grid,
    constants: tuple[MeanDirection, ...],
    analytic_first: bool = False,
    name: str = "amed",
) -> Table:
    """AMED-Solver with constants per step (Zhou et al. 2024, arXiv 2312.00094, eq. 9).

    rho_m = rho_s^r rho_t^(1-r);  y_m = y + (rho_m - rho_t) eps(y, rho_t);  y_s = y + c (rho_s - rho_t) eps(y_m, a rho_m).
    Order 2 at r = 1/2, c = a = 1 (that is DPM-Solver-2), order 1 at any other fixed r, no convergence at fixed c != 1:
    learned constants belong to their grid.
    """
    record = Recorder(name, schedule, grid)
    if record.alpha(grid[0]) <= 0:
        raise ValueError(
            "this solver works with rho = sigma / alpha, which is infinite at the grid's start: start at rho = 80"
        )
    for (t, s), step in zip(pairwise(grid), constants, strict=True):
        now = record.first(t, analytic_first)
        rho_m = record.rho(s) ** step.r * record.rho(t) ** (1 - step.r)
        inner = record.time_of_rho(step.a * rho_m)
        y = now.x / record.alpha(t)
        record.advance(record.alpha(inner) * (y + (rho_m - record.rho(t)) * now.eps), inner, node=False)
        middle = record.evaluate(inner)
        record.advance(record.alpha(s) * (y + step.c * (record.rho(s) - record.rho(t)) * middle.eps), s)
    return record.table()


def dpm2(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """DPM-Solver-2, single step (Lu et al. 2022, arXiv 2206.00927, algorithm 1; r = 1/2). Order 2."""
    return amed(schedule, grid, (MeanDirection(),) * (len(grid) - 1), analytic_first, name="dpm2")


def dpmpp2m(schedule: Schedule, grid: Grid, analytic_first: bool = False, lower_order_final: bool = True) -> Table:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2). Order 2; the first step, and the last by default,
    are of order 1, which keeps few-step runs stable and the global order."""
    record = Recorder("dpmpp2m", schedule, grid)
    before: tuple[Symbols, float] | None = None
    for i, (t, s) in enumerate(pairwise(grid)):
        now = record.first(t, analytic_first)
        last = i == len(grid) - 2
        if before is None or (last and lower_order_final):
            record.advance(exponential_step(record, now, t, s), s)
        else:
            h = math.log(record.rho(t) / record.rho(s))
            q = math.log(record.rho(before[1]) / record.rho(t)) / h
            estimate = (1 + 1 / (2 * q)) * now.x0 - (1 / (2 * q)) * before[0].x0
            ratio = record.sigma(s) / record.sigma(t)
            record.advance(ratio * now.x - record.alpha(s) * math.expm1(-h) * estimate, s)
        before = (now, t)
    return record.table()


@dataclass(frozen=True)
class Solver:
    """A builder and what it costs: `evaluations` per step, convergence `order`."""

    build: Callable[..., Table]
    evaluations: int
    order: int


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, evaluations=1, order=1),
    "ddim": Solver(ddim, evaluations=1, order=1),
    "heun": Solver(heun, evaluations=2, order=2),
    "dpm2": Solver(dpm2, evaluations=2, order=2),
    "dpmpp2m": Solver(dpmpp2m, evaluations=1, order=2),
}


def steps_for(evaluations: int, nfe: int, analytic_first: bool = False) -> int:
    """Steps of a solver with this many evaluations a step that cost exactly `nfe`; ValueError if no number does."""
    total = nfe + analytic_first
    if nfe < 1 or total % evaluations:
        below = total // evaluations * evaluations - analytic_first
        reachable = [n for n in (below, below + evaluations) if n >= 1]
        other = "without" if analytic_first else "with"
        raise ValueError(
            f"{nfe} network evaluations cannot be reached at {evaluations} a step: use {' or '.join(map(str, reachable))}, "
            f"or the same number {other} the analytic first step"
        )
    return total // evaluations
