"""Data whose average velocities are known, in float64 and differentiable once: for `torch.func.jvp` and for gradients.

With x_t = alpha x_0 + sigma eps and F_t the distribution function of one coordinate of x_t, the trajectory of dx/dt = v through z
at t is at r at

    Gaussian          z_r = alpha_r m + g_r / g_t (z - alpha_t m),      g^2 = alpha^2 s^2 + sigma^2
    one coordinate    z_r = F_r^{-1}(F_t(z))                            (no two trajectories cross)
    rotated product   z_r = Q y_r with y = Q^T z, each coordinate of y by itself

and u(z, t, r) = (z - z_r) / (t - r), which is v(z, t) where r = t.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from tensors import normal
from torch import Tensor

from midway.samplers.prediction import Evaluations, JumpField, expand, times_of
from midway.samplers.schedule import Cosine, Linear, Schedule

HALVINGS = 60
"""Of the interval that holds a quantile: down to rounding, wherever it is."""


class Data(ABC):
    """Data of D coordinates on a schedule. z (B, D); t, r (B,) with r <= t."""

    schedule: Schedule

    @abstractmethod
    def sample(self, count: int, seed: int) -> Tensor:
        """x_0 (count, D), the same for the same seed."""

    @abstractmethod
    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """v (B, D), by the posterior mean: not by any trajectory."""

    @abstractmethod
    def average(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """u (B, D)."""

    def transport(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """z_r (B, D)."""
        return z - expand(t - r, z) * self.average(z, t, r)


def per_second(schedule: Schedule, t: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The differences from r to t of alpha, sigma, alpha^2 and sigma^2, divided by t - r, with no 0 / 0 where r = t."""
    if isinstance(schedule, Linear):
        one = torch.ones_like(t)
        return -one, one, t + r - 2, t + r
    if isinstance(schedule, Cosine):  # cos a - cos b = -2 sin((a + b) / 2) sin((a - b) / 2)
        quarter, half = math.pi / 4, math.pi / 2
        slow, fast = quarter * torch.sinc((t - r) / 4), half * torch.sinc((t - r) / 2)
        alpha, sigma = -2 * torch.sin(quarter * (t + r)) * slow, 2 * torch.cos(quarter * (t + r)) * slow
        square = torch.sin(half * (t + r)) * fast
        return alpha, sigma, -square, square
    raise ValueError(f"no closed form on {schedule}: use Linear or Cosine")


