"""AMED-Plugin: what it equals, its order, its two forms, and what it raises for."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from oracles import Mixture, convergence, mixture, noise_at, point_mass, times_of, uneven_grid
from torch import Tensor

from midway.samplers import grids
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.exponential import begin_in_rho
from midway.samplers.plugin import BASES, plugin_table
from midway.samplers.prediction import Prediction
from midway.samplers.sample import EvaluationCounter, sample, trajectory
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS
from midway.samplers.step_parameters import AMEDConfig, Constants, MeanDirection, StepParameters
from midway.samplers.table import Table

SCHEDULES = [Linear(), Cosine(), VP(), EDM()]
names = [type(s).__name__ for s in SCHEDULES]
ON_HALVES = {"euler": "ddim", "ipndm3": "ipndm3", "ipndm4": "ipndm4", "dpmpp2m": "dpmpp2m", "dpmpp3m": "dpmpp3m"}
"""The solver that each base is on the grid with its inner nodes added."""
CONFIG = AMEDConfig(scale_dir=0.2, scale_time=0.1)


def _data(dtype: torch.dtype) -> Mixture:
    data = mixture()
    return Mixture(data.weights.to(dtype), data.means.to(dtype), data.stds.to(dtype))


def _rule(steps: int) -> Constants:
    rule = Constants(steps, CONFIG).double()
    with torch.no_grad():
        rule.raw.copy_(0.1 * torch.randn(steps, 3, generator=torch.Generator().manual_seed(1)))
    return rule


def _rho(schedule: Schedule, t: float) -> float:
    return schedule.rho(torch.tensor(t, dtype=torch.float64)).item()


def _with_inner_nodes(schedule: Schedule, grid: grids.Grid, r: list[float]) -> grids.Grid:
    """Every step cut at rho_s^r rho_t^(1-r)."""
    times = [grid[0]]
    for t, s, position in zip(grid[:-1], grid[1:], r, strict=True):
        rho = torch.tensor(_rho(schedule, s) ** position * _rho(schedule, t) ** (1 - position), dtype=torch.float64)
        times += [schedule.time_of_rho(rho).item(), s]
    return tuple(times)


# ---- identities ----


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_without_a_base_it_is_amed_solver(schedule: Schedule, analytic_first: bool) -> None:
    grid, constants = grids.logsnr(schedule, 4), _rule(4).values()
    x, field = noise_at(schedule, grid[0]), mixture().field(schedule)
    record = begin_in_rho("amed", schedule, grid)  # arXiv 2312.00094, eq. 9
    for (t, s), step in zip(pairwise(grid), constants, strict=True):
        now, rho_t, rho_s = record.first(t, analytic_first), record.rho(t), record.rho(s)
        rho_m, y = rho_s**step.r * rho_t ** (1 - step.r), now.x / record.alpha(t)
        inner = record.time_of_rho(step.a * rho_m)
        record.advance(record.alpha(inner) * (y + (rho_m - rho_t) * now.eps), inner, node=False)
        record.advance(record.alpha(s) * (y + step.c * (rho_s - rho_t) * record.evaluate(inner).eps), s)
    ours = trajectory(field, plugin_table(schedule, grid, "none", constants, analytic_first), x)
    for got, want in zip(ours, trajectory(field, record.table(), x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("base", ON_HALVES)
def test_with_unit_scales_it_is_its_base_on_the_grid_with_the_inner_nodes(
    base: str, schedule: Schedule, analytic_first: bool
) -> None:
    """Whatever r: so both evaluations of a step are in the history, at their own rho, in the right order."""
    grid, r = grids.karras(schedule, 5), [0.5, 0.2, 0.7, 0.4, 0.6]
    table = plugin_table(schedule, grid, base, [MeanDirection(position) for position in r], analytic_first)
    fine = SOLVERS[ON_HALVES[base]].build(schedule, _with_inner_nodes(schedule, grid, r), analytic_first)
    x, field = noise_at(schedule, grid[0]), mixture().field(schedule)
    scale = x.abs().max().item()
    for got, want in zip(trajectory(field, table, x), trajectory(field, fine, x)[::2], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11 * scale)
    assert table.nfe == fine.nfe


@pytest.mark.parametrize("base", [name for name, base in BASES.items() if base.multistep])
def test_an_analytic_slope_can_be_kept_out_of_the_history(base: str) -> None:
    """It is a multiple of x_0, whose weight then is 0 in every row after its own half; the dynamic form takes the same steps."""
    schedule = VP()
    grid, constants = grids.karras(schedule, 4), _rule(4).values()
    kept, out = (plugin_table(schedule, grid, base, constants, True, analytic_history=keep) for keep in (True, False))
    assert any(row.states[0] != 0 for row in kept.rows[1:])
    assert all(row.states[0] == 0 for row in out.rows[1:])
    assert [len(row.predictions) for row in out.rows] == [len(row.predictions) for row in kept.rows]
    x, field = noise_at(schedule, grid[0]), mixture().field(schedule)
    for table, keep in ((kept, True), (out, False)):
        states = nodes(AMEDSolver(schedule, grid, base, True, 0, keep), field, _rule(4), x)
        for got, want in zip(states, trajectory(field, table, x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11)
    assert not torch.equal(sample(field, kept, x), sample(field, out, x))


@pytest.mark.parametrize("r", [0.25, 0.75])
@pytest.mark.parametrize("schedule", [VP(), EDM(sigma_max=5.0)], ids=["VP", "EDM"])
def test_the_second_order_base_is_of_order_two_for_any_r(schedule: Schedule, r: float) -> None:
    """AMED-Solver is not (test_solvers.py): the weights 1/2r and 1 - 1/2r are what restores the order."""
    start, end = times_of(schedule, 3.0, 0.1)

    def build(steps: int) -> Table:
        return plugin_table(schedule, uneven_grid(start, end, steps), "dpm2", [MeanDirection(r)] * steps)

    order, _ = convergence(mixture().field(schedule), schedule, build, (32, 64, 128, 256))
    assert order == pytest.approx(2, abs=0.15)


@pytest.mark.parametrize("base", BASES)
def test_the_direction_scale_multiplies_what_the_predictions_add(base: str) -> None:
    """The end state is affine in the last step's c; at c = 0 only a part of an earlier state is left."""
    schedule = Cosine()
    grid = grids.karras(schedule, 3, rho_max=10.0)
    x, field = noise_at(schedule, grid[0]), mixture().field(schedule)

    def table_of(c: float) -> Table:
        return plugin_table(schedule, grid, base, [MeanDirection(0.4), MeanDirection(0.6), MeanDirection(0.3, c)])

    none, half, whole = (sample(field, table_of(c), x) for c in (0.0, 0.5, 1.0))
    torch.testing.assert_close(half, (none + whole) / 2, rtol=1e-10, atol=1e-12)
    y_t, y_m = _y_before(schedule, table_of(0.0), x)
    solver, rho_s = BASES[base], _rho(schedule, grid[3])
    rho_m = rho_s**0.3 * _rho(schedule, grid[2]) ** 0.7
    kept = rho_s / rho_m if solver.reads == "x0" else 1.0
    left = kept * (y_t if solver.from_start else y_m)
    alpha = schedule.alpha(torch.tensor(grid[3], dtype=torch.float64))
    torch.testing.assert_close(none, alpha * left, rtol=1e-9, atol=1e-11)
    assert (whole - none).abs().max() > 1e-3


