"""Levels, bits per dimension, dequantisation, and the discretised logistic mixture: against enumeration and exact fractions."""

import math
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
import torch
from scipy import stats
from torch import Tensor

from midway.gen.baselines.logistic_mixture import LogisticMixture
from midway.gen.data.images import load_images
from midway.gen.data.levels import (
    bits_per_dim,
    dequantised_bound,
    from_levels,
    inverse_logit,
    levels_of,
    levels_unchecked,
    logit_transform,
    to_levels,
    uniform_dequantise,
)


def _u8(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)


# ---- levels ----


@pytest.mark.parametrize("levels", [2, 3, 4, 16, 17, 100, 255, 256])
def test_levels_are_stored_as_the_nearest_integer_and_come_back(levels: int) -> None:
    k = torch.arange(levels)
    stored = from_levels(k, levels)
    assert stored.dtype == torch.uint8
    assert stored.tolist() == [round(Fraction(i * 255, levels - 1)) for i in range(levels)]
    assert torch.equal(to_levels(stored, levels), k)


def test_the_fewest_levels_that_hold_all_values_are_found() -> None:
    digits = load_images("digits").images[:]
    assert levels_of(digits) == 17
    assert torch.equal(from_levels(to_levels(digits, 17), 17), digits)
    assert levels_of(_u8(0, 255, 0)) == 2
    assert levels_of(_u8(0, 85)) == 4
    assert levels_of(_u8(0, 17)) == 16
    assert levels_of(_u8(0, 85, 1)) == 256


def test_values_that_are_no_levels_raise() -> None:
    with pytest.raises(ValueError, match="value 3, which is none of 17 levels"):
        to_levels(_u8(0, 16, 3, 255), 17)
    assert levels_unchecked(_u8(0, 16, 3, 255), 17).tolist() == [0, 1, -1, 16]
    with pytest.raises(ValueError, match=r"float32.*to_uint8"):
        to_levels(torch.zeros(3), 17)
    for wrong in (-1, 17):
        with pytest.raises(ValueError, match="levels are 0 to 16"):
            from_levels(torch.tensor([wrong, 3]), 17)
    for levels in (1, 257):
        with pytest.raises(ValueError, match=f"levels is {levels}"):
            to_levels(_u8(0), levels)


# ---- bits and dequantisation ----


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_a_uniform_model_has_exactly_log2_of_the_levels(levels: int) -> None:
    dims = 48
    nats = torch.full((3,), -dims * math.log(levels), dtype=torch.float64)
    torch.testing.assert_close(bits_per_dim(nats, dims), torch.full_like(nats, math.log2(levels)), rtol=1e-14, atol=0)
    flat = dequantised_bound(torch.zeros(3, dtype=torch.float64), dims, levels)  # the uniform density of x
    torch.testing.assert_close(flat, nats, rtol=1e-14, atol=0)


def test_a_density_vouches_for_the_integers_it_covers() -> None:
    """Over u, exp of the bound averages to the exact probability of the cell, and the bound itself to no more."""
    levels = 5
    density = torch.distributions.Normal(torch.tensor(0.4, dtype=torch.float64), 0.1)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    for k in range(levels):
        x = uniform_dequantise(torch.full_like(u, k).long(), u, levels)
        bound = dequantised_bound(density.log_prob(x), 1, levels)
        cell = density.cdf(torch.tensor((k + 1) / levels)) - density.cdf(torch.tensor(k / levels))
        torch.testing.assert_close(bound.exp().mean(), cell, rtol=1e-4, atol=1e-9)
        assert bound.mean() < cell.log()


