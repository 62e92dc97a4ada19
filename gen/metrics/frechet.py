"""Fréchet distance between two sets of features, each summarised by a Gaussian.

    d = |m1 - m2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)                           (Dowson & Landau 1982)

It is the square of the 2-Wasserstein distance of the Gaussians. Its name always carries the feature network's name. The last
trace needs no matrix root of a product. With any factor S1 = R R^T,

    tr (S1 S2)^(1/2) = sum_i sqrt lambda_i(R^T S2 R)                               root "eigen"

and R^T S2 R is symmetric and positive: the result is never complex and never NaN, also for singular covariances. R is the
Cholesky factor of whichever covariance has one (it keeps small eigenvalues 10 to 1000 times better than eigenvectors do, in
a third of the time), else V sqrt(w) of the first. The same trace without eigenvalues, by matrix products alone, which is what a
GPU is good at, is that of the root of A = R^T S2 R by the coupled iteration of Newton and Schulz (Higham 2008, "Functions of
Matrices", ch. 6),

    Y = A / |A|_F, Z = 1;   W = (3 - Z Y) / 2,  Y <- Y W,  Z <- W Z;   A^(1/2) = |A|_F^(1/2) Y      root "newton-schulz"

until |1 - Z Y|_F / sqrt(D) vanishes. An eigenvalue l of A / |A|_F takes about log(1 / l) / log(9 / 4) steps, and rounding grows
with 1 / sqrt(l). Measured at D = 192 in float64 it agrees with root "eigen" to 1e-10 where S1 and S2 have conditions of 1e7, to
1e-8 at 1e9, and from about 1e11 on it does not converge and raises ValueError. Nor does it for a singular A, unless rounding
makes every 0 positive; then it is as near as root "eigen". (Making Y, Z and W symmetric in every step makes it unstable.)

Of fewer vectors than features, X and Y centred, the same trace has no covariance and loses no digits by squaring:

    tr (S1 S2)^(1/2) = |X Y^T|_* / sqrt((N1 - 1) (N2 - 1)),      |.|_* the sum of singular values
"""

import warnings
from typing import Literal

import torch
from torch import Tensor

from midway.gen.metrics.moments import FeatureStatistics, comparable

Root = Literal["eigen", "newton-schulz"]
_CONVERGED = 1e-7  # the iteration is quadratic: the step after this one reaches rounding
_MOST_STEPS = 60  # an eigenvalue of 1e-20 is through


def frechet_distance(
    a: FeatureStatistics, b: FeatureStatistics, root: Root = "eigen", device: str | torch.device = "cpu"
) -> float:
    """Squared distance >= 0, in squared feature units. ValueError if the dimensions differ or a set has < 2 images.

    Biased upwards by about C / N: compare only at equal N. Warns where N < 2 D. `root` selects the method of the trace, both in
    float64, on a `device` that has it; ValueError where "newton-schulz" does not converge.
    """
    if a.dim != b.dim:
        raise ValueError(f"features of {a.dim} and {b.dim} dimensions cannot be compared: use one feature network")
    if root not in ("eigen", "newton-schulz"):
        raise ValueError(f"root is {root!r}: use 'eigen' or 'newton-schulz'")
    first, second = a.covariance.to(device), b.covariance.to(device)
    _warn_if_few(a.count, a.dim)
    _warn_if_few(b.count, b.dim)
    trace = _trace_of_root(first, second) if root == "eigen" else _trace_by_products(first, second)
    return _distance(a.mean, b.mean, float(first.trace() + second.trace()), trace)


def frechet_distance_of_features(x: Tensor, y: Tensor) -> float:
    """`frechet_distance` of features (N, D) and (M, D), any float dtype; to rounding also where N or M is at most D.

    There no covariance is formed, only a product of at most D x D. ValueError for sets that are not comparable (not (N, D),
    not finite, fewer than 2 images, other D). Warns where N or M < 2 D.
    """
    first, second = comparable(x, y)
    if min(len(first), len(second)) > first.shape[1]:
        return frechet_distance(FeatureStatistics.of(first), FeatureStatistics.of(second))
    for features in (first, second):
        _warn_if_few(*features.shape)
    means = first.mean(0), second.mean(0)
    first, second = (_scaled(features) for features in (first, second))
    nuclear = float(torch.linalg.svdvals(_at_most_square(first) @ _at_most_square(second).T).sum())
    return _distance(*means, float(first.square().sum() + second.square().sum()), nuclear)


