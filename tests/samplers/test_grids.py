"""Grids: formulas, reversal, and the grid that dynamic programming finds on a trajectory."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from oracles import exact_solution, mixture, noise_at

from midway.samplers import grids
from midway.samplers.gits import cheapest_path, gits_grid, jump_costs
from midway.samplers.sample import EvaluationCounter, sample
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


@pytest.mark.parametrize("schedule", [VP(), EDM(), Linear()])
def test_a_jumps_cost_is_where_one_euler_step_in_rho_lands(schedule: Schedule) -> None:
    """Against ddim from the trajectory's own node; a jump to the next node costs nothing, there the trajectory is that step."""
    fine = grids.karras(schedule, 6, rho_max=5.0, rho_min=0.05)
    field, x = mixture().field(schedule), noise_at(schedule, fine[0], 8, 0)
    costs = jump_costs(field, schedule, x, fine)
    at_two = sample(field, ddim(schedule, fine[:3]), x)
    alpha = schedule.alpha(torch.tensor(fine[5], dtype=torch.float64))
    gap = sample(field, ddim(schedule, (fine[2], fine[5])), at_two) - sample(field, ddim(schedule, fine[:6]), x)
    assert costs[2, 5].item() == pytest.approx((gap / alpha).norm(dim=1).mean().item(), rel=1e-10)
    assert costs.diagonal(1).max() < 1e-12
    assert (costs.tril() == torch.inf)[torch.ones_like(costs).tril() > 0].all()


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
    assert field.evaluations == 32 * 60
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
