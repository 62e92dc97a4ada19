"""The registry and the first solvers: AMED's order, counted evaluations, budgets, nodes, variance of solvers that draw noise.

Orders of all solvers are in test_orders.py, identities and exactness in test_solver_identities.py."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracles import convergence, mixture, times_of, uneven_grid
from tensors import normal
from torch import Tensor

from midway.samplers import grids
from midway.samplers.plugin import plugin_table
from midway.samplers.recorder import Recorder
from midway.samplers.rows import Row
from midway.samplers.sample import EvaluationCounter, sample, trajectory
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, ddim, dpmpp2m_sde, euler, steps_for
from midway.samplers.step_parameters import MeanDirection
from midway.samplers.table import Table
from midway.samplers.table_facts import variance_ratios

SCHEDULES = [Linear(), Cosine(), VP(), EDM(sigma_max=5.0)]
names = [type(s).__name__ for s in SCHEDULES]
POINTS = normal(16, 2, dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("name", ["euler", "ddim", "heun", "dpm2", "dpmpp2m"])
def test_order_over_a_wide_range_of_noise_on_uneven_steps(name: str, schedule: Schedule) -> None:
    """By least squares over three doublings."""
    start, end = times_of(schedule, 3.0, 0.1)

    def build(steps: int) -> Table:
        return SOLVERS[name].build(schedule, uneven_grid(start, end, steps))

    order, _ = convergence(mixture().field(schedule), schedule, build, (64, 128, 256, 512))
    assert order == pytest.approx(SOLVERS[name].order, abs=0.15)


def test_a_wrong_coefficient_breaks_the_order() -> None:
    """One weight of each step off by 1 %: the test above can fail."""
    start, end = times_of(Cosine(), 3.0, 0.1)

    def build(steps: int) -> Table:
        table = SOLVERS["dpm2"].build(Cosine(), uneven_grid(start, end, steps))
        rows = [replace(r, predictions=(*r.predictions[:-1], 1.01 * r.predictions[-1])) for r in table.rows]
        return replace(table, rows=tuple(rows), schedule="")  # of a known schedule, no such table can be made

    order, _ = convergence(mixture().field(Cosine()), Cosine(), build, (128, 256))
    assert order < 0.5


@pytest.mark.parametrize(("step", "order"), [(MeanDirection(r=0.3), 1), (MeanDirection(c=0.97), 0)])
def test_other_constants_lose_the_order(step: MeanDirection, order: int) -> None:
    """r != 1/2 is of order 1, c != 1 does not converge (module docstring of plugin.py)."""
    schedule = VP()
    start, end = times_of(schedule, 3.0, 0.1)

    def build(steps: int) -> Table:
        return plugin_table(schedule, uneven_grid(start, end, steps), "none", [step] * steps)

    found, _ = convergence(mixture().field(schedule), schedule, build, (128, 256))
    assert found == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_euler_is_ddim_where_the_schedule_is_straight(schedule: Schedule) -> None:
    grid, field = uneven_grid(*times_of(schedule, 3.0, 0.1), 6), mixture().field(schedule)
    difference = (
        (sample(field, euler(schedule, grid), POINTS) - sample(field, ddim(schedule, grid), POINTS)).abs().max()
    )
    if isinstance(schedule, Linear | EDM):
        assert difference < 1e-12
    else:
        assert difference > 1e-3


def test_the_registry_has_the_cost_of_a_table_and_its_valid_starts() -> None:
    for name, solver in SOLVERS.items():
        grid = (1.0, 0.9, 0.5, 0.3, 0.1) if solver.pure_noise else (0.9, 0.8, 0.5, 0.3, 0.1)
        table = solver.build(Linear(), grid)
        assert table.solver == name
        assert table.nfe == 4 * solver.evaluations
        assert table.stochastic == solver.stochastic
        if solver.history_order is not None:
            assert solver.order == min(2, solver.history_order)


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("name", list(SOLVERS))
def test_counted_evaluations_are_the_tables(name: str, analytic_first: bool) -> None:
    schedule = Cosine()
    nfe = 12 - analytic_first  # 12 is a number of whole steps for 1, 2, 3 and 4 evaluations a step
    grid = grids.uniform(schedule, steps_for(SOLVERS[name].evaluations, nfe, analytic_first))
    table = SOLVERS[name].build(schedule, grid, analytic_first)
    counter = EvaluationCounter(mixture().field(schedule))
    sample(counter, table, POINTS[:5], torch.randn_like if table.stochastic else None)
    assert counter.evaluations == 5 * nfe == 5 * table.nfe


def test_budgets_that_cannot_be_reached_name_the_neighbours() -> None:
    with pytest.raises(ValueError, match="use 4 or 6"):
        steps_for(2, 5)
    assert steps_for(2, 5, analytic_first=True) == 3
    with pytest.raises(ValueError, match="use 2"):
        steps_for(2, 0)
    with pytest.raises(ValueError, match="use 4 or 8"):
        steps_for(4, 6)
    with pytest.raises(ValueError, match="use 2 or 5"):
        steps_for(3, 4, analytic_first=True)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_analytic_first_step_is_the_direction_of_unit_variance_data(schedule: Schedule) -> None:
    start, end = times_of(schedule, 3.0, 0.1)
    recorder = Recorder("probe", schedule, (start, end))
    symbols = recorder.analytic(start)
    alpha, sigma = recorder.alpha(start), recorder.sigma(start)
    eps, x0 = symbols.eps.weights["x", 0], symbols.x0.weights["x", 0]
    assert eps == pytest.approx(1 / math.hypot(alpha, sigma), rel=1e-12)
    assert alpha * x0 + sigma * eps == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if solver.stochastic])
def test_solvers_that_draw_noise_reach_the_variance_of_a_gaussian_at_their_weak_order(
    name: str, schedule: Schedule
) -> None:
    """Where they draw: er_sde's own process draws little here, sa_solver's starts and stops at the steps of its window."""
    options = {"psi": "sde"} if name.startswith("er_sde") else {"window": (0, 9)} if name.startswith("sa_") else {}
    errors, (start, end) = [], times_of(schedule, 1.6, 0.6)
    for steps in (64, 128):
        table = SOLVERS[name].build(schedule, uneven_grid(start, end, steps), **options)
        errors.append(abs(variance_ratios(table, schedule, 0.5)[-1] - 1))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(SOLVERS[name].order, abs=0.15)
    assert errors[1] < 0.01


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("build", [ddim, dpmpp2m_sde])
def test_noise_is_added_as_much_as_is_taken_away(build: Callable[..., Table], eta: float, schedule: Schedule) -> None:
    """A point mass at 0 has the variance sigma^2 at every time, after any number of steps."""
    grid = uneven_grid(*times_of(schedule, 3.0, 0.1), 6)
    table = build(schedule, grid, eta=eta)
    assert table.stochastic
    assert variance_ratios(table, schedule, 0.0) == pytest.approx(1, rel=1e-10)
    alpha = schedule.alpha(torch.tensor(grid, dtype=torch.float64)).tolist()
    for i, row in enumerate(table.rows):  # and the mean of a point mass at 1 is alpha
        assert row.states[-1] * alpha[i] + sum(row.predictions) == pytest.approx(alpha[i + 1], rel=1e-10)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_ancestral_euler_in_rho_is_ddim_with_the_same_eta(eta: float) -> None:
    """Euler's method in y = x / alpha down to rho_down, noise back up to rho_s, rho_s^2 = rho_down^2 + rho_up^2."""
    schedule = VP()
    grid = uneven_grid(*times_of(schedule, 3.0, 0.1), 6)
    times = torch.tensor(grid, dtype=torch.float64)
    alpha, rho = schedule.alpha(times).tolist(), schedule.rho(times).tolist()
    field, draws = mixture().field(schedule), iter(torch.randn(6, 16, 2, dtype=torch.float64).unbind())
    fixed = [next(draws) for _ in range(6)]
    y = POINTS / alpha[0]
    for i in range(6):
        eps = field(alpha[i] * y, times[i].expand(16)).eps
        up = eta * rho[i + 1] * math.sqrt(rho[i] ** 2 - rho[i + 1] ** 2) / rho[i]
        down = math.sqrt(rho[i + 1] ** 2 - up**2)
        y = y + (down - rho[i]) * eps + up * fixed[i]
    again = iter(fixed)
    got = sample(field, ddim(schedule, grid, eta=eta), POINTS, lambda x: next(again))
    torch.testing.assert_close(got, alpha[-1] * y, rtol=0, atol=1e-12)


