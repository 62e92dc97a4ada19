"""Kernel inception distance: squared maximum mean discrepancy (MMD) of features under a cubic polynomial kernel.

    k(x, y) = (x . y / D + 1)^3                                   (Binkowski et al. 2018, arXiv 1801.01401)

    MMD^2 = sum_{i != j} k(x_i, x_j) / (N (N - 1)) + sum_{i != j} k(y_i, y_j) / (M (M - 1)) - 2 mean_ij k(x_i, y_j)

(Gretton et al. 2012, JMLR 13, Lemma 6): unbiased at any N and M, unlike the Fréchet distance, and so at times a little below 0.
As in the literature KID is the mean over subsets of both sets, drawn without replacement, and its std that of the subsets (with
the divisor `subsets`), not of the mean. Subset i is a function of (seed, i). All in float64; a block of at most 32 MiB of kernel
values is held at a time. Like every distance it is named with its feature network.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from midway.gen.core.randomness import permutation
from midway.gen.metrics.moments import comparable

_BLOCK = 2**22  # kernel values held at a time


@dataclass(frozen=True)
class Kid:
    """`value`, the mean of `subsets` estimates from `size` images of each set, and `std` among them.

    Of whole sets there is one estimate and no std; `size` is then the number of images of the smaller set.
    """

    value: float
    std: float | None
    subsets: int
    size: int


def kid(x: Tensor, y: Tensor, subsets: int = 100, size: int | None = 1000, seed: int = 0) -> Kid:
    """Of features (N, D) and (M, D), any float dtype, on their device. ValueError for sets that are not comparable.

    A `size` beyond min(N, M) is lowered to it, and the result has the size used. For the whole of both sets, or `size` None, the
    one estimate is the unbiased MMD^2 of them. ValueError for size < 2 or subsets < 1.
    """
    x, y = comparable(x, y)
    if subsets < 1 or (size is not None and size < 2):
        raise ValueError(f"subsets={subsets}, size={size}: use at least 1 subset of at least 2 images")
    least, most = sorted((len(x), len(y)))
    if size is None or size >= most:
        return Kid(_squared_mmd(x, y), None, 1, least)
    size = min(size, least)
    found = [_squared_mmd(*(_subset(*part, i, size, seed) for part in (("x", x), ("y", y)))) for i in range(subsets)]
    mean = math.fsum(found) / subsets
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / subsets)
    return Kid(mean, spread if subsets > 1 else None, subsets, size)


def _subset(side: str, features: Tensor, index: int, size: int, seed: int) -> Tensor:
    rows = permutation(seed, f"kid-{side}", index, len(features))[:size]
    return features[rows.to(features.device)]


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    return _mean_of_others(x) + _mean_of_others(y) - 2 * _total(x, y) / (len(x) * len(y))


def _mean_of_others(x: Tensor) -> float:
    """Mean of k(x_i, x_j) over i != j."""
    own = float((x.square().sum(1) / x.shape[1] + 1).pow(3).sum())
    return (_total(x, x) - own) / (len(x) * (len(x) - 1))


def _total(x: Tensor, y: Tensor) -> float:
    """Sum of the kernel over all pairs."""
    blocks = x.split(max(1, _BLOCK // len(y)))
    return math.fsum(float((block @ y.T / x.shape[1] + 1).pow(3).sum()) for block in blocks)
