"""The exact field of a mixture: against the score by differentiation, quadrature, limits, the isotropic oracle, and moments."""

import math

import numpy as np
import oracles
import pytest
import torch
from tensors import normal
from torch import Tensor

from midway.samplers.grids import logsnr
from midway.samplers.mixture import Mixture
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Linear, Schedule
from midway.samplers.solvers import SOLVERS

SCHEDULES = [Linear(), VP(), EDM()]


def correlated(count: int = 3, dim: int = 4, seed: int = 0) -> Mixture:
    """Components with full covariances, about unit variance."""
    factors = normal(count, dim, dim, seed=seed, dtype=torch.float64) / dim**0.5
    weights = torch.arange(1, count + 1, dtype=torch.float64)
    covariances = factors @ factors.mT + 0.01 * torch.eye(dim, dtype=torch.float64)
    return Mixture.of(weights / weights.sum(), normal(count, dim, seed=seed + 1, dtype=torch.float64), covariances)


def isotropic(data: oracles.Mixture) -> Mixture:
    eye = torch.eye(data.means.shape[1], dtype=torch.float64)
    return Mixture.of(data.weights, data.means, data.stds.square()[:, None, None] * eye)


def level(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("rho", [0.02, 0.5, 4.0])
def test_the_field_is_the_score_of_its_density(schedule: Schedule, rho: float) -> None:
    """eps = -sigma grad log p(x_t) (Tweedie), with the gradient by differentiation."""
    mixture, t = correlated(), schedule.time_of_rho(level(rho))
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    clean = mixture.sample(torch.linspace(0.05, 0.95, 6), normal(6, 4, seed=7))
    x = (alpha * clean + sigma * normal(6, 4, seed=8)).requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(x, alpha, sigma).sum(), x)
    found = mixture.field(schedule)(x.detach(), t.expand(6))
    torch.testing.assert_close(found.eps, -sigma * score, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(alpha * found.x0 + sigma * found.eps, x.detach(), rtol=1e-12, atol=1e-12)


def test_density_and_denoiser_are_those_of_quadrature_in_one_dimension() -> None:
    """E[x_0 | x] and p(x) by integrating over x_0."""
    weights, means, stds = np.array([0.3, 0.7]), np.array([-1.0, 0.6]), np.array([0.2, 0.5])
    pair = (torch.from_numpy(weights), torch.from_numpy(means)[:, None])
    mixture = Mixture.of(*pair, torch.from_numpy(stds**2)[:, None, None])
    grid = np.linspace(-6, 6, 60001)
    prior = (weights * np.exp(-((grid[:, None] - means) ** 2) / (2 * stds**2)) / stds / math.sqrt(2 * math.pi)).sum(1)
    for alpha, sigma, x in ((1.0, 0.4, 0.1), (0.6, 0.8, -1.2), (0.9, 0.05, 0.7)):
        joint = prior * np.exp(-((x - alpha * grid) ** 2) / (2 * sigma**2)) / sigma / math.sqrt(2 * math.pi)
        mass, first = (np.trapezoid(values, grid) for values in (joint, grid * joint))
        point = level(x)[None]
        assert mixture.log_density(point, level(alpha), level(sigma)).item() == pytest.approx(np.log(mass), abs=1e-8)
        assert mixture.denoise(point, level(alpha), level(sigma))[0].item() == pytest.approx(first / mass, abs=1e-8)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_it_agrees_with_the_isotropic_oracle(schedule: Schedule) -> None:
    data = oracles.mixture()
    t = schedule.time_of_rho(torch.tensor([0.01, 0.3, 1.0, 5.0, 60.0], dtype=torch.float64))
    x = normal(5, 2, dtype=torch.float64) * torch.hypot(schedule.alpha(t), schedule.sigma(t))[:, None]
    found, wanted = isotropic(data).field(schedule)(x, t), data.field(schedule)(x, t)
    torch.testing.assert_close(found.x0, wanted.x0, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.eps, wanted.eps, rtol=1e-8, atol=1e-10)


def test_without_noise_it_returns_the_data_and_in_pure_noise_their_mean() -> None:
    mixture = correlated()
    x = mixture.sample(torch.linspace(0.05, 0.95, 8), normal(8, 4))
    near, sure = mixture.denoise(x, level(1.0), level(1e-6))
    torch.testing.assert_close(near, x, rtol=0, atol=1e-8)
    assert sure.sum(1).allclose(torch.ones(8, dtype=torch.float64))
    far, posterior = mixture.denoise(1e6 * x, level(1.0), level(1e6))
    torch.testing.assert_close(far, mixture.mean.expand(8, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(posterior, mixture.weights.expand(8, -1), rtol=1e-4, atol=1e-4)
    exactly, _ = mixture.denoise(x, level(0.0), level(1.0))  # pure noise
    torch.testing.assert_close(exactly, mixture.mean.expand(8, -1), rtol=1e-12, atol=1e-12)


def test_mean_and_covariance_are_those_of_its_samples() -> None:
    """Each mean within 5 of its standard errors, the covariance within 3 %."""
    mixture, count = correlated(), 200_000
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    drawn = mixture.sample(uniform, normal(count, 4, seed=2, dtype=torch.float64))
    errors = (mixture.covariance.diagonal() / count).sqrt()
    assert ((drawn.mean(0) - mixture.mean).abs() < 5 * errors).all()
    scale = mixture.covariance.diagonal().max()
    torch.testing.assert_close(torch.cov(drawn.T), mixture.covariance, rtol=0, atol=0.03 * float(scale))


def test_the_covariance_is_the_second_moment_less_that_of_the_mean() -> None:
    mixture = correlated()
    within = torch.stack([axes @ values.diag() @ axes.T for axes, values in zip(mixture.axes, mixture.variances)])
    second = torch.einsum("k,kij->ij", mixture.weights, within + mixture.means[:, :, None] * mixture.means[:, None, :])
    wanted = second - torch.outer(mixture.mean, mixture.mean)
    torch.testing.assert_close(mixture.covariance, wanted, rtol=1e-12, atol=1e-14)


def test_a_component_is_drawn_as_often_as_its_weight() -> None:
    mixture = Mixture.of(
        level(0.25).repeat(2) * torch.tensor([1.0, 3.0]), torch.tensor([[0.0], [1.0]]), torch.zeros(2, 1, 1)
    )
    uniform = (torch.arange(100) + 0.5) / 100
    assert mixture.sample(uniform, torch.zeros(100, 1)).sum() == 75


def test_a_time_that_all_samples_share_gives_what_a_time_for_each_gives() -> None:
    field, x = correlated().field(EDM()), 3 * normal(6, 4, dtype=torch.float64)
    shared = level(0.01).expand(6).requires_grad_()
    own = level(0.01).repeat(6).requires_grad_()
    results = [field(x, t) for t in (shared, own)]
    for name in ("x0", "eps", "features"):
        first, second = (getattr(result, name) for result in results)
        torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
    gradients = [
        torch.autograd.grad(result.x0.sum(), t)[0].sum() for result, t in zip(results, (shared, own), strict=True)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=0)


@pytest.mark.parametrize("name", [pytest.param("ddim", marks=pytest.mark.slow), "dpmpp2m"])
def test_solvers_converge_on_it_at_their_order(name: str) -> None:
    """Correlated components, against a fine solution by rk4."""
    schedule, field = EDM(), correlated().field(EDM())
    start = torch.tensor(logsnr(schedule, 1)[0], dtype=torch.float64)
    x = schedule.sigma(start) * normal(8, 4, seed=3, dtype=torch.float64)

    def end(solver: str, steps: int) -> Tensor:
        return sample(field, SOLVERS[solver].build(schedule, logsnr(schedule, steps)), x)

    exact = end("rk4", 600)
    errors = [oracles.rmse(end(name, steps), exact) for steps in (80, 160, 320)]
    order = -np.polyfit(np.log([80, 160, 320]), np.log(errors), 1)[0]
    assert order == pytest.approx(SOLVERS[name].order, abs=0.2)


def test_float32_differs_from_float64_by_rounding_alone() -> None:
    schedule, mixture = EDM(), correlated()
    table = SOLVERS["dpmpp2m"].build(schedule, logsnr(schedule, 12))
    x = 80 * normal(16, 4, dtype=torch.float64)
    wide, narrow = (sample(mixture.field(schedule), table, start) for start in (x, x.float()))
    assert narrow.dtype is torch.float32
    torch.testing.assert_close(narrow.double(), wide, rtol=0, atol=2e-4)


def test_invalid_mixtures_raise() -> None:
    one, eye = torch.ones(1), torch.eye(2)[None]
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture.of(2 * one, torch.zeros(1, 2), eye)
    with pytest.raises(ValueError, match="need weights"):
        Mixture.of(torch.ones(2) / 2, torch.zeros(1, 2), eye)
    with pytest.raises(ValueError, match="negative eigenvalue"):
        Mixture.of(one, torch.zeros(1, 2), -eye)


def test_the_hash_is_of_the_numbers() -> None:
    assert correlated().hash == correlated().hash != correlated(seed=5).hash
