"""Fréchet distance between two sets of features, each summarised by a Gaussian.

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                           (Dowson & Landau 1982)

The last trace needs eigenvalues only. With the symmetric factor S1 = R R^T, R = V sqrt(w),

    tr (S1 S2)^(1/2) = sum_i sqrt lambda_i(R^T S2 R),

and R^T S2 R is symmetric and positive: the result is never complex and never NaN, also for singular covariances.
It is the square of the 2-Wasserstein distance of the Gaussians. Its name always carries the feature network's name.
"""

import warnings

import torch
from torch import Tensor

from midway.gen.statistics import FeatureStatistics


def _factor(covariance: Tensor) -> Tensor:
    """R (D, D) with R R^T = covariance; rounding errors below 0 are clipped."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt()


def _trace_of_root(first: Tensor, second: Tensor) -> float:
    """tr (S1 S2)^(1/2) of two covariances (D, D), float64."""
    factor = _factor(first)
    return float(torch.linalg.eigvalsh(factor.T @ second @ factor).clamp(min=0).sqrt().sum())


def _warn_if_few(statistics: FeatureStatistics) -> None:
    if statistics.count < 2 * statistics.dim:
        warnings.warn(
            f"{statistics.count} images for {statistics.dim} features: below 2 x features the Fréchet distance is "
            "mostly bias; compare only equal image counts, or use more images",
            stacklevel=3,
        )


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Squared distance >= 0, in squared feature units. ValueError if the dimensions differ or a set has < 2 images.

    Biased upwards by about C / N: compare only at equal N. Warns where N < 2 D.
    """
    if a.dim != b.dim:
        raise ValueError(f"features of {a.dim} and {b.dim} dimensions cannot be compared: use one feature network")
    first, second = a.covariance, b.covariance
    _warn_if_few(a)
    _warn_if_few(b)
    shift = float((a.mean - b.mean).square().sum())
    spread = float(first.trace() + second.trace()) - 2 * _trace_of_root(first, second)
    return max(shift + spread, 0.0)
