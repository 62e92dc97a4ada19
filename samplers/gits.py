"""A grid fitted to the curvature of a model's trajectories (GITS, Chen et al. 2024, arXiv 2405.11326, section 4).

A fine trajectory y_0 .. y_M (y = x / alpha) is drawn once for a few samples. Jumping from node i to node j > i with one
Euler step in rho = sigma / alpha misses the trajectory by

    cost(i, j) = mean over samples |y_i + (rho_j - rho_i) eps_i - y_j|

and the grid is the path 0 -> ... -> M of exactly N jumps with the least summed cost, found by dynamic programming:

    least_1(j) = cost(0, j),     least_k(j) = min over i < j of least_(k-1)(i) + cost(i, j).
"""

import torch
from torch import Tensor

from midway.samplers.grids import Grid, karras
from midway.samplers.prediction import Field, Prediction, acting
from midway.samplers.sample import trajectory
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import ddim

GITS = "gits"
"""This grid's name."""
FINE_STEPS = 60


def jump_costs(field: Field, schedule: Schedule, x: Tensor, grid: Grid) -> Tensor:
    """float64 (M + 1, M + 1) on the host: cost(i, j) for j > i, infinite elsewhere. x: (B, *) at grid[0]; M evaluations."""
    slopes: list[Tensor] = []
    fields = (acting(field, time) for time in grid)  # ddim evaluates every time but the last, in order

    def remember(state: Tensor, t: Tensor) -> Prediction:
        prediction = next(fields)(state, t)
        slopes.append(prediction.eps.double())
        return prediction

    times = torch.tensor(grid, dtype=torch.float64)
    alpha, rho = schedule.alpha(times), schedule.rho(times).to(x.device)
    states = trajectory(remember, ddim(schedule, grid), x)
    y = torch.stack([state.double() / a for state, a in zip(states, alpha.tolist(), strict=True)])
    costs = torch.full((len(grid), len(grid)), torch.inf, dtype=torch.float64)
    for i, slope in enumerate(slopes):
        ahead = (rho[i + 1 :] - rho[i]).view(-1, *[1] * x.dim())
        missed = y[i] + ahead * slope - y[i + 1 :]
        costs[i, i + 1 :] = missed.flatten(2).norm(dim=2).mean(1).cpu()
    return costs


def cheapest_path(costs: Tensor, steps: int) -> list[int]:
    """Indices 0 = i_0 < ... < i_N = M of exactly N jumps with the least summed cost; costs (M + 1, M + 1)."""
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise ValueError(
            f"{steps} steps cannot be chosen from {last} fine ones: ask for 1 to {last}, or refine the fine grid"
        )
    least, came_from = costs[0], []
    for _ in range(steps - 1):
        least, best = (least[:, None] + costs).min(dim=0)
        came_from.append(best)
    path = [last]
    for best in reversed(came_from):
        path.append(int(best[path[-1]]))
    return [0, *reversed(path)]


@torch.no_grad()
def gits_grid(field: Field, schedule: Schedule, x: Tensor, fine_grid: Grid | None, steps: int) -> Grid:
    """The `steps`-step part of `fine_grid` (default: 61 times of EDM's spacing) that Euler's method in rho follows best.

    x: (B, *) noise at the fine grid's start, a few dozen samples; costs one evaluation per fine step. The fine grid must start
    where alpha > 0. ValueError if it has fewer steps than requested.
    """
    fine = karras(schedule, FINE_STEPS) if fine_grid is None else fine_grid
    if schedule.alpha(torch.tensor(fine[0], dtype=torch.float64)) <= 0:
        raise ValueError(
            "the fine grid starts at pure noise, where rho = sigma / alpha is infinite: start it at rho = 80"
        )
    return tuple(fine[i] for i in cheapest_path(jump_costs(field, schedule, x, fine), steps))