def frechet_distance_to(x: Tensor, reference: FeatureStatistics) -> float:
    """`frechet_distance` of features (N, D) to statistics; of N <= D without a covariance of x, so without squaring its digits.

    With S2 = R R^T and X centred, / sqrt(N - 1): tr (S1 S2)^(1/2) = |X R|_*. ValueError and warnings as of the others.
    """
    statistics = FeatureStatistics.of(x)
    if not 2 <= len(x) <= reference.dim or statistics.dim != reference.dim:
        return frechet_distance(statistics, reference)
    _warn_if_few(len(x), reference.dim)
    _warn_if_few(reference.count, reference.dim)
    covariance, rows = reference.covariance, _scaled(x.double().cpu())
    factor, info = torch.linalg.cholesky_ex(covariance)
    nuclear = float(torch.linalg.svdvals(rows @ (factor if int(info) == 0 else _factor(covariance))).sum())
    return _distance(statistics.mean, reference.mean, float(rows.square().sum() + covariance.trace()), nuclear)


def _distance(first_mean: Tensor, second_mean: Tensor, traces: float, trace_of_root: float) -> float:
    """The sum of its parts; rounding errors below 0 are clipped."""
    return max(float((first_mean - second_mean).square().sum()) + traces - 2 * trace_of_root, 0.0)


def _warn_if_few(count: int, dim: int) -> None:
    if count < 2 * dim:
        warnings.warn(
            f"{count} images for {dim} features: below 2 x features the Fréchet distance is "
            "mostly bias; compare only equal image counts, or use more images",
            stacklevel=3,
        )


# ---- of statistics ----


def _trace_of_root(first: Tensor, second: Tensor) -> float:
    """tr (S1 S2)^(1/2) of two covariances (D, D), float64."""
    return float(torch.linalg.eigvalsh(_similar(first, second)).clamp(min=0).sqrt().sum())


def _similar(first: Tensor, second: Tensor) -> Tensor:
    """R^T S R (D, D), symmetric, with the eigenvalues of S1 S2."""
    factor, other = _cholesky(first, second) or (_factor(first), second)
    product = factor.T @ other @ factor
    return (product + product.T) / 2


def _cholesky(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor] | None:
    """The Cholesky factor of either covariance, and the other covariance; None if both are singular."""
    for covariance, other in ((first, second), (second, first)):
        factor, info = torch.linalg.cholesky_ex(covariance)
        if int(info) == 0:
            return factor, other
    return None


def _factor(covariance: Tensor) -> Tensor:
    """R (D, D) with R R^T = covariance; rounding errors below 0 are clipped."""
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    return vectors * eigenvalues.clamp(min=0).sqrt()


def _trace_by_products(first: Tensor, second: Tensor) -> float:
    """tr (S1 S2)^(1/2) by the coupled iteration. ValueError if it does not converge."""
    similar = _cholesky(first, second)
    if similar is None:
        raise ValueError(_refusal("both covariances are singular"))
    factor, other = similar
    product = factor.T @ other @ factor
    return _trace_of_iterated_root((product + product.T) / 2)


def _trace_of_iterated_root(matrix: Tensor) -> float:
    """tr A^(1/2) of symmetric positive A (D, D)."""
    scale = float(torch.linalg.matrix_norm(matrix))
    one = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    y, z, least = matrix / scale, one, float("inf")
    for _ in range(_MOST_STEPS):
        product = z @ y
        residual = float(torch.linalg.matrix_norm(one - product)) / len(matrix) ** 0.5
        w = (3 * one - product) / 2
        y, z = y @ w, w @ z
        if residual < _CONVERGED:
            return scale**0.5 * float(y.trace())
        if not residual < 1e3:
            break
        least = min(least, residual)
    raise ValueError(_refusal(f"its residual |1 - Z Y| / sqrt(D) stayed at {least:.1e}, above {_CONVERGED:g}"))


def _refusal(what: str) -> str:
    return (
        f"the Newton-Schulz root did not converge: {what}; covariances of fewer images than features, or of conditions "
        "beyond 1e9, have none: use root='eigen', frechet_distance_of_features, or more images than features"
    )


# ---- of features ----


def _scaled(features: Tensor) -> Tensor:
    """X / sqrt(N - 1) of centred vectors: X^T X is the covariance."""
    return (features - features.mean(0)) / (len(features) - 1) ** 0.5


def _at_most_square(rows: Tensor) -> Tensor:
    """Q^T X (at most D, D) for rows (N, D): products with it have the singular values of those with X."""
    return torch.linalg.qr(rows, mode="r").R if len(rows) > rows.shape[1] else rows
