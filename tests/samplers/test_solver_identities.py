"""What solvers are equal to, where they are exact, and what their weights sum to."""

import math
from itertools import pairwise
from typing import get_args

import mutate_tables
import numpy as np
import pytest
import torch
from oracles import mixture, point_mass, times_of, uneven_grid
from tensors import normal
from torch import Tensor

from midway.samplers import grids
from midway.samplers.grids import Grid
from midway.samplers.multistep import dpmpp_weights
from midway.samplers.plugin import plugin_table
from midway.samplers.prediction import NetworkField, Target, target_value
from midway.samplers.runge_kutta import RK4, TABLEAUS, Tableau, runge_kutta
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import (
    ALIASES,
    SOLVERS,
    adams_bashforth,
    ddim,
    ddpm,
    deis,
    dpmpp,
    dpmpp2m,
    dpmpp2m_sde,
    ipndm,
    ipndm_v,
    unipc,
)
from midway.samplers.step_parameters import MeanDirection
from midway.samplers.table import Table

SCHEDULES = [VP(), EDM(sigma_max=5.0), Linear(), Cosine()]
names = [type(s).__name__ for s in SCHEDULES]
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]
IN_RHO = [name for name in DETERMINISTIC if SOLVERS[name].coordinate == "rho"]
POINTS = normal(16, 2, dtype=torch.float64)
IN_TIME = [name for name in DETERMINISTIC if SOLVERS[name].coordinate == "t"]


def grid_of(schedule: Schedule, steps: int = 6, rho_start: float = 3.0, rho_end: float = 0.1) -> Grid:
    return uneven_grid(*times_of(schedule, rho_start, rho_end), steps)


def run(table: Table, schedule: Schedule) -> Tensor:
    return sample(mixture().field(schedule), table, POINTS)


def assert_same(schedule: Schedule, *tables: Table) -> None:
    first, *others = (run(table, schedule) for table in tables)
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=1e-12)


# ---- equal solvers ----


def test_all_solvers_of_order_one_are_one_solver_where_rho_is_a_multiple_of_t() -> None:
    schedule = EDM(sigma_max=5.0)
    grid = grid_of(schedule)
    builds = [SOLVERS[name].build for name in ("euler", "ddim", "ab1", "dpmpp1m", "ipndm1", "deis1")]
    assert_same(schedule, *(build(schedule, grid) for build in builds), unipc_without_correction(schedule, grid))


def unipc_without_correction(schedule: Schedule, grid: Grid) -> Table:
    """UniP-1: every step a UniPC run of its own, whose only step is never corrected."""
    rows = [unipc(schedule, pair, order=1).rows[0] for pair in pairwise(grid)]
    whole = ddim(schedule, grid)
    changed = tuple(
        type(row)(row.time, row.arrival, (*row.states[:-1], one.states[0]), (*row.predictions[:-1], one.predictions[0]))
        for row, one in zip(whole.rows, rows, strict=True)
    )
    return Table("unip1", grid, whole.nodes, changed)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_solvers_under_two_names_are_the_same(schedule: Schedule) -> None:
    grid = grid_of(schedule)
    in_the_middle = (plugin_table(schedule, grid, base, [MeanDirection(0.5, 1, 1)] * 6) for base in ("none", "dpm2"))
    assert_same(schedule, SOLVERS["dpm2"].build(schedule, grid), *in_the_middle)
    assert_same(schedule, dpmpp2m(schedule, grid), dpmpp(schedule, grid, order=2), dpmpp2m_sde(schedule, grid, eta=0))
    for one, other in zip(ddpm(schedule, grid).rows, ddim(schedule, grid, eta=1.0).rows, strict=True):
        weights = (*other.states, *other.predictions, other.noise)
        assert (*one.states, *one.predictions, one.noise) == pytest.approx(weights, rel=1e-13, abs=1e-14)
    final = {"lower_order_final": False}
    assert_same(schedule, dpmpp2m(schedule, grid, **final), dpmpp(schedule, grid, order=2, **final))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_first_three_rows_of_unipc2_with_bh2_predict_as_dpmpp2m(schedule: Schedule) -> None:
    """UniP-2 with B = 1 - e^-h is DPM-Solver++(2M): on three nodes, with the correction taken off, they agree."""
    grid = grid_of(schedule)[:3]
    ours, theirs = (build(schedule, grid, lower_order_final=False) for build in (unipc, dpmpp2m))
    assert ours.rows[0].states == pytest.approx(theirs.rows[0].states, abs=1e-14)
    assert ours.rows[0].predictions == pytest.approx(theirs.rows[0].predictions, abs=1e-14)
    times = torch.tensor(grid, dtype=torch.float64)
    alpha, sigma = schedule.alpha(times).tolist(), schedule.sigma(times).tolist()
    h = math.log(alpha[1] / sigma[1]) - math.log(alpha[0] / sigma[0])
    # the correction of order 1: -alpha B / 2 (D_0 - D_1), carried on by sigma_2 / sigma_1
    correction = sigma[2] / sigma[1] * alpha[1] * -math.expm1(-h) / 2
    expected = (theirs.rows[1].predictions[0] - correction, theirs.rows[1].predictions[1] + correction)
    assert ours.rows[1].predictions == pytest.approx(expected, abs=1e-13)


