"""Sliced Wasserstein distance: closed forms, the definition by other means, bounds, and torch-fidelity's scale."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor

from midway.gen.metrics import sliced
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.sliced import Slices, common_steps, orthonormal_directions, sliced_wasserstein


def features(seed: int, count: int, dim: int = 5) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_translation_scores_its_squared_length_and_a_scaling_that_of_the_vectors() -> None:
    x, shift = features(0, 30), torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    assert sliced_wasserstein(x, x + shift) == pytest.approx(float(shift.square().sum()), rel=1e-12)
    assert sliced_wasserstein(x, x) == 0
    factor = 1.5  # projections scale, and their order stays
    assert sliced_wasserstein(x, factor * x) == pytest.approx(float((0.5 * x).square().sum(1).mean()), rel=1e-12)


def test_of_isotropic_gaussians_it_is_the_frechet_distance() -> None:
    x, y = features(1, 4000), 2 * features(2, 4000) + 1
    expected = frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y))
    assert sliced_wasserstein(x, y) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 3), (4, 6), (5, 5), (7, 1), (12, 8)])
def test_common_steps_are_those_of_the_quantile_functions(n: int, m: int) -> None:
    """In rational numbers: on every step both quantile functions are constant, and steps fill [0, 1]."""
    i, j, width = common_steps(n, m)
    assert len(width) == n + m - math.gcd(n, m) and float(width.sum()) == pytest.approx(1, abs=1e-15)
    at = Fraction(0)
    for first, second, w in zip(i.tolist(), j.tolist(), width.tolist(), strict=True):
        end = at + Fraction(round(w * n * m), n * m)
        assert Fraction(first, n) <= at < end <= Fraction(first + 1, n)
        assert Fraction(second, m) <= at < end <= Fraction(second + 1, m)
        at = end
    assert at == 1


@pytest.mark.parametrize(("n", "m"), [(6, 6), (6, 4), (3, 10)])
def test_along_a_direction_it_is_the_integral_over_quantiles(n: int, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By repeating both sets to the same count; and, in first order, scipy's distance has the same steps."""
    x, y = features(3, n, 2), features(4, m, 2)
    common = math.lcm(n, m)
    directions = orthonormal_directions(2, 10)

    def alike(z: Tensor, u: Tensor) -> Tensor:
        return (z @ u).sort().values.repeat_interleave(common // len(z))

    expected = sum(float((alike(x, u) - alike(y, u)).square().mean()) for u in directions) / len(directions) * 2
    for block in (2**22, 1):
        monkeypatch.setattr(sliced, "_BLOCK", block)
        assert sliced_wasserstein(x, y, 10) == pytest.approx(expected, rel=1e-12)
        assert sliced_wasserstein(y, x, 10) == pytest.approx(expected, rel=1e-12)
    i, j, width = common_steps(n, m)
    first, second = x[:, 0].sort().values, y[:, 0].sort().values
    assert float((first[i] - second[j]).abs() @ width) == pytest.approx(wasserstein_distance(first, second))


def test_it_is_at_most_the_distance_in_all_dimensions() -> None:
    """Of four points each, over all assignments: projections are contractions, and whole bases add up."""
    for seed in range(5):
        x, y = features(seed, 4, 3), 3 * features(seed + 50, 4, 3)
        whole = min(float((x - y[list(order)]).square().sum(1).mean()) for order in itertools.permutations(range(4)))
        assert 0 < sliced_wasserstein(x, y) <= whole * (1 + 1e-12)


def test_it_sees_more_than_two_moments() -> None:
    """Two points at -1 and 1 on every axis beside a Gaussian of the same mean and covariance."""
    x = features(5, 3000, 2)
    y = x.sign()
    y = (
        (y - y.mean(0))
        @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(y.T))).T
        @ torch.linalg.cholesky(torch.cov(x.T)).T
    )
    y = y + x.mean(0)
    assert frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y)) < 1e-10
    assert sliced_wasserstein(x, y) > 0.1


def test_directions_are_orthonormal_bases_of_their_seed() -> None:
    found = orthonormal_directions(7, 20)
    assert found.shape == (21, 7)
    for basis in found.split(7):
        torch.testing.assert_close(basis @ basis.T, torch.eye(7, dtype=torch.float64))
    assert torch.equal(found[:7], orthonormal_directions(7, 1)) and not torch.equal(found[:7], found[7:14])
    assert not torch.equal(found, orthonormal_directions(7, 20, seed=1))
    with pytest.raises(ValueError, match="at least 1"):
        orthonormal_directions(7, 0)


def test_slices_of_a_reference_serve_many_sets() -> None:
    reference = Slices.of(features(6, 40))
    for seed, count in ((7, 40), (8, 9)):
        other = features(seed, count)
        assert reference.distance(other) == sliced_wasserstein(features(6, 40), other)
    with pytest.raises(ValueError, match="cannot be compared"):
        reference.distance(features(9, 5, 4))
    with pytest.raises(ValueError, match="at least 2"):
        reference.distance(features(9, 1))


def test_mind_is_three_times_as_large() -> None:
    """The published formula on its own directions: 3 D / (n M) sum over sorted projections, which here is 3 SW^2."""
    x, y = features(10, 60), features(11, 60) + 0.3
    u = torch.nn.functional.normalize(features(12, 20_000), dim=1)
    mind = 3 * 5 * float(((x @ u.T).sort(0).values - (y @ u.T).sort(0).values).square().mean())
    assert 3 * sliced_wasserstein(x, y, 5000) == pytest.approx(mind, rel=0.02)
