"""Learned tables: DPM-Solver++(3M) plus learned corrections on a learned grid (the Generalised Solver, arXiv 2510.17699).

For the steps n = 0 .. N - 1, with r and w the weights of DPM-Solver++ on the learned grid and s^2 = alpha^2 + sigma^2,

    x_{n+1} = r_n x_n + sum_j w_nj D_j + sigma_{n+1} sum_j a_nj x_j / s_j + alpha_{n+1} sum_j c_nj D_j      (j = 0 .. n)

where D_j is the clean estimate of x_j at the evaluation time e_j. In the angle theta = atan2(sigma, alpha) of the noise level,

    theta_n = theta_N + (theta_0 - theta_N) sum_{k >= n} p_k,    p = softmax(log p_start + bounded(gap))
    tan theta(e_n) = exp(bounded(shift_n)) tan theta_n,          kept between the two ends of the grid

and a, c, gap and shift are learned. All zero is DPM-Solver++ on the grid that learning starts from.

One learning rate serves all four, because all are relative changes: `gap` of a step's length, `shift` of a noise level, `a`
of the noise in a state, `c` of its signal. The angle is finite at both ends of every schedule and the same for the same noise
level, so the same a, c and gap are the same solver of y = x / alpha on every schedule. (As published, a and c are in units of
the state, and the times come from stick breaking of t.)

x_1 .. x_n are combinations of x_0 and the D_j, so weights on all states add no solver that weights on x_n and all D_j lack;
they are the published form, and cost no evaluation.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from midway.samplers.fused import weighted_sum
from midway.samplers.grids import Grid, is_grid
from midway.samplers.multistep import dpmpp_weights
from midway.samplers.prediction import Field, Prediction
from midway.samplers.rows import CompiledRow, Execution, Row
from midway.samplers.schedule import Schedule, fingerprint
from midway.samplers.table import Table

REACH = 4.0
"""A learned gap or noise level is at most e^4 times what it started from: the grid keeps falling whatever is learned."""


class Coefficients(NamedTuple):
    """A learned table's numbers, float64, differentiable.

    times (N + 1,): the grid. evaluations (E,): where the field is evaluated; E = N, or N - 1 if the first row is
    analytic, without an evaluation. states (N, N), predictions (N, E): the rows' weights, zero on what a row does not have yet.
    """

    times: Tensor
    evaluations: Tensor
    states: Tensor
    predictions: Tensor


class LearnedTable(nn.Module):
    """A table of N steps that learns. It starts as DPM-Solver++ of `order` on `grid`; the grid's two ends never move.

    analytic_first: the first clean estimate is the analytic one instead of an evaluation. ValueError for a grid that does not
    fall, for another order, or for a grid that an analytic first step leaves without an evaluation.
    """

    grid: Tensor

    def __init__(self, schedule: Schedule, grid: Grid, order: int = 3, analytic_first: bool = False) -> None:
        super().__init__()
        times = torch.tensor(grid, dtype=torch.float64)
        steps = len(grid) - 1
        if steps < 1 + analytic_first or not is_grid(grid):
            raise ValueError(
                f"a learned table needs a falling grid within [0, 1] of at least {1 + analytic_first} steps, got {grid}: "
                "choose one of grids.py, of more steps if the first is analytic"
            )
        self.schedule, self.order, self.analytic_first = schedule, order, analytic_first
        self.register_buffer("grid", times)
        self.gap = nn.Parameter(torch.zeros(steps))
        self.shift = nn.Parameter(torch.zeros(steps))
        self.states = nn.Parameter(torch.zeros(steps, steps))
        self.predictions = nn.Parameter(torch.zeros(steps, steps))
        dpmpp_weights(schedule, times, order)  # ValueError for an unsupported order or end

    def restart(self, grid: Grid) -> None:
        """Forget what was learned and start from DPM-Solver++ on another grid of as many steps; ValueError for any other."""
        if not is_grid(grid) or len(grid) != len(self.grid):
            raise ValueError(f"this table begins on a falling grid of {len(self.grid)} times within [0, 1], got {grid}")
        with torch.no_grad():
            self.grid.copy_(torch.tensor(grid, dtype=torch.float64))
            for parameter in self.parameters():
                parameter.zero_()

    @property
    def nfe(self) -> int:
        """Evaluations of the field per sample."""
        return len(self.grid) - 1 - self.analytic_first

    def times(self) -> Tensor:
        """The learned grid, float64 (N + 1,), strictly falling."""
        angle = angle_of(self.schedule, self.grid)
        share = torch.softmax((angle[:-1] - angle[1:]).log() + _bounded(self.gap), dim=0)
        left = share.flip(0).cumsum(0).flip(0)[1:]  # the share of the way that is left after every step but the last
        inner = time_of_angle(self.schedule, angle[-1] + (angle[0] - angle[-1]) * left)
        return torch.cat([self.grid[:1], inner, self.grid[-1:]])

    def evaluation_times(self, times: Tensor) -> Tensor:
        """The evaluation time of the state at each of `times` (N,)."""
        alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        evaluations = time_of_angle(self.schedule, torch.atan2(sigma * _bounded(self.shift).exp(), alpha))
        return _clamp_straight(evaluations, self.grid[-1], self.grid[0])

    def coefficients(self) -> Coefficients:
        """Everything a solver needs, as differentiable functions of the parameters."""
        times = self.times()
        alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        norm = torch.hypot(alpha, sigma)
        ratio, weights = dpmpp_weights(self.schedule, times, self.order)
        states = torch.diag(ratio) + (sigma[1:, None] * self.states.double() / norm[:-1]).tril()
        predictions = weights + (alpha[1:, None] * self.predictions.double()).tril()
        evaluations = self.evaluation_times(times[:-1])
        if self.analytic_first:  # D_0 = x_0 alpha / (s (s + sigma)), from eps = x / s
            share = alpha[0] / (norm[0] * (norm[0] + sigma[0]))
            states = torch.cat([states[:, :1] + share * predictions[:, :1], states[:, 1:]], dim=1)
            predictions, evaluations = predictions[:, 1:], evaluations[1:]
        return Coefficients(times, evaluations, states, predictions)

    @torch.no_grad()
    def table(self, metadata: Mapping[str, str] | None = None) -> Table:
        """The solver as plain numbers, for `sample`. ValueError when a parameter is not finite."""
        times, evaluations, states, predictions = (c.tolist() for c in self.coefficients())
        first = int(self.analytic_first)
        rows = tuple(
            Row(
                time=evaluations[n - first] if n >= first else None,
                arrival=times[n + 1],
                states=tuple(states[n][: n + 1]),
                predictions=tuple(predictions[n][: n + 1 - first]),
            )
            for n in range(len(times) - 1)
        )
        nodes, made_for = tuple(range(len(times))), fingerprint(self.schedule)
        return Table("table", tuple(times), nodes, rows, dict(metadata or {}), made_for)


def rollout(field: Field, learned: LearnedTable, x: Tensor) -> Tensor:
    """What `sample` gives for the table of `learned`, differentiable. x (B, *) at `grid[0]` -> (B, *) at `grid[-1]`."""
    _, evaluations, states, predictions = (c.to(x) for c in learned.coefficients())
    execution = Execution([_row(learned, n, states[n], predictions[n]) for n in range(len(states))], x)
    for row in execution.rows:
        number = row.evaluation
        execution.advance(None if number is None else field(execution.state, evaluations[number].expand(x.shape[0])).x0)
    return execution.state


def _row(learned: LearnedTable, n: int, states: Tensor, predictions: Tensor) -> CompiledRow:
    """Row n, with weights that are tensors; all states and predictions stay, for the gradient."""
    made = n + 1 - learned.analytic_first
    weights = (*states[: n + 1].unbind(), *predictions[:made].unbind())
    sources = (*range(n + 1), *(len(learned.grid) + j for j in range(made)))
    return CompiledRow(
        evaluation=made - 1 if made else None,
        weights=(),
        sources=sources,
        noise=0.0,
        last_use=(),
        combine=lambda buffers: weighted_sum(weights, [buffers[j] for j in sources]),
    )


def checkpointed(network: Callable[..., Prediction]) -> Callable[..., Prediction]:
    """`network` that keeps no activations and is run again in the backward pass: memory of one evaluation instead of all.

    Wrap what is wrapped in an EvaluationCounter, not the counter, so that running again does not count.
    """

    def again(*arguments: Tensor) -> Prediction:
        return checkpoint(network, *arguments, use_reentrant=False, preserve_rng_state=False)

    return again


def angle_of(schedule: Schedule, t: Tensor) -> Tensor:
    """atan2(sigma, alpha) in [0, pi / 2]: the noise level, finite on every schedule."""
    return torch.atan2(schedule.sigma(t), schedule.alpha(t))


def time_of_angle(schedule: Schedule, angle: Tensor) -> Tensor:
    """The t at which `angle_of` is `angle` float64 (N,), differentiable on every schedule.

    The derivative is that of the inverse function, since a schedule may find its times by bisection.
    """
    with torch.no_grad():
        t = schedule.time_of_rho(angle.tan().clamp(max=math.tan(math.pi / 2)))
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        d_alpha, d_sigma = schedule.rates(t)
        slope = (alpha * d_sigma - sigma * d_alpha) / (alpha.square() + sigma.square())
    return t + (angle - angle.detach()) / slope


def _bounded(raw: Tensor) -> Tensor:
    """float64, in (-REACH, REACH), with slope 1 at 0."""
    return REACH * torch.tanh(raw.double() / REACH)


def _clamp_straight(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Clamped, with the gradient of x: what has left the range can come back."""
    return x.clamp(low, high).detach() + (x - x.detach())  # no rounding: the value stays within the range