@dataclass(frozen=True, eq=False)
class Gaussian(Data):
    """Independent coordinates N(mean, std^2), each (D,)."""

    mean: Tensor
    std: Tensor
    schedule: Schedule

    def sample(self, count: int, seed: int) -> Tensor:
        return self.mean + self.std * normal(count, len(self.mean), seed=seed, dtype=torch.float64)

    def spread(self, t: Tensor) -> Tensor:
        """g (B, D): the standard deviation of x_t."""
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        return torch.hypot(alpha * self.std, sigma)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha(t)[:, None], self.schedule.sigma(t)[:, None]
        d_alpha, d_sigma = (rate[:, None] for rate in self.schedule.rates(t))
        gain = (alpha * d_alpha * self.std.square() + sigma * d_sigma) / self.spread(t).square()
        return d_alpha * self.mean + gain * (z - alpha * self.mean)

    def average(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        alpha, _, alpha_2, sigma_2 = (part[:, None] for part in per_second(self.schedule, t, r))
        g_t, g_r = self.spread(t), self.spread(r)
        gain = (alpha_2 * self.std.square() + sigma_2) / (g_t * (g_t + g_r))  # (g_t - g_r) / (g_t (t - r))
        return alpha * self.mean + gain * (z - self.schedule.alpha(t)[:, None] * self.mean)


@dataclass(frozen=True, eq=False)
class Product(Data):
    """Coordinates that are independent mixtures of K Gaussians on axes, the columns of an orthogonal `rotation` (D, D).

    weights (K,); means and stds (D, K).
    """

    weights: Tensor
    means: Tensor
    stds: Tensor
    rotation: Tensor
    schedule: Schedule

    def sample(self, count: int, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        dim, _ = self.means.shape
        chosen = torch.multinomial(self.weights, count * dim, True, generator=generator).view(count, dim, 1)
        own = [part.expand(count, -1, -1).gather(2, chosen)[..., 0] for part in (self.means, self.stds)]
        noise = torch.randn(count, dim, generator=generator, dtype=torch.float64)
        return (own[0] + own[1] * noise) @ self.rotation.T

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        y = (z @ self.rotation)[..., None]
        alpha, sigma = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None]
        d_alpha, d_sigma = (rate[:, None, None] for rate in self.schedule.rates(t))
        variance, off = (alpha * self.stds).square() + sigma.square(), y - alpha * self.means
        posterior = torch.softmax(self.weights.log() - (off.square() / variance + variance.log()) / 2, dim=-1)
        gain = (alpha * d_alpha * self.stds.square() + sigma * d_sigma) / variance
        return (posterior * (d_alpha * self.means + gain * off)).sum(-1) @ self.rotation.T

    def _logs(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log F_t(y), log(1 - F_t(y)) and log of the density, (B, D) each: the smaller of the first two keeps its digits."""
        alpha, sigma = self.schedule.alpha(t)[:, None, None], self.schedule.sigma(t)[:, None, None]
        spread = torch.hypot(alpha * self.stds, sigma)
        z = (y[..., None] - alpha * self.means) / spread
        density = -z.square() / 2 - spread.log() - math.log(2 * math.pi) / 2
        sides = torch.special.log_ndtr(z), torch.special.log_ndtr(-z), density
        below, above, log_density = (torch.logsumexp(self.weights.log() + side, dim=-1) for side in sides)
        return below, above, log_density

    def transport(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """By bisection, and one step of Newton's method whose derivative is that of the implicit function."""
        y = z @ self.rotation
        below, above, _ = self._logs(y, t)
        lower = (below < above).detach()  # in which tail
        wanted = torch.where(lower, below, above)
        with torch.no_grad():
            edge = 45 * torch.ones_like(y.detach())
            low, high = -edge, edge
            for _ in range(HALVINGS):
                middle = (low + high) / 2
                below, above, _ = self._logs(middle, r.detach())
                small = torch.where(lower, below < wanted.detach(), above > wanted.detach())
                low, high = torch.where(small, middle, low), torch.where(small, high, middle)
        there = ((low + high) / 2).detach()
        below, above, log_density = self._logs(there, r)
        got = torch.where(lower, below, above)
        slope = torch.where(lower, 1.0, -1.0) * (log_density - got).exp().detach()  # d got / d y
        return (there - (got - wanted) / slope) @ self.rotation.T

    def average(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        same = expand(t == r, z)
        step = torch.where(same, 1.0, expand(t - r, z))
        return torch.where(same, self.velocity(z, t), (z - self.transport(z, t, r)) / step)


@dataclass(frozen=True, eq=False)
class ExactJumps(JumpField):
    """The field whose average velocities are exact; `network` replaces them, to count or to change them."""

    data: Data
    network: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None

    @property
    def schedule(self) -> Schedule:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.data.schedule

    def average(self, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        return (self.network or self.data.average)(x, t, r)

    def jumps(self, times: tuple[float, ...], ends: tuple[float, ...], x: Tensor) -> Evaluations:
        pairs = zip(times_of(times, x), times_of(ends, x), strict=True)
        return Evaluations(((0.0, 1.0),) * len(times), [partial(self._estimate, *pair) for pair in pairs])

    def _estimate(self, t: Tensor, r: Tensor, x: Tensor) -> Tensor:
        return self(x, t, r).x0


def gaussian(schedule: Schedule) -> Gaussian:
    """Three coordinates of other means and standard deviations, one of them that of the noise."""
    return Gaussian(_tensor(0.7, -0.4, 0.1), _tensor(0.5, 1.0, 1.6), schedule)


def mixture(schedule: Schedule) -> Product:
    """One coordinate, two well separated components."""
    return Product(
        _tensor(0.6, 0.4), _tensor(-0.9, 1.1)[None], _tensor(0.35, 0.25)[None], torch.eye(1).double(), schedule
    )


def rotated(schedule: Schedule) -> Product:
    """Three coordinates, each of two components, rotated."""
    means, stds = _tensor(-0.9, 1.1, -0.5, 0.8, -1.0, 0.3), _tensor(0.35, 0.25, 0.5, 0.4, 0.6, 0.3)
    axes = torch.linalg.qr(normal(3, 3, seed=1, dtype=torch.float64))[0]
    return Product(_tensor(0.6, 0.4), means.view(3, 2), stds.view(3, 2), axes, schedule)


MAKERS: tuple[Callable[[Schedule], Data], ...] = (gaussian, mixture, rotated)


def states(data: Data, count: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """z (B, D) of the data at t (B,), and r (B,) < t."""
    x, generator = data.sample(count, seed=5), torch.Generator().manual_seed(3)
    r, t = (0.01 + 0.98 * torch.rand(2, count, generator=generator, dtype=torch.float64)).sort(0)[0]
    noise = normal(*x.shape, seed=6, dtype=torch.float64)
    return data.schedule.alpha(t)[:, None] * x + data.schedule.sigma(t)[:, None] * noise, t, r


def _tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
