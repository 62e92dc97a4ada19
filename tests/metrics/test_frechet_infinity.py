"""Fréchet distance at infinity: exact lines, the fit against numpy, and the bias of few images that it takes away."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from midway.gen.metrics import frechet_infinity
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.frechet_infinity import frechet_distance_at_infinity, image_counts, intercept
from midway.gen.metrics.moments import FeatureStatistics

D = 8


def features(seed: int, count: int, dim: int = D) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_gaussian(dim: int, shift: float = 0.0) -> FeatureStatistics:
    """Of an imagined sample of unit variance."""
    mean = torch.full((dim,), shift, dtype=torch.float64)
    return FeatureStatistics(1000, mean, 999 * torch.eye(dim, dtype=torch.float64))


def test_few_images_are_biased_and_infinitely_many_are_not() -> None:
    """The truth is 48 * 0.1^2 = 0.48, with exact moments on the other side."""
    dim, shift, far, near = 48, 0.1, [], []
    truth = dim * shift**2
    for seed in range(3):
        x, reference = features(seed, 2000, dim), unit_gaussian(dim, shift)
        few, many = (frechet_distance(FeatureStatistics.of(x[:n]), reference) for n in (500, 2000))
        found = frechet_distance_at_infinity(x, reference)
        assert few > many + 0.5
        assert many > truth + 0.2
        far.append(abs(many - truth))
        near.append(abs(found.value - truth))
    assert max(near) < min(far) / 2


def test_distances_are_those_of_subsets_and_the_last_of_all_images() -> None:
    x, reference = features(1, 200), unit_gaussian(D, 0.5)
    found = frechet_distance_at_infinity(x, reference)
    assert found.counts == image_counts(200, D, 15)
    assert len(found.distances) == 15
    assert found.distances[-1] == pytest.approx(frechet_distance(FeatureStatistics.of(x), reference), rel=1e-12)
    expected = intercept([1 / n for n in found.counts], found.distances)
    assert (found.value, found.standard_error) == expected


def test_an_exact_line_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frechet_infinity, "frechet_distance", lambda a, b: 3.0 + 700.0 / a.count)
    found = frechet_distance_at_infinity(features(1, 300), unit_gaussian(D))
    assert found.value == pytest.approx(3, rel=1e-12)
    assert found.standard_error == pytest.approx(0, abs=1e-6)


def test_the_intercept_and_its_error_are_those_of_least_squares() -> None:
    x = [1 / n for n in image_counts(300, D, 15)]
    noise = features(2, 15)[:, 0]
    y = tuple(2 + 30 * a + float(e) for a, e in zip(x, noise, strict=True))
    design = np.stack([np.ones(15), np.array(x)], axis=1)
    line, residual, *_ = np.linalg.lstsq(design, np.array(y), rcond=None)
    covariance = np.linalg.inv(design.T @ design) * residual[0] / 13
    assert intercept(x, y) == pytest.approx((line[0], math.sqrt(covariance[0, 0])), rel=1e-9)


@pytest.mark.parametrize(
    ("count", "dim", "least"), [(50_000, 2048, 5000), (10_000, 2048, 4096), (200, 8, 20), (32, 8, 16)]
)
def test_counts_are_even_from_a_tenth_or_twice_the_features(count: int, dim: int, least: int) -> None:
    counts = image_counts(count, dim, 15)
    assert (counts[0], counts[-1], len(counts)) == (least, count, 15)
    steps = np.diff(counts)
    assert steps.min() > 0
    assert steps.max() - steps.min() <= 1


def test_subsets_are_drawn_by_the_seed_without_replacement(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []

    def spy(a: Tensor) -> FeatureStatistics:
        seen.append(a[:, 0].tolist())
        return unit_gaussian(2)

    monkeypatch.setattr(frechet_infinity.FeatureStatistics, "of", spy)
    numbered = torch.arange(100.0)[:, None].expand(-1, 2)
    for seed in (0, 0, 1):
        frechet_distance_at_infinity(numbered, unit_gaussian(2), seed=seed)
    assert [len(set(subset)) for subset in seen[:15]] == list(image_counts(100, 2, 15))
    assert seen[:15] == seen[15:30] != seen[30:]
    assert seen[0] != seen[1][: len(seen[0])]
    assert set(seen[0]) != set(map(float, range(len(seen[0]))))


def test_raises_for_too_few_images_and_points() -> None:
    with pytest.raises(ValueError, match=r"31 images for 8 features.* 32 images"):
        frechet_distance_at_infinity(features(1, 31), unit_gaussian(D))
    with pytest.raises(ValueError, match="points is 2"):
        frechet_distance_at_infinity(features(1, 64), unit_gaussian(D), points=2)
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance_at_infinity(torch.full((64, D), math.nan), unit_gaussian(D))
    with pytest.raises(ValueError, match="one feature network"):
        frechet_distance_at_infinity(features(1, 64), unit_gaussian(D + 1))


def test_no_point_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance_at_infinity(features(1, 32), unit_gaussian(D))