def _y_before(schedule: Schedule, table: Table, x: Tensor) -> tuple[Tensor, Tensor]:
    """x / alpha at the last step's start and at its inner node."""
    states = list(table.states(mixture().field(schedule), x))
    times = [table.grid[0], *(row.arrival for row in table.rows)]
    last = len(table.rows)
    alpha = [schedule.alpha(torch.tensor(times[i], dtype=torch.float64)) for i in (last - 2, last - 1)]
    return states[last - 2] / alpha[0], states[last - 1] / alpha[1]


@pytest.mark.parametrize("base", BASES)
def test_the_inner_evaluation_is_at_the_scaled_noise_level(base: str) -> None:
    schedule = VP()
    grid = grids.karras(schedule, 2)
    table = plugin_table(schedule, grid, base, [MeanDirection(0.3, 1.0, 0.9), MeanDirection(0.6, 1.0, 1.1)])
    for i, (r, a) in enumerate([(0.3, 0.9), (0.6, 1.1)]):
        wanted = a * _rho(schedule, grid[i + 1]) ** r * _rho(schedule, grid[i]) ** (1 - r)
        inner = table.rows[2 * i + 1].time
        assert inner is not None
        assert _rho(schedule, inner) == pytest.approx(wanted, rel=1e-9)
        assert table.rows[2 * i].arrival == inner


