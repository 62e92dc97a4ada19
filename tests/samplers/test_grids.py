"""Grids: formulas, reversal, and the grid that dynamic programming finds on a trajectory."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from oracles import exact_solution, mixture, noise_at

from midway.samplers import grids
from midway.samplers.adams import ipndm
from midway.samplers.gits import COEFFICIENTS, COSTS, cheapest_path, fitted_grid, gits_grid, warm_up
from midway.samplers.sample import EvaluationCounter, sample, trajectory
from midway.samplers.schedule import EDM, VP, Linear, Schedule
from midway.samplers.solvers import ddim, dpmpp2m
from midway.samplers.table import Table


@pytest.mark.parametrize("schedule", [VP(), EDM(), Linear()])
def test_quadratic_has_equal_steps_of_the_root_of_t(schedule: Schedule) -> None:
    times = grids.quadratic(schedule, 5, rho_max=5.0, rho_min=0.01)
    roots = [math.sqrt(t) for t in times]
    assert [a - b for a, b in itertools.pairwise(roots)] == pytest.approx([(roots[0] - roots[-1]) / 5] * 5, rel=1e-12)
    ends = schedule.rho(torch.tensor([times[0], times[-1]], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([5.0, 0.01], dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", [VP(), EDM(), Linear()])
def test_the_grid_vp_has_the_noise_levels_of_equal_steps_of_vp(schedule: Schedule) -> None:
    times, own = grids.vp(schedule, 5), grids.uniform(VP(), 5)
    levels, wanted = (s.rho(torch.tensor(t, dtype=torch.float64)) for s, t in ((schedule, times), (VP(), own)))
    torch.testing.assert_close(levels, wanted, rtol=1e-9, atol=0)


def test_a_reversed_grid_rises_through_the_same_times() -> None:
    grid = grids.karras(VP(), 4)
    rising = grids.reversed_grid(grid)
    assert all(a < b for a, b in itertools.pairwise(rising))
    assert rising == tuple(sorted(grid))
    assert grids.reversed_grid(rising) == grid


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 7])
def test_dynamic_programming_finds_the_least_of_all_paths(steps: int, seed: int) -> None:
    last = 7
    costs = torch.rand(last + 1, last + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    costs = torch.where(torch.ones_like(costs).triu(1) > 0, costs, torch.inf)

    def total(path: tuple[int, ...]) -> float:
        return sum(costs[i, j].item() for i, j in itertools.pairwise(path))

    paths = [(0, *inner, last) for inner in itertools.combinations(range(1, last), steps - 1)]
    got = tuple(cheapest_path(costs, steps))
    assert got in paths
    assert total(got) == pytest.approx(min(total(path) for path in paths), rel=1e-12)


@pytest.mark.parametrize("coefficient", [0.5, 1.15])
def test_a_coefficient_weighs_later_jumps(coefficient: float) -> None:
    """By its powers: the least of all paths again, of several costs, of which some have another path without it."""
    paths: list[tuple[int, ...]] = [(0, *inner, 8) for inner in itertools.combinations(range(1, 8), 3)]
    costs, differing = torch.zeros(9, 9), 0
    for seed in range(12):
        costs = torch.rand(9, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).triu(1)
        costs = torch.where(costs > 0, costs, torch.inf)
        totals = {
            path: sum(coefficient**n * costs[i, j].item() for n, (i, j) in enumerate(itertools.pairwise(path)))
            for path in paths
        }
        got = cheapest_path(costs, 4, coefficient)
        assert totals[tuple(got)] == pytest.approx(min(totals.values()), rel=1e-12)
        differing += got != cheapest_path(costs, 4)
    assert differing > 0
    with pytest.raises(ValueError, match=r"1\.15 as published"):
        cheapest_path(costs, 4, 0.0)


@pytest.mark.parametrize("schedule", [VP(), EDM(), Linear()])
def test_a_jumps_cost_is_where_one_euler_step_in_rho_lands(schedule: Schedule) -> None:
    """Against ddim from the trajectory's own node: its distance from the trajectory there, or from the line between its ends."""
    fine = grids.karras(schedule, 6, rho_max=5.0, rho_min=0.05)
    field, x = mixture().field(schedule), noise_at(schedule, fine[0], 8, 0)
    warm = warm_up(field, schedule, x, fine)
    states = trajectory(field, ipndm(schedule, fine), x)
    alpha = schedule.alpha(torch.tensor(fine, dtype=torch.float64))
    y = torch.stack([state / a for state, a in zip(states, alpha, strict=True)])
    landed = sample(field, ddim(schedule, (fine[2], fine[5])), states[2]) / alpha[5]
    assert warm.costs["l2"][2, 5].item() == pytest.approx((landed - y[5]).norm(dim=1).mean().item(), rel=1e-10)

    def height(point: torch.Tensor) -> torch.Tensor:
        """Of the triangle over the chord: twice its area, by Gram's determinant, over its base."""
        side, base = point - y[0], y[-1] - y[0]
        gram = side.square().sum(1) * base.square().sum(1) - (side * base).sum(1).square()
        return gram.sqrt() / base.norm(dim=1)

    wanted = (height(landed) - height(y[5])).mean().item()
    assert warm.costs["dev"][2, 5].item() == pytest.approx(wanted, rel=1e-8)
    for costs in warm.costs.values():
        assert (costs.tril() == torch.inf)[torch.ones_like(costs).tril() > 0].all()
    assert torch.equal(warm.ends, states[-1])