def test_noise_must_be_given_to_a_table_that_draws_it() -> None:
    with pytest.raises(ValueError, match="noise source"):
        sample(mixture().field(Cosine()), ddim(Cosine(), (0.9, 0.5), eta=0.5), POINTS)
    with pytest.raises(ValueError, match="eta must be in"):
        ddim(Cosine(), (0.9, 0.5), eta=2)


@pytest.mark.parametrize("name", [name for name, solver in SOLVERS.items() if not solver.stochastic])
def test_a_trajectory_holds_the_nodes(name: str) -> None:
    schedule = Cosine()
    grid = grids.karras(schedule, 5)
    field = mixture().field(schedule)
    states = trajectory(field, SOLVERS[name].build(schedule, grid), POINTS)
    assert len(states) == 6
    assert torch.equal(states[-1], sample(field, SOLVERS[name].build(schedule, grid), POINTS))
    if SOLVERS[name].history_order is None:  # one-step methods: the k-th node is the end of the first k steps
        torch.testing.assert_close(
            states[2], sample(field, SOLVERS[name].build(schedule, grid[:3]), POINTS), rtol=0, atol=1e-12
        )


def test_tables_survive_the_disk(tmp_path) -> None:
    table = ddim(Cosine(), grids.karras(Cosine(), 4), analytic_first=True, eta=0.3)
    table.save(tmp_path / "table.safetensors")
    assert Table.load(tmp_path / "table.safetensors") == table
    assert [p.name for p in tmp_path.iterdir()] == ["table.safetensors"]