def test_the_variants_of_unipc_differ_only_where_two_points_are_used() -> None:
    schedule = VP()
    grid = grid_of(schedule, 8)
    bh1, bh2 = (unipc(schedule, grid, order=3, variant=v, lower_order_final=False).rows for v in ("bh1", "bh2"))
    for i, (one, two) in enumerate(zip(bh1, bh2, strict=True)):
        same = one.predictions == pytest.approx(two.predictions, rel=1e-12)
        assert same == (i not in (1, 2))  # row 1 corrects with 2 points and predicts with 2; row 2 takes that back
    with pytest.raises(ValueError, match="variants bh1 and bh2"):
        unipc(schedule, grid, variant="bh3")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("name", ["dpm2", "dpmpp2s"])
def test_single_step_dpm_solvers_evaluate_at_the_middle_logsnr(name: str, schedule: Schedule) -> None:
    """Any other middle that closes in as fast would have the same order and be exact for the same data."""
    (t, s), table = grid_of(schedule)[:2], SOLVERS[name].build(schedule, grid_of(schedule)[:2])
    lam = schedule.logsnr(torch.tensor([t, table.rows[0].arrival, s], dtype=torch.float64)).tolist()
    assert lam[1] == pytest.approx((lam[0] + lam[2]) / 2, abs=1e-12)


@pytest.mark.parametrize("name", ["rk4", "heun", "kutta3"])
def test_runge_kutta_in_time_and_in_rho_agree_where_rho_is_a_multiple_of_t(name: str) -> None:
    schedule = EDM(sigma_max=5.0)
    grid = grid_of(schedule)
    in_time, in_rho = (runge_kutta(schedule, grid, tableau=TABLEAUS[name], variable=v) for v in ("t", "rho"))
    assert_same(schedule, in_time, in_rho)
    other = Cosine()
    grid = grid_of(other)
    in_time, in_rho = (runge_kutta(other, grid, tableau=TABLEAUS[name], variable=v) for v in ("t", "rho"))
    assert (run(in_time, other) - run(in_rho, other)).abs().max() > 1e-5


