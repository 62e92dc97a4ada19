"""What learning buys on a problem with an exact solution: AMED against where it starts, a learned table against AMED."""

import math
from collections.abc import Callable

import torch
from oracles import exact_solution, mixture
from torch import Tensor, nn

from midway.samplers import grids
from midway.samplers.amed import AMEDSolver, nodes
from midway.samplers.learned import LearnedTable, rollout
from midway.samplers.schedule import Cosine, Schedule
from midway.samplers.step_parameters import AMEDConfig, Constants

STEPS, BATCH = 250, 256


def _start(schedule: Schedule, time: float, seed: int) -> Tensor:
    t = torch.tensor(time, dtype=torch.float64)
    noise = torch.randn(BATCH, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return noise * torch.hypot(schedule.alpha(t), schedule.sigma(t))


def _learn(parameters: nn.Module, end_of: Callable[[Tensor], Tensor], x: Tensor, exact: Tensor, rate: float) -> None:
    """Adam with a cosine rate on the squared distance of the end states, as much for either solver."""
    optimizer = torch.optim.Adam(parameters.parameters(), rate)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        (end_of(x) - exact).square().mean().log().backward()
        optimizer.step()


def test_amed_halves_its_error_and_a_learned_table_is_half_as_far_again() -> None:
    """5 evaluations each, the analytic first step included, learned on the same noise and tested on other."""
    schedule, field = Cosine(), mixture().field(Cosine())
    rho_max, rho_min = 20.0, 0.05
    amed_grid = grids.logsnr(schedule, 3, rho_max, rho_min)
    table_grid = grids.logsnr(schedule, 6, rho_max, rho_min)
    x, unseen = (_start(schedule, amed_grid[0], seed) for seed in (1, 2))
    exact, wanted = (exact_solution(mixture(), schedule, z, amed_grid[0], amed_grid[-1]) for z in (x, unseen))

    solver, constants = AMEDSolver(schedule, amed_grid, "none", True, 0), Constants(3, AMEDConfig())
    learned = LearnedTable(schedule, table_grid, analytic_first=True)

    def amed_end(state: Tensor) -> Tensor:
        return nodes(solver, field, constants, state)[-1]

    def table_end(state: Tensor) -> Tensor:
        return rollout(field, learned, state)

    def error(end_of: Callable[[Tensor], Tensor]) -> float:
        with torch.no_grad():
            return (end_of(unseen) - wanted).square().mean().sqrt().item()

    before = error(amed_end)
    _learn(constants, amed_end, x, exact, 0.02)
    _learn(learned, table_end, x, exact, 0.02)
    assert error(amed_end) < before / 2
    assert error(table_end) < error(amed_end) / 1.5
