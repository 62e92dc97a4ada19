"""DPM-Solver++ multistep: the weights of every step as differentiable functions of the times, and its builders.

With lambda = log(alpha / sigma), h = lambda_s - lambda_t, h0 and h1 the two steps before, r0 = h0 / h, r1 = h1 / h, and D, D',
D'' the x0 predictions at t and at the two nodes before it (Lu et al. 2022, arXiv 2211.01095, algorithm 2 and appendix B):

    x_s  = sigma_s / sigma_t x - alpha_s (e^-h - 1) D + alpha_s p2 D1 - alpha_s p3 D2
    p2   = (e^-h - 1) / h + 1,                p3 = (e^-h - 1 + h) / h^2 - 1/2
    D1_0 = (D - D') / r0,                     D1_1 = (D' - D'') / r1
    1M:  D1 = D2 = 0
    2M:  D1 = D1_0 and p2 replaced by -(e^-h - 1) / 2,  D2 = 0
    3M:  D1 = D1_0 + r0 / (r0 + r1) (D1_0 - D1_1),      D2 = (D1_0 - D1_1) / (r0 + r1)

h^2 times the second derivative of the interpolating parabola is 2 (D1_0 - D1_1) / (r0 + r1), twice the published D2. So the
published 3M is of order 2 with a small constant; `curvature=2` gives order 3.
"""

import math
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from midway.samplers.exponential import begin, begin_in_rho, need_noise_at_the_end, weighted
from midway.samplers.generator import exponential_step
from midway.samplers.grids import Grid
from midway.samplers.recorder import Symbols
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table


