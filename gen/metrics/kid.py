"""Kernel inception distance: squared maximum mean discrepancy (MMD) of features under a cubic polynomial kernel.

    k(x, y) = (x . y / D + 1)^3                                   (Binkowski et al. 2018, arXiv 1801.01401)

    MMD^2 = sum_{i != j} k(x_i, x_j) / (N (N - 1)) + sum_{i != j} k(y_i, y_j) / (M (M - 1)) - 2 mean_ij k(x_i, y_j)

(Gretton et al. 2012, JMLR 13, Lemma 6): unbiased at any N and M, unlike the Fréchet distance, and so at times a little below 0.
As in the literature KID is the mean over subsets of both sets, drawn without replacement, and its std that of the subsets (with
the divisor `subsets`), not of the mean. Subset i is a function of (seed, i).

Far from the origin k is large and alike for all pairs, and its differences would be lost. With x = m + u about the common mean m,

    k(x, y) = (s + t)^3,    t = u . v / D,  s = c + a + b,  c = m . m / D + 1,  a = m . u / D,  b = m . v / D

and every function of x alone or of y alone cancels in MMD^2. What remains, t (3 s^2 + 3 s t + t^2) + 3 a b (s + c), is summed in
place of k. All in float64; a block of at most 32 MiB of kernel values, and a few like it, is held at a time. Like every distance
it is named with its feature network.
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


@dataclass(frozen=True, eq=False)
class _Centred:
    """u (N, D) and a (N,) of features, and c of their common mean."""

    u: Tensor
    a: Tensor
    c: float

    @staticmethod
    def of(features: Tensor, mean: Tensor) -> "_Centred":
        u = features - mean
        return _Centred(u, u @ mean / len(mean), float(mean.square().mean()) + 1)

    def own(self) -> Tensor:
        """float64 (N,): the kernel of each with itself."""
        return _mixed(self.u.square().mean(1), self.a, self.a, self.c)

    def total(self, other: "_Centred") -> float:
        """Sum of the kernel over all pairs."""
        rows = max(1, _BLOCK // len(other.u))
        blocks = zip(self.u.split(rows), self.a.split(rows), strict=True)
        return math.fsum(
            float(_mixed(u @ other.u.T / u.shape[1], a[:, None], other.a, self.c).sum()) for u, a in blocks
        )

    def mean_of_others(self) -> float:
        """Mean of the kernel of x_i and x_j over i != j."""
        return (self.total(self) - float(self.own().sum())) / (len(self.u) * (len(self.u) - 1))


def _mixed(t: Tensor, a: Tensor, b: Tensor, c: float) -> Tensor:
    """What of (c + a + b + t)^3 depends on both vectors of a pair."""
    s = a + b + c
    return t * (3 * s * (s + t) + t.square()) + 3 * a * b * (s + c)


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    mean = (x.mean(0) + y.mean(0)) / 2
    first, second = _Centred.of(x, mean), _Centred.of(y, mean)
    return first.mean_of_others() + second.mean_of_others() - 2 * first.total(second) / (len(x) * len(y))
