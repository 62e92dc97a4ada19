"""Explicit Runge-Kutta methods from their tableau.

    k_i = f(z + h sum_j a_ij k_j, u + c_i h),    z_s = z + h sum_i b_i k_i,    c_i = sum_j a_ij

with (z, u, f) = (x, t, v), or (y = x / alpha, rho = sigma / alpha, eps), in which every schedule gives the same y. A tableau of
order p satisfies the order conditions of all rooted trees with up to p nodes (Butcher; Hairer, Norsett & Wanner, section II.2);
they are checked, up to order 4, when it is made.
"""

from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Literal, get_args

import torch

from midway.samplers.exponential import begin, begin_in_rho, need_noise_at_the_end, weighted
from midway.samplers.generator import exponential_step
from midway.samplers.grids import Grid
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

Variable = Literal["t", "rho"]


@dataclass(frozen=True)
class Tableau:
    """An explicit method: `a[i]` are the i weights of the earlier slopes in stage i, `b` those of the step, `order` 1 to 4."""

    name: str
    a: tuple[tuple[float, ...], ...]
    b: tuple[float, ...]
    order: int

    def __post_init__(self) -> None:
        if len(self.a) != len(self.b) or any(len(row) != i for i, row in enumerate(self.a)):
            raise ValueError(
                f"tableau '{self.name}' is not explicit: stage i (from 0) needs i weights, and b one for each of the "
                f"{len(self.a)} stages"
            )
        if not 1 <= self.order <= 4:
            raise ValueError(f"tableau '{self.name}' claims order {self.order}: only orders 1 to 4 can be checked here")
        error = max(abs(value - wanted) for value, wanted in _order_conditions(self))
        if error > 1e-12:
            raise ValueError(f"tableau '{self.name}' misses an order condition of order <= {self.order} by {error:.2g}")

    @property
    def c(self) -> tuple[float, ...]:
        """The stages' places in the step."""
        return tuple(sum(row) for row in self.a)


def _order_conditions(tableau: Tableau) -> list[tuple[float, float]]:
    """(value, what it must be) for every rooted tree of at most `order` nodes."""
    stages = len(tableau.b)
    a = torch.tensor([[*row, *[0.0] * (stages - len(row))] for row in tableau.a], dtype=torch.float64)
    b, c = torch.tensor(tableau.b, dtype=torch.float64), a.sum(1)
    trees = [
        [(b.sum(), 1)],
        [(b @ c, 1 / 2)],
        [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
        [(b @ c**3, 1 / 4), ((b * c) @ a @ c, 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
    ]
    return [(float(value), wanted) for level in trees[: tableau.order] for value, wanted in level]


HEUN = Tableau("heun", ((), (1.0,)), (1 / 2, 1 / 2), order=2)
MIDPOINT = Tableau("midpoint", ((), (1 / 2,)), (0.0, 1.0), order=2)
RALSTON = Tableau("ralston", ((), (2 / 3,)), (1 / 4, 3 / 4), order=2)
KUTTA3 = Tableau("kutta3", ((), (1 / 2,), (-1.0, 2.0)), (1 / 6, 2 / 3, 1 / 6), order=3)
RK4 = Tableau("rk4", ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6), order=4)
RK38 = Tableau("rk38", ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)), (1 / 8, 3 / 8, 3 / 8, 1 / 8), order=4)
TABLEAUS = {tableau.name: tableau for tableau in (HEUN, MIDPOINT, RALSTON, KUTTA3, RK4, RK38)}


def runge_kutta(
    schedule: Schedule,
    grid: Grid,
    analytic_first: bool = False,
    tableau: Tableau = RK4,
    variable: Variable = "t",
    name: str = "",
) -> Table:
    """Any explicit Runge-Kutta method on dx/dt = v (`variable="t"`) or dy/drho = eps (`"rho"`). One evaluation per stage.

    In rho the grid may not start at pure noise, where rho is infinite; it may end at sigma = 0, by a step of Euler's.
    """
    if variable not in get_args(Variable):
        raise ValueError(f"variable must be 't' or 'rho', got {variable!r}")
    if variable == "t":
        record, slope = begin(name or tableau.name, schedule, grid), attrgetter("velocity")
        place, time, scale = float, float, lambda _: 1.0
    else:
        record, slope = begin_in_rho(name or tableau.name, schedule, grid), attrgetter("eps")
        place, time, scale = record.rho, record.time_of_rho, record.alpha
    if tableau.c[-1] == 1 and variable == "t":
        need_noise_at_the_end(record)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        if variable == "rho" and record.sigma(s) == 0:
            record.advance(exponential_step(record, now.x, now.x0, t, s), s)
            break
        z, u, h, slopes = now.x / scale(t), place(t), place(s) - place(t), [slope(now)]
        for row, c in zip(tableau.a[1:], tableau.c[1:], strict=True):
            inner = s if c == 1 else time(u + c * h)
            record.advance(scale(inner) * (z + h * weighted(row, slopes)), inner, node=False)
            slopes.append(slope(record.evaluate(inner)))
        record.advance(scale(s) * (z + h * weighted(tableau.b, slopes)), s)
    return record.table(variable=variable)