@pytest.mark.parametrize("name", [*(n for n in IN_RHO if SOLVERS[n].invariant), "heun in rho", "rk4 in rho"])
def test_solvers_in_rho_do_not_see_the_schedule(name: str) -> None:
    """The same rho grid gives the same y = x / alpha on every schedule."""
    rho = torch.tensor([3.0, 2.2, 1.0, 0.7, 0.3, 0.2, 0.1], dtype=torch.float64)
    y, ends = 3 * POINTS, []
    for schedule in SCHEDULES:
        grid = tuple(schedule.time_of_rho(rho).tolist())
        if name.endswith("in rho"):
            table = runge_kutta(schedule, grid, tableau=TABLEAUS[name.split()[0]], variable="rho")
        else:
            table = SOLVERS[name].build(schedule, grid)
        alpha = schedule.alpha(torch.tensor([grid[0], grid[-1]], dtype=torch.float64))
        ends.append(sample(mixture().field(schedule), table, alpha[0] * y) / alpha[1])
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-11)


@pytest.mark.parametrize("target", get_args(Target))
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_no_state_depends_on_the_networks_target(name: str, target: Target) -> None:
    """A network's own output, folded into the rows, gives what its estimates give."""
    for schedule in SCHEDULES:
        field, table = mixture().field(schedule), SOLVERS[name].build(schedule, grid_of(schedule))

        def network(x: Tensor, t: Tensor, field=field, schedule=schedule) -> Tensor:
            prediction = field(x, t)
            return target_value(target, prediction.x0, prediction.eps, t, schedule)

        folded = table.states(NetworkField(network, target, schedule), POINTS)
        for got, expected in zip(folded, table.states(field, POINTS), strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-11)


# ---- exactness ----


STRAIGHT = [schedule for schedule in SCHEDULES if isinstance(schedule, Linear | EDM)]


@pytest.mark.parametrize(
    ("name", "schedule"), [*((n, s) for n in IN_RHO for s in SCHEDULES), *((n, s) for n in IN_TIME for s in STRAIGHT)]
)
@pytest.mark.parametrize("rising", [False, True])
def test_a_point_mass_is_solved_exactly_at_every_node(name: str, schedule: Schedule, rising: bool) -> None:
    """By solvers in rho on every schedule, in both directions; by solvers in t where alpha and sigma are straight in t."""
    point, grid = torch.tensor([0.3, -0.7], dtype=torch.float64), grid_of(schedule)
    grid = grids.reversed_grid(grid) if rising else grid
    times = torch.tensor([grid[0], grid[-1]], dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    exact = alpha[1] * point + sigma[1] / sigma[0] * (POINTS - alpha[0] * point)
    got = sample(point_mass(schedule, point), SOLVERS[name].build(schedule, grid), POINTS)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if SOLVERS[name].pure_noise])
@pytest.mark.parametrize("analytic_first", [False, True])
def test_runs_may_start_at_pure_noise(name: str, analytic_first: bool) -> None:
    """Linear at t = 1: a point mass at 0 is solved exactly without an evaluation there; others by the first one."""
    grid = (1.0, 0.8, 0.65, 0.3, 0.2, 0.1)
    point = torch.zeros(2, dtype=torch.float64) if analytic_first else torch.tensor([0.3, -0.7], dtype=torch.float64)
    table = SOLVERS[name].build(Linear(), grid, analytic_first)
    got = sample(point_mass(Linear(), point), table, POINTS)
    torch.testing.assert_close(got, 0.9 * point + 0.1 * POINTS, rtol=0, atol=1e-11)
    assert table.nfe == SOLVERS[name].evaluations * 5 - analytic_first


@pytest.mark.parametrize("name", [n for n in DETERMINISTIC if SOLVERS[n].pure_noise and n not in IN_TIME])
def test_runs_may_encode_to_pure_noise(name: str) -> None:
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)
    table = SOLVERS[name].build(Linear(), (0.1, 0.2, 0.5, 0.8, 1.0))
    got = sample(point_mass(Linear(), point), table, POINTS)
    torch.testing.assert_close(got, 10 * (POINTS - 0.9 * point), rtol=0, atol=1e-11)


# ---- weights ----


def test_equal_steps_have_the_textbook_weights() -> None:
    grid = (0.9, 0.7, 0.5, 0.3, 0.1)
    constant, true = (build(EDM(), grid, order=4).rows for build in (ipndm, ipndm_v))
    for one, other in zip(constant, true, strict=True):
        assert one.predictions == pytest.approx(other.predictions, abs=1e-12)