@pytest.mark.parametrize("base", ["dpmpp2m", "dpmpp3m"])
def test_multistep_bases_solve_a_point_mass_wherever_they_look(base: str) -> None:
    """x0 does not change, so neither r nor a matters."""
    schedule, point = Cosine(), torch.tensor([0.3, -0.7], dtype=torch.float64)
    grid = grids.karras(schedule, 3)
    steps = [MeanDirection(0.2, 1.0, 0.9), MeanDirection(0.5, 1.0, 1.1), MeanDirection(0.8, 1.0, 0.95)]
    x, times = noise_at(schedule, grid[0]), torch.tensor([grid[0], grid[-1]], dtype=torch.float64)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    exact = alpha[1] * point + sigma[1] / sigma[0] * (x - alpha[0] * point)
    got = sample(point_mass(schedule, point), plugin_table(schedule, grid, base, steps), x)
    torch.testing.assert_close(got, exact, rtol=0, atol=1e-10)


# ---- the dynamic form ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
@pytest.mark.parametrize("base", BASES)
def test_the_dynamic_form_with_constants_is_the_table(
    base: str, schedule: Schedule, analytic_first: bool, dtype: torch.dtype
) -> None:
    """At every node, relative to the states there; evaluations counted at the network."""
    grid, rule = grids.karras(schedule, 4), _rule(4)
    table = plugin_table(schedule, grid, base, rule.values(), analytic_first)
    x, field = noise_at(schedule, grid[0]).to(dtype), _data(dtype).field(schedule)
    counted = EvaluationCounter(field)
    with torch.no_grad():
        states = nodes(AMEDSolver(schedule, grid, base, analytic_first), counted, rule, x)
    assert counted.evaluations == len(x) * table.nfe == len(x) * (8 - analytic_first)
    for got, want in zip(states, trajectory(field, table, x), strict=True):
        assert got.dtype == dtype
        assert (got - want).norm() < (1e-5 if dtype == torch.float32 else 1e-10) * want.norm()


