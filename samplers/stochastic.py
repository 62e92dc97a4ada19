"""Solvers that draw fresh noise z at every step: they solve the reverse SDE.

With lambda = log(alpha / sigma), h = lambda_s - lambda_t:

    ddpm          x_s = alpha_s x0 + sigma_s rho_s / rho_t eps + sigma_s sqrt(1 - (rho_s / rho_t)^2) z          (DDIM at eta = 1)
    dpmpp2m_sde   x_s = sigma_s / sigma_t e^-(eta h) x + alpha_s (1 - e^-(1 + eta)h) D + sigma_s sqrt(1 - e^-(2 eta h)) z,
                  D = (1 + 1/2q) x0_t - 1/2q x0_before,   q = h_before / h

In y = x / alpha the ddpm step goes from rho_t down to rho_s^2 / rho_t by Euler's method and adds noise up to rho_s: this is also
the "ancestral" Euler sampler of the rho-space libraries, which therefore has no entry of its own.
"""

import math
from itertools import pairwise

from midway.samplers.exponential import begin, log_rho, need_noise_at_the_end
from midway.samplers.grids import Grid
from midway.samplers.recorder import FRESH_NOISE, Combination, Recorder
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table


def begin_falling(solver: str, schedule: Schedule, grid: Grid) -> Recorder:
    """`begin` for solvers that add noise; ValueError for a rising grid."""
    if grid[0] < grid[-1]:
        raise ValueError(f"{solver} draws noise and only goes from noise to data: use a falling grid, or eta = 0")
    return begin(solver, schedule, grid)


def ancestral_step(record: Recorder, x0: Combination, eps: Combination, t: float, s: float, eta: float) -> Combination:
    """alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z, c = eta sigma_s sqrt(1 - rho_s^2 / rho_t^2) (2010.02502, eq. 12, 16)."""
    sigma_s = record.sigma(s)
    c = eta * sigma_s * math.sqrt(1 - (record.rho(s) / record.rho(t)) ** 2)
    return record.alpha(s) * x0 + math.sqrt(sigma_s**2 - c**2) * eps + c * FRESH_NOISE


def ddpm(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, eq. 7 and 11, on any grid): DDIM with eta = 1. Weak order 1."""
    record = begin_falling("ddpm", schedule, grid)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        record.advance(ancestral_step(record, now.x0, now.eps, t, s, eta=1.0), s)
    return record.table()


def dpmpp2m_sde(
    schedule: Schedule,
    grid: Grid,
    analytic_first: bool = False,
    eta: float = 1.0,
    lower_order_final: bool = True,
) -> Table:
    """SDE-DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, section 6), eta scaling its noise; eta = 0 is dpmpp2m.

    The first step, and the last by default, are of order 1 in x0.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}: 0 is DPM-Solver++(2M), 1 the reverse SDE")
    record = begin_falling("dpmpp2m_sde", schedule, grid)
    if not lower_order_final:
        need_noise_at_the_end(record)
    before: tuple[Combination, float] | None = None
    for i, (t, s) in enumerate(pairwise(grid)):
        now = record.first(t, analytic_first)
        h = log_rho(record, t) - log_rho(record, s)
        estimate = now.x0
        if before is not None and not (lower_order_final and i == len(grid) - 2):
            q = before[1] / h  # x0 half a step ahead, by the line through the last two
            estimate = (1 + 1 / (2 * q)) * now.x0 - (1 / (2 * q)) * before[0]
        kept = math.exp(-eta * h) if eta else 1.0  # h may be infinite
        pull = record.alpha(s) * -math.expm1(-(1 + eta) * h)
        noise = record.sigma(s) * math.sqrt(1 - kept**2)
        record.advance(record.sigma(s) / record.sigma(t) * kept * now.x + pull * estimate + noise * FRESH_NOISE, s)
        before = (now.x0, h)
    return record.table(eta=repr(eta))
