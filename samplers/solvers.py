"""Solvers as builders `(schedule, grid, analytic_first=False, <own options>) -> Table`, and their registry.

One step goes from t to s < t; on the reversed grid (data to noise) every deterministic builder inverts. With
rho = sigma / alpha, y = x / alpha and lambda = -log rho:

    euler    x_s = x + (s - t) v(x, t)
    ddim     x_s = alpha_s x0 + sqrt(sigma_s^2 - c^2) eps + c z          (eta = 0: Euler of dy / d rho = eps)
    heun     x_s = x + (s - t) (v(x, t) + v(x + (s - t) v(x, t), s)) / 2
    dpm2     y_s = y + (rho_s - rho_t) eps(y_m, rho_m),  rho_m = sqrt(rho_s rho_t),  y_m = y + (rho_m - rho_t) eps(y, rho_t)

`generator.py` has the formula of multistep solvers, `multistep.py` DPM-Solver++, `unipc.py` UniPC, `adams.py` Adams-Bashforth,
iPNDM and DEIS, `runge_kutta.py` every explicit tableau, `stochastic.py` the solvers that draw noise. `SOLVERS` holds them by
name, with what they cost and how fast they converge; `steps_for` turns a budget into steps.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from typing import Any, Literal

from midway.samplers.adams import adams_bashforth, deis, deis_t, ipndm, ipndm_v
from midway.samplers.exponential import begin, begin_falling, begin_in_rho, need_noise_at_the_end
from midway.samplers.generator import Method, exponential_step, multistep
from midway.samplers.grids import NAMED, Grid, named, to_data
from midway.samplers.jumps import JUMPS
from midway.samplers.multistep import dpmpp, dpmpp2m, dpmpp2s
from midway.samplers.runge_kutta import HEUN, TABLEAUS, runge_kutta
from midway.samplers.schedule import Schedule
from midway.samplers.stochastic import ddpm, dpmpp2m_sde, er_sde, sa_solver
from midway.samplers.table import Table
from midway.samplers.unipc import unipc


def euler(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """Euler's method on dx/dt = v. Order 1."""
    return multistep(begin("euler", schedule, grid), Method("velocity", "t", 1), analytic_first)


def ddim(schedule: Schedule, grid: Grid, analytic_first: bool = False, eta: float = 0.0) -> Table:
    """DDIM (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16). Order 1 at eta = 0; eta = 1 is ancestral sampling.

    c = eta sigma_s sqrt(1 - rho_s^2 / rho_t^2) is eq. 16 on variance-preserving schedules and the same process on the others.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be in [0, 1], got {eta}: 0 is deterministic DDIM, 1 is ancestral sampling")
    record = (begin_falling if eta else begin)("ddim", schedule, grid)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        kept = math.sqrt(1 - eta**2 * (1 - (record.rho(s) / record.rho(t)) ** 2)) if eta else 1.0
        record.advance(exponential_step(record, now.x, now.x0, t, s, kept), s)
    return record.table(eta=repr(eta))


heun = partial(runge_kutta, tableau=HEUN)
"""Heun's method on dx/dt = v. Order 2. The last step is corrected like the others, so even budgets are reached; its corrector
divides by the small sigma at the end, which shows when the last step is long."""

edm_heun = partial(runge_kutta, tableau=HEUN, variable="rho", name="edm_heun")
"""Heun's method on dy/drho = eps (Karras et al. 2022, arXiv 2206.00364, algorithm 1). Order 2. On a grid that ends at sigma = 0,
as theirs and those of `Solver.on` do, the last step is Euler's and N steps cost 2 N - 1 evaluations."""