@pytest.mark.parametrize("a", [0.05, 1e-6, 0.3])
def test_the_logit_transform_is_inverted_and_its_jacobian_is_the_derivative(a: float) -> None:
    x = torch.rand(3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y, logdet = logit_transform(x, a)
    torch.testing.assert_close(inverse_logit(y, a), x)
    q = a + (1 - 2 * a) * x
    torch.testing.assert_close(y, torch.logit(q))
    (slope,) = torch.autograd.grad(y.sum(), x)  # the transform is elementwise, so its Jacobian is diagonal
    torch.testing.assert_close(logdet, slope.log().flatten(1).sum(1))


def test_the_ends_of_the_range_are_finite_and_margins_are_checked() -> None:
    y, logdet = logit_transform(torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(y, torch.tensor([[-math.log(19), math.log(19)]]))
    assert logdet.isfinite().all()
    for function in (logit_transform, inverse_logit):
        with pytest.raises(ValueError, match=r"margin is 0\.5"):
            function(y, 0.5)


# ---- the discretised logistic mixture ----


def _mixture(levels: int, mixtures: int = 3, wide: float = 1.0, dtype: torch.dtype = torch.float64) -> LogisticMixture:
    """Parameters for images (40, 1, 1, 2), from mild (wide = 1) to far beyond anything sensible."""
    raw = torch.randn(3, 40, mixtures, 1, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits, means, log_scales = (wide * raw).to(dtype)
    return LogisticMixture(logits, means, log_scales - 1, levels)


def _all_probabilities(mixture: LogisticMixture) -> Tensor:
    """P(k) of every level, (L, B, C, H, W)."""
    shape = mixture.means[:, 0].shape
    return torch.stack([mixture.log_prob(torch.full(shape, k)).exp() for k in range(mixture.levels)])


@pytest.mark.parametrize("wide", [1.0, 30.0])
@pytest.mark.parametrize("levels", [2, 3, 17, 256])
def test_the_probabilities_of_all_levels_sum_to_one(levels: int, wide: float) -> None:
    """Also for scales and means from one extreme to the other."""
    total = _all_probabilities(_mixture(levels, wide=wide)).sum(0)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-9)
    single = _all_probabilities(_mixture(levels, wide=wide, dtype=torch.float32)).sum(0)
    torch.testing.assert_close(single, torch.ones_like(single), rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixtures", [1, 3])
@pytest.mark.parametrize("levels", [2, 5, 17])
def test_probabilities_are_differences_of_the_distribution_function(levels: int, mixtures: int) -> None:
    mixture = _mixture(levels, mixtures)
    weights = mixture.logits.softmax(1).numpy()
    half = 1 / (levels - 1)
    scales = mixture.log_scales.clamp(min=math.log(half) - 2.5).exp()
    for k, probability in enumerate(_all_probabilities(mixture)):
        x = 2 * k / (levels - 1) - 1
        law = stats.logistic(mixture.means.numpy(), scales.numpy())
        upper = 1.0 if k == levels - 1 else law.cdf(x + half)
        lower = 0.0 if k == 0 else law.cdf(x - half)
        torch.testing.assert_close(probability, torch.from_numpy((weights * (upper - lower)).sum(1)))


@pytest.mark.parametrize("mean", [-6.0, -1.2, 0.4, 9.0])
@pytest.mark.parametrize("levels", [3, 17, 256])
def test_levels_far_in_the_tails_keep_their_logarithm(levels: int, mean: float) -> None:
    """Where the difference of two distribution functions is 0 in float64: against 60 decimal digits."""
    scale = math.exp(-2.5)
    parameters = torch.tensor([0.0, mean, -2.5], dtype=torch.float64).view(3, 1, 1, 1, 1, 1)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        mixture = LogisticMixture(*parameters.to(dtype).unbind(0), levels=levels)
        for k in (1, levels // 2, levels - 2):
            with localcontext(prec=60):
                edges = [(Decimal(2 * i - 1) / (levels - 1) - 1 - Decimal(mean)) / Decimal(scale) for i in (k, k + 1)]
                below, up_to = (1 / (1 + (-edge).exp()) for edge in edges)
                exact = float((up_to - below).ln())
            got = mixture.log_prob(torch.full((1, 1, 1, 1), k)).item()
            assert got == pytest.approx(exact, rel=tolerance)


def test_every_two_pixel_image_is_counted_once() -> None:
    """The values are independent given the parameters: over all 16 images of 4 levels the products sum to 1."""
    mixture = _mixture(4)
    k = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    logs = [mixture.log_prob(image.view(1, 1, 1, 2).expand(40, 1, 1, 2)).flatten(1).sum(1) for image in k]
    torch.testing.assert_close(torch.stack(logs).exp().sum(0), torch.ones(40, dtype=torch.float64))


@pytest.mark.parametrize("levels", [2, 17, 256])
def test_far_off_means_and_extreme_scales_have_finite_gradients(levels: int) -> None:
    extremes = torch.tensor([-1e3, -20.0, 0.0, 20.0, 1e3])
    mean, log_scale = torch.cartesian_prod(extremes, extremes).T
    parameters = torch.stack([torch.zeros(25), mean, log_scale], 1).view(25, 3, 1, 1).requires_grad_()
    for k in (0, 1, levels - 1):
        log_prob = LogisticMixture.of(parameters, 1, levels).log_prob(torch.full((25, 1, 1, 1), k))
        (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
        assert log_prob.isfinite().all()
        assert gradient.isfinite().all()


def test_the_mean_is_the_expectation() -> None:
    mixture = _mixture(17)
    x = (2 * torch.arange(17, dtype=torch.float64) / 16 - 1).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(mixture.mean(), (_all_probabilities(mixture) * x).sum(0))


def test_a_networks_output_is_split_by_parameter_component_and_channel() -> None:
    """Zeros are equal components spread over the range; each channel of the output moves one channel of the image."""
    parameters = torch.zeros(1, 3 * 2 * 3, 1, 1)
    start = LogisticMixture.of(parameters, 3, 17)
    assert start.means.flatten().tolist() == [-0.5] * 3 + [0.5] * 3
    assert (start.logits == 0).all()
    assert (start.log_scales == -1.5).all()
    k = torch.full((1, 3, 1, 1), 4)
    for index in range(18):
        moved = parameters.clone()
        moved[0, index] += 1
        changed = (LogisticMixture.of(moved, 3, 17).log_prob(k) != start.log_prob(k)).flatten()
        assert changed.nonzero().flatten().tolist() == [index % 3]
    assert LogisticMixture.of(parameters.bfloat16(), 3, 17).log_prob(k).dtype == torch.float32
