"""Fréchet distance at infinitely many generated images, from distances at several image counts.

    d(N) = d_infinity + C / N + O(1 / N^2)                              (Chong & Forsyth 2020, arXiv 1911.07023)

A line in 1 / N is fitted by least squares to d at 15 counts, evenly spaced from max(2 D, N / 10) to N (the paper: from 5000 to
50000), each of a subset drawn without replacement, a function of (seed, point). Its intercept is the estimate. Below 2 D the
distance is not linear in 1 / N, and between N / 2 and N the slope cannot be estimated: N < 4 D raises ValueError.

Only the generated side is extrapolated: the bias of few reference images stays, the same for all that is compared with them.
The standard error is that of the fitted line. Subsets share images, so it does not hold what another N images would change.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.core.randomness import permutation
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics, check_features


@dataclass(frozen=True)
class Extrapolated:
    """The intercept `value`, which may fall below 0, its standard error, and the points: image counts with distances."""

    value: float
    standard_error: float
    counts: tuple[int, ...]
    distances: tuple[float, ...]


def frechet_distance_at_infinity(
    generated: Tensor, reference: FeatureStatistics, points: int = 15, seed: int = 0
) -> Extrapolated:
    """Of features (N, D) beside the statistics of a reference, in squared feature units; any float dtype.

    ValueError for N < 4 D, points < 3, features that are not finite (N, D), or a reference of other D or fewer than 2 images.
    """
    check_features(generated)
    if points < 3:
        raise ValueError(f"points is {points}: a line with an error needs at least 3")
    counts = image_counts(len(generated), generated.shape[1], points)
    subsets = (generated[permutation(seed, "extrapolation", i, len(generated))[:n]] for i, n in enumerate(counts))
    distances = tuple(frechet_distance(FeatureStatistics.of(subset), reference) for subset in subsets)
    value, error = intercept([1 / n for n in counts], distances)
    return Extrapolated(value, error, counts, distances)


def image_counts(count: int, dim: int, points: int) -> tuple[int, ...]:
    """The image counts at which `count` images of `dim` features are measured, rising. ValueError for count < 4 dim."""
    if count < 4 * dim:
        raise ValueError(
            f"{count} images for {dim} features: a distance is extrapolated from at least 4 x features, {4 * dim} images"
        )
    least = max(2 * dim, math.ceil(count / 10))
    return tuple(least + round(i * (count - least) / (points - 1)) for i in range(points))


def intercept(x: list[float], y: tuple[float, ...]) -> tuple[float, float]:
    """Of the least-squares line through three points or more, and its standard error."""
    abscissae, ordinates = (torch.tensor(values, dtype=torch.float64) for values in (x, y))
    centred, middle = abscissae - abscissae.mean(), float(abscissae.mean())
    spread = float(centred.square().sum())
    slope = float((centred * ordinates).sum()) / spread
    value = float(ordinates.mean()) - slope * middle
    variance = float((ordinates - value - slope * abscissae).square().sum()) / (len(x) - 2)
    return value, math.sqrt(variance * (1 / len(x) + middle**2 / spread))
