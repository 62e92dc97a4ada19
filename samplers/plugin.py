"""AMED-Plugin: one learned inner node per step inside another solver (Zhou et al. 2024, arXiv 2312.00094).

In the coordinates y = x / alpha, rho = sigma / alpha a step from t to s has two halves that meet at rho_m = rho_s^r rho_t^(1-r):

    y_m = k y  +   sum_j w_j F_j         F_0 the evaluation at rho_t, F_1, F_2, ... the ones before it
    y_s = k y' + c sum_j w_j F_j         F_0 the evaluation of y_m at a rho_m, F_1 the one at rho_t, ...

    base       F    y'   weights of the first half, of the second half
    none       eps  y    Euler's;                      w_0 = rho_s - rho_t                        (this is AMED-Solver)
    dpm2       eps  y    Euler's;                      w_0 = (rho_s - rho_t) / 2r, w_1 = (rho_s - rho_t) (1 - 1/2r)
    euler      eps  y_m  Euler's in both halves: w_0 is the half's length in rho, k = 1            (Euler in rho is DDIM)
    ipndm4     eps  y_m  Adams-Bashforth with the coefficients of equal steps, of order 1, 2, 3, 4, 4, ...
    ipndm3     eps  y_m  the same of order at most 3
    dpmpp2m    x0   y_m  DPM-Solver++ multistep of order 1, 2, 2, ..., 2, 1; k = rho_to / rho_from
    dpmpp3m    x0   y_m  the same of order 1, 2, 3, ..., 3, 2, 1

Both evaluations of a step enter the history of the multistep bases, at rho_t and at rho_m. c multiplies what the predictions
add, never k y. Two differences from the authors' code: eps of the second half is taken at a rho_m, where it is evaluated (they
divide x_m - D by the unscaled inner time), and x0 is not clipped to quantiles (dynamic thresholding), which only makes sense
for pixels in [-1, 1].
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from midway.samplers.adams import EQUAL_STEPS
from midway.samplers.exponential import begin_in_rho, need_noise_at_the_end, weighted
from midway.samplers.grids import Grid
from midway.samplers.multistep import difference_weights
from midway.samplers.recorder import Combination, Recorder, scalar
from midway.samplers.schedule import Schedule
from midway.samplers.step_parameters import MeanDirection
from midway.samplers.table import Table


@dataclass(frozen=True)
class Weights:
    """y_to = kept y_from + sum_j terms[j] F_j, newest prediction first; float64, one per sample (B,) or ()."""

    kept: Tensor
    terms: tuple[Tensor, ...]

    def scaled(self, c: Tensor) -> "Weights":
        """What the predictions add, times c."""
        return Weights(self.kept, tuple(c * w for w in self.terms))


Half = Callable[[Sequence[Tensor], Tensor, int], Weights]
"""(rho of all predictions so far, newest first; rho to reach; order) -> Weights. Differentiable in every rho."""


def adams(rhos: Sequence[Tensor], to: Tensor, order: int) -> Weights:
    """Adams-Bashforth with the coefficients of equal steps; order 1 is Euler."""
    return Weights(torch.ones_like(to), tuple((to - rhos[0]) * b for b in EQUAL_STEPS[order - 1]))


def mean_direction(rhos: Sequence[Tensor], to: Tensor, order: int) -> Weights:
    """The whole step along the inner slope (arXiv 2312.00094, eq. 9)."""
    return Weights(torch.ones_like(to), (to - rhos[1],))


def second_order(rhos: Sequence[Tensor], to: Tensor, order: int) -> Weights:
    """DPM-Solver-2 with its inner node anywhere (Lu et al. 2022, arXiv 2206.00927, algorithm 4): 1/2r on the inner slope."""
    middle, start = rhos[:2]
    inner = 0.5 * (start / to).log() / (start / middle).log()
    return Weights(torch.ones_like(to), ((to - start) * inner, (to - start) * (1 - inner)))


def exponential(rhos: Sequence[Tensor], to: Tensor, order: int) -> Weights:
    """DPM-Solver++ multistep of order 1 to 3 (`multistep.difference_weights`); steps are ratios of the noise levels."""
    h = (rhos[0] / to).log()
    gaps = [h / (before / after).log() for after, before in pairwise(rhos[:order])]
    near, far = (*gaps, torch.zeros_like(h), torch.zeros_like(h))[:2]
    slope, bend = difference_weights(h, near, far, torch.full_like(h, order))
    on_near, on_far = slope * near, bend * far
    newest = -torch.expm1(-h) + on_near
    return Weights(to / rhos[0], (newest, on_far - on_near, -on_far)[:order])


@dataclass(frozen=True)
class Base:
    """A solver that AMED can be plugged into."""

    reads: Literal["eps", "x0"]
    """Which prediction F is."""
    halfway: Half
    arrival: Half
    order: int = 1
    """How many predictions a half weighs at most."""
    from_start: bool = False
    """Whether the second half moves y, the state at the step's start, instead of y_m."""
    lower_order_final: bool = False

    @property
    def multistep(self) -> bool:
        """Whether a step weighs predictions of earlier steps."""
        return self.order > 1

    def read(self, now: Any) -> Any:
        """F of a `Prediction` or of `Symbols`."""
        return now.eps if self.reads == "eps" else now.x0

    def orders(self, step: int, steps: int, skipped: int = 0) -> tuple[int, int]:
        """The orders of the two halves of step number `step` of `steps`: at most the predictions made so far but `skipped`."""
        halves = 2 * steps
        left = halves if self.lower_order_final else 2 * halves
        first, second = (min(self.order, max(1, k + 1 - skipped), left - k) for k in (2 * step, 2 * step + 1))
        return first, second


