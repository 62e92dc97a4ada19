"""Explicit Adams methods: one evaluation a step, the slope extrapolated by the polynomial through its last values.

    ab p        dx / dt   = v      polynomial in t                         (Adams-Bashforth, true variable-step weights)
    ipndm_v p   dy / drho = eps    polynomial in rho                       (y = x / alpha, rho = sigma / alpha)
    deis p      dy / drho = eps    polynomial in log rho, integrated exactly  (DEIS-rhoAB's integral in the variable log rho)
    ipndm p     dy / drho = eps    the weights of equal steps: 1; 3/2, -1/2; 23/12, -16/12, 5/12; 55/24, -59/24, 37/24, -9/24

The first steps have fewer values and so order 1, 2, ... Where rho is infinite (pure noise, alpha = 0) the three in rho
take a DDIM step, and the value there enters no other step.

iPNDM: Liu et al. 2022, arXiv 2202.09778, eq. 12; Zhang & Chen 2022, arXiv 2204.13902, section 3.3. DEIS: the same, eq. 14 and 15.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from midway.samplers.exponential import adams_weights, begin, exponential_step, need_noise_at_the_end, weighted
from midway.samplers.grids import Grid
from midway.samplers.recorder import Combination, Recorder
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)

RhoRule = Callable[[Sequence[float], float], list[float]]
"""(rho at the last evaluations, newest first; rho_s) -> weights of their eps, which sum to rho_s - rho_t."""


def _check_order(solver: str, order: int, highest: int) -> None:
    if not 1 <= order <= highest:
        raise ValueError(f"{solver} has orders 1 to {highest}, got {order}")


def adams_bashforth(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 2) -> Table:
    """Adams-Bashforth on dx/dt = v with the weights of the actual steps (Hairer, Norsett & Wanner, section III.5). Order 1-4."""
    _check_order("ab", order, 4)
    record = begin(f"ab{order}", schedule, grid)
    past: list[tuple[float, Combination]] = []
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        past = [(t, now.velocity), *past][:order]
        weights = adams_weights([(u - t) / (s - t) for u, _ in past])
        record.advance(now.x + (s - t) * weighted(weights, [v for _, v in past]), s)
    return record.table()


def _in_rho(record: Recorder, analytic_first: bool, order: int, rule: RhoRule) -> Table:
    """y_s = y + sum_j w_j eps_j, newest first."""
    past: list[tuple[float, Combination]] = []
    for t, s in pairwise(record.grid):
        now = record.first(t, analytic_first)
        if record.alpha(t) > 0:
            past = [(record.rho(t), now.eps), *past][:order]
        if len(past) < 2 or record.alpha(s) <= 0:
            record.advance(exponential_step(record, now, t, s), s)
            continue
        change = weighted(rule([rho for rho, _ in past], record.rho(s)), [eps for _, eps in past])
        record.advance(record.alpha(s) * (now.x / record.alpha(t) + change), s)
    return record.table()


def _equal_steps(rhos: Sequence[float], rho_s: float) -> list[float]:
    return [(rho_s - rhos[0]) * c for c in EQUAL_STEPS[len(rhos) - 1]]


def _polynomial_in_rho(rhos: Sequence[float], rho_s: float) -> list[float]:
    step = rho_s - rhos[0]
    return [step * w for w in adams_weights([(rho - rhos[0]) / step for rho in rhos])]


def _polynomial_in_log_rho(rhos: Sequence[float], rho_s: float) -> list[float]:
    step = math.log(rho_s / rhos[0])
    return [rhos[0] * step * w for w in adams_weights([math.log(rho / rhos[0]) / step for rho in rhos], rate=step)]


def ipndm(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 4) -> Table:
    """iPNDM (arXiv 2204.13902, section 3.3), at most `order` 1-4 values, weights of equal steps of rho.

    Of order 1 on uneven grids, and of order 2 or more only where the steps of rho change smoothly (as EDM's do, order 2).
    """
    _check_order("ipndm", order, 4)
    return _in_rho(begin(f"ipndm{order}", schedule, grid), analytic_first, order, _equal_steps)


def ipndm_v(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 4) -> Table:
    """iPNDM with the weights of the actual steps: Adams-Bashforth in rho, order 1-4 on any grid."""
    _check_order("ipndm_v", order, 4)
    return _in_rho(begin(f"ipndm_v{order}", schedule, grid), analytic_first, order, _polynomial_in_rho)


def deis(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 3) -> Table:
    """DEIS (arXiv 2204.13902, eq. 14-15) with eps a polynomial in log rho, order 1-3 (order 1 is DDIM)."""
    _check_order("deis", order, 3)
    record = begin(f"deis{order}", schedule, grid)
    if order > 1:
        need_noise_at_the_end(record)
    return _in_rho(record, analytic_first, order, _polynomial_in_log_rho)
