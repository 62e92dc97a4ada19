"""Problems with known answers: fields whose ODE has an exact solution, or one that scipy solves to 1e-12."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.integrate import solve_ivp
from tensors import normal
from torch import Tensor

from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.sample import sample
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table


@dataclass(frozen=True)
class Mixture:
    """Gaussian mixture with isotropic components: weights (K,), means (K, D), stds (K,), all float64."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def x0(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t = x] for x (B, D) and alpha, sigma (B, 1)."""
        variance = alpha.square() * self.stds.square() + sigma.square()  # (B, K)
        residual = x[:, None, :] - alpha[:, :, None] * self.means  # (B, K, D)
        log_likelihood = -0.5 * residual.square().sum(-1) / variance - 0.5 * x.shape[1] * variance.log()
        posterior = torch.softmax(self.weights.log() + log_likelihood, dim=1)
        gain = (alpha * self.stds.square() / variance)[:, :, None]
        return (posterior[:, :, None] * (self.means + gain * residual)).sum(1)

    def field(self, schedule: Schedule) -> Field:
        """The exact denoiser as a field."""

        def predict(x: Tensor, t: Tensor) -> Prediction:
            alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
            x0 = self.x0(x, alpha, sigma)
            return Prediction(x0, (x - alpha * x0) / sigma, features=x0.detach())

        return predict


def mixture() -> Mixture:
    """Three well-separated components in two dimensions, about unit variance."""
    means = torch.tensor([[-1.2, 0.3], [0.8, 1.0], [0.5, -1.1]], dtype=torch.float64)
    return Mixture(
        weights=torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
        means=means,
        stds=torch.tensor([0.4, 0.5, 0.3], dtype=torch.float64),
    )


def gaussian(*mean: float, std: float) -> Mixture:
    """One component."""
    one = torch.ones(1, dtype=torch.float64)
    return Mixture(one, torch.tensor([mean], dtype=torch.float64), std * one)


def point_mass(schedule: Schedule, point: Tensor) -> Field:
    """The field of data that is one point."""

    def predict(x: Tensor, t: Tensor) -> Prediction:
        x0 = point.expand_as(x)
        return Prediction(x0, (x - expand(schedule.alpha(t), x) * x0) / expand(schedule.sigma(t), x))

    return predict


def exact_solution(data: Mixture, schedule: Schedule, x: Tensor, start: float, end: float) -> Tensor:
    """The probability-flow ODE from `start` to `end` by DOP853 at 1e-12, solved as dy / d log rho = rho eps."""

    def slope(log_rho: float, y: np.ndarray) -> np.ndarray:
        rho = math.exp(log_rho)
        ratio = torch.full((x.shape[0], 1), rho, dtype=torch.float64)
        state = torch.from_numpy(y).view_as(x)
        x0 = data.x0(state, torch.ones_like(ratio), ratio)
        return (state - x0).numpy().ravel()  # rho * eps

    times = torch.tensor([start, end], dtype=torch.float64)
    alpha, log_rho = schedule.alpha(times), schedule.rho(times).log()
    solution = solve_ivp(
        slope, log_rho.tolist(), (x / alpha[0]).numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-13
    )
    return alpha[1] * torch.from_numpy(solution.y[:, -1]).view_as(x)


def noise_at(schedule: Schedule, t: float, count: int = 8, seed: int = 0) -> Tensor:
    """Normal states (count, 2) at time t, with the standard deviation that data of unit variance have there."""
    time = torch.tensor(t, dtype=torch.float64)
    scale = torch.hypot(schedule.alpha(time), schedule.sigma(time))
    return scale * normal(count, 2, seed=seed, dtype=torch.float64)


def times_of(schedule: Schedule, rho_start: float, rho_end: float) -> tuple[float, float]:
    """The times at which sigma / alpha has these values."""
    start, end = schedule.time_of_rho(torch.tensor([rho_start, rho_end], dtype=torch.float64)).tolist()
    return start, end


def rmse(got: Tensor, want: Tensor | float = 0.0) -> float:
    """Root mean square of the difference."""
    return (got - want).square().mean().sqrt().item()


def convergence(
    field: Field, schedule: Schedule, build: Callable[[int], Table], counts: Sequence[int]
) -> tuple[float, float]:
    """Order of tables with these numbers of steps on the mixture (slope of log error on log steps), and the last error."""
    first = build(counts[0])
    x = noise_at(schedule, first.grid[0], 16)
    exact = exact_solution(mixture(), schedule, x, first.grid[0], first.grid[-1])
    errors = [rmse(sample(field, build(steps), x), exact) for steps in counts]
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0], errors[-1]


def uneven_grid(start: float, end: float, steps: int) -> tuple[float, ...]:
    """Steps alternate 1:3: a grid on which a solver that assumes equal steps shows."""
    widths = torch.tensor([1.0, 3.0], dtype=torch.float64).repeat(steps // 2)
    fractions = torch.cat([torch.zeros(1, dtype=torch.float64), widths.cumsum(0) / widths.sum()])
    return tuple((start + (end - start) * fractions).tolist())
