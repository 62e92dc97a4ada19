"""Forward processes of discrete timesteps as continuous schedules.

A model trained on timesteps k = 0 .. N - 1 with betas beta_k is variance preserving with alpha_k^2 = prod_{j <= k} (1 - beta_j)
(Ho et al. 2020, arXiv 2006.11239, eq. 4). `Discrete` extends that to a continuous schedule with timestep k at t = (k + 1) / N:

    log rho(t)  is piecewise linear between the timesteps,
    rho(t)      is linear from data (t = 0) to the first timestep,
    1 / rho(t)  is linear from the last but one timestep to t = 1 if the last has no signal (zero terminal SNR),

and alpha^2 = 1 / (1 + rho^2), sigma^2 = rho^2 / (1 + rho^2).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from midway.samplers.grids import Grid, explicit
from midway.samplers.schedule import Schedule


def betas_of(config: Mapping[str, Any]) -> Tensor:
    """float64 (N,): the noise variances of a config. ValueError for an unknown beta schedule."""
    if config.get("trained_betas") is not None:
        return torch.tensor(list(config["trained_betas"]), dtype=torch.float64)
    steps, name = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    start, end = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if name == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if name == "scaled_linear":
        return torch.linspace(math.sqrt(start), math.sqrt(end), steps, dtype=torch.float64).square()
    if name == "squaredcos_cap_v2":  # Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17
        angle = (torch.arange(steps + 1, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        alpha_bar = angle.cos().square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(
        f"unknown beta_schedule {name!r}: supported are linear, scaled_linear and squaredcos_cap_v2; pass "
        "the betas of any other as trained_betas"
    )


def without_terminal_signal(log_alpha_bar: Tensor) -> Tensor:
    """log alpha^2 (N,), shifted and scaled in alpha so that the last is log 0 and the first stays (Lin et al. 2023,
    arXiv 2305.08891, algorithm 1)."""
    alpha = (log_alpha_bar / 2).exp()
    return 2 * ((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])).log()


@dataclass(frozen=True, repr=False)
class Discrete(Schedule):
    """The forward process of N discrete timesteps, continued to t in [0, 1] (module docstring).

    log_rho: log(sigma / alpha) at timesteps 0 .. N - 1, strictly rising; the last may be infinite. The kinks at the
    timesteps affect only solvers of dx/dt with about N steps, not exponential solvers.
    """

    log_rho: tuple[float, ...]

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in pairwise(self.log_rho))
        if len(self.log_rho) < 3 or not rising or not all(map(math.isfinite, self.log_rho[:-1])):
            raise ValueError(
                "a discrete schedule needs at least three timesteps of rising noise with signal in all but the last: "
                "check the betas (each in (0, 1))"
            )

    @staticmethod
    def from_log_alpha_bar(log_alpha_bar: Tensor) -> "Discrete":
        """log prod(1 - beta) (N,), float64."""
        log_sigma_squared = (-torch.expm1(log_alpha_bar)).log()
        return Discrete(tuple(((log_sigma_squared - log_alpha_bar) / 2).tolist()))

    @cached_property
    def _hash(self) -> int:
        return hash(self.log_rho)

    def __hash__(self) -> int:  # caches of tables and numbers are keyed by schedules
        return self._hash

    def __repr__(self) -> str:
        """Unique to the schedule: `table.fingerprint` uses it."""
        digest = hashlib.sha256(",".join(f"{value:.6f}" for value in self.log_rho).encode()).hexdigest()[:12]
        return f"Discrete({self.steps} timesteps, {digest})"

    @property
    def steps(self) -> int:
        """N."""
        return len(self.log_rho)

    @property
    def zero_terminal_snr(self) -> bool:
        return math.isinf(self.log_rho[-1])

    @cached_property
    def _copies(self) -> dict[tuple[torch.device, torch.dtype], Tensor]:
        return {}

    def _knots(self, like: Tensor) -> Tensor:
        """The finite entries of `log_rho`, cached for each device and dtype, so that no later call waits for a copy."""
        key = (like.device, like.dtype)
        if key not in self._copies:
            finite = self.log_rho[:-1] if self.zero_terminal_snr else self.log_rho
            self._copies[key] = torch.tensor(finite, dtype=like.dtype, device=like.device)
        return self._copies[key]

    def _piece(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For p = N t: the timestep k on the left, log rho there and the slope d log rho / dp up to k + 1."""
        knots = self._knots(p)
        left = (p.floor().long() - 1).clamp(0, len(knots) - 2)
        return left, knots[left], knots[left + 1] - knots[left]

    def _log_rho(self, t: Tensor) -> Tensor:
        p, knots = self.steps * t, self._knots(t)
        left, start, slope = self._piece(p)
        log_rho = torch.where(p < 1, knots[0] + p.log(), start + (p - 1 - left) * slope)
        if self.zero_terminal_snr:
            log_rho = torch.where(p > len(knots), knots[-1] - (self.steps - p).log(), log_rho)
        return log_rho

    def alpha(self, t: Tensor) -> Tensor:
        return torch.sigmoid(-2 * self._log_rho(t)).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sigmoid(2 * self._log_rho(t)).sqrt()

    def rho(self, t: Tensor) -> Tensor:
        return self._log_rho(t).exp()

    def logsnr(self, t: Tensor) -> Tensor:
        return -2 * self._log_rho(t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # (alpha, sigma) turn on the circle at w = d atan(rho) / dt = alpha sigma d log rho / dt, which stays finite at both ends
        p, knots = self.steps * t, self._knots(t)
        alpha, sigma = self.alpha(t), self.sigma(t)
        w = torch.where(p < 1, alpha.square() * knots[0].exp(), alpha * sigma * self._piece(p)[2])
        if self.zero_terminal_snr:
            w = torch.where(p > len(knots), sigma.square() * (-knots[-1]).exp(), w)
        return -self.steps * w * sigma, self.steps * w * alpha

    def time_of_logsnr(self, logsnr: Tensor) -> Tensor:
        target, knots = -logsnr / 2, self._knots(logsnr)
        left = (torch.searchsorted(knots, target.contiguous(), right=True) - 1).clamp(0, len(knots) - 2)
        inside = 1 + left + (target - knots[left]) / (knots[left + 1] - knots[left])
        p = torch.where(target < knots[0], (target - knots[0]).exp(), inside)
        if self.zero_terminal_snr:
            p = torch.where(target > knots[-1], self.steps - (knots[-1] - target).exp(), p)
        return (p / self.steps).clamp(max=1)

    def timestep(self, t: Tensor) -> Tensor:
        """The float timestep k = N t - 1 that is the network's input, at least 0; rounded where t differs from an
        integer timestep by no more than its dtype resolves."""
        k = (self.steps * t - 1).clamp(min=0)
        to_integer = (k.round() - k).detach()
        return k + torch.where(to_integer.abs() < 2 * self.steps * torch.finfo(t.dtype).eps, to_integer, 0)

    def time(self, timestep: Tensor) -> Tensor:
        """t = (k + 1) / N of float timesteps k >= 0."""
        return (timestep + 1) / self.steps

    def grid(self, timesteps: Sequence[float], end: float = 0.0) -> Grid:
        """The grid of a run that evaluates at these falling timesteps k and arrives at t = `end`, data by default."""
        return explicit([*((k + 1) / self.steps for k in timesteps), end])
