"""Distilling AMED against a finer teacher.

Every form of it measures the mean squared distance to the teacher's state, in units of alpha^2 + sigma^2:

    end to end    of the end state alone, with the gradient through the whole trajectory (ours): the teacher may have any grid.
                  `learned.checkpointed` saves memory.
    restarted     at every node, each step starting from the teacher's, with its slope and features (one-step bases, as in the
                  authors' code). The steps are independent, so all of them train in one batch with one evaluation each.
    detached      at every node, each step starting from the student's own state and history, cut from the graph.

In the last two, which are published (Zhou et al. 2024, arXiv 2312.00094, section 3.4 and algorithm 1), the teacher's grid must
have the student's nodes, and a step's error has a gradient in that step's numbers alone, through one evaluation.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.samplers.amed import (
    AMEDSolver,
    History,
    NoiseLevels,
    choose,
    features_of,
    noise_levels,
    observe,
    take_step,
)
from midway.samplers.grids import Grid
from midway.samplers.prediction import Field, Prediction, acting
from midway.samplers.sample import trajectory
from midway.samplers.schedule import Schedule
from midway.samplers.step_parameters import StepParameters, StepRule
from midway.samplers.table import Table

NEGLIGIBLE = 1e-6
"""A mean squared error below this (0.001 of the state's standard deviation) is not worth improving; added to every step's
error where its logarithm is the loss."""


@dataclass(frozen=True)
class TeacherNodes:
    """What the teacher left at the student's nodes, stacked: states (N + 1, B, *), and at the first N of them the slope eps
    (N, B, *) and the features (N, B, F); no eps and features, (0, B, ...), where no step restarts from the teacher."""

    states: Tensor
    eps: Tensor
    features: Tensor

    def take(self, items: Tensor) -> "TeacherNodes":
        """The trajectories `items` int64 (b,)."""
        return TeacherNodes(self.states[:, items], self.eps[:, items], self.features[:, items])


def only_ends(starts: Tensor, ends: Tensor) -> TeacherNodes:
    """Of a teacher that is met at its end alone, with any grid between: states (2, B, *)."""
    return TeacherNodes(
        torch.stack([starts, ends]), starts.new_zeros(0, *starts.shape), starts.new_zeros(0, len(starts), 0)
    )


def check_nested(teacher: Table, grid: Grid, stride: int) -> None:
    """ValueError unless every `stride`-th node of the teacher's grid is one of the student's, and the teacher draws no noise."""
    need_no_noise(teacher)
    shared = teacher.grid[::stride]
    if len(shared) != len(grid) or max(abs(a - b) for a, b in zip(shared, grid, strict=True)) > 1e-9:
        raise ValueError(
            f"every {stride}-th time of the teacher's grid must be one of the student's: build both with the same grid rule, "
            f"{len(grid) - 1} and {stride * (len(grid) - 1)} steps"
        )


def need_no_noise(table: Table) -> None:
    """ValueError for a teacher that draws noise."""
    if table.stochastic:
        raise ValueError(
            f"teacher '{table.solver}' draws noise: a solver can only be distilled from a deterministic one"
        )


def _evaluations_at(table: Table, stride: int) -> list[int | None]:
    """For the student's nodes but the last, the number of the teacher's evaluation of that state at that time, if it made one."""
    evaluated = [i for i, row in enumerate(table.rows) if row.time is not None]
    wanted = zip(table.nodes[:-1:stride], table.grid[:-1:stride], strict=True)
    return [evaluated.index(n) if table.rows[n].time == t else None for n, t in wanted]


@torch.no_grad()
def teacher_nodes(
    field: Field, solver: AMEDSolver, table: Table, stride: int, x: Tensor, slopes: bool = True
) -> TeacherNodes:
    """Run the teacher's table from x (B, *); every `stride`-th node of its grid is a node of the student.

    slopes: keep its predictions at the nodes, from which steps restart. A node that the teacher itself did not evaluate (a
    corrected state) costs one evaluation more; with `analytic_first` the first prediction is the analytic one.
    """
    check_nested(table, solver.grid, stride)
    numbers = _evaluations_at(table, stride) if slopes else []
    fields, wanted = enumerate(acting(field, time) for time in table.times), {n for n in numbers if n is not None}
    found: dict[int, Prediction] = {}

    def remember(state: Tensor, t: Tensor) -> Prediction:
        number, now = next(fields)
        prediction = now(state, t)
        if number in wanted:
            found[number] = prediction
        return prediction

    states = trajectory(remember, table, x)[::stride]
    at = noise_levels(solver, x.device)
    kept = [
        observe(solver, field, at, i, states[i]) if n is None or (i == 0 and solver.analytic_first) else found[n]
        for i, n in enumerate(numbers)
    ]
    features = [features_of(p, solver.feature_dim) for p in kept]
    return TeacherNodes(
        states=torch.stack(states),
        eps=torch.stack([p.eps for p in kept]) if slopes else x.new_zeros(0, *x.shape),
        features=torch.stack(features) if slopes else x.new_zeros(0, len(x), 0),
    )


def step_errors(field: Field, solver: AMEDSolver, rule: StepRule, teacher: TeacherNodes) -> Tensor:
    """(N,): each step's error when it restarts from the teacher's node.

    `field` must accept the samples of all N steps at once, step by step: (N B, *). ValueError for a multistep base.
    """
    if solver.plugin.multistep:
        raise ValueError(f"steps of base '{solver.base}' weigh earlier predictions and cannot restart: use node_errors")
    step = torch.arange(solver.steps, device=teacher.states.device).repeat_interleave(teacher.states.shape[1])
    at = noise_levels(solver, teacher.states.device)
    start, end = at.take(step), at.take(step + 1)
    directions = choose(rule, start, end, step, teacher.features.flatten(0, 1))
    x, now = teacher.states[:-1].flatten(0, 1), _slope(teacher.eps.flatten(0, 1))
    reached, _ = take_step(solver, field, (1, 1), start, end, x, now, History(), directions)
    return _errors(reached.unflatten(0, teacher.eps.shape[:2]), teacher.states[1:], at)


def _slope(eps: Tensor) -> Prediction:
    """A prediction of which only eps will be read: that of the bases which can restart."""
    return Prediction(eps, eps)


def _errors(reached: Tensor, wanted: Tensor, at: NoiseLevels) -> Tensor:
    """(N, B, *) at the nodes after the first, twice -> (N,)."""
    distance = (reached - wanted).square().flatten(1).mean(1)
    return distance / (at.alpha[1:].square() * (1 + at.rho[1:].square())).to(distance.dtype)


def node_errors(states: Sequence[Tensor], solver: AMEDSolver, teacher: TeacherNodes) -> Tensor:
    """(N,): the error of the student's states (N + 1 of (B, *), from `nodes`) at every node but the first."""
    return _errors(torch.stack(list(states[1:])), teacher.states[1:], noise_levels(solver, teacher.states.device))


def refined(schedule: Schedule, grid: Grid, parts: int) -> Grid:
    """Any grid with every step cut into this many equal ones of log rho: a teacher on it passes the nodes of the grid."""
    log_rho = schedule.rho(torch.tensor(grid, dtype=torch.float64)).log()
    share = torch.arange(1, parts, dtype=torch.float64) / parts
    inner = schedule.time_of_rho((log_rho[:-1, None] + share * (log_rho[1:] - log_rho[:-1])[:, None]).exp())
    return (*(t for i, start in enumerate(grid[:-1]) for t in (start, *inner[i].tolist())), grid[-1])


def end_error(end: Tensor, solver: AMEDSolver, wanted: Tensor) -> Tensor:
    """(): of end states (B, *) from the teacher's, in units of the state's variance."""
    last = torch.tensor(solver.grid[-1], dtype=torch.float64)
    unit = solver.schedule.alpha(last).square() + solver.schedule.sigma(last).square()
    return (end - wanted).square().mean() / unit.item()


@torch.no_grad()
def best_positions(
    field: Field, solver: AMEDSolver, teacher: TeacherNodes, candidates: Tensor, restarted: bool
) -> tuple[Tensor, float]:
    """(N,): for every step the r of `candidates` (K,) with the least error at the step's end, with c = a = 1; the last error.

    The error as a function of r has several basins on long steps, and from r = 1/2 the gradient may lead into a poor one.
    restarted: steps start from the teacher's nodes, else from the state that the best r of the step before reached.
    """
    at, x, history, best = noise_levels(solver, teacher.states.device), teacher.states[0], History(), []
    least = math.inf
    for i in range(solver.steps):
        step = torch.full((x.shape[0],), i, device=x.device)
        now = _slope(teacher.eps[i]) if restarted else observe(solver, field, at, i, x)
        orders, start, end = solver.orders(i), at.take(step), at.take(step + 1)
        trials = [
            take_step(solver, field, orders, start, end, x, now, history, StepParameters(r * one, one, one))
            for one in [torch.ones_like(start.rho)]
            for r in candidates
        ]
        errors = torch.stack([(reached - teacher.states[i + 1]).square().mean() for reached, _ in trials])
        chosen = int(errors.nan_to_num(torch.inf).argmin())
        least = errors[chosen].item()
        best.append(candidates[chosen])
        x, history = (teacher.states[i + 1], History()) if restarted else trials[chosen]
    return torch.stack(best), least
