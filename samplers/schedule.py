"""Forward processes: x_t = alpha(t) x_0 + sigma(t) eps for t in [0, 1], where t = 0 is data.

A schedule is two functions of t. Everything else follows from them:

    rho(t)    = sigma / alpha               noise-to-signal ratio; the sigma of EDM
    logsnr(t) = log(alpha^2 / sigma^2) = -2 log rho
    rates(t)  = (d alpha / dt, d sigma / dt)

To add a schedule, subclass `Schedule` with `alpha` and `sigma`; `rates` and `time_of_logsnr` then come from forward-mode
differentiation and bisection. The four below override them with closed forms, because `rates` runs at every evaluation.
All functions are elementwise on tensors of any shape and keep the dtype.
"""

import functools
import hashlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule(ABC):
    """alpha(t), sigma(t) on [0, 1]; logsnr falls strictly from data (t = 0) to noise (t = 1)."""

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Signal scale."""

    @abstractmethod
    def sigma(self, t: Tensor) -> Tensor:
        """Noise scale."""

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(d alpha / dt, d sigma / dt)."""
        ones = torch.ones_like(t)
        return torch.func.jvp(self.alpha, (t,), (ones,))[1], torch.func.jvp(self.sigma, (t,), (ones,))[1]

    def time_of_logsnr(self, logsnr: Tensor) -> Tensor:
        """The t at which `logsnr(t)` has this value, clamped to [0, 1]; bisection to the last bit of float64."""
        target = logsnr.double()
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(64):
            middle = (low + high) / 2
            noisier = self.logsnr(middle) < target
            low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
        return ((low + high) / 2).to(logsnr.dtype)

    def rho(self, t: Tensor) -> Tensor:
        """sigma / alpha, infinite where alpha is 0."""
        return self.sigma(t) / self.alpha(t)

    def logsnr(self, t: Tensor) -> Tensor:
        """log(alpha^2 / sigma^2): +inf at t = 0."""
        return 2 * (self.alpha(t).log() - self.sigma(t).log())

    def time_of_rho(self, rho: Tensor) -> Tensor:
        """The t at which sigma / alpha = rho."""
        return self.time_of_logsnr(-2 * rho.log())


@dataclass(frozen=True)
class Linear(Schedule):
    """Rectified flow (Liu et al. 2022, arXiv 2209.03003): alpha = 1 - t, sigma = t."""

    def alpha(self, t: Tensor) -> Tensor:
        return 1 - t

    def sigma(self, t: Tensor) -> Tensor:
        return t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return -torch.ones_like(t), torch.ones_like(t)

    def time_of_logsnr(self, logsnr: Tensor) -> Tensor:
        return torch.sigmoid(-logsnr / 2)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Variance-preserving cosine (Nichol & Dhariwal 2021, arXiv 2102.09672, without offset): alpha = cos(pi t / 2)."""

    def alpha(self, t: Tensor) -> Tensor:
        return torch.cos(math.pi / 2 * t)

    def sigma(self, t: Tensor) -> Tensor:
        return torch.sin(math.pi / 2 * t)

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        angle = math.pi / 2 * t
        return -math.pi / 2 * torch.sin(angle), math.pi / 2 * torch.cos(angle)

    def time_of_logsnr(self, logsnr: Tensor) -> Tensor:
        return 2 / math.pi * torch.atan(torch.exp(-logsnr / 2))


@dataclass(frozen=True)
class VP(Schedule):
    """Variance preserving with linear beta (Song et al. 2021, arXiv 2011.13456, eq. 33).

    log alpha = -(beta_max - beta_min) t^2 / 4 - beta_min t / 2, sigma^2 = 1 - alpha^2.
    """

    beta_min: float = 0.1
    beta_max: float = 20.0

    def _log_alpha(self, t: Tensor) -> Tensor:
        return -0.25 * (self.beta_max - self.beta_min) * t.square() - 0.5 * self.beta_min * t

    def alpha(self, t: Tensor) -> Tensor:
        return self._log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return (-torch.expm1(2 * self._log_alpha(t))).sqrt()

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_rate = -0.5 * (self.beta_max - self.beta_min) * t - 0.5 * self.beta_min
        alpha, sigma = self.alpha(t), self.sigma(t)
        return log_rate * alpha, -log_rate * alpha.square() / sigma

    def time_of_logsnr(self, logsnr: Tensor) -> Tensor:
        minus_log_alpha = 0.5 * torch.nn.functional.softplus(-logsnr)
        half = 0.5 * self.beta_min
        return (
            2 * minus_log_alpha / (half + (half**2 + (self.beta_max - self.beta_min) * minus_log_alpha).sqrt())
        ).clamp(max=1)


@dataclass(frozen=True)
class EDM(Schedule):
    """Variance exploding as in EDM (Karras et al. 2022, arXiv 2206.00364): alpha = 1, sigma = sigma_max t.

    EDM's spacing of sigma is a grid (`grids.karras`), not a second time convention.
    """

    sigma_max: float = 80.0

    def alpha(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_max * t

    def rates(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(t), torch.full_like(t, self.sigma_max)

    def time_of_logsnr(self, logsnr: Tensor) -> Tensor:
        return (torch.exp(-logsnr / 2) / self.sigma_max).clamp(max=1)


@dataclass(frozen=True)
class Shifted(Schedule):
    """`base` with its logSNR lowered by 2 log(factor) at every t.

    On `Linear` this is SD3's t' = s t / (1 + (s - 1) t) (Esser et al. 2024, arXiv 2403.03206, eq. 23) and, for any
    base whose alpha falls to 0, simple diffusion's resolution shift (Hoogeboom et al. 2023, arXiv 2301.11093, eq. 4). On `EDM`,
    which ends at a finite sigma, times beyond 1 / factor would need a larger one: enlarge sigma_max instead.
    """

    base: Schedule
    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise ValueError(f"a shift factor must be positive, got {self.factor}")

    def warp(self, t: Tensor) -> Tensor:
        """The base's time that has the shifted logSNR of `t`."""
        return self.base.time_of_logsnr(self.base.logsnr(t) - 2 * math.log(self.factor))

    def alpha(self, t: Tensor) -> Tensor:
        return self.base.alpha(self.warp(t))

    def sigma(self, t: Tensor) -> Tensor:
        return self.base.sigma(self.warp(t))

    def time_of_logsnr(self, logsnr: Tensor) -> Tensor:
        return self.base.time_of_logsnr(logsnr + 2 * math.log(self.factor))


SCHEDULES: dict[str, type[Schedule]] = {"linear": Linear, "cosine": Cosine, "vp": VP, "edm": EDM}


class Fingerprint(str):
    """A short text that tells schedules apart: what the schedule prints, hashed if that is long. It holds its schedule."""

    schedule: Schedule


@functools.lru_cache
def fingerprint(schedule: Schedule) -> Fingerprint:
    """The text of a schedule, equal for equal schedules."""
    text = repr(schedule)
    short = text if len(text) <= 100 else f"{type(schedule).__name__}@{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    made = Fingerprint(short)
    made.schedule = schedule
    return made


def schedule_of(text: str) -> Schedule | None:
    """The schedule with this fingerprint: the one that it holds, or of a text from a file one of `SCHEDULES`; else None."""
    if isinstance(text, Fingerprint):
        return text.schedule
    return next((made for made in (make() for make in SCHEDULES.values()) if fingerprint(made) == text), None)
