"""Explicit Adams methods: one evaluation a step, the slope extrapolated by the polynomial through its last values.

Settings of the one formula (generator.py) but for `ipndm`, which has the weights of equal steps on any grid:

    ab p        dx / dt   = v      polynomial in t                         (Adams-Bashforth, true variable-step weights)
    ipndm_v p   dy / drho = eps    polynomial in rho                       (y = x / alpha, rho = sigma / alpha)
    deis p      dy / drho = eps    polynomial in log rho                   (DEIS-rhoAB's integral in the variable log rho)
    deis_t p    dy / drho = eps    polynomial in t                         (DEIS-tAB)
    ipndm p     dy / drho = eps    1; 3/2, -1/2; 23/12, -16/12, 5/12; 55/24, -59/24, 37/24, -9/24

Adams-Bashforth: Hairer, Norsett & Wanner, section III.5. iPNDM: Liu et al. 2022, arXiv 2202.09778, eq. 12; Zhang & Chen 2022,
arXiv 2204.13902, section 3.3. DEIS: the same, eq. 14 and 15; the authors' code sums 10,000 points where integrals are exact here.
"""

from midway.samplers.exponential import begin, check_order, need_noise_at_the_end
from midway.samplers.generator import Average, Method, Reads, Variable, multistep
from midway.samplers.grids import Grid
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

EQUAL_STEPS = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def adams_bashforth(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 2) -> Table:
    """Adams-Bashforth on dx/dt = v with the weights of the actual steps. Order 1-4; 1 is Euler."""
    return _adams("ab", schedule, grid, analytic_first, order, "velocity", "t")


def ipndm(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 4) -> Table:
    """iPNDM (arXiv 2204.13902, section 3.3), at most `order` 1-4 values, weights of equal steps of rho.

    Of order 1 on uneven grids, and of order 2 or more only where the steps of rho change smoothly (as EDM's do, order 2).
    """
    equal = lambda places, h: EQUAL_STEPS[len(places) - 1]  # noqa: E731
    return _adams("ipndm", schedule, grid, analytic_first, order, "eps", "rho", average=equal)


def ipndm_v(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 4) -> Table:
    """iPNDM with the weights of the actual steps: Adams-Bashforth in rho, order 1-4 on any grid."""
    return _adams("ipndm_v", schedule, grid, analytic_first, order, "eps", "rho")


def deis(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 3) -> Table:
    """DEIS (arXiv 2204.13902, eq. 14-15) with eps a polynomial in log rho, order 1-3 (order 1 is DDIM)."""
    return _adams("deis", schedule, grid, analytic_first, order, "eps", "log rho", highest=3)


def deis_t(schedule: Schedule, grid: Grid, analytic_first: bool = False, order: int = 3) -> Table:
    """DEIS-tAB (arXiv 2204.13902, eq. 14-15) with eps a polynomial in t, which sees the schedule; order 1-4."""
    return _adams("deis_t", schedule, grid, analytic_first, order, "eps", "t")


def _adams(
    family: str,
    schedule: Schedule,
    grid: Grid,
    analytic_first: bool,
    order: int,
    reads: Reads,
    variable: Variable,
    highest: int = 4,
    average: Average | None = None,
) -> Table:
    check_order(family, order, highest)
    record = begin(f"{family}{order}", schedule, grid)
    if reads == "eps" and variable != "rho" and order > 1:
        need_noise_at_the_end(record)
    return multistep(record, Method(reads, variable, order, average=average), analytic_first)
