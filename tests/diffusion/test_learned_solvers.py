"""What learning buys on a problem with an exact solution: AMED against where it starts, a learned table against the rest."""

import math
from collections.abc import Callable

import torch
from oracles import exact_solution, mixture, noise_at, rmse
from torch import Tensor, nn

from midway.samplers import grids
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.learned import LearnedTable, rollout
from midway.samplers.sample import sample
from midway.samplers.schedule import Cosine, Linear
from midway.samplers.solvers import SOLVERS
from midway.samplers.step_parameters import AMEDConfig, Constants

SCHEDULE, FIELD, STEPS = Cosine(), mixture().field(Cosine()), 150


def _learn(
    parameters: nn.Module, end_of: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor, steps: int = STEPS
) -> None:
    """Adam with a cosine rate on the squared distance of the end states, as much for either solver."""
    optimizer = torch.optim.Adam(parameters.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + math.cos(math.pi * step / steps))
        items = torch.arange(64 * step, 64 * (step + 1)) % len(x)
        optimizer.zero_grad()
        (end_of(x[items]) - exact[items]).square().mean().log().backward()
        optimizer.step()


def test_amed_halves_its_error_and_a_learned_table_beats_it_and_dpm_solver_on_its_best_grid() -> None:
    """5 evaluations each, the analytic first step included, learned on 256 exact pairs and tested on others.

    The table's error is below a third of DPM-Solver++(3M)'s and two thirds of AMED's.
    """
    ends = (20.0, 0.05)
    amed_grid = grids.logsnr(SCHEDULE, 3, *ends)
    x, unseen = (noise_at(SCHEDULE, amed_grid[0], 256, seed) for seed in (1, 2))
    exact, wanted = (exact_solution(mixture(), SCHEDULE, z, amed_grid[0], amed_grid[-1]) for z in (x, unseen))
    solver, constants = AMEDSolver(SCHEDULE, amed_grid, "none", True, 0), Constants(3, AMEDConfig())
    learned = LearnedTable(SCHEDULE, grids.logsnr(SCHEDULE, 6, *ends), analytic_first=True)

    def amed_end(state: Tensor) -> Tensor:
        return nodes(solver, FIELD, constants, state)[-1]

    def table_end(state: Tensor) -> Tensor:
        return rollout(FIELD, learned, state)

    def error(end: Tensor) -> float:
        return rmse(end.detach(), wanted)

    grids_of_dpm = (make(SCHEDULE, 6, rho_max=ends[0], rho_min=ends[1]) for make in grids.GRIDS.values())
    dpm = [sample(FIELD, SOLVERS["dpmpp3m"].build(SCHEDULE, grid, True), unseen) for grid in grids_of_dpm]
    before = error(amed_end(unseen))
    _learn(constants, amed_end, x, exact)
    _learn(learned, table_end, x, exact)
    assert error(amed_end(unseen)) < before / 2
    assert error(table_end(unseen)) < error(amed_end(unseen)) / 1.5
    assert error(table_end(unseen)) < min(map(error, dpm)) / 3


def test_a_table_learns_to_end_three_times_nearer_than_dpm_solver_from_pure_noise() -> None:
    """5 evaluations on the linear schedule, against DPM-Solver++(3M) on its best grid."""
    schedule, field = Linear(), mixture().field(Linear())
    grid = grids.uniform(schedule, 5)
    x, unseen = (noise_at(schedule, grid[0], 256, seed) for seed in (1, 2))
    exact, wanted = (exact_solution(mixture(), schedule, z, grid[0], grid[-1]) for z in (x, unseen))
    learned = LearnedTable(schedule, grid)
    dpm = (SOLVERS["dpmpp3m"].build(schedule, make(schedule, 5)) for make in grids.GRIDS.values())
    best = min(rmse(sample(field, table, unseen), wanted) for table in dpm)
    _learn(learned, lambda state: rollout(field, learned, state), x, exact, 400)
    assert rmse(sample(field, learned.table(), unseen), wanted) < best / 3