def test_rows_that_do_not_fit_raise_an_error() -> None:
    with pytest.raises(ValueError, match="needs 1 and 1"):
        Table("bad", (1.0, 0.5), (0, 1), (Row(1.0, 0.5, (1.0, 0.0), (1.0,)),))
    with pytest.raises(ValueError, match="not finite"):
        Table("bad", (1.0, 0.5), (0, 1), (Row(1.0, 0.5, (math.inf,), (1.0,)),))


@pytest.mark.parametrize("nfe", [3, 5, 9])
def test_edm_heun_of_commands_ends_at_sigma_0(nfe: int) -> None:
    """On N nodes of their grid and sigma = 0: 2 N - 1 evaluations, and the state of algorithm 1 there."""
    schedule, entry = EDM(), SOLVERS["edm_heun"]
    steps = entry.steps(nfe)
    table = entry.on(schedule, grids.karras(schedule, steps))
    assert (table.nfe, table.grid) == (nfe, (*grids.karras(schedule, steps), 0.0))
    assert entry.steps(nfe - 1, analytic_first=True) == steps
    with pytest.raises(ValueError, match=r"4 network evaluations.* the last of 1: use 3 or 5"):
        entry.steps(4)
    assert SOLVERS["heun"].steps(4) == 2  # others end where the grid does
    assert SOLVERS["heun"].on(schedule, grids.karras(schedule, 2)).grid == grids.karras(schedule, 2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_edm_heun_is_algorithm_1_of_edm(schedule: Schedule) -> None:
    """In y and rho, written out: Euler, then the trapezoid, but not after the last step, which ends at 0. 2 N - 1 evaluations."""
    grid = grids.to_data(uneven_grid(*times_of(schedule, 3.0, 0.1), 4))
    times = torch.tensor(grid, dtype=torch.float64)
    alpha, rho, field = schedule.alpha(times), schedule.rho(times), mixture().field(schedule)

    def slope(y: Tensor, i: int) -> Tensor:
        return (y - field(alpha[i] * y, times[i].expand(16)).x0) / rho[i]

    y = POINTS / alpha[0]
    for i in range(5):
        d = slope(y, i)
        euler_y = y + (rho[i + 1] - rho[i]) * d
        y = euler_y if i == 4 else y + (rho[i + 1] - rho[i]) * (d + slope(euler_y, i + 1)) / 2
    table = SOLVERS["edm_heun"].build(schedule, grid)
    assert table.nfe == 2 * 5 - 1
    torch.testing.assert_close(sample(field, table, POINTS), y, rtol=0, atol=1e-12)
    if isinstance(schedule, EDM):
        same = SOLVERS["heun"].build(schedule, grid[:-1])
        for a, b in zip(same.rows, SOLVERS["edm_heun"].build(schedule, grid[:-1]).rows, strict=True):
            assert (*a.states, *a.predictions) == pytest.approx((*b.states, *b.predictions), abs=1e-12)
