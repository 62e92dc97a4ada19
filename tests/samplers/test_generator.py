"""The one formula against independent derivations: closed moments, adaptive quadrature, the papers' algorithms written out."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from oracles import mixture, rmse
from scipy.integrate import quad
from tensors import normal
from test_orders import grids_of, known_states, sample_from_history, slope
from torch import Tensor

from midway.samplers.grids import Grid
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, adams_bashforth, ddim, deis, deis_t, dpmpp, ipndm_v, unipc
from midway.samplers.stochastic import PSIS, WINDOW, er_sde, sa_solver
from midway.samplers.table import Table
from midway.samplers.table_facts import variance_ratios

SCHEDULES = [Linear(), VP(), EDM(sigma_max=5.0), Cosine()]
names = [type(s).__name__ for s in SCHEDULES]
RHO = (3.0, 2.2, 1.0, 0.7, 0.3, 0.2, 0.1)
POINTS = normal(16, 2, dtype=torch.float64)


def grid_of(schedule: Schedule, rho: Sequence[float] = RHO) -> Grid:
    return tuple(schedule.time_of_rho(torch.tensor(rho, dtype=torch.float64)).tolist())


def lagrange(places: Sequence[float], j: int) -> Callable[[float], float]:
    return lambda u: math.prod((u - p) / (places[j] - p) for k, p in enumerate(places) if k != j)


def by_quadrature(places: Sequence[float], start: float, end: float, density: Callable[[float], float]) -> list[float]:
    """int L_j(u) density(u) du, adaptively."""
    kinds = (lambda u, j=j: lagrange(places, j)(u) * density(u) for j in range(len(places)))
    return [quad(each, start, end, epsabs=1e-14, epsrel=1e-13)[0] for each in kinds]


def closed(places: Sequence[float], rate: float) -> list[float]:
    """w_j with sum_j w_j f(places[j]) = int_0^1 e^(rate z) f(z) dz for polynomials, from the moments' recurrence."""
    moments = [math.expm1(rate) / rate if rate else 1.0]
    for k in range(1, len(places)):
        moments.append((math.exp(rate) - k * moments[-1]) / rate if rate else 1 / (k + 1))
    return np.linalg.solve(np.vander(places, increasing=True).T, moments).tolist()


def numbers(schedule: Schedule, grid: Grid) -> tuple[list[float], list[float], list[float]]:
    t = torch.tensor(grid, dtype=torch.float64)
    return schedule.alpha(t).tolist(), schedule.sigma(t).tolist(), schedule.rho(t).tolist()


