"""Sliced squared 2-Wasserstein distance of two sets of features.

    SW^2 = D mean_u W^2(u . x, u . y),        W^2 = int_0^1 (F^-1(q) - G^-1(q))^2 dq

over unit directions u, F and G the distribution functions of both sets along u (Rabin et al. 2011; Bonneel et al. 2015). W^2 is
exact for any two counts: both quantile functions are steps, and the integral is a sum over their common steps. It compares whole
distributions, not two moments, and needs no D x D matrix.

The directions are whole orthonormal bases, functions of (seed, D) alone. Over a basis the squared lengths of projections add up
to that of the vector: with the factor D a translation by d scores exactly |d|^2, as in the Fréchet distance, and nothing scores
more than the squared Wasserstein distance in all D dimensions. MIND (arXiv 2605.06797) is the same mean times 3 D, of independent
directions and with the larger set cut to the smaller; the name is not used here. Like the Fréchet distance it is biased upwards
for few images: compare equal counts.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.core.randomness import normal
from midway.gen.metrics.moments import comparable

DIRECTIONS = 1000
"""The least number of directions; whole bases are more."""
_BLOCK = 2**22  # projected values held at a time


@dataclass(frozen=True, eq=False)
class Slices:
    """Of a set of features: `directions` float64 (L, D), and its projections on them, sorted, float64 (L, N)."""

    features: Tensor
    directions: Tensor
    sorted: Tensor

    @classmethod
    def of(cls, features: Tensor, directions: int = DIRECTIONS, seed: int = 0) -> "Slices":
        """Of features (N, D), any float dtype. ValueError as `comparable`, or for directions < 1."""
        x, _ = comparable(features, features)
        chosen = orthonormal_directions(x.shape[1], directions, seed).to(x.device)
        return cls(x, chosen, _projected(chosen, x))

    def distance(self, features: Tensor) -> float:
        """SW^2 to features (M, D). ValueError for sets that are not comparable."""
        mine, theirs = comparable(self.features, features)
        i, j, width = (part.to(mine.device) for part in common_steps(len(mine), len(theirs)))
        rows = max(1, _BLOCK // len(width))
        found = [
            float(((known[:, i] - _projected(chosen, theirs)[:, j]).square() @ width).sum())
            for chosen, known in zip(self.directions.split(rows), self.sorted.split(rows), strict=True)
        ]
        return mine.shape[1] * math.fsum(found) / len(self.directions)


def sliced_wasserstein(x: Tensor, y: Tensor, directions: int = DIRECTIONS, seed: int = 0) -> float:
    """SW^2 >= 0 of features (N, D) and (M, D), in their squared units. ValueError for sets that are not comparable."""
    return Slices.of(x, directions, seed).distance(y)


def orthonormal_directions(dim: int, count: int, seed: int = 0) -> Tensor:
    """float64 (L, D), L the next multiple of D: the rows of random orthogonal matrices. ValueError for count < 1."""
    if count < 1:
        raise ValueError(f"{count} directions: use at least 1")
    drawn = normal(seed, "sliced-wasserstein", dim, torch.arange(-(-count // dim)), (dim, dim)).double()
    return torch.linalg.qr(drawn).Q.flatten(0, 1)


def common_steps(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of the quantile functions of n and m values: which value either has on a common step, int64 (S,), and its width.

    Widths add up to 1. There are n + m - gcd(n, m) steps; their ends are counted in units of 1 / (n m).
    """
    ends = torch.cat([m * torch.arange(1, n + 1), n * torch.arange(1, m + 1)]).unique()
    width = ends.diff(prepend=ends.new_zeros(1)).double() / (n * m)
    return (ends - 1) // m, (ends - 1) // n, width


def _projected(directions: Tensor, features: Tensor) -> Tensor:
    return (directions @ features.T).sort(dim=1).values
