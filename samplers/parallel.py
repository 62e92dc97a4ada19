"""Sampling in parallel over time: all evaluations of a stretch of the trajectory in one batch, repeated until nothing changes.

A table (table.py) is a triangular system for its states. A *wave* evaluates the field at all states x^k of a window in one
batch, and then solves the rows exactly with a line in place of each prediction D_j:

    x_{i+1} = sum_j states[j] x_j + sum_j predictions[j] (D_j^k + g_j (x_j - x_j^k)) + noise z

On a one-step table that is x_{i+1} = F_i(x_i^k) + a_i (x_i - x_i^k) with a_i = states[i] + predictions[i] g_i. The slope g_j is
a number known beforehand, so no Jacobian of the network is needed:

    picard    g = sigma' / (alpha sigma' - alpha' sigma)    the velocity stays as it was: a = 1 on Euler's table
    gaussian  g = alpha c / (alpha^2 c + sigma^2)           that of the posterior mean for data N(0, c)

`picard` is the iteration of Shih et al. 2023 (ParaDiGMS, arXiv 2305.16317, section 3). `gaussian` is a quasi-Newton iteration in
the sense of Lim et al. 2023 (DEER, arXiv 2309.12252): such data need one wave, and on DDIM's table it is the same on every
schedule. On variance-preserving schedules the two are one at c = 1. With `memory` > 0 Anderson mixing over the last waves
accelerates either, triangular as in Tang et al. 2024 (ParaTAA, arXiv 2402.09970, section 3): with G the solution above,
r = G - x^k, and dx, dr the differences between successive waves,

    x_i = G_i - sum_m gamma_im (dx_im + dr_im),    gamma_i = argmin sum_{l <= i} |r_l - sum_m gamma_m dr_lm|^2 / s_l^2

with s^2 = alpha^2 + sigma^2. The first state of a window depends on final ones alone and is not mixed, so every wave settles one
evaluation at least: after as many waves as the table has evaluations, the end is the one that `sample` finds.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from typing import Literal, get_args

import torch
from torch import Tensor

from midway.samplers.prediction import Field, acting, copies, expand, on_device
from midway.samplers.rows import Execution, NoiseSource
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

Method = Literal["picard", "gaussian"]

FieldOfCopies = Callable[[int], Field]
"""`fields(n)` is the field for n copies of the batch, (n B, *) with sample b of copy k at k B + b: labels repeat n times.
Without labels it is `lambda copies: field`."""

RIDGE = 1e-10
"""Of the trace of Anderson's normal equations, added to their diagonal."""


@dataclass(frozen=True)
class ParallelConfig:
    """How to iterate."""

    method: Method = "gaussian"
    tolerance: float = 1e-3
    """A state has settled when it changes by at most this, root mean square, in units of sqrt(alpha^2 + sigma^2)."""
    window: int | None = None
    """Evaluations of a wave, per sample; None for the whole trajectory."""
    memory: int = 0
    """Earlier waves in Anderson mixing; 0 for none. It saves `picard` about a third of its waves where the two differ, `gaussian`
    none; the error may then be a few times the tolerance."""
    variance: float = 1.0
    """Variance c of the data: the slope of `gaussian`, and the first guess of both methods."""

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ValueError(f"unknown method {self.method!r}: choose one of {', '.join(get_args(Method))}")
        if not self.tolerance >= 0:
            raise ValueError(
                f"tolerance must be at least 0, got {self.tolerance}: 0 is as exact as the sequential sampler"
            )
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window holds at least 1 evaluation, got {self.window}: None is the whole trajectory")
        if self.memory < 0:
            raise ValueError(f"memory must be at least 0, got {self.memory}: 0 is no acceleration")
        if not self.variance > 0:
            raise ValueError(f"the variance of the data must be positive, got {self.variance}: standardised data has 1")


@dataclass(frozen=True)
class ParallelSample:
    """The end x (B, *), the waves it took, and the evaluations of the field per sample in all of them."""

    x: Tensor
    waves: int
    evaluations: int


def gaussian_slopes(schedule: Schedule, times: Tensor, variance: float = 1.0) -> Tensor:
    """dD/dx (N,) at `times` (N,) for data N(0, variance)."""
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    return alpha * variance / (alpha.square() * variance + sigma.square())


def picard_slopes(schedule: Schedule, times: Tensor) -> Tensor:
    """dD/dx (N,) at `times` (N,) under which the velocity alpha' D + sigma' (x - alpha D) / sigma does not depend on x."""
    d_alpha, d_sigma = schedule.rates(times)
    return d_sigma / (schedule.alpha(times) * d_sigma - d_alpha * schedule.sigma(times))