def test_ipndm_v_has_the_true_weights_of_uneven_steps() -> None:
    """Steps 1, 3, 1 on EDM, where eps = (x - x0) / rho: the row's weight on x_j is the Adams weight times h / rho_j."""
    rho = [4.0, 3.0, 2.0 / 3.0, 0.5]
    schedule = EDM(sigma_max=5.0)
    rows = ipndm_v(schedule, tuple(r / 5 for r in rho), order=3).rows
    h, before, last = rho[3] - rho[2], rho[2] - rho[1], rho[1] - rho[0]
    # Lagrange polynomials through three slopes, integrated over the step by hand
    w1 = h * (h**2 / 3 + (2 * before + last) * h / 2 + before * (before + last)) / (before * (before + last))
    w2 = -h * (h**2 / 3 + (before + last) * h / 2) / (before * last)
    w3 = h * (h**2 / 3 + before * h / 2) / (last * (before + last))
    expected = [-w / r for w, r in zip((w3, w2, w1), rho[:3], strict=True)]
    assert rows[2].predictions == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize(
    ("name", "degree", "variable"),
    [
        *[(f"ab{p}", p - 1, "t") for p in (1, 2, 3, 4)],
        *[(f"ipndm_v{p}", p - 1, "rho") for p in (2, 3, 4)],
        *[(f"deis{p}", p - 1, "log rho") for p in (1, 2, 3)],
        *[(f"deis_t{p}", p - 1, "eps of t") for p in (2, 3)],
        *[("unipc3", 2, "lambda"), ("dpmpp3m twice", 2, "lambda")],
    ],
)
def test_moment_conditions_hold_on_every_row(schedule: Schedule, name: str, degree: int, variable: str) -> None:
    """A slope that is a polynomial of time alone is integrated exactly once there are enough values.

    x is propagated exactly to the rows' starts, so every row is tested by itself, against numerical integration.
    """
    grid = grid_of(schedule)
    build = SOLVERS[name].build if name != "dpmpp3m twice" else None
    if build is None:
        table = dpmpp(schedule, grid, order=3, lower_order_final=False, curvature=2.0)
    else:
        table = build(schedule, grid, lower_order_final=False) if name == "unipc3" else build(schedule, grid)
    states, predictions = _polynomial_solution(schedule, grid, degree, variable)
    first = max(degree, 3 if name == "unipc3" else 0)  # the correction needs the step before to have all its points too
    for i, row in enumerate(table.rows):
        if i < first:
            continue
        got = sum(w * x for w, x in zip(row.states, states, strict=False))
        got += sum(w * d for w, d in zip(row.predictions, predictions, strict=False))
        assert got == pytest.approx(states[i + 1], abs=1e-10), i


