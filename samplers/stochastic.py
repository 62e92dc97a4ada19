"""Solvers that draw fresh noise z at every step.

With rho = sigma / alpha, y = x / alpha and h the step in lambda = -log rho:

    ddpm          y' = m + rho'^2 / rho eps + rho' sqrt(1 - (rho' / rho)^2) z                        (DDIM at eta = 1)
    dpmpp2m_sde   y' = rho' / rho e^(-eta h) y + (1 - e^(-(1 + eta) h)) D + rho' sqrt(1 - e^(-2 eta h)) z,
                  D = (1 + 1/2q) m - 1/2q m_before,   q = h_before / h
    sa_solver p   the one formula (generator.py), phi = rho^(1 + tau^2), u = log rho, with a corrector
    er_sde p      the same with any phi, u = rho

All reach the marginals of the process, whatever they draw: both are members of one family, and at order 1, or with phi = rho,
the same. In y the ddpm step is Euler's down to rho'^2 / rho with noise up to rho': the "ancestral" Euler sampler of the rho-space
libraries, which therefore has no entry of its own.

SA-Solver: Xue et al. 2023, arXiv 2309.05019. The polynomial is integrated exactly; the authors' code takes h^2 / 2 for its moment
at two values and few steps. ER-SDE-Solver: Cui et al. 2023, arXiv 2309.06169. The authors' order 3 adds a second difference to a
first one that it does not correct for it, and so is of order 2; here x0 is the parabola, of order 3.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch

from midway.samplers.exponential import begin_falling, check_order, need_noise_at_the_end
from midway.samplers.generator import LogPsi, Method, middle, multistep, ode
from midway.samplers.grids import Grid
from midway.samplers.schedule import VP, Schedule
from midway.samplers.table import Table

WINDOW: tuple[float, float] = tuple(VP().rho(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist())
"""Noise levels rho at which SA-Solver draws by default: its authors' times 0.2 to 0.8 of `VP`, on every schedule."""

PSIS: Mapping[str, LogPsi] = {
    "er": lambda rho: np.logaddexp(rho**0.3, math.log(10)),
    "ode": ode,
    "sde": np.log,
    "rho^1.5": lambda rho: 0.5 * np.log(rho),
    "rho^2.5": lambda rho: 1.5 * np.log(rho),
    "log": lambda rho: np.log(np.log10(1 + 100 * rho**1.5)) - 0.1 * np.log(rho),
}
"""log of psi = phi / rho: exp(rho^0.3) + 10 (the authors' default), 1, rho, and others of theirs (arXiv 2309.06169)."""


def ddpm(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239, eq. 7 and 11, on any grid): DDIM with eta = 1. Weak order 1."""
    return multistep(begin_falling("ddpm", schedule, grid), Method("x0", "rho", 1), analytic_first, lambda t: np.log)


def sa_solver(
    schedule: Schedule,
    grid: Grid,
    analytic_first: bool = False,
    predictor: int = 3,
    corrector: int = 4,
    tau: float = 1.0,
    window: tuple[float, float] = WINDOW,
    lower_order_final: bool = True,
) -> Table:
    """SA-Solver (arXiv 2309.05019): one evaluation a step, the corrector's included (PEC).

    predictor: its values, 1 to 4. corrector: its values with the new one, at most predictor + 1; 0 for none. tau: strength of the
    noise of steps that start within `window`, in rho; 0 for the others and the last. 0 is the ODE, 1 the reverse SDE.
    """
    check_order("sa_solver", predictor, 4)
    if not (tau >= 0 and corrector in (0, *range(2, predictor + 2))):
        raise ValueError(
            f"sa_solver needs tau >= 0 and a corrector of 0 or 2 to {predictor + 1} values, got {tau} and {corrector}"
        )
    record = begin_falling(f"sa_solver{predictor}", schedule, grid)
    if not lower_order_final:
        need_noise_at_the_end(record)
    noisy = [t for t in grid[:-2] if window[0] <= record.rho(t) <= window[1]]
    method = Method("x0", "log rho", predictor, corrector, lower_order_final)
    psi = lambda rho: tau**2 * np.log(rho)  # noqa: E731
    return multistep(record, method, analytic_first, lambda t: psi if t in noisy else ode, tau=repr(tau))


def er_sde(
    schedule: Schedule,
    grid: Grid,
    analytic_first: bool = False,
    order: int = 3,
    psi: str | LogPsi = "er",
    eta: float = 1.0,
) -> Table:
    """ER-SDE-Solver (arXiv 2309.06169), order 1-3 in x0; one evaluation a step.

    psi: a name of `PSIS`, or log psi as a function of rho (float64 arrays) that does not decrease; ValueError if it does on the
    grid's noise levels. eta in [0, 1]: psi^eta, so 0 is the ODE.
    """
    check_order("er_sde", order, 3)
    record = begin_falling(f"er_sde{order}", schedule, grid)
    if order > 1:
        need_noise_at_the_end(record)
    if isinstance(psi, str) and psi not in PSIS:
        raise ValueError(f"unknown psi {psi!r}: choose one of {', '.join(PSIS)}, or give log psi as a function of rho")
    log_psi = PSIS[psi] if isinstance(psi, str) else psi
    levels = np.geomspace(max(record.rho(grid[-1]), 1e-8), min(record.rho(grid[0]), 1e8), 1000)
    if not (0 <= eta <= 1 and bool((np.diff(log_psi(levels)) >= -1e-12).all())):
        raise ValueError(
            f"er_sde needs eta in [0, 1] and a psi = phi / rho that does not decrease, or steps would take noise away; got {eta} "
            f"and {psi}: choose one of {', '.join(PSIS)}"
        )
    return multistep(
        record, Method("x0", "rho", order), analytic_first, lambda t: lambda rho: eta * log_psi(rho), eta=repr(eta)
    )


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
    method = Method("x0", "log rho", 2, lower_order_final=lower_order_final, average=middle)
    psi = (lambda rho: eta * np.log(rho)) if eta else ode  # rho may be infinite
    return multistep(record, method, analytic_first, lambda t: psi, eta=repr(eta))
