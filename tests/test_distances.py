"""Fréchet distance and streaming statistics against closed forms, invariances and scipy."""

import warnings

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from midway.gen.distances import frechet_distance
from midway.gen.statistics import FeatureStatistics

D = 12


def gaussian(mean: Tensor, covariance: Tensor, count: int = 1000) -> FeatureStatistics:
    """The statistics of an imagined sample with exactly this mean and covariance."""
    outer = (count - 1) * covariance + count * torch.outer(mean, mean)
    return FeatureStatistics(count, count * mean, outer)


def features(seed: int, count: int = 400, dim: int = D) -> Tensor:
    """float64 (count, dim), correlated and shifted, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    shift = torch.randn(dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + shift


def distance(x: Tensor, y: Tensor) -> float:
    return frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))


def test_shifted_unit_gaussians_are_d_apart() -> None:
    zero, one, eye = torch.zeros(D).double(), torch.ones(D).double(), torch.eye(D).double()
    assert frechet_distance(gaussian(zero, eye), gaussian(one, eye)) == pytest.approx(D, rel=1e-12)


def test_diagonal_closed_form() -> None:
    generator = torch.Generator().manual_seed(0)
    m1, m2, v1, v2 = torch.rand(4, D, generator=generator, dtype=torch.float64)
    expected = float((m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum())
    assert frechet_distance(gaussian(m1, v1.diag()), gaussian(m2, v2.diag())) == pytest.approx(expected, rel=1e-11)


def test_agrees_with_the_matrix_square_root() -> None:
    a, b = FeatureStatistics.of(features(1)), FeatureStatistics.of(features(2))
    root = np.real(np.asarray(sqrtm((a.covariance @ b.covariance).numpy())))
    spread = np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    expected = float((a.mean - b.mean).square().sum()) + float(spread)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero() -> None:
    """Never below, though rounding is as often negative as positive."""
    assert all(0 <= distance(features(seed), features(seed)) < 1e-10 for seed in range(20))


def test_singular_covariances_give_a_finite_distance() -> None:
    """Features on lines: commuting rank-1 covariances, whose distance is the squared difference of deviations."""
    line = torch.linspace(-1, 1, 100).double()[:, None] * torch.ones(1, D).double()
    deviation = float(line[:, 0].std())
    assert distance(line, 3 * line) == pytest.approx(D * (3 * deviation - deviation) ** 2, rel=1e-9)


def test_symmetric() -> None:
    assert distance(features(1), features(2)) == pytest.approx(distance(features(2), features(1)), rel=1e-10)


def test_invariant_under_rotation() -> None:
    rotation, _ = torch.linalg.qr(features(3, D))
    expected = distance(features(1), features(2))
    assert distance(features(1) @ rotation, features(2) @ rotation) == pytest.approx(expected, rel=1e-10)


def test_scales_with_the_square() -> None:
    expected = 2.5**2 * distance(features(1), features(2))
    assert distance(2.5 * features(1), 2.5 * features(2)) == pytest.approx(expected, rel=1e-10)


def test_covariance_has_the_divisor_n_minus_1() -> None:
    torch.testing.assert_close(FeatureStatistics.of(features(1)).covariance, torch.cov(features(1).T))


@pytest.mark.parametrize("sizes", [[1, 399], [200, 200], [0, 7, 393], [100] * 4])
def test_merged_shards_equal_the_whole(sizes: list[int]) -> None:
    parts = [FeatureStatistics.of(part) for part in features(1).split(sizes)]
    merged, whole = sum(parts[1:], parts[0]), FeatureStatistics.of(features(1))
    assert merged.count == whole.count == 400
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-11, atol=1e-11)


def test_order_of_images_and_shards_does_not_matter() -> None:
    x = features(1)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    parts = [FeatureStatistics.of(part) for part in shuffled.split(90)]
    merged = sum(parts[:-1][::-1], parts[-1])
    assert frechet_distance(merged, FeatureStatistics.of(x)) < 1e-10


@pytest.mark.parametrize("offset", [5.0, 50.0])
def test_a_large_mean_does_not_cost_precision(offset: float) -> None:
    """float32 features and sums lose 1e-3 at offset 5 and everything at 50."""
    x, y = features(1).float() + offset, features(2).float() + offset
    centre = x.double().mean(dim=0)
    expected = distance(x.double() - centre, y.double() - centre)
    assert distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_half_precision_features_are_summed_in_float64() -> None:
    x = torch.full((5000, 2), 3.0, dtype=torch.bfloat16)
    assert FeatureStatistics.of(x).total.tolist() == [15000.0, 15000.0]


def test_tensors_round_trip() -> None:
    a = FeatureStatistics.of(features(1))
    b = FeatureStatistics.from_tensors(a.to_tensors())
    assert b.count == a.count
    assert torch.equal(b.total, a.total)
    assert torch.equal(b.outer, a.outer)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(50), r"expected \(N, D\)"),
        (torch.zeros(50, 1), r"expected \(N, D\)"),
        (torch.zeros(5, 4, 4), r"expected \(N, D\)"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), "1 of 2 feature vectors are not finite"),
        (torch.tensor([[0.0, float("inf")]]), "1 of 1 feature vectors are not finite"),
    ],
)
def test_refuses_unusable_features(bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.of(bad)


def test_refuses_a_single_image() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        distance(features(1, count=1), features(2))


def test_refuses_different_dimensions() -> None:
    with pytest.raises(ValueError, match="one feature network"):
        distance(features(1), features(2, dim=D + 1))
    with pytest.raises(ValueError, match="one feature network"):
        _ = FeatureStatistics.of(features(1)) + FeatureStatistics.of(features(2, dim=D + 1))


def test_refuses_incomplete_or_misshapen_tensors() -> None:
    tensors = FeatureStatistics.of(features(1)).to_tensors()
    with pytest.raises(ValueError, match="lack outer"):
        FeatureStatistics.from_tensors({name: tensor for name, tensor in tensors.items() if name != "outer"})
    with pytest.raises(ValueError, match="float64 total"):
        FeatureStatistics.from_tensors({**tensors, "outer": tensors["outer"].float()})


def test_warns_below_twice_the_dimension() -> None:
    with pytest.warns(UserWarning, match="23 images for 12 features"):
        distance(features(1, count=23), features(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance(features(1, count=24), features(2))
