"""A grid fitted to the curvature of a model's trajectories (GITS, Chen et al. 2024, arXiv 2405.11326, section 4).

A fine trajectory y_0 .. y_M (y = x / alpha) is solved once for a few samples. Jumping from node i to node j > i with one Euler
step in rho = sigma / alpha lands at y_ij = y_i + (rho_j - rho_i) eps_i, which misses the trajectory by

    l2     cost(i, j) = mean over samples |y_ij - y_j|
    dev    cost(i, j) = mean over samples d(y_ij) - d(y_j),     d(y) the distance of y to the line through y_0 and y_M

and the grid is the path 0 -> ... -> M of exactly N jumps with the least sum_n k^n cost of jump n, found by dynamic programming:

    least_1(j) = cost(0, j),     least_n(j) = min over i < j of least_(n-1)(i) + k^(n-1) cost(i, j).

A coefficient k > 1 makes later jumps, those near the data, shorter. The authors take dev and k = 1.15. Which of the four is best
depends on the solver that will use the grid, so by default `fitted_grid` takes the one on which that solver ends nearest to the
fine trajectories.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from midway.samplers.adams import ipndm
from midway.samplers.grids import Grid, karras
from midway.samplers.prediction import Field, Prediction, acting
from midway.samplers.sample import sample, trajectory
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import ddim
from midway.samplers.table import Table

GITS = "gits"
"""This grid's name."""
FINE_STEPS = 60
Cost = Literal["l2", "dev"]
COSTS: tuple[Cost, ...] = ("l2", "dev")
COEFFICIENTS = (1.0, 1.15)


@dataclass(frozen=True)
class WarmUp:
    """Fine trajectories of B samples on `grid` (M + 1 times), and the costs of jumping over parts of them.

    starts, ends: their states (B, *) at the grid's ends. costs: float64 (M + 1, M + 1) on the host, infinite but for j > i.
    """

    grid: Grid
    starts: Tensor
    ends: Tensor
    costs: dict[Cost, Tensor]

    def path(self, steps: int, cost: Cost, coefficient: float = 1.0) -> Grid:
        """The times of the cheapest path of this many jumps."""
        return tuple(self.grid[i] for i in cheapest_path(self.costs[cost], steps, coefficient))


@torch.no_grad()
def warm_up(field: Field, schedule: Schedule, x: Tensor, grid: Grid | None = None) -> WarmUp:
    """Trajectories of iPNDM(4) from x: (B, *) noise at the start of `grid` (default: 61 times of EDM's spacing), some dozens.

    One evaluation per fine step. ValueError for a grid that starts at pure noise, where rho is infinite.
    """
    grid = karras(schedule, FINE_STEPS) if grid is None else grid
    times = torch.tensor(grid, dtype=torch.float64)
    alpha, rho = schedule.alpha(times), schedule.rho(times).to(x.device)
    if alpha[0] <= 0:
        raise ValueError(
            "the fine grid starts at pure noise, where rho = sigma / alpha is infinite: start it at rho = 80"
        )
    slopes: list[Tensor] = []
    fields = (acting(field, time) for time in grid)  # ipndm evaluates every time but the last, in order

    def remember(state: Tensor, t: Tensor) -> Prediction:
        prediction = next(fields)(state, t)
        slopes.append(prediction.eps.double().flatten(1))
        return prediction

    states = trajectory(remember, ipndm(schedule, grid), x)
    y = torch.stack([state.double().flatten(1) / a for state, a in zip(states, alpha.tolist(), strict=True)])
    return WarmUp(grid, x, states[-1], jump_costs(y, torch.stack(slopes), rho))


def jump_costs(y: Tensor, slopes: Tensor, rho: Tensor) -> dict[Cost, Tensor]:
    """Both costs of all jumps, float64 (M + 1, M + 1) on the host: nodes y (M + 1, B, D), slopes eps (M, B, D), rho (M + 1,)."""
    costs: dict[Cost, Tensor] = {name: torch.full((len(y), len(y)), torch.inf, dtype=torch.float64) for name in COSTS}
    own = _deviation(y, y)
    for i, slope in enumerate(slopes):
        reached = y[i] + (rho[i + 1 :] - rho[i])[:, None, None] * slope
        costs["l2"][i, i + 1 :] = (reached - y[i + 1 :]).norm(dim=2).mean(1).cpu()
        costs["dev"][i, i + 1 :] = (_deviation(reached, y) - own[i + 1 :]).mean(1).cpu()
    return costs


def _deviation(points: Tensor, y: Tensor) -> Tensor:
    """Distances (K, B) of points (K, B, D) to the lines through y[0] and y[-1] (B, D)."""
    chord = torch.nn.functional.normalize(y[-1] - y[0], dim=1)
    off = points - y[0]
    return (off - (off * chord).sum(2, keepdim=True) * chord).norm(dim=2)


def cheapest_path(costs: Tensor, steps: int, coefficient: float = 1.0) -> list[int]:
    """Indices 0 = i_0 < ... < i_N = M of exactly N jumps with the least sum of coefficient^n costs[i_n, i_n+1], n from 0.

    costs: (M + 1, M + 1). ValueError for a number of steps that it does not have, or a coefficient that is not positive.
    """
    last = len(costs) - 1
    if not 1 <= steps <= last:
        raise ValueError(
            f"{steps} steps cannot be chosen from {last} fine ones: ask for 1 to {last}, or refine the fine grid"
        )
    if not 0 < coefficient < torch.inf:
        raise ValueError(f"the coefficient of later jumps is {coefficient}: give a positive number, 1.15 as published")
    least, came_from = costs[0], []
    for number in range(1, steps):
        least, best = (least[:, None] + coefficient**number * costs).min(dim=0)
        came_from.append(best)
    path = [last]
    for best in reversed(came_from):
        path.append(int(best[path[-1]]))
    return [0, *reversed(path)]


@torch.no_grad()
def fitted_grid(
    warm: WarmUp,
    field: Field,
    steps: int,
    build: Callable[[Grid], Table],
    cost: Cost | None = None,
    coefficient: float | None = None,
) -> Grid:
    """The path of `steps` jumps on which the solver that `build` makes ends nearest to the fine trajectories, by RMSE.

    Among both costs and coefficients 1 and 1.15, or the given ones; `steps` evaluations a step of the solver for each distinct
    path, none if there is only one. field: that of the warm-up's samples.
    """
    chosen = product((cost,) if cost else COSTS, COEFFICIENTS if coefficient is None else (coefficient,))
    paths = list(dict.fromkeys(warm.path(steps, *one) for one in chosen))
    if len(paths) == 1:
        return paths[0]
    missed = [(sample(field, build(path), warm.starts) - warm.ends).double().square().mean() for path in paths]
    return paths[int(torch.stack(missed).nan_to_num(nan=torch.inf).argmin())]


def gits_grid(
    field: Field,
    schedule: Schedule,
    x: Tensor,
    fine_grid: Grid | None,
    steps: int,
    cost: Cost | None = None,
    coefficient: float | None = None,
) -> Grid:
    """`warm_up` and `fitted_grid` in one, for ddim. x: (B, *) noise at the fine grid's start; ValueError as of the two."""
    warm = warm_up(field, schedule, x, fine_grid)
    return fitted_grid(warm, field, steps, lambda grid: ddim(schedule, grid), cost, coefficient)