@pytest.mark.parametrize("base", BASES)
def test_directions_may_differ_between_samples(base: str) -> None:
    """A batch with per-sample numbers equals its samples run alone, as tables."""
    schedule = Cosine()
    grid = grids.karras(schedule, 3, rho_max=5.0)
    x, field = noise_at(schedule, grid[0], 4), mixture().field(schedule)
    r = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=torch.float64)
    together = nodes(
        AMEDSolver(schedule, grid, base), field, lambda f, s, t: StepParameters(r, 1 + 0.1 * r, 1 - 0.1 * r), x
    )
    for i, own in enumerate(r.tolist()):
        table = plugin_table(schedule, grid, base, [MeanDirection(own, 1 + 0.1 * own, 1 - 0.1 * own)] * 3)
        alone = sample(field, table, x[i : i + 1])
        torch.testing.assert_close(together[-1][i : i + 1], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("base", BASES)
def test_the_gradient_of_the_end_state_is_right(base: str) -> None:
    """In r, c and a of every step, against central differences."""
    schedule = VP()
    grid = grids.karras(schedule, 3, rho_max=5.0)
    solver, x, field = AMEDSolver(schedule, grid, base), noise_at(schedule, grid[0], 2), mixture().field(schedule)
    raw = torch.tensor([[0.03, -0.02, 0.01], [-0.04, 0.05, 0.02], [0.02, 0.01, -0.03]], dtype=torch.float64)

    def end(values: Tensor) -> Tensor:
        return nodes(solver, field, _called(Constants(3, CONFIG).double(), values), x)[-1]

    assert torch.autograd.gradcheck(end, (raw.requires_grad_(),), eps=1e-6, atol=1e-6, rtol=1e-5)


def _called(rule: Constants, values: Tensor) -> Callable[[Tensor, Tensor, Tensor], StepParameters]:
    return lambda f, s, t: torch.func.functional_call(rule, {"raw": values}, (f, s, t))


@pytest.mark.parametrize("base", BASES)
def test_detached_steps_have_a_gradient_in_their_own_numbers_alone(base: str) -> None:
    schedule = Cosine()
    grid = grids.karras(schedule, 3, rho_max=5.0)
    rule, solver = _rule(3), AMEDSolver(schedule, grid, base)
    x, field = noise_at(schedule, grid[0]), mixture().field(schedule)
    attached = nodes(solver, field, rule, x)
    detached = nodes(solver, field, rule, x, detached=True)
    for i, (one, other) in enumerate(zip(attached[1:], detached[1:], strict=True)):
        assert torch.equal(one, other)
        (cut,) = torch.autograd.grad(other.sum(), rule.raw, retain_graph=True)
        (whole,) = torch.autograd.grad(one.sum(), rule.raw, retain_graph=True)
        assert (cut.abs().sum(1) > 0).tolist() == [j == i for j in range(3)]
        assert (whole.abs().sum(1) > 0).tolist() == [j <= i for j in range(3)]


def test_detached_steps_evaluate_their_start_without_a_graph() -> None:
    """So a network that is not frozen keeps no activations of evaluations that nothing learns from."""
    schedule = Cosine()
    grid, field, graphs = grids.karras(schedule, 3, rho_max=5.0), mixture().field(schedule), []

    def watched(x: Tensor, t: Tensor) -> Prediction:
        graphs.append(torch.is_grad_enabled())
        return field(x, t)

    for detached in (True, False):
        nodes(AMEDSolver(schedule, grid, "ipndm3"), watched, _rule(3), noise_at(schedule, grid[0]), detached)
    assert graphs == [False, True] * 3 + [True] * 6


# ---- errors ----


def test_what_cannot_be_built_raises_an_error_that_names_the_fix() -> None:
    schedule, steps = Linear(), [MeanDirection()] * 2
    grid = grids.karras(schedule, 2)
    with pytest.raises(ValueError, match=r"unknown base 'unipc': choose one of none, .*dpmpp3m"):
        plugin_table(schedule, grid, "unipc", steps)
    with pytest.raises(ValueError, match="unknown base"):
        AMEDSolver(schedule, grid, "unipc")
    with pytest.raises(ValueError, match="2 constants for 3 steps"):
        plugin_table(schedule, grids.karras(schedule, 3), "euler", steps)
    for times, words in (((1.0, 0.5, 0.1), "start at rho = 80"), ((0.9, 0.5, 0.0), "end the grid at rho = 0.002")):
        with pytest.raises(ValueError, match=words):
            plugin_table(schedule, times, "dpmpp2m", steps)
        with pytest.raises(ValueError, match=words):
            AMEDSolver(schedule, times, "dpmpp2m")


def test_saturated_numbers_stay_finite() -> None:
    """sigmoid(300) is 1 in float64: without its margin r would put an inner node on the step's end."""
    schedule = Cosine()
    grid = grids.karras(schedule, 4)
    x, field = noise_at(schedule, grid[0]), mixture().field(schedule)
    for base in BASES:
        rule = Constants(4, replace(CONFIG, scale_dir=0.0)).double()
        with torch.no_grad():
            rule.raw[:, 0] = torch.tensor([30.0, -30.0, 30.0, -30.0])
        assert all(math.isfinite(step.r) and 0 < step.r < 1 for step in rule.values())
        assert nodes(AMEDSolver(schedule, grid, base), field, rule, x)[-1].isfinite().all(), base