def _gaps(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step n's h, and the inverse ratios 1 / r0 = h / h0 and 1 / r1 = h / h1, (N,) each; 0 where a step was infinite."""
    finite, one = (alpha > 0) & (sigma > 0), torch.ones_like(alpha)
    # log(sigma / alpha) where it is finite; 0 elsewhere, so that no gradient is infinite
    log_rho = torch.where(finite, sigma, one).log() - torch.where(finite, alpha, one).log()
    known = finite[:-1] & finite[1:]
    h = torch.where(known, log_rho[:-1] - log_rho[1:], torch.ones_like(alpha[1:]))
    inverse = torch.where(known, 1 / h, torch.zeros_like(h))  # a step from pure noise is infinitely long
    before = torch.cat([inverse.new_zeros(2), inverse])
    return h, h * before[1:-1], h * before[:-2]


def _orders(steps: int, order: int, lower_order_final: bool) -> Tensor:
    """int64 (N,): the order of every step; 1, 2, ... at the start, and ..., 2, 1 at the end with `lower_order_final`."""
    number = torch.arange(steps)
    rising = (number + 1).clamp(max=order)
    return torch.minimum(rising, steps - number) if lower_order_final else rising


def _check_arguments(times: Tensor, order: int) -> None:
    if order not in (1, 2, 3):
        raise ValueError(f"DPM-Solver++ multistep has order 1, 2 or 3, got {order}")
    if times.dim() != 1 or len(times) < 2 or times.dtype != torch.float64:
        raise ValueError(f"times must be float64 (N + 1,) with N >= 1, got {times.dtype} {tuple(times.shape)}")


def _check_levels(alpha: Tensor, sigma: Tensor, last_order: int) -> None:
    """Pure noise may be the first time, pure noise or data the last one, if its step is of order 1."""
    inner = slice(1, -1 if last_order == 1 else None)
    if not (bool((alpha[inner] > 0).all()) and bool((sigma[inner] > 0).all()) and bool(sigma[0] > 0)):
        raise ValueError(
            "DPM-Solver++ needs sigma > 0 at the grid's start, and alpha > 0 and sigma > 0 between its ends (at its end too "
            "without lower_order_final): use a grid from rho = 80 to rho = 0.002"
        )


def difference_weights(
    h: Tensor, near: Tensor, far: Tensor, order: Tensor, curvature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The weights of D1_0 = near (D - D') and D1_1 = far (D' - D'') in y_s = x_s / alpha_s; 0 at order 1, of D1_1 also at 2.

    h, near = 1 / r0 = h / h0, far = 1 / r1 = h / h1 and the order, of equal shape; float64, differentiable.
    """
    decay = torch.expm1(-h)
    p2, p3 = decay / h + 1, (decay + h) / h.square() - 0.5
    both = near + far
    share = torch.where(both != 0, far / torch.where(both != 0, both, torch.ones_like(both)), torch.zeros_like(both))
    # share = r0 / (r0 + r1), share * near = 1 / (r0 + r1)
    second = curvature * p3 * share * near
    third = order == 3
    slope = torch.where(third, p2 * (1 + share) - second, torch.where(order == 2, -decay / 2, torch.zeros_like(h)))
    bend = torch.where(third, second - p2 * share, torch.zeros_like(h))
    return slope, bend


def dpmpp_weights(
    schedule: Schedule, times: Tensor, order: int, lower_order_final: bool = True, curvature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(ratio (N,), weights (N, N)) of x_{n+1} = ratio[n] x_n + sum_j weights[n, j] D_j, differentiable in times (N + 1,).

    D_j is the x0 prediction at times[j]. Step n has order min(order, n + 1); with `lower_order_final` also at most N - n.
    `curvature` multiplies D2 of order 3: 1 as published, 2 for the exact parabola. times[0] may have alpha = 0: it supports its
    own step and no later one, and the gradient through the vanished ratios is taken as 0. ValueError for another order or dtype,
    and where a ratio is not finite.
    """
    _check_arguments(times, order)
    alpha, sigma = schedule.alpha(times), schedule.sigma(times)
    orders = _orders(len(times) - 1, order, lower_order_final).to(times.device)
    _check_levels(alpha, sigma, int(orders[-1]))
    h, near, far = _gaps(alpha, sigma)
    ratio, target = sigma[1:] / sigma[:-1], alpha[1:]
    slope, bend = difference_weights(h, near, far, orders, curvature)
    on_near, on_far = target * slope * near, target * bend * far
    newest = target - ratio * alpha[:-1] + on_near
    weights = torch.diag(newest) + torch.diag((on_far - on_near)[1:], -1)
    if len(times) > 3:
        weights = weights - torch.diag(on_far[2:], -2)
    return ratio, weights


def dpmpp(
    schedule: Schedule,
    grid: Grid,
    analytic_first: bool = False,
    order: int = 3,
    lower_order_final: bool = True,
    curvature: float = 1.0,
) -> Table:
    """DPM-Solver++ multistep of order 1 (DDIM), 2 or 3 from `dpmpp_weights`, whose options these are."""
    record = begin(f"dpmpp{order}m", schedule, grid)
    if order > 1 and not lower_order_final:
        need_noise_at_the_end(record)
    ratio, weights = dpmpp_weights(
        schedule, torch.tensor(grid, dtype=torch.float64), order, lower_order_final, curvature
    )
    past: list[Symbols] = []
    for n, (t, s) in enumerate(pairwise(grid)):
        past = [*past, record.first(t, analytic_first)][-3:]
        row = weights[n, n + 1 - len(past) : n + 1].tolist()
        record.advance(ratio[n].item() * past[-1].x + weighted(row, [now.x0 for now in past]), s)
    return record.table()


dpmpp2m = partial(dpmpp, order=2)
"""DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2). Order 2; the first step, and the last by default,
are of order 1, which keeps few-step runs stable and the global order."""


def dpmpp2s(schedule: Schedule, grid: Grid, analytic_first: bool = False) -> Table:
    """DPM-Solver++(2S), single step, r = 1/2 (arXiv 2211.01095, algorithm 1): two evaluations, no history. Order 2.

    u = sigma_m / sigma_t x - alpha_m (e^(-h/2) - 1) D(x, t) at lambda_m = lambda_t + h / 2, then the whole step with D(u, m).
    """
    record = begin_in_rho("dpmpp2s", schedule, grid)
    need_noise_at_the_end(record)
    for t, s in pairwise(grid):
        now = record.first(t, analytic_first)
        middle = record.time_of_rho(math.sqrt(record.rho(t) * record.rho(s)))
        record.advance(exponential_step(record, now.x, now.x0, t, middle), middle, node=False)
        record.advance(exponential_step(record, now.x, record.evaluate(middle).x0, t, s), s)
    return record.table()