def test_the_fitted_grid_is_that_on_which_its_solver_ends_nearest() -> None:
    """By brute force among both costs and both coefficients; here solvers differ, and what is given is not chosen again."""
    schedule = VP()
    field = mixture().field(schedule)
    warm = warm_up(field, schedule, noise_at(schedule, grids.karras(schedule, 1)[0], 32, 1))
    for build in (ddim, dpmpp2m):
        errors = {}
        for cost, coefficient in itertools.product(COSTS, COEFFICIENTS):
            grid = warm.path(6, cost, coefficient)
            end = sample(field, build(schedule, grid), warm.starts)
            errors[grid] = (end - warm.ends).square().mean().item()
            assert grid == fitted_grid(warm, field, 6, lambda _: pytest.fail("chosen"), cost, coefficient)
        chosen = fitted_grid(warm, field, 6, lambda grid: build(schedule, grid))  # noqa: B023
        assert len(errors) > 1 and chosen == min(errors, key=errors.__getitem__)


@pytest.mark.parametrize(
    ("build", "schedule", "share"),
    [(ddim, VP(), 0.8), (ddim, EDM(), 0.5), (ddim, Linear(), 1.0), (dpmpp2m, VP(), 0.8), (dpmpp2m, EDM(), 0.5)],
)
def test_the_fitted_grid_beats_the_uniform_one_on_unseen_noise(
    build: Callable[[Schedule, grids.Grid], Table], schedule: Schedule, share: float
) -> None:
    """Equal steps of t are good on the linear schedule, so there is little to win there."""
    field = EvaluationCounter(mixture().field(schedule))
    start = grids.karras(schedule, 1)[0]
    fitted = gits_grid(field, schedule, noise_at(schedule, start, 32, 1), None, 6)
    assert field.evaluations in [32 * (60 + 6 * paths) for paths in (0, 2, 3, 4)]
    assert len(fitted) == 7
    assert set(fitted) <= set(grids.karras(schedule, 60))
    x = noise_at(schedule, start, 64, 2)
    exact = exact_solution(mixture(), schedule, x, fitted[0], fitted[-1])
    errors = [
        (sample(field, build(schedule, grid), x) - exact).square().mean().sqrt().item()
        for grid in (fitted, grids.uniform(schedule, 6))
    ]
    assert errors[0] < share * errors[1]


def test_what_cannot_be_fitted_raises_an_error() -> None:
    with pytest.raises(ValueError, match="ask for 1 to 3"):
        cheapest_path(torch.zeros(4, 4), 4)
    with pytest.raises(ValueError, match="starts at pure noise"):
        gits_grid(mixture().field(Linear()), Linear(), torch.zeros(1, 2), (1.0, 0.5, 0.1), 2)


@pytest.mark.parametrize(("name", "levels"), [("ays_sd", grids.AYS_SD), ("ays_sdxl", grids.AYS_SDXL)])
def test_align_your_steps_has_the_published_levels_and_interpolates_their_logarithm(
    name: str, levels: tuple[float, ...]
) -> None:
    make = grids.NAMED[name]
    for schedule in (VP(), Linear()):
        ten, twenty = (
            schedule.rho(torch.tensor(make(schedule, n, 14.615, 0.002), dtype=torch.float64)) for n in (10, 20)
        )
        assert ten[:-1].tolist() == pytest.approx(levels[:-1], rel=1e-9)
        assert ten[-1].item() == pytest.approx(0.002, rel=1e-9)
        assert twenty[:-1:2].tolist() == pytest.approx(ten[:-1].tolist(), rel=1e-9)
        assert twenty[1].item() == pytest.approx(math.sqrt(levels[0] * levels[1]), rel=1e-9)
    assert make(VP(), 1) == pytest.approx(grids.karras(VP(), 1), abs=1e-12)
    with pytest.raises(ValueError, match="noise levels"):
        make(VP(), 10, 5.0, 0.002)  # ends below its second level


def test_a_grid_to_data_has_one_step_more() -> None:
    grid = grids.karras(EDM(), 3)
    assert grids.to_data(grid) == (*grid, 0.0)
