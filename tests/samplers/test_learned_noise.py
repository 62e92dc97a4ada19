"""The solver with learned noise: what it is without noise, its noise row on any data, its covariance, its table and gradients."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from oracles import gaussian, mixture, noise_at
from tensors import normal, randomised
from torch import Tensor

from midway.samplers import grids
from midway.samplers.learned_noise import LearnedNoise, NoiseRange, states
from midway.samplers.plugin import plugin_table
from midway.samplers.sample import EvaluationCounter, sample, trajectory
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule, Shifted
from midway.samplers.solvers import SOLVERS
from midway.samplers.step_parameters import MeanDirection
from midway.samplers.table import NOISY, Table

SCHEDULES = [Linear(), Cosine(), VP(), EDM(), Shifted(Linear(), 3.0)]
names = [type(s).__name__ for s in SCHEDULES]


def _learned(schedule: Schedule, steps: int = 3, analytic_first: bool = False, limit: float = 0.1) -> LearnedNoise:
    """With noise in every step but the first, and constants of no other solver."""
    learned = randomised(LearnedNoise(schedule, grids.karras(schedule, steps), analytic_first, NoiseRange(limit)))
    learned.begin_with(0.5)
    return learned.double()


def _draws(count: int, shape: tuple[int, ...]) -> list[Tensor]:
    return [normal(*shape, seed=10 + k, dtype=torch.float64) for k in range(count)]


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_without_noise_it_is_the_midpoint_rule_and_amed_with_constants(
    schedule: Schedule, analytic_first: bool
) -> None:
    """Nothing learned: DPM-Solver-2, whose inner node is the geometric midpoint in rho; with r, c, k: AMED-Solver's table."""
    grid = grids.karras(schedule, 4)
    learned = LearnedNoise(schedule, grid, analytic_first)
    table = learned.table()
    assert table.nfe == learned.nfe == 8 - analytic_first
    _same_rows(table, SOLVERS["dpm2"].build(schedule, grid, analytic_first))
    if not analytic_first:
        x = noise_at(schedule, grid[0])
        _assert_midpoint(schedule, grid, x, trajectory(mixture().field(schedule), table, x))
    learned = randomised(learned)
    with torch.no_grad():
        learned.noise.zero_()
    values = zip(*(v.tolist() for v in vars(learned.constants()).values()), strict=True)
    amed = plugin_table(schedule, grid, "none", [MeanDirection(*v) for v in values], analytic_first, NOISY)
    _same_rows(learned.table(), amed)
    assert not learned.table().stochastic


