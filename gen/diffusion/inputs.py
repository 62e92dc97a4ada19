"""What a network gets as its time, and on which noise levels it is trained; networks of others have theirs.

    own    2/pi atan2(sigma, alpha); states and targets are scaled to unit variance
    ddpm   the timestep k in 0 .. 999 of linear betas from 1e-4 to 0.02 with the same noise level; states and targets as they are
    sit    1 - t, which is 1 at data; states and targets as they are

ddpm: Ho et al. 2020, arXiv 2006.11239, section 4; DiT, Peebles & Xie 2022, arXiv 2212.09748. sit: Ma et al. 2024, arXiv
2401.08740; LightningDiT, Yao et al. 2025, arXiv 2501.01423. Between timesteps k is a fraction, below the first level it is 0.
"""

import math
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from midway.samplers.discrete import Discrete, betas_of
from midway.samplers.grids import RHO_MAX, RHO_MIN

Inputs = Literal["own", "ddpm", "sit"]
CLOSE = 1e-9
"""A fraction of a timestep that is rounding in float64."""


def noise_angle(alpha: Tensor, sigma: Tensor) -> Tensor:
    """The network's time, 2/pi atan2(sigma, alpha) in [0, 1]."""
    return 2 / math.pi * torch.atan2(sigma, alpha)


@cache
def timesteps() -> Discrete:
    """The process of 1000 timesteps with linear betas."""
    return Discrete.from_log_alpha_bar(torch.log1p(-betas_of({})).cumsum(0))


def network_time(inputs: Inputs, t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """The time that the network gets at t, where the process has alpha and sigma (all of one shape)."""
    if inputs == "own":
        return noise_angle(alpha, sigma)
    if inputs == "sit":
        return 1 - t
    k = timesteps().timestep(timesteps().time_of_rho(sigma / alpha))
    return torch.where((k.round() - k).abs() < CLOSE, k.round(), k)


def noise_levels(inputs: Inputs) -> tuple[float, float]:
    """(rho_min, rho_max) that the network was trained on, within those of grids."""
    least = math.exp(timesteps().log_rho[0]) if inputs == "ddpm" else 0.0
    return max(RHO_MIN, least), RHO_MAX