def _polynomial_solution(schedule: Schedule, grid: Grid, degree: int, variable: str) -> tuple[list[float], list[float]]:
    """x and x0 at the nodes of the ODE whose v, eps or x0 is q(u) = 1 + u + .. + u^degree, by Gauss-Legendre panels."""
    times = torch.tensor(grid, dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    rho, (d_alpha, d_sigma) = sigma / alpha, schedule.rates(times)

    def q(u: Tensor) -> Tensor:
        return sum((u**k for k in range(degree + 1)), torch.zeros_like(u))

    def rate_of_rho(t: Tensor) -> Tensor:
        (da, ds), a, s = schedule.rates(t), schedule.alpha(t), schedule.sigma(t)
        return (ds * a - s * da) / a.square()

    def integral(places: Tensor, weight) -> Tensor:
        """Running integral of weight(u) q(u) over the nodes."""
        x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(30))
        low, width = places[:-1, None], places.diff()[:, None]
        u = low + width * (x + 1) / 2
        panels = (width / 2 * w * weight(u) * q(u)).sum(1)
        return torch.cat([panels.new_zeros(1), panels.cumsum(0)])

    if variable == "t":
        x = 1 + integral(times, torch.ones_like)
        slope = q(times)  # v = d_alpha x0 + d_sigma eps and x = alpha x0 + sigma eps
        x0 = (sigma * slope - d_sigma * x) / (d_alpha * sigma - d_sigma * alpha)
    elif variable == "lambda":
        x0 = q(-rho.log())
        x = sigma * (1 + integral(-rho.log(), torch.exp))
    else:
        places = {"rho": rho, "log rho": rho.log(), "eps of t": times}[variable]
        weight = {"rho": torch.ones_like, "log rho": torch.exp, "eps of t": rate_of_rho}[variable]
        x = alpha * (1 + integral(places, weight))
        x0 = (x - sigma * q(places)) / alpha
    return x.tolist(), x0.tolist()


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("final", [True, False])
def test_dpmpp_weights_are_the_papers_and_differentiable(order: int, final: bool) -> None:
    times = torch.tensor(grid_of(VP()), dtype=torch.float64, requires_grad=True)
    ratio, weights = dpmpp_weights(VP(), times, order, final)
    expected = torch.zeros_like(weights)
    alpha, sigma = VP().alpha(times).tolist(), VP().sigma(times).tolist()
    lam = [math.log(a / s) for a, s in zip(alpha, sigma, strict=True)]
    steps = len(lam) - 1
    for n in range(steps):
        h, e = lam[n + 1] - lam[n], math.expm1(lam[n] - lam[n + 1])
        p = min(order, n + 1, steps - n) if final else min(order, n + 1)
        d = [torch.eye(steps, dtype=torch.float64)[max(n - k, 0)] for k in range(3)]
        total = -alpha[n + 1] * e * d[0]
        if p == 2:
            total = total - alpha[n + 1] * e / 2 * (d[0] - d[1]) / ((lam[n] - lam[n - 1]) / h)
        if p == 3:
            r0, r1 = (lam[n] - lam[n - 1]) / h, (lam[n - 1] - lam[n - 2]) / h
            near, far = (d[0] - d[1]) / r0, (d[1] - d[2]) / r1
            slope, bend = near + r0 / (r0 + r1) * (near - far), (near - far) / (r0 + r1)
            total = total + alpha[n + 1] * ((e / h + 1) * slope - ((e + h) / h**2 - 0.5) * bend)
        expected[n] = total
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(ratio.detach(), torch.tensor([b / a for a, b in pairwise(sigma)], dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda t: dpmpp_weights(VP(), t, order, final), (times,))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_weights_and_their_gradient_are_finite_at_pure_noise_and_at_data(order: int) -> None:
    times = torch.tensor([1.0, 0.8, 0.7, 0.3, 0.0], dtype=torch.float64, requires_grad=True)
    ratio, weights = dpmpp_weights(Linear(), times, order)
    (gradient,) = torch.autograd.grad((weights * torch.arange(16.0).view(4, 4)).sum() + ratio.sum(), times)
    assert ratio.isfinite().all()
    assert weights.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient[1:].abs().min() > 0
    near = torch.tensor([1 - 1e-14, 0.8, 0.7, 0.3, 0.0], dtype=torch.float64)
    torch.testing.assert_close(weights, dpmpp_weights(Linear(), near, order)[1], rtol=0, atol=0.03)


def test_dpmpp_weights_raise_an_error_for_invalid_arguments() -> None:
    times = torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="order 1, 2 or 3"):
        dpmpp_weights(Linear(), times, 4)
    with pytest.raises(ValueError, match="float64"):
        dpmpp_weights(Linear(), times.float(), 2)
    with pytest.raises(ValueError, match=r"rho = 0\.002"):
        dpmpp_weights(Linear(), times, 2, lower_order_final=False)
    with pytest.raises(ValueError, match="at the grid's start"):
        dpmpp_weights(Linear(), times.flip(0), 2)


