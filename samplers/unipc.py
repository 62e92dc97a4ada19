"""UniPC: a multistep predictor, corrected by the next step's evaluation (Zhao et al. 2023, arXiv 2302.04867).

With lambda = log(alpha / sigma), h = lambda_s - lambda_t and D_j the x0 predictions at t and before (data-prediction form,
appendix A and algorithms 5 to 8):

    predictor   x~_s = sigma_s / sigma_t x_t + alpha_s sum_j p_j D_j
    corrector   x_s  = sigma_s / sigma_t x_t + alpha_s (sum_j c_j D_j + c_s D_s),      D_s = D(x~_s)

p and c are the weights of the polynomial through their points, integrated exactly against the exponential; with two points the
paper fixes the difference's coefficient to B(h) / 2 instead, where

    bh1: B = h,      bh2: B = 1 - e^-h.

D_s is also the evaluation that the next step needs: corrected = predicted + alpha_s (sum (c_j - p_j) D_j + c_s D_s), so a step
is one row and costs one evaluation. The grid's nodes are the predicted states; the last one is not corrected, as in the paper.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from midway.samplers.exponential import ZERO, adams_weights, begin, log_rho, need_noise_at_the_end, weighted
from midway.samplers.grids import Grid
from midway.samplers.recorder import Combination
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

Variant = Literal["bh1", "bh2"]


@dataclass(frozen=True)
class _Step:
    """A predictor step that the next evaluation will correct: its points (lambda, x0), newest first, their weights, and h."""

    points: list[tuple[float, Combination]]
    weights: list[float]
    h: float


def unified_weights(places: Sequence[float], h: float, variant: Variant) -> list[float]:
    """Weights of D at `places` (in steps, the first 0) that sum to 1 - e^-h (arXiv 2302.04867, eq. 3 and 9)."""
    if len(places) == 1:
        return [-math.expm1(-h)]
    if len(places) == 2:  # (1 - e^-h) D + B(h) / 2 (D' - D) / place
        slope = (h if variant == "bh1" else -math.expm1(-h)) / (2 * places[1])
        return [-math.expm1(-h) - slope, slope]
    return [h * math.exp(-h) * w for w in adams_weights(places, rate=h)]


def _correction(step: _Step, x0: Combination, alpha: float, variant: Variant) -> Combination:
    """Corrected minus predicted state; x0 is the prediction at the predicted state."""
    here = step.points[0][0]
    places = [(u - here) / step.h for u, _ in step.points]
    corrector = unified_weights([*places[:1], 1.0, *places[1:]], step.h, variant)
    predictor = [step.weights[0], 0.0, *step.weights[1:]]
    values = [step.points[0][1], x0, *(value for _, value in step.points[1:])]
    return alpha * weighted([c - p for c, p in zip(corrector, predictor, strict=True)], values)


def unipc(
    schedule: Schedule,
    grid: Grid,
    analytic_first: bool = False,
    order: int = 2,
    variant: Variant = "bh2",
    lower_order_final: bool = True,
) -> Table:
    """UniPC-p, p = 1-3 (arXiv 2302.04867, algorithms 5-8). Order p + 1 from exact history with `lower_order_final=False`.

    The first steps have order 1, 2, ...; with `lower_order_final` the last ones have ..., 2, 1. A step from or to pure noise is
    DDIM's, not corrected, and supports no other one.
    """
    if order not in (1, 2, 3) or variant not in get_args(Variant):
        raise ValueError(f"unipc has orders 1, 2 and 3 and variants bh1 and bh2, got {order} and {variant!r}")
    record = begin(f"unipc{order}", schedule, grid)
    if not lower_order_final:
        need_noise_at_the_end(record)
    past: list[tuple[float, Combination]] = []
    last: _Step | None = None
    for i, (t, s) in enumerate(pairwise(grid)):
        now = record.first(t, analytic_first)
        x = now.x + (ZERO if last is None else _correction(last, now.x0, record.alpha(t), variant))
        if record.alpha(t) > 0:
            past = [(-log_rho(record, t), now.x0), *past][:order]
        points = past[: len(grid) - 1 - i] if lower_order_final else past
        ratio = record.sigma(s) / record.sigma(t)
        if not points or record.alpha(s) <= 0:
            last = None
            record.advance(ratio * x + (record.alpha(s) - ratio * record.alpha(t)) * now.x0, s)
            continue
        h = -log_rho(record, s) - points[0][0]
        weights = unified_weights([(u - points[0][0]) / h for u, _ in points], h, variant)
        last = _Step(points, weights, h)
        record.advance(ratio * x + record.alpha(s) * weighted(weights, [value for _, value in points]), s)
    return record.table(variant=variant)
