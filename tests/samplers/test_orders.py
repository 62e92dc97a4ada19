"""Measured convergence of every solver on grids with alternating 1:3 steps, against exact solutions.

Three questions: how fast does a table converge as it is built; how fast does a multistep solver converge from exact history,
with no step of lower order; and does encoding then decoding come back at the solver's order.
"""

import math
from functools import cache

import pytest
import torch
from oracles import Mixture, exact_solution, gaussian, mixture, noise_at, rmse, times_of, uneven_grid
from torch import Tensor

from midway.samplers.fused import combine
from midway.samplers.grids import Grid, karras, reversed_grid
from midway.samplers.prediction import Field
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Linear, Schedule
from midway.samplers.solvers import SOLVERS, dpmpp
from midway.samplers.table import Table

SCHEDULES = [VP(), EDM(sigma_max=5.0), Linear()]
names = [type(s).__name__ for s in SCHEDULES]
DETERMINISTIC = [name for name, solver in SOLVERS.items() if not solver.stochastic]
COUNTS = (64, 128)
ONE_STEP = [name for name in DETERMINISTIC if SOLVERS[name].history_order is None]
MULTISTEP = [name for name in DETERMINISTIC if SOLVERS[name].history_order is not None]


def closed_form(data: Mixture, schedule: Schedule, x: Tensor, start: float, end: float) -> Tensor:
    """y_s = m + sqrt((s^2 + rho_s^2) / (s^2 + rho_t^2)) (y_t - m) for one component with mean m and deviation s."""
    times = torch.tensor([start, end], dtype=torch.float64)
    alpha, rho = schedule.alpha(times), schedule.rho(times)
    spread = (data.stds.square() + rho.square()).sqrt()
    return alpha[1] * (data.means + spread[1] / spread[0] * (x / alpha[0] - data.means))


DATA = {"gaussian": (gaussian(0.4, -0.7, std=0.5), closed_form), "mixture": (mixture(), exact_solution)}


def slope(errors: list[float]) -> float:
    """Order of convergence between the two step counts."""
    return math.log(errors[0] / errors[1]) / math.log(COUNTS[1] / COUNTS[0])


def build(name: str, schedule: Schedule, grid: Grid, history: bool = False) -> Table:
    """`history`: without the low-order steps at the end, where the solver has them."""
    if history and name.startswith(("dpmpp", "unipc")):
        return SOLVERS[name].build(schedule, grid, lower_order_final=False)
    return SOLVERS[name].build(schedule, grid)


def sample_from_history(field: Field, table: Table, known: list[Tensor]) -> Tensor:
    """Run a one-row-a-step table whose first states, and the predictions there, are given."""
    states = list(known)
    predictions: list[Tensor] = []
    for i, row in enumerate(table.rows):
        assert row.time is not None
        predictions.append(field(states[i], torch.full((len(states[i]),), row.time, dtype=torch.float64)).x0)
        if i + 1 >= len(known):
            states.append(combine((*row.states, *row.predictions), (*states, *predictions)))
    return states[-1]


@cache
def known_states(kind: str, schedule: Schedule, grid: Grid) -> tuple[Tensor, ...]:
    """The exact states at the first four nodes and, last, at the end."""
    data, exact = DATA[kind]
    x = noise_at(schedule, grid[0], 16)
    return (x, *(exact(data, schedule, x, grid[0], t) for t in (*grid[1:4], grid[-1])))


def grids_of(schedule: Schedule) -> list[Grid]:
    start, end = times_of(schedule, 1.6, 0.6)
    return [uneven_grid(start, end, steps) for steps in COUNTS]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_solvers_have_their_order(name: str, kind: str, schedule: Schedule) -> None:
    data, errors = DATA[kind][0], []
    for grid in grids_of(schedule):
        x, *_, end = known_states(kind, schedule, grid)
        errors.append(rmse(sample(data.field(schedule), build(name, schedule, grid), x), end))
    straight = (name, kind) == ("midpoint", "gaussian") and not isinstance(schedule, VP)
    order = (
        3 if straight else SOLVERS[name].order
    )  # midpoint's leading error vanishes for a Gaussian on straight schedules
    assert slope(errors) == pytest.approx(order, abs=0.15)


