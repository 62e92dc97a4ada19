"""Noise levels that training draws: maps of a uniform number u, and the shift for latents of many values.

    tau = rho / (1 + rho), rho = sigma / alpha          the time of rectified flow, which names a noise level on every schedule
    logit_normal   log rho = mean + std Phi^-1(u)                              tau = sigmoid(N(mean, std^2))
    mode           tau = 1 - u - scale (cos^2(pi u / 2) - 1 + u)
    cosmap         rho = tan(pi u / 2)              density of tau: 2 / (pi - 2 pi tau + 2 pi tau^2)
    shift          rho -> factor rho                tau -> factor tau / (1 + (factor - 1) tau)

Esser et al. 2024, arXiv 2403.03206: eq. 19, 20, 21 and 23. The shift lowers logSNR by 2 log(factor), which is simple diffusion's
alignment of resolutions (Hoogeboom et al. 2023, arXiv 2301.11093, eq. 4).
"""

import math
from typing import Literal

import torch
from torch import Tensor

from midway.samplers.grids import RHO_MAX, RHO_MIN
from midway.samplers.schedule import Schedule

Density = Literal["logit_normal", "uniform", "mode", "cosmap"]
VALUES = 4096
"""Values of a latent at which the automatic shift is none."""
MODE_SCALES = (-1.0, 2 / (math.pi - 2))
"""Of `mode`: between these tau falls in u."""


def shift_factor(shift: float | Literal["auto"], values: int) -> float:
    """The factor of a shift; auto: sqrt(values / 4096) for latents of so many values (Zheng et al. 2025, arXiv 2510.11690)."""
    return math.sqrt(values / VALUES) if shift == "auto" else shift


def logit_normal(u: Tensor, mean: float, std: float) -> Tensor:
    """log rho."""
    return mean + std * torch.special.ndtri(u)


def mode(u: Tensor, scale: float) -> Tensor:
    """log rho, of which a scale above 0 draws the middle more often, and one below 0 the ends."""
    bend = (math.pi / 2 * u).cos().square() - 1 + u
    return torch.logit(1 - u - scale * bend)


def cosmap(u: Tensor) -> Tensor:
    """log rho, such that the times of a cosine schedule with these noise levels are uniform."""
    return (math.pi / 2 * u).tan().log()


def time_at(schedule: Schedule, log_rho: Tensor, least: float = RHO_MIN, greatest: float = RHO_MAX) -> Tensor:
    """The times of these noise levels, or of the nearest within rho = least .. greatest, by default those that grids sample."""
    return schedule.time_of_logsnr(-2 * log_rho.clamp(math.log(least), math.log(greatest)))