def sample_parallel(
    fields: FieldOfCopies,
    table: Table,
    schedule: Schedule,
    x: Tensor,
    config: ParallelConfig | None = None,
    noise: NoiseSource | None = None,
) -> ParallelSample:
    """`sample` with many evaluations at a time. x: (B, *) at `table.grid[0]`; the end is at `table.grid[-1]`.

    The tolerance holds for every sample; the host waits for the device once a wave. ValueError for a table of another schedule,
    one that jumps, or one that draws noise without a source; FloatingPointError when a state stops being finite.
    """
    table.check(schedule, noise)
    table.check_plain("parallel sampling")
    draws = {i: noise(x) for i, row in enumerate(table.rows) if row.noise != 0 and noise is not None}
    system = _System(table, schedule, x, config or ParallelConfig(), draws)
    while not system.done:
        system.wave(fields)
    return ParallelSample(system.states[len(table.rows)], system.waves, system.evaluations)


@dataclass
class ParallelSampler:
    """`sample_parallel` as a sampler; `waves` is the most that a run has taken so far."""

    rows: Table
    schedule: Schedule
    config: ParallelConfig = ParallelConfig()
    waves: int = 0
    table: None = None

    def __post_init__(self) -> None:
        self.grid, self.nfe, self.card = self.rows.grid, self.rows.nfe, self.rows.card
        self.hash = hashlib.sha256(f"{self.rows.hash} {self.config}".encode()).hexdigest()[:12]

    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) at `grid[0]` -> (B, *) at `grid[-1]`; errors as `sample_parallel`."""
        found = sample_parallel(partial(copies, field), self.rows, self.schedule, x, self.config, noise)
        self.waves = max(self.waves, found.waves)
        return found.x


class _System:
    """The states of a table while they are solved for: final up to `settled`, with a value up to `reached`."""

    def __init__(
        self, table: Table, schedule: Schedule, x: Tensor, config: ParallelConfig, draws: dict[int, Tensor]
    ) -> None:
        self.rows, self.config, self.draws = table.rows, config, draws
        compiled = table.rows_for(((0.0, 1.0),) * table.nfe)  # every wave reads all of them again
        self.execution = Execution([replace(row, last_use=()) for row in compiled], x)
        self.states = self.execution.buffers
        times = torch.tensor(table.times, dtype=torch.float64)
        arrivals = torch.tensor([table.grid[0], *(row.arrival for row in table.rows)], dtype=torch.float64)
        gaussian = gaussian_slopes(schedule, times, config.variance)
        self.guess = gaussian.tolist()
        self.slopes = (gaussian if config.method == "gaussian" else picard_slopes(schedule, times)).tolist()
        self.norms = torch.hypot(schedule.alpha(arrivals), schedule.sigma(arrivals)).tolist()
        self.found: dict[int, tuple[Tensor, Tensor]] = {}  # evaluation -> (D_j^k, x_j^k), until its state has settled
        self.lines = [x] * len(self.guess)  # evaluation -> its prediction at the present state
        self.mixing = _Mixing(config.memory)
        self.settled = self.reached = self.waves = self.evaluations = 0
        self._extend()

    @property
    def done(self) -> bool:
        return self.settled == len(self.rows)

    def wave(self, fields: FieldOfCopies) -> None:
        """Evaluate the window, solve it, and move it on."""
        self.waves += 1
        self._evaluate(fields)
        before = {i: self.states[i] for i in range(self.settled + 1, self.reached + 1)}
        self._solve(self.settled, self.reached)
        after = {i: self.states[i] for i in before}
        first = self.settled + 1  # its inputs are final
        changes = self._changes(before)
        self._settle({i for i, change in changes.items() if change <= self.config.tolerance or i == first})
        for i, mixed in self.mixing.step(before, after, self.norms).items():
            if i > self.settled:
                self.states[i] = mixed
        self._extend()

    def _evaluate(self, fields: FieldOfCopies) -> None:
        """Evaluate the window's states in one batch, or in one for each of the fields that are `acting` there."""
        times = {i: time for i in range(self.settled, self.reached) if (time := self.rows[i].time) is not None}
        single = fields(1)
        for _, group in groupby(times, lambda i: acting(single, times[i])):
            some = list(group)
            x = torch.cat([self.states[i] for i in some])
            t = on_device(tuple(times[i] for i in some), x.dtype, x.device).repeat_interleave(len(x) // len(some))
            x0 = acting(fields(len(some)), times[some[0]])(x, t).x0.to(x.dtype)
            for i, part in zip(some, x0.chunk(len(some)), strict=True):
                self.found[len(self.rows[i].predictions) - 1] = part, self.states[i]
        self.evaluations += len(times)

    def _solve(self, start: int, end: int) -> None:
        """Form the states start + 1 .. end from those before them."""
        self.execution.row = start
        for i in range(start, end):
            row, j = self.rows[i], len(self.rows[i].predictions) - 1
            if row.time is not None:
                self.lines[j] = self._line(j, self.states[i])
            self.execution.advance(None if row.time is None else self.lines[j], partial(self.draws.__getitem__, i))

    def _line(self, j: int, x: Tensor) -> Tensor:
        """Prediction j at state x: the line through the field's value; before that a guess, in the first window N(0, c)'s."""
        if j not in self.found:
            return self.lines[j - 1] if self.waves else x * self.guess[j]
        x0, base = self.found[j]
        return torch.add(x0, x - base, alpha=self.slopes[j])

    def _changes(self, before: dict[int, Tensor]) -> dict[int, float]:
        """How far each state moved: root mean square of the worst sample, in units of sqrt(alpha^2 + sigma^2)."""
        change = torch.stack([self.states[i] for i in before]) - torch.stack(list(before.values()))
        worst = change.reshape(*change.shape[:2], -1).square().mean(2).sqrt().amax(1)
        changes = {i: rms / self.norms[i] for i, rms in zip(before, worst.tolist(), strict=True)}
        for i, change in changes.items():
            if not math.isfinite(change):
                raise FloatingPointError(
                    f"the state at t = {self.rows[i - 1].arrival:.4g} stopped being finite in wave {self.waves}: if `sample` "
                    "gives finite values for this field and table, use method 'gaussian', no memory, or a smaller window"
                )
        return changes

    def _settle(self, settled: set[int]) -> None:
        """Move on over the states that have settled, and over rows that evaluate nothing."""
        while not self.done and (self.rows[self.settled].time is None or self.settled + 1 in settled):
            self.found.pop(len(self.rows[self.settled].predictions) - 1, None)
            self.settled += 1

    def _extend(self) -> None:
        """Open the window: a first guess for the states that enter it."""
        end, room = self.settled, self.config.window or len(self.guess)
        while end < len(self.rows) and (room > 0 or self.rows[end].time is None):
            room -= self.rows[end].time is not None
            end += 1
        self._solve(self.reached, end)
        self.reached = end
        self._settle(set())


class _Mixing:
    """Triangular Anderson mixing over the last `memory` waves. A state that a wave did not hold has differences of zero."""

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.last: dict[int, tuple[Tensor, Tensor]] = {}  # state -> (x, r) of the last wave
        self.waves: list[dict[int, tuple[Tensor, Tensor]]] = []  # state -> (dr, dx + dr) of a wave

    def step(self, before: dict[int, Tensor], after: dict[int, Tensor], norms: list[float]) -> dict[int, Tensor]:
        """The states to go on from, for x^k (`before`) and G (`after`): state -> (B, *)."""
        if self.memory == 0:
            return after
        now = {i: (x, after[i] - x) for i, x in before.items()}
        if self.last:
            changed = {i: (now[i][1] - self.last[i][1], now[i][0] - self.last[i][0]) for i in now if i in self.last}
            self.waves = [*self.waves, {i: (dr, dx + dr) for i, (dr, dx) in changed.items()}][-self.memory :]
        self.last = now
        return self._mixed({i: r for i, (_, r) in now.items()}, after, norms) if self.waves else after

    def _mixed(self, residuals: dict[int, Tensor], after: dict[int, Tensor], norms: list[float]) -> dict[int, Tensor]:
        zero = torch.zeros_like(next(iter(after.values())))
        past = {i: [wave.get(i, (zero, zero)) for wave in self.waves] for i in residuals}
        sides = [_normal_equations([dr for dr, _ in past[i]], r, norms[i]) for i, r in residuals.items()]
        gram = torch.stack([g for g, _ in sides]).cumsum(0)  # (states, B, M, M): row i sums the states up to i
        target = torch.stack([b for _, b in sides]).cumsum(0)
        gamma = torch.linalg.solve_ex(gram + _ridge(gram), target)[0].squeeze(-1)  # (states, B, M)
        mixed = {}
        for (i, g), row in zip(after.items(), gamma.to(zero.dtype), strict=True):
            for (_, step), weight in zip(past[i], row.unbind(1), strict=True):
                g = g - expand(weight, g) * step
            mixed[i] = g
        return mixed


def _normal_equations(differences: list[Tensor], residual: Tensor, norm: float) -> tuple[Tensor, Tensor]:
    """M times (B, *) and (B, *) -> float64 (B, M, M) and (B, M, 1)."""
    d = torch.stack([x.reshape(len(x), -1) for x in differences], dim=1).double() / norm
    return d @ d.mT, d @ (residual.reshape(len(residual), -1, 1).double() / norm)


def _ridge(gram: Tensor) -> Tensor:
    """A small multiple of the identity, which leaves directions without differences unchanged."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=1e-100)
    return RIDGE * trace[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
