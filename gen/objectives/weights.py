"""Weights of the squared error of a unit-variance target, by the noise level.

With y = a x0 + b eps and a state that is given, an error d of x0 is an error -alpha / sigma d of eps, so

    error of y / sqrt(a^2 + b^2) = d (a sigma - b alpha) / (sigma sqrt(a^2 + b^2))

    own         1: the error of y, divided by its size
    velocity    the error of the velocity, divided by its size, whatever y is       Li & He 2025, arXiv 2511.13720
    min_snr     min(SNR, gamma) d^2, with SNR = alpha^2 / sigma^2                   Hang et al. 2023, arXiv 2303.09556, eq. 7
    learned     e^-u of own, with u(rho) added to the loss                          Karras et al. 2024, arXiv 2312.02696, eq. 14

x0 determines a velocity by 1 / sigma, eps and the score by 1 / alpha: the weight of `velocity` stays as it is at tau = 0.05
(times.py) below it for x0, and as it is at 0.95 above it for the others. That of v is bounded. u is learned with the network, and
e^-u L + u is least at u = log E L, so that all noise levels get gradients of one size.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from midway.gen.networks.layers import sinusoid
from midway.samplers.prediction import Target, target_coefficients
from midway.samplers.schedule import Schedule

Weighting = Literal["own", "velocity", "min_snr", "learned"]
WAVES, LONGEST = 64, 30.0
"""Of u: sines and cosines, and the longest period over 2 pi; log rho spans about 11."""
EDGES: dict[Target, float] = {"x0": 0.05, "eps": 0.95, "score": 0.95}
"""tau beyond which the weight of `velocity` does not grow, by the target."""


def weight(kind: Weighting, target: Target, schedule: Schedule, t: Tensor, gamma: float) -> Tensor:
    """The weight of the squared error of a unit-variance target at t (B,), shaped like t."""
    if kind in ("own", "learned") or (kind == "velocity" and target == "velocity"):
        return torch.ones_like(t)
    if kind == "velocity":
        t = up_to_edge(target, schedule, t)
        return (size_by_x0("velocity", schedule, t) / size_by_x0(target, schedule, t)).square()
    snr = (schedule.alpha(t) / schedule.sigma(t)).square()
    return snr.clamp(max=gamma) / size_by_x0(target, schedule, t).square()


class LossLevel(nn.Module):
    """u of noise levels rho (B,): a linear map of sines and cosines of log rho, which starts as 0."""

    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(WAVES, 1)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, rho: Tensor) -> Tensor:
        waves = sinusoid(rho.log(), WAVES, LONGEST)
        return self.map(waves.to(self.map.weight.dtype))[:, 0]


def up_to_edge(target: Target, schedule: Schedule, t: Tensor) -> Tensor:
    """t (B,), those beyond the target's edge moved there."""
    if target not in EDGES:
        return t
    rho, edge = schedule.rho(t), EDGES[target] / (1 - EDGES[target])
    beyond = rho < edge if edge < 1 else rho > edge
    return torch.where(beyond, schedule.time_of_rho(torch.full_like(t, edge)), t)


def size_by_x0(target: Target, schedule: Schedule, t: Tensor) -> Tensor:
    """Error of the unit-variance target per error of x0, up to its sign, shaped like t."""
    a, b = target_coefficients(target, t, schedule)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return (a - b * alpha / sigma) / (a.square() + b.square()).sqrt()
