"""Solvers against exact solutions: order on uneven grids, identities, exactness, counted evaluations."""

import math

import numpy as np
import pytest
import torch
from oracles import exact_solution, mixture, uneven_grid
from torch import Tensor

from midway.samplers import grids
from midway.samplers.prediction import Prediction, expand
from midway.samplers.sample import EvaluationCounter, sample, trajectory
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, MeanDirection, amed, ddim, dpm2, euler, steps_for
from midway.samplers.table import Recorder, Row, Table

SCHEDULES = [Linear(), Cosine(), VP(), EDM(sigma_max=5.0)]
names = [type(s).__name__ for s in SCHEDULES]


def _times(schedule: Schedule, rho_start: float = 3.0, rho_end: float = 0.1) -> list[float]:
    return schedule.time_of_rho(torch.tensor([rho_start, rho_end], dtype=torch.float64)).tolist()


def _points(count: int = 16) -> Tensor:
    return torch.randn(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def _build(name: str, schedule: Schedule, grid: tuple[float, ...]) -> Table:
    if name == "amed":
        return amed(schedule, grid, (MeanDirection(),) * (len(grid) - 1))
    return SOLVERS[name].build(schedule, grid)


def _order(name: str, schedule: Schedule) -> float:
    """Slope of log error on log steps over the last three doublings."""
    data, (start, end) = mixture(), _times(schedule)
    scale = torch.hypot(*(f(torch.tensor(start, dtype=torch.float64)) for f in (schedule.alpha, schedule.sigma)))
    x = _points() * scale
    exact = exact_solution(data, schedule, x, start, end)
    counts = [64, 128, 256, 512]
    errors = []
    for steps in counts:
        table = _build(name, schedule, uneven_grid(start, end, steps))
        errors.append((sample(data.field(schedule), table, x) - exact).square().mean().sqrt().item())
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("name", [*SOLVERS, "amed"])
def test_order_on_a_grid_of_uneven_steps(name: str, schedule: Schedule) -> None:
    nominal = 2 if name == "amed" else SOLVERS[name].order
    assert _order(name, schedule) == pytest.approx(nominal, abs=0.15)


def test_the_order_test_sees_a_wrong_coefficient() -> None:
    """One coefficient off by 1 % must break the order: the test above can fail."""
    schedule = Cosine()
    data, (start, end) = mixture(), _times(schedule)
    x = _points()
    exact = exact_solution(data, schedule, x, start, end)
    errors = []
    for steps in (128, 256):
        table = dpm2(schedule, uneven_grid(start, end, steps))
        rows = [
            Row(r.time, r.arrival, r.states, (*r.predictions[:-1], r.predictions[-1] * 1.01), r.noise)
            for r in table.rows
        ]
        broken = Table(table.solver, table.grid, table.nodes, tuple(rows))
        errors.append((sample(data.field(schedule), broken, x) - exact).square().mean().sqrt().item())
    assert math.log2(errors[0] / errors[1]) < 0.5


def test_other_constants_lose_the_order() -> None:
    """r != 1/2 is of order 1, c != 1 does not converge (formula note of the AMED builder)."""
    schedule = VP()
    data, (start, end) = mixture(), _times(schedule)
    x = _points()
    exact = exact_solution(data, schedule, x, start, end)

    def slope(step: MeanDirection) -> float:
        errors = []
        for steps in (256, 512):
            table = amed(schedule, uneven_grid(start, end, steps), (step,) * steps)
            errors.append((sample(data.field(schedule), table, x) - exact).square().mean().sqrt().item())
        return math.log2(errors[0] / errors[1])

    assert slope(MeanDirection(r=0.3)) == pytest.approx(1, abs=0.15)
    assert slope(MeanDirection(c=0.97)) == pytest.approx(0, abs=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_euler_is_ddim_where_the_schedule_is_straight(schedule: Schedule) -> None:
    data, (start, end) = mixture(), _times(schedule)
    x, grid = _points(), uneven_grid(start, end, 6)
    field = data.field(schedule)
    difference = (sample(field, euler(schedule, grid), x) - sample(field, ddim(schedule, grid), x)).abs().max()
    if isinstance(schedule, Linear | EDM):
        assert difference < 1e-12
    else:
        assert difference > 1e-3


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("name", ["ddim", "dpmpp2m", "dpm2"])
def test_a_point_mass_is_solved_in_one_step(name: str, schedule: Schedule) -> None:
    point = torch.tensor([0.3, -0.7], dtype=torch.float64)

    def field(x: Tensor, t: Tensor) -> Prediction:
        x0 = point.expand_as(x)
        return Prediction(x0, (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x))

    start, end = _times(schedule)
    x = _points()
    times = torch.tensor([start, end], dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    exact = alpha[1] * point + sigma[1] / sigma[0] * (x - alpha[0] * point)
    got = sample(field, SOLVERS[name].build(schedule, (start, end)), x)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["ddim", "dpm2", "dpmpp2m"])
def test_exponential_solvers_do_not_see_the_schedule(name: str) -> None:
    """The same rho grid and the same data give the same y = x / alpha on every schedule."""
    rho = torch.logspace(math.log10(3), -1, 7, dtype=torch.float64)
    y = 3 * _points()
    ends = []
    for schedule in SCHEDULES:
        grid = tuple(schedule.time_of_rho(rho).tolist())
        alpha = schedule.alpha(torch.tensor([grid[0], grid[-1]], dtype=torch.float64))
        table = SOLVERS[name].build(schedule, grid)
        ends.append(sample(mixture().field(schedule), table, alpha[0] * y) / alpha[1])
    for other in ends[1:]:
        torch.testing.assert_close(other, ends[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_dpm2_is_amed_at_one_half(schedule: Schedule) -> None:
    grid = grids.karras(schedule, 4, rho_max=5.0)
    assert dpm2(schedule, grid).rows == amed(schedule, grid, (MeanDirection(0.5, 1.0, 1.0),) * 4).rows


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("name", [*SOLVERS, "amed"])
def test_counted_evaluations_are_the_tables(name: str, analytic_first: bool) -> None:
    schedule = Cosine()
    per_step = 2 if name == "amed" else SOLVERS[name].evaluations
    nfe = 7 if analytic_first and per_step == 2 else 8
    grid = grids.uniform(schedule, steps_for(per_step, nfe, analytic_first))
    if name == "amed":
        table = amed(schedule, grid, (MeanDirection(),) * (len(grid) - 1), analytic_first)
    else:
        table = SOLVERS[name].build(schedule, grid, analytic_first)
    counter = EvaluationCounter(mixture().field(schedule))
    sample(counter, table, _points(5))
    assert counter.evaluations == 5 * nfe == 5 * table.nfe


def test_budgets_that_cannot_be_reached_name_the_neighbours() -> None:
    with pytest.raises(ValueError, match="use 4 or 6"):
        steps_for(2, 5)
    assert steps_for(2, 5, analytic_first=True) == 3
    with pytest.raises(ValueError, match="use 2"):
        steps_for(2, 0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_analytic_first_step_is_the_direction_of_unit_variance_data(schedule: Schedule) -> None:
    start, end = _times(schedule)
    recorder = Recorder("probe", schedule, (start, end))
    symbols = recorder.analytic(start)
    alpha, sigma = recorder.alpha(start), recorder.sigma(start)
    eps, x0 = symbols.eps.states[0], symbols.x0.states[0]
    assert eps == pytest.approx(1 / math.hypot(alpha, sigma), rel=1e-12)
    assert alpha * x0 + sigma * eps == pytest.approx(1, rel=1e-12)


def test_the_analytic_first_step_is_exact_at_pure_noise() -> None:
    """At t = 1 of the linear schedule the state is noise: v = x for zero-mean data, no evaluation needed."""
    table = euler(Linear(), (1.0, 0.9), analytic_first=True)
    assert table.nfe == 0
    x = _points()
    torch.testing.assert_close(sample(mixture().field(Linear()), table, x), 0.9 * x, rtol=0, atol=1e-12)


def test_ancestral_sampling_of_a_gaussian_keeps_its_variance() -> None:
    """DDIM at eta = 1 with the exact denoiser of N(0, 1): the state's variance stays alpha^2 + sigma^2 = 1."""
    schedule = Cosine()

    def field(x: Tensor, t: Tensor) -> Prediction:
        alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
        return Prediction(alpha * x, sigma * x)

    generator = torch.Generator().manual_seed(0)
    noise = lambda x: torch.randn(x.shape, dtype=x.dtype, generator=generator)  # noqa: E731
    table = ddim(schedule, grids.uniform(schedule, 200), eta=1.0)
    end = sample(field, table, noise(torch.empty(4000, 2, dtype=torch.float64)), noise)
    assert end.var().item() == pytest.approx(1, abs=0.05)


def test_noise_must_be_given_to_a_table_that_draws_it() -> None:
    with pytest.raises(ValueError, match="noise source"):
        sample(mixture().field(Cosine()), ddim(Cosine(), (0.9, 0.5), eta=0.5), _points())
    with pytest.raises(ValueError, match="eta must be in"):
        ddim(Cosine(), (0.9, 0.5), eta=2)


@pytest.mark.parametrize("name", list(SOLVERS))
def test_a_trajectory_holds_the_nodes(name: str) -> None:
    schedule = Cosine()
    grid = grids.karras(schedule, 5)
    field = mixture().field(schedule)
    states = trajectory(field, SOLVERS[name].build(schedule, grid), _points())
    assert len(states) == 6
    assert torch.equal(states[-1], sample(field, SOLVERS[name].build(schedule, grid), _points()))
    if name in ("heun", "dpm2", "euler", "ddim"):  # one-step methods: the k-th node is the end of the first k steps
        torch.testing.assert_close(
            states[2], sample(field, SOLVERS[name].build(schedule, grid[:3]), _points()), rtol=0, atol=1e-12
        )


def test_tables_survive_the_disk(tmp_path) -> None:
    table = ddim(Cosine(), grids.karras(Cosine(), 4), analytic_first=True, eta=0.3)
    table.save(tmp_path / "table.safetensors")
    assert Table.load(tmp_path / "table.safetensors") == table
    assert [p.name for p in tmp_path.iterdir()] == ["table.safetensors"]


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="needs 1 and 1"):
        Table("bad", (1.0, 0.5), (0, 1), (Row(1.0, 0.5, (1.0, 0.0), (1.0,)),))
    with pytest.raises(ValueError, match="not finite"):
        Table("bad", (1.0, 0.5), (0, 1), (Row(1.0, 0.5, (math.inf,), (1.0,)),))
    with pytest.raises(ValueError, match="infinite at the grid's start"):
        dpm2(Linear(), (1.0, 0.5))