BASES: dict[str, Base] = {
    "none": Base("eps", adams, mean_direction, from_start=True),
    "euler": Base("eps", adams, adams),
    "dpm2": Base("eps", adams, second_order, from_start=True),
    "ipndm3": Base("eps", adams, adams, order=3),
    "ipndm4": Base("eps", adams, adams, order=4),
    "dpmpp2m": Base("x0", exponential, exponential, order=2, lower_order_final=True),
    "dpmpp3m": Base("x0", exponential, exponential, order=3, lower_order_final=True),
}


def begin(schedule: Schedule, grid: Grid, base: str, name: str = "") -> Recorder:
    """A recorder for AMED on this base; ValueError for an unknown one, or a grid that does not have 0 < rho < inf throughout."""
    if base not in BASES:
        raise ValueError(f"unknown base '{base}': choose one of {', '.join(BASES)}")
    record = begin_in_rho(name or f"amed-plugin-{base}", schedule, grid)
    need_noise_at_the_end(record)
    return record


def plugin_table(
    schedule: Schedule,
    grid: Grid,
    base: str,
    constants: Sequence[MeanDirection],
    analytic_first: bool = False,
    name: str = "",
    analytic_history: bool = True,
) -> Table:
    """AMED-Plugin with constants per step, on the base of this name: two evaluations a step, one less with an analytic first.

    analytic_history: whether later halves may weigh an analytic first slope, or it serves its own half alone.
    With r = 1/2, c = a = 1 it is the base on a grid with every step halved in log rho (dpm2: on the grid itself).
    ValueError for an unknown base, another number of constants than steps, or a grid with an end at rho = 0 or infinity.
    """
    record = begin(schedule, grid, base, name)
    if len(constants) != len(grid) - 1:
        raise ValueError(
            f"{len(constants)} constants for {len(grid) - 1} steps: give one (r, c, a) per step of the grid"
        )
    solver, terms, rhos = BASES[base], [], []
    for i, ((t, s), step) in enumerate(zip(pairwise(grid), constants, strict=True)):
        first, second = solver.orders(i, len(constants), int(analytic_first and not analytic_history))
        now = record.first(t, analytic_first)
        y, rho_t, rho_s = now.x / record.alpha(t), scalar(record.rho(t)), scalar(record.rho(s))
        terms, rhos = [solver.read(now), *terms], [rho_t, *rhos]
        rho_m = rho_s**step.r * rho_t ** (1 - step.r)
        inner = record.time_of_rho(step.a * rho_m.item())
        y_m = _combine(solver.halfway(rhos, rho_m, first), y, terms)
        record.advance(record.alpha(inner) * y_m, inner, node=False)
        middle = record.evaluate(inner)
        terms, rhos = [solver.read(middle), *terms], [rho_m, *rhos]
        start = y if solver.from_start else middle.x / record.alpha(inner)
        weights = solver.arrival(rhos, rho_s, second).scaled(scalar(step.c))
        record.advance(record.alpha(s) * _combine(weights, start, terms), s)
    return record.table(base=base)


def unlearned(schedule: Schedule, grid: Grid, base: str, analytic_first: bool = False) -> Table:
    """The plugin before it learns: r = 1/2, c = a = 1 in every step."""
    return plugin_table(schedule, grid, base, [MeanDirection()] * (len(grid) - 1), analytic_first)


def _combine(weights: Weights, y: Combination, terms: Sequence[Combination]) -> Combination:
    factors = [weight.item() for weight in (weights.kept, *weights.terms)]
    return weighted(factors, [y, *terms[: len(weights.terms)]])  # older terms have no weight
