"""Distilling AMED against a finer teacher (Zhou et al. 2024, arXiv 2312.00094, section 3.4 and algorithm 1).

The squared distance to the teacher at each node of the student's grid, every step restarted from the teacher's node. The steps
are then independent, so all of them train in one batch, with one evaluation that carries a gradient; nothing is
back-propagated along the trajectory. The slopes and features at the nodes are the teacher's own evaluations there.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from midway.samplers.amed import DirectionRule, analytic_prediction, features_of, levels, mean_direction_step
from midway.samplers.grids import Grid
from midway.samplers.prediction import Field, Prediction
from midway.samplers.sample import trajectory
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

NEGLIGIBLE = 1e-6
"""A mean squared error below this (0.001 of the state's standard deviation) is not worth improving; added to every step's
error where its logarithm is the loss."""


@dataclass(frozen=True)
class TeacherNodes:
    """What the teacher left at the student's nodes, stacked: states (N + 1, B, *), and at the first N of them the slope eps
    (N, B, *) and the features (N, B, F)."""

    states: Tensor
    eps: Tensor
    features: Tensor

    def take(self, items: Tensor) -> "TeacherNodes":
        """The trajectories `items` int64 (b,)."""
        return TeacherNodes(self.states[:, items], self.eps[:, items], self.features[:, items])


def _evaluations_at_nodes(table: Table) -> list[int]:
    """For every node but the last, the number of the evaluation made at that state."""
    evaluated = [i for i, row in enumerate(table.rows) if row.time is not None]
    return [evaluated.index(node) for node in table.nodes[:-1]]


@torch.no_grad()
def teacher_nodes(
    field: Field, schedule: Schedule, table: Table, stride: int, x: Tensor, analytic_first: bool, feature_dim: int
) -> TeacherNodes:
    """Run the teacher's table from x (B, *); every `stride`-th node of its grid is a node of the student.

    analytic_first: the student takes its first slope analytically, so the teacher's is replaced there.
    """
    predictions: list[Prediction] = []

    def remember(state: Tensor, t: Tensor) -> Prediction:
        predictions.append(field(state, t))
        return predictions[-1]

    states = trajectory(remember, table, x)
    kept = [predictions[e] for e in _evaluations_at_nodes(table)[::stride]]
    if analytic_first:
        at = levels(schedule, table.grid, x.device)
        kept[0] = analytic_prediction(x, at.alpha[0], at.rho[0], feature_dim)
    return TeacherNodes(
        states=torch.stack(states[::stride]),
        eps=torch.stack([p.eps for p in kept]),
        features=torch.stack([features_of(p, feature_dim) for p in kept]),
    )


def step_errors(
    field: Field, schedule: Schedule, grid: Grid, directions: DirectionRule, teacher: TeacherNodes
) -> Tensor:
    """(N,): each step's mean squared distance to the teacher's next node, in units of alpha^2 + sigma^2 there.

    `field` must accept the samples of all N steps at once, step by step: (N B, *).
    """
    steps, batch = teacher.eps.shape[:2]
    at = levels(schedule, grid, teacher.states.device)
    step = torch.arange(steps, device=teacher.states.device).repeat_interleave(batch)
    log_rho = torch.stack([at.rho[step].log(), at.rho[step + 1].log()], dim=1)
    chosen = directions(teacher.features.flatten(0, 1), step, log_rho)
    x, eps = teacher.states[:-1].flatten(0, 1), teacher.eps.flatten(0, 1)
    reached = mean_direction_step(field, schedule, at, step, x, eps, chosen)
    distance = (reached - teacher.states[1:].flatten(0, 1)).unflatten(0, (steps, batch)).square()
    return distance.flatten(1).mean(1) / (at.alpha[1:].square() * (1 + at.rho[1:].square()))