def test_tableaus_are_checked_when_made() -> None:
    for tableau in TABLEAUS.values():
        assert tableau.c[0] == 0
    with pytest.raises(ValueError, match="misses an order condition"):
        Tableau("bad", RK4.a, (1 / 6, 1 / 3, 1 / 3, 1 / 6 + 1e-9), 4)
    with pytest.raises(ValueError, match="misses an order condition"):
        Tableau("bad", ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.01, 0.99)), RK4.b, 4)
    with pytest.raises(ValueError, match="not explicit"):
        Tableau("bad", ((), (1.0, 0.0)), (0.5, 0.5), 2)
    with pytest.raises(ValueError, match="only orders 1 to 4"):
        Tableau("bad", RK4.a, RK4.b, 5)


@pytest.mark.parametrize("schedule", [Linear(), VP()], ids=["Linear", "VP"])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_number_of_every_table_matters(name: str, schedule: Schedule) -> None:
    """Multiplied by 1.01, each breaks a property that the table must have (`mutate_tables.py`)."""
    count, escaped = mutate_tables.check(name, schedule)
    assert count > 15
    assert not escaped


# ---- errors ----


@pytest.mark.parametrize("name", list(SOLVERS))
def test_grids_that_a_solver_cannot_serve_raise_an_error_that_names_the_fix(name: str) -> None:
    solver = SOLVERS[name]
    with pytest.raises(ValueError, match=r"rho = 0\.002|falling grid"):
        solver.build(Linear(), (0.0, 0.3, 0.9))
    if not solver.pure_noise:
        with pytest.raises(ValueError, match="infinite at the grid's start: start at rho = 80"):
            solver.build(Linear(), (1.0, 0.5, 0.1))
        with pytest.raises(ValueError, match="infinite at the grid's end: end at rho = 80"):
            solver.build(Linear(), (0.1, 0.5, 1.0))
    if solver.stochastic:
        with pytest.raises(ValueError, match="only goes from noise to data"):
            solver.build(Linear(), (0.1, 0.5, 0.9))


@pytest.mark.parametrize("name", ["heun", "kutta3", "rk4", "rk38", "dpm2", "dpmpp2s", "deis2", "deis3", "deis_t2"])
def test_solvers_that_divide_by_the_last_sigma_name_the_end(name: str) -> None:
    with pytest.raises(ValueError, match="needs sigma > 0 at the grid's end"):
        SOLVERS[name].build(Linear(), (0.9, 0.5, 0.0))


def test_options_are_checked() -> None:
    grid = (0.9, 0.5, 0.1)
    for build, order in ((adams_bashforth, 5), (ipndm, 0), (ipndm_v, 5), (deis, 4), (unipc, 4)):
        with pytest.raises(ValueError, match="has orders"):
            build(Linear(), grid, order=order)
    with pytest.raises(ValueError, match="variable must be"):
        runge_kutta(Linear(), grid, variable="lambda")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="eta must be"):
        dpmpp2m_sde(Linear(), grid, eta=1.5)
    for build in (unipc, dpmpp2m, dpmpp2m_sde):
        with pytest.raises(ValueError, match="sigma > 0 at the grid's end"):
            build(Linear(), (0.9, 0.5, 0.0), lower_order_final=False)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("alias", ALIASES)
def test_an_alias_is_the_table_of_its_solver(alias: str, schedule: Schedule) -> None:
    """Up to rounding; with an analytic first step, too."""
    grid = grid_of(schedule)
    for analytic_first in (False, True):
        mine, its = (SOLVERS[name].build(schedule, grid, analytic_first) for name in (alias, ALIASES[alias]))
        assert (mine.grid, mine.nodes, mine.times, mine.nfe) == (its.grid, its.nodes, its.times, its.nfe)
        for a, b in zip(mine.rows, its.rows, strict=True):
            assert (*a.states, *a.predictions, a.noise) == pytest.approx(
                (*b.states, *b.predictions, b.noise), abs=1e-13
            )