# ---- settings of the formula ----


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize(("make", "variable"), [(ipndm_v, "rho"), (deis, "log rho"), (adams_bashforth, "t")])
@pytest.mark.parametrize("order", [2, 3])
def test_adams_methods_have_the_weights_of_their_closed_moments(
    make: Callable[..., Table], variable: str, order: int, schedule: Schedule
) -> None:
    """Weights on D_j are -w_j / rho_j of y, or those of v = alpha' D + sigma' (x - alpha D) / sigma."""
    grid = grid_of(schedule)
    (alpha, sigma, rho), rows = numbers(schedule, grid), make(schedule, grid, order=order).rows
    d_alpha, d_sigma = (r.tolist() for r in schedule.rates(torch.tensor(grid, dtype=torch.float64)))
    u = {"rho": rho, "log rho": [math.log(r) for r in rho], "t": grid}[variable]
    for n in range(order - 1, len(rows)):
        h = u[n + 1] - u[n]
        past = range(n, n - order, -1)
        w = closed([(u[j] - u[n]) / h for j in past], h if variable == "log rho" else 0.0)
        scale = h * rho[n] if variable == "log rho" else h
        for j, weight in zip(past, w, strict=True):
            of_x0 = d_alpha[j] - d_sigma[j] * alpha[j] / sigma[j] if variable == "t" else -alpha[n + 1] / rho[j]
            assert rows[n].predictions[j] == pytest.approx(scale * weight * of_x0, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("steps", [(1.0, 0.9, 0.6, 0.5, 0.2, 0.1), (0.98, 0.5, 0.4, 0.03, 0.02, 0.002)])
def test_deis_in_t_has_the_closed_moments_of_the_flow(steps: Grid) -> None:
    """int t^k d rho for rho = t / (1 - t): 1/(1-t); 1/(1-t) + log(1-t); t + 2 log(1-t) + 1/(1-t)."""
    rows = deis_t(Linear(), steps, order=3).rows
    moments: list[Callable[[float], float]] = [
        lambda t: 1 / (1 - t),
        lambda t: 1 / (1 - t) + math.log(1 - t),
        lambda t: t + 2 * math.log(1 - t) + 1 / (1 - t),
    ]
    first = 3 if steps[0] == 1 else 2  # pure noise is no value of a later step
    for n in range(first, len(rows)):
        t, s = steps[n : n + 2]
        past = [steps[n - k] for k in range(3)]
        want = np.linalg.solve(np.vander(past, increasing=True).T, [m(s) - m(t) for m in moments])
        got = [-rows[n].predictions[n - k] * past[k] / ((1 - past[k]) * (1 - s)) for k in range(3)]
        assert got == pytest.approx(want.tolist(), rel=1e-11)
    if steps[0] == 1:  # eps_0 is x_0 itself: x' = alpha' m_0 + sigma' x_0
        assert (rows[0].states[0], rows[0].predictions[0]) == pytest.approx((0.9, 1 - 0.9), abs=1e-15)


def test_deis_in_t_is_adams_bashforth_where_t_is_a_multiple_of_rho_and_no_other_solver_elsewhere() -> None:
    for a, b in zip(*(make(EDM(), grid_of(EDM()), order=3).rows for make in (deis_t, ipndm_v)), strict=True):
        assert a.predictions == pytest.approx(b.predictions, rel=1e-11)
    grid = grid_of(Linear())
    others = [make(Linear(), grid, order=3) for make in (deis, ipndm_v, adams_bashforth)]
    mine = deis_t(Linear(), grid, order=3).rows[3].predictions
    assert all(abs(other.rows[3].predictions[3] - mine[3]) > 1e-3 for other in others)
    textbook = deis_t(EDM(5.0), (0.9, 0.7, 0.5, 0.3), order=3).rows[2].predictions  # equal steps: (23, -16, 5) / 12
    assert [-w * r for w, r in zip(textbook, (4.5, 3.5, 2.5), strict=True)] == pytest.approx(
        [-5 / 12, 16 / 12, -23 / 12]
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_sa_solver_without_noise_is_the_exact_exponential_multistep_method(schedule: Schedule) -> None:
    """UniPC of three values is exact too; at two, its published weight and the integral differ."""
    grid = grid_of(schedule)
    alpha, _, rho = numbers(schedule, grid)
    rows = sa_solver(schedule, grid, predictor=2, corrector=0, tau=0, lower_order_final=False).rows
    for n in range(1, 6):
        h, k = (math.log(rho[i] / rho[i + 1]) for i in (n, n - 1))
        moment = h - 1 + math.exp(-h)
        want = [-moment / k, 1 - math.exp(-h) + moment / k]
        assert [w / alpha[n + 1] for w in rows[n].predictions[n - 1 :]] == pytest.approx(want, rel=1e-12)
    published = unipc(schedule, grid, order=3, lower_order_final=False)
    exact = sa_solver(schedule, grid, tau=0, lower_order_final=False)
    for n, (a, b) in enumerate(zip(exact.rows, published.rows, strict=True)):
        assert (a.predictions == pytest.approx(b.predictions, rel=1e-11)) == (n not in (1, 2))  # two values: B(h) / 2
    first = dpmpp(schedule, grid, order=1)
    for a, b in zip(sa_solver(schedule, grid, predictor=1, corrector=0, tau=0).rows, first.rows, strict=True):
        assert (*a.states, *a.predictions) == pytest.approx((*b.states, *b.predictions), abs=1e-12)


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_sa_solver_of_two_values_has_the_weights_of_its_paper(tau: float) -> None:
    """A = 1 + tau^2: 1 - e^-Ah + I / k and -I / k, I = (A h - 1 + e^-Ah) / A; noise rho' sqrt(1 - e^(-2 tau^2 h))."""
    grid = grid_of(EDM(5.0))
    rows = sa_solver(EDM(5.0), grid, predictor=2, corrector=0, tau=tau, window=(0.0, 5.0), lower_order_final=False).rows
    A = 1 + tau**2
    for n in range(1, 5):  # the last step draws nothing
        h, k = math.log(RHO[n] / RHO[n + 1]), math.log(RHO[n - 1] / RHO[n])
        moment = (A * h - 1 + math.exp(-A * h)) / A
        assert rows[n].predictions[n - 1 :] == pytest.approx(
            [-moment / k, 1 - math.exp(-A * h) + moment / k], rel=1e-11
        )
        assert rows[n].states[n] == pytest.approx(math.exp(-A * h), rel=1e-12)
        assert rows[n].noise == pytest.approx(RHO[n + 1] * math.sqrt(1 - math.exp(-2 * tau**2 * h)), rel=1e-12)
    assert rows[5].noise == 0


def test_sa_solver_draws_within_its_window_and_never_last() -> None:
    """The authors' times 0.2 to 0.8 of VP, as noise levels on every schedule."""
    assert VP().time_of_rho(torch.tensor(WINDOW, dtype=torch.float64)).tolist() == pytest.approx([0.2, 0.8], abs=1e-12)
    rho = (80.0, 26.0, 24.0, 1.0, 0.73, 0.7, 0.1)
    for schedule in (VP(), Linear(), EDM()):
        rows = sa_solver(schedule, grid_of(schedule, rho)).rows
        assert [row.noise > 0 for row in rows] == [False, False, True, True, True, False]
    assert not sa_solver(EDM(), grid_of(EDM(), (3.0, 1.0, 0.8)), window=(0.0, 80.0)).rows[1].noise
    assert sa_solver(EDM(), grid_of(EDM(), (3.0, 1.0, 0.8)), tau=0).stochastic is False


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_one_draw_serves_the_predicted_and_the_corrected_state(schedule: Schedule) -> None:
    """Predict, evaluate, correct from the corrected state with the same z, as published, in y, by adaptive quadrature."""
    grid, tau = grid_of(schedule), 0.8
    table = sa_solver(schedule, grid, predictor=2, corrector=3, tau=tau, window=(0.0, 9.0))
    draws = normal(6, 16, 2, seed=1, dtype=torch.float64)
    field, (alpha, _, rho) = mixture().field(schedule), numbers(schedule, grid)
    lam = [-math.log(r) for r in rho]
    y, predicted, past, last = POINTS / alpha[0], POINTS / alpha[0], [], (1.0, 0)
    carried = y
    for n in range(6):
        m = field(alpha[n] * predicted, torch.full((16,), grid[n], dtype=torch.float64)).x0
        A, h = 1 + (tau if n < 5 else 0) ** 2, lam[n + 1] - lam[n]
        if past:
            y = carried + _mean(lam, [n, *range(n - 1, max(-1, n - 3), -1)], last, [m, *past[:2]])
        past = [m, *past][:2]
        last = (A, n)
        carried = math.exp(-A * h) * y + rho[n + 1] * math.sqrt(1 - math.exp(-2 * (A - 1) * h)) * draws[n]
        used = past[: min(2, 6 - n)]
        predicted = carried + _mean(lam, list(range(n, n - len(used), -1)), last, used)
    again = iter(draws)
    got = sample(field, table, POINTS, lambda x: next(again))
    torch.testing.assert_close(got / alpha[6], predicted, rtol=0, atol=1e-11)


def _mean(lam: list[float], places: list[int], step: tuple[float, int], values: list[Tensor]) -> Tensor:
    """sum_j A int e^(-A (lambda' - l)) L_j(l) dl values[j], over step number n."""
    A, n = step
    weights = by_quadrature([lam[j] for j in places], lam[n], lam[n + 1], lambda u: A * math.exp(-A * (lam[n + 1] - u)))
    return sum((w * value for w, value in zip(weights, values, strict=True)), torch.zeros_like(values[0]))


@pytest.mark.parametrize("psi", list(PSIS))
@pytest.mark.parametrize("order", [1, 2, 3])
def test_er_sde_has_the_integrals_of_its_process(psi: str, order: int) -> None:
    """Weights int phi(rho') phi'(r) / phi(r)^2 L_j(r) dr of the last values in rho, by adaptive quadrature."""
    rows = er_sde(EDM(5.0), grid_of(EDM(5.0)), order=order, psi=psi).rows

    def log_phi(r: float) -> float:
        return math.log(r) + float(PSIS[psi](np.array(r)))

    def density(r: float, end: float) -> float:
        return -math.exp(log_phi(end) - log_phi(r)) * _slope(log_phi, r)

    for n in range(order - 1, 6):
        start, end = RHO[n : n + 2]
        want = by_quadrature(RHO[n : n - order if n >= order else None : -1], start, end, partial(density, end=end))
        assert rows[n].predictions[n - order + 1 :][::-1] == pytest.approx(want, rel=1e-7, abs=1e-9)
        kept = math.exp(float(PSIS[psi](np.array(end)) - PSIS[psi](np.array(start))))
        assert rows[n].states[n] == pytest.approx(kept * end / start, rel=1e-12)
        assert rows[n].noise == pytest.approx(end * math.sqrt(1 - kept**2), abs=1e-12)


def test_the_default_process_of_er_sde_draws_at_high_noise_only() -> None:
    """phi = rho (exp(rho^0.3) + 10): tau^2 = log(psi(rho) / psi(rho / 2)) / log 2 is 0.75 at 80, 0.20 at 10, 0.05 at 1."""
    rho = np.array([80.0, 10.0, 1.0])
    assert np.exp(PSIS["er"](rho)) == pytest.approx(np.exp(rho**0.3) + 10, rel=1e-12)
    assert (PSIS["er"](rho) - PSIS["er"](rho / 2)) / math.log(2) == pytest.approx([0.75, 0.20, 0.05], abs=0.005)


@pytest.mark.parametrize("schedule", [Linear(), VP(), Cosine()], ids=["Linear", "VP", "Cosine"])
def test_integrals_are_exact_over_long_steps(schedule: Schedule) -> None:
    """From rho = 30 to 0.002 in one step, where L_j(t) bends over few of the 10 units of log rho; reference in 200 parts."""
    grid = grid_of(schedule, (80.0, 30.0, 0.002))
    _, _, rho = numbers(schedule, grid)
    row = deis_t(schedule, grid, order=2).rows[1]
    cuts = grid_of(schedule, np.geomspace(30.0, 0.002, 200).tolist())
    x, w = np.polynomial.legendre.leggauss(20)
    want = rho[2] - rho[1]  # all of it on the newest value, but for the part that leans on the one before
    lean = 0.0
    for t, s in pairwise(cuts):  # int L_before d rho = - int L_before' (rho - rho_1) dt + L_before(end) (rho_2 - rho_1)
        u = torch.from_numpy((t + s) / 2 + (s - t) / 2 * x)
        lean -= float(((s - t) / 2 * w * (schedule.rho(u).numpy() - rho[1])).sum()) / (grid[0] - grid[1])
    lean += want * (grid[2] - grid[1]) / (grid[0] - grid[1])
    alpha = schedule.alpha(torch.tensor(grid[2], dtype=torch.float64)).item()
    got = [-w * r / alpha for w, r in zip(row.predictions, rho, strict=False)]
    assert got == pytest.approx([lean, want - lean], rel=1e-10)


def _slope(log_phi: Callable[[float], float], r: float) -> float:
    h = 1e-4 * r  # central differences of order 4: exact to about 1e-11
    near, far = (log_phi(r + k * h) - log_phi(r - k * h) for k in (1, 2))
    return (8 * near - far) / (12 * h)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_families_meet_at_order_one_and_without_noise(schedule: Schedule) -> None:
    grid = grid_of(schedule)
    pairs: list[tuple[Table, Table]] = [
        (er_sde(schedule, grid, order=1, psi="ode"), ddim(schedule, grid)),
        (er_sde(schedule, grid, order=1, eta=0.0), ddim(schedule, grid)),
        (er_sde(schedule, grid, order=1, psi="sde"), SOLVERS["ddpm"].build(schedule, grid)),
        (ddim(schedule, grid, eta=1.0), SOLVERS["ddpm"].build(schedule, grid)),
    ]
    sa, er = (
        sa_solver(schedule, grid, predictor=1, corrector=0, window=(0.0, 9.0)),
        er_sde(schedule, grid, order=1, psi="sde"),
    )
    for a, b in [*((x.rows, y.rows) for x, y in pairs), (sa.rows[:-1], er.rows[:-1])]:
        for mine, its in zip(a, b, strict=True):
            assert (*mine.states, *mine.predictions, mine.noise) == pytest.approx(
                (*its.states, *its.predictions, its.noise), abs=1e-12
            )


# ---- order 3 of ER-SDE ----


def published_er3(schedule: Schedule, grid: Grid, exact: list[Tensor]) -> Tensor:
    """The authors' order 3 at phi = rho, from exact first states: the first difference is not adjusted by the second."""
    _, _, rho = numbers(schedule, grid)
    field, past, y = mixture().field(schedule), [], exact[0]
    for n, (r, s) in enumerate(pairwise(rho)):
        m = field(y, torch.full((len(y),), grid[n], dtype=torch.float64)).x0
        past = [m, *past][:3]
        if n + 1 < len(exact):
            y = exact[n + 1]
            continue
        log, d = math.log(r / s), s - r
        difference, before = (
            (past[0] - past[1]) / (rho[n] - rho[n - 1]),
            (past[1] - past[2]) / (rho[n - 1] - rho[n - 2]),
        )
        second = 2 * (difference - before) / (rho[n] - rho[n - 2])
        y = s / r * y + (1 - s / r) * m + (d + s * log) * difference + (d**2 / 2 + s * ((r - s) - r * log)) * second
    return y


def test_order_three_of_er_sde_is_three_and_that_of_the_authors_is_two() -> None:
    schedule, field = EDM(5.0), mixture().field(EDM(5.0))
    ours, theirs = [], []
    for grid in grids_of(schedule):
        *known, end = known_states("mixture", schedule, grid)
        table = er_sde(schedule, grid, psi="ode")
        ours.append(rmse(sample_from_history(field, table, known), end))
        theirs.append(rmse(published_er3(schedule, grid, known), end))
    assert slope(ours) == pytest.approx(3, abs=0.15)
    assert slope(theirs) == pytest.approx(2, abs=0.15)
    assert theirs[1] > 10 * ours[1]


@pytest.mark.parametrize(("predictor", "corrector", "order"), [(2, 0, 2), (2, 2, 2), (2, 3, 3), (3, 0, 3), (3, 4, 4)])
def test_sa_solver_has_the_order_of_its_corrector(predictor: int, corrector: int, order: int) -> None:
    schedule, field, errors = Linear(), mixture().field(Linear()), []
    for grid in grids_of(schedule):
        *known, end = known_states("mixture", schedule, grid)
        table = sa_solver(schedule, grid, False, predictor, corrector, tau=0.0, lower_order_final=False)
        errors.append(rmse(sample_from_history(field, table, known), end))
    assert slope(errors) == pytest.approx(order, abs=0.15)


# ---- grids and errors ----


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.stochastic])
def test_runs_that_draw_noise_may_start_at_pure_noise(name: str) -> None:
    """A point mass at 0 keeps the variance of its noise, the first draw included."""
    table = SOLVERS[name].build(Linear(), (1.0, 0.8, 0.65, 0.3, 0.2, 0.1))
    assert variance_ratios(table, Linear(), 0.0) == pytest.approx(1, rel=1e-12)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "psi that decreases": (lambda: er_sde(EDM(), grid_of(EDM()), psi=lambda rho: -np.log(rho)), "take noise away"),
    "log psi far out": (lambda: er_sde(Linear(), (1.0, *grid_of(Linear())), psi="log"), "take noise away"),
    "psi unknown": (lambda: er_sde(EDM(), grid_of(EDM()), psi="rho^9"), "choose one of er, ode, sde"),
    "eta": (lambda: er_sde(EDM(), grid_of(EDM()), eta=1.5), "eta in"),
    "order": (lambda: er_sde(EDM(), grid_of(EDM()), order=4), "orders 1 to 3"),
    "tau": (lambda: sa_solver(EDM(), grid_of(EDM()), tau=-1.0), "tau >= 0"),
    "corrector": (lambda: sa_solver(EDM(), grid_of(EDM()), predictor=2, corrector=4), "0 or 2 to 3"),
    "order of deis_t": (lambda: deis_t(EDM(), grid_of(EDM()), order=5), "orders 1 to 4"),
}


@pytest.mark.parametrize("wrong", ERRORS)
def test_impossible_settings_raise_an_error(wrong: str) -> None:
    make, message = ERRORS[wrong]
    with pytest.raises(ValueError, match=message):
        make()