def dpm2(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """DPM-Solver-2, single step (Lu et al. 2022, arXiv 2206.00927, algorithm 1; r = 1/2). Order 2."""
    record = begin_in_rho("dpm2", schedule, grid)
    need_noise_at_the_end(record)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        rho_m = record.rho(s) ** 0.5 * record.rho(t) ** 0.5
        inner = record.time_of_rho(rho_m)
        y = now.x / record.alpha(t)
        record.advance(record.alpha(inner) * (y + (rho_m - record.rho(t)) * now.eps), inner, node=False)
        middle = record.evaluate(inner)
        record.advance(record.alpha(s) * (y + (record.rho(s) - record.rho(t)) * middle.eps), s)
    return record.table()


@dataclass(frozen=True)
class Solver:
    """A builder, what it costs and how fast it converges.

    `order` is that of the table as built, low-order first and last steps included; of a stochastic solver, the weak order.
    """

    build: Callable[..., Table]
    evaluations: int
    """Network evaluations per step."""
    order: int
    history_order: int | None = None
    """Of a multistep solver: the order from exact earlier values, with no step of lower order."""
    coordinate: Literal["t", "rho"] = "rho"
    """What the builder solves in: "t", exact where x is straight in t; "rho", exact where x0 does not change."""
    pure_noise: bool = True
    """Whether grids may start where alpha = 0 (t = 1 of `Linear`)."""
    stochastic: bool = False
    invariant: bool = True
    """Of a solver in rho: whether the same noise levels give the same y = x / alpha on every schedule."""
    to_data: bool = False
    """Whether commands give it a last step of one evaluation more, from the end of the grid to sigma = 0."""

    def steps(self, nfe: int, analytic_first: bool = False) -> int:
        """Steps of the grid on which `on` costs exactly `nfe` evaluations; ValueError if no number does."""
        return steps_for(self.evaluations, nfe, analytic_first, self.to_data) - self.to_data

    def on(self, schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
        """The table of commands: on a grid of `grids.NAMED`, and to sigma = 0 from its end where `to_data`."""
        return self.build(schedule, to_data(grid) if self.to_data else grid, analytic_first)


def _runge_kutta(name: str) -> Solver:
    tableau = TABLEAUS[name]
    build = partial(runge_kutta, tableau=tableau)
    return Solver(build, evaluations=len(tableau.b), order=tableau.order, coordinate="t")


def _family(name: str, build: Callable[..., Table], first: int, last: int, **facts: Any) -> dict[str, Solver]:
    """Multistep solvers of one evaluation a step by their order, which first and last steps lower to 2."""
    orders = range(first, last + 1)
    return {f"{name}{p}": Solver(partial(build, order=p), 1, min(2, p), p if p > 1 else None, **facts) for p in orders}


SOLVERS: dict[str, Solver] = {
    "euler": Solver(euler, evaluations=1, order=1, coordinate="t"),
    "ddim": Solver(ddim, evaluations=1, order=1),
    "heun": _runge_kutta("heun"),
    "edm_heun": Solver(edm_heun, evaluations=2, order=2, pure_noise=False, to_data=True),
    "dpm2": Solver(dpm2, evaluations=2, order=2, pure_noise=False),
    "dpmpp2m": Solver(dpmpp2m, evaluations=1, order=2, history_order=2),
    "dpmpp1m": Solver(partial(dpmpp, order=1), evaluations=1, order=1),
    "dpmpp3m": Solver(partial(dpmpp, order=3), evaluations=1, order=2, history_order=2),
    "dpmpp2s": Solver(dpmpp2s, evaluations=2, order=2, pure_noise=False),
    "unipc2": Solver(partial(unipc, order=2), evaluations=1, order=2, history_order=3),
    "unipc3": Solver(partial(unipc, order=3), evaluations=1, order=2, history_order=4),
    **_family("ab", adams_bashforth, 1, 4, coordinate="t"),
    "ipndm1": Solver(partial(ipndm, order=1), evaluations=1, order=1),
    **{f"ipndm{p}": Solver(partial(ipndm, order=p), evaluations=1, order=1, history_order=1) for p in (2, 3, 4)},
    **_family("ipndm_v", ipndm_v, 2, 4),
    **_family("deis", deis, 1, 3),
    **_family("deis_t", deis_t, 2, 3, invariant=False),
    **{name: _runge_kutta(name) for name in ("midpoint", "ralston", "kutta3", "rk4", "rk38")},
    "ddpm": Solver(ddpm, evaluations=1, order=1, stochastic=True),
    "dpmpp2m_sde": Solver(dpmpp2m_sde, evaluations=1, order=2, history_order=2, stochastic=True),
    "sa_solver2": Solver(partial(sa_solver, predictor=2, corrector=2), 1, order=2, history_order=2, stochastic=True),
    "sa_solver3": Solver(sa_solver, evaluations=1, order=2, history_order=2, stochastic=True),
    **{f"er_sde{p}": Solver(partial(er_sde, order=p), 1, min(2, p), None, stochastic=True) for p in (1, 2, 3)},
}

ALIASES = {"dpmpp1m": "ddim", "ipndm1": "ddim", "deis1": "ddim", "ab1": "euler"}
"""Solvers of the registry that are another one under a second name: usable by name, and measured once by `--solvers all`."""


def make_solver(name: str, schedule: Schedule, nfe: int, grid: str = "karras", shift: float = 1.0) -> Table:
    """The table of a solver of `SOLVERS`, or of `JUMPS`, at exactly `nfe` evaluations on a grid of `grids.NAMED`.

    shift: of the noise levels that a model was trained on, its attribute of this name, for the grid `shift`.

    ValueError for a name that is not there, and for a budget that the solver cannot spend.
    """
    for what, given, known in (("solver", name, [*SOLVERS, *JUMPS]), ("grid", grid, NAMED)):
        if given not in known:
            near = ", ".join(get_close_matches(given, known, n=3, cutoff=0.3)) or ", ".join(known)
            raise ValueError(f"there is no {what} '{given}': the nearest are {near}")
    if name in JUMPS:
        return JUMPS[name](schedule, named(grid, schedule, nfe, trained=shift))
    solver = SOLVERS[name]
    return solver.on(schedule, named(grid, schedule, solver.steps(nfe), trained=shift))


def steps_for(evaluations: int, nfe: int, analytic_first: bool = False, euler_last: bool = False) -> int:
    """Steps of a solver with this many evaluations a step that cost exactly `nfe`; ValueError if no number does.

    The first costs one less with `analytic_first`, the last with `euler_last`.
    """
    spared = analytic_first + euler_last
    total = nfe + spared
    if nfe < 1 or total % evaluations:
        below = total // evaluations * evaluations - spared
        reachable = [n for n in (below, below + evaluations) if n >= 1]
        other = "without" if analytic_first else "with"
        raise ValueError(
            f"{nfe} network evaluations cannot be reached at {evaluations} a step{', the last of 1' if euler_last else ''}: "
            f"use {' or '.join(map(str, reachable))}, or the same number {other} the analytic first step"
        )
    return total // evaluations
