"""UniPC: a multistep predictor, corrected by the next step's evaluation (Zhao et al. 2023, arXiv 2302.04867).

With lambda = -log rho, h the step in lambda and D_j the x0 predictions (data-prediction form, appendix A and algorithms 5 to 8),

    predictor   x~_s = sigma_s / sigma_t x_t + alpha_s sum_j p_j D_j
    corrector   x_s  = sigma_s / sigma_t x_t + alpha_s (sum_j c_j D_j + c_s D_s),      D_s = D(x~_s)

is the one formula (generator.py) with x0 a polynomial in log rho, phi = rho and a corrector, except that with two points the
paper fixes the coefficient of the difference to B(h) / 2, where

    bh1: B = h,      bh2: B = 1 - e^-h.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

from midway.samplers.exponential import begin, need_noise_at_the_end
from midway.samplers.generator import Method, middle, multistep
from midway.samplers.grids import Grid
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

Variant = Literal["bh1", "bh2"]


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

    def two_points(places: Sequence[float], h: float) -> list[float] | None:
        ahead = middle(places, h)
        if ahead is None or variant == "bh2":
            return ahead
        slope = h / -math.expm1(-h) * ahead[1]
        return [1 - slope, slope]

    method = Method("x0", "log rho", order, order + 1, lower_order_final, two_points)
    return multistep(record, method, analytic_first, variant=variant)