def _history_errors(name: str, schedule: Schedule, kind: str = "mixture") -> list[float]:
    errors = []
    for grid in grids_of(schedule):
        *known, end = known_states(kind, schedule, grid)
        table = build(name, schedule, grid, history=True)
        errors.append(rmse(sample_from_history(DATA[kind][0].field(schedule), table, known), end))
    return errors


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("name", MULTISTEP)
def test_multistep_solvers_have_their_order_from_exact_history(name: str, schedule: Schedule) -> None:
    """On the mixture: on a Gaussian the leading errors of some change sign within the range, and no slope is clean."""
    assert slope(_history_errors(name, schedule)) == pytest.approx(SOLVERS[name].history_order, abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("name", [n for n in MULTISTEP if SOLVERS[n].history_order != 1])
def test_first_and_last_steps_of_lower_order_leave_an_error_of_order_two(name: str, schedule: Schedule) -> None:
    """Their own error, isolated: the run as built minus the run from exact history. So `order` is 2 for all of them."""
    field, errors = DATA["mixture"][0].field(schedule), []
    for grid in grids_of(schedule):
        *known, _ = known_states("mixture", schedule, grid)
        exact_start = sample_from_history(field, build(name, schedule, grid, history=True), known)
        errors.append(rmse(sample(field, build(name, schedule, grid), known[0]), exact_start))
    assert slope(errors) == pytest.approx(2, abs=0.3)  # between two and three: the steps themselves shrink unevenly
    assert SOLVERS[name].order == 2


def test_the_published_third_order_dpm_solver_is_of_order_two_and_twice_the_curvature_of_order_three() -> None:
    schedule, field = Linear(), DATA["mixture"][0].field(Linear())
    published, corrected = [], []
    for grid in grids_of(schedule):
        *known, end = known_states("mixture", schedule, grid)
        for curvature, errors in ((1.0, published), (2.0, corrected)):
            table = dpmpp(schedule, grid, order=3, lower_order_final=False, curvature=curvature)
            errors.append(rmse(sample_from_history(field, table, known), end))
    assert slope(published) == pytest.approx(2, abs=0.15)
    assert slope(corrected) == pytest.approx(3, abs=0.15)


@pytest.mark.parametrize("order", [2, 3, 4])
def test_ipndm_needs_smooth_steps_for_order_two(order: int) -> None:
    """Weights of equal steps: order 1 on alternating steps (the registry's), 2 where neighbouring steps become alike."""
    schedule, field, errors = EDM(5.0), DATA["mixture"][0].field(EDM(5.0)), []
    for steps in COUNTS:
        grid = karras(schedule, steps, rho_max=1.6, rho_min=0.6)
        *known, end = known_states("mixture", schedule, grid)
        errors.append(rmse(sample_from_history(field, build(f"ipndm{order}", schedule, grid), known), end))
    assert slope(errors) == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_encoding_finds_the_exact_noise_and_decoding_comes_back_at_the_solvers_order(name: str) -> None:
    """The same builder on the rising grid, then on the falling one."""
    schedule, field, encoded_errors, errors = Linear(), mixture().field(Linear()), [], []
    for grid in grids_of(schedule):
        exact, *_, start = known_states("mixture", schedule, grid)  # start: a point at the data's end
        encoded = sample(field, build(name, schedule, reversed_grid(grid)), start)
        encoded_errors.append(rmse(encoded, exact))
        errors.append(rmse(sample(field, build(name, schedule, grid), encoded), start))
    assert min(slope(encoded_errors), slope(errors)) > SOLVERS[name].order - 0.15
    assert errors[1] < 2e-2