def _same_rows(got: Table, want: Table) -> None:
    for a, b in zip(got.rows, want.rows, strict=True):
        assert [a.time or 0, a.arrival] == pytest.approx([b.time or 0, b.arrival], rel=1e-12)
        for mine, theirs in ((a.states, b.states), (a.predictions, b.predictions)):
            assert mine == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def _assert_midpoint(schedule: Schedule, grid: grids.Grid, x: Tensor, found: list[Tensor]) -> None:
    """y' = y + (rho' - rho) eps at the state an Euler step leads to at sqrt(rho rho')."""
    t = torch.tensor(grid, dtype=torch.float64)
    alpha, rho = schedule.alpha(t), schedule.rho(t)
    field = mixture().field(schedule)

    def slope(y: Tensor, level: Tensor) -> Tensor:
        time = schedule.time_of_rho(level[None])
        return field(schedule.alpha(time) * y, time.expand(len(y))).eps

    for i, state in enumerate(found[:-1]):
        y, middle = state / alpha[i], (rho[i] * rho[i + 1]).sqrt()
        inner = y + (middle - rho[i]) * slope(y, rho[i])
        end = alpha[i + 1] * (y + (rho[i + 1] - rho[i]) * slope(inner, middle))
        torch.testing.assert_close(found[i + 1], end, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_noise_row_leads_from_one_noise_level_to_the_next_whatever_the_data(schedule: Schedule) -> None:
    """x = alpha x0 + sigma eps goes to alpha' x0 + noise of deviation sigma', with rho' = (1 + g) rho: exact for every x0."""
    learned = _learned(schedule, 4)
    table, roots = learned.table(), learned.roots().tolist()
    assert roots[0] == 0
    noisy = [i for i, row in enumerate(table.rows) if row.noise]
    assert noisy == [table.nodes[n] for n in (1, 2, 3)], "one before every step but the first"
    for n, i in enumerate(noisy, 1):
        row = table.rows[i]
        assert row.time is None
        assert not any((*row.states[:-1], *row.predictions)), "it weighs the newest state alone"
        t = torch.tensor([table.grid[n], row.arrival], dtype=torch.float64)
        (alpha, above), (sigma, higher) = schedule.alpha(t).tolist(), schedule.sigma(t).tolist()
        assert higher / above == pytest.approx((1 + roots[n] ** 2) * sigma / alpha, rel=1e-9)
        assert row.states[-1] * alpha == pytest.approx(above, rel=1e-9)
        assert math.hypot(row.states[-1] * sigma, row.noise) == pytest.approx(higher, rel=1e-9)


@pytest.mark.parametrize("analytic_first", [False, True])
def test_the_covariance_on_gaussian_data_is_that_of_independent_steps(analytic_first: bool) -> None:
    """The state is a vector of coefficients of (x, z_1, z_2, ..), found by running the table on unit vectors; the recursion
    var' = A^2 (var + noise^2), with A the gain of a step that is written by hand, has the same end."""
    schedule, std = EDM(), 0.5
    learned = _learned(schedule, 4, analytic_first)
    table, field = learned.table(), gaussian(0.0, std=std).field(schedule)
    unit, calls = torch.eye(4, dtype=torch.float64)[:, :, None], itertools.count(1)
    ends = sample(field, table, unit[0], lambda x: unit[next(calls)])
    start = schedule.sigma(torch.tensor(table.grid[0], dtype=torch.float64)).item()
    got = start**2 * ends[0].item() ** 2 + ends[1:].square().sum().item()
    variance, rho, roots, constants = start**2, learned.rho().tolist(), learned.roots().tolist(), learned.constants()
    for i in range(4):
        r, c, k, g = constants.r[i].item(), constants.c[i].item(), constants.a[i].item(), roots[i] ** 2
        top, end = (1 + g) * rho[i], rho[i + 1]
        variance += top**2 - rho[i] ** 2
        first = 1 / math.sqrt(1 + top**2) if i == 0 and analytic_first else top / (std**2 + top**2)
        s = end**r * top ** (1 - r)
        variance *= (1 + c * (end - top) * (1 + (s - top) * first) * k * s / (std**2 + (k * s) ** 2)) ** 2
    assert got == pytest.approx(variance, rel=1e-9)
    assert ends[1:].abs().min() > 1e-4, "all three draws reach the end"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_table_is_the_differentiable_solver(schedule: Schedule) -> None:
    learned, draws = _learned(schedule, 4, True), _draws(3, (8, 2))
    x, numbers, again = noise_at(schedule, learned.grid[0]), iter(draws), iter(draws)
    counter = EvaluationCounter(mixture().field(schedule))
    found = states(counter, learned, x, lambda x: next(numbers))
    assert counter.evaluations == 7 * 8
    want = trajectory(mixture().field(schedule), learned.table(), x, lambda x: next(again))
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_its_gradients_are_those_of_finite_differences() -> None:
    learned, draws = _learned(VP()), _draws(2, (8, 2))
    x = noise_at(VP(), learned.grid[0])

    def end() -> Tensor:
        numbers = iter(draws)
        return states(mixture().field(VP()), learned, x, lambda x: next(numbers))[-1].square().mean()

    end().backward()
    for parameter in learned.parameters():
        assert parameter.grad is not None
        for place in itertools.product(*map(range, parameter.shape)):
            values = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    parameter[place] += step
                    values.append(end().item())
                    parameter[place] -= step
            slope = (values[0] - values[1]) / 2e-6
            assert parameter.grad[place].item() == pytest.approx(slope, rel=1e-4, abs=1e-7), place


def test_it_draws_the_noise_it_is_given_and_is_saved_with_it(tmp_path: Path) -> None:
    learned = _learned(VP())
    table, field = learned.table(), mixture().field(VP())
    x = noise_at(VP(), table.grid[0])
    table.save(tmp_path / "solver.safetensors")
    read = Table.load(tmp_path / "solver.safetensors", VP())

    def solve(solver: Table, skip: int = 0) -> Tensor:
        draws = iter(_draws(4, (8, 2))[skip:])
        return sample(field, solver, x, lambda x: next(draws))

    first, second, other = solve(table), solve(read), solve(table, 2)
    assert torch.equal(first, second)
    assert (first - other).abs().max() > 1e-3
    with pytest.raises(ValueError, match="draws noise"):
        sample(field, table, x)
    with pytest.raises(ValueError, match="no learned solver but adasde"):
        Table("table", table.grid, table.nodes, table.rows, {}, table.schedule)


def test_grids_that_it_cannot_use() -> None:
    grid = grids.karras(EDM(), 3)
    with pytest.raises(ValueError, match="falling grid"):
        LearnedNoise(EDM(), grids.reversed_grid(grid))
    with pytest.raises(ValueError, match="infinite at the grid's start"):
        LearnedNoise(Linear(), (1.0, 0.5, 0.1))
    with pytest.raises(ValueError, match="needs sigma > 0"):
        LearnedNoise(Linear(), (0.9, 0.5, 0.0))
    with pytest.raises(ValueError, match="take fewer steps, or a smaller limit"):
        LearnedNoise(EDM(), grids.karras(EDM(), 400), ranges=NoiseRange(0.5))
    with pytest.raises(ValueError, match="limit must be in"):
        NoiseRange(-0.1)
    learned = LearnedNoise(EDM(), grid)
    with torch.no_grad():
        learned.raw[0, 0] = math.nan
    with pytest.raises(ValueError, match="not finite"):
        learned.table()
