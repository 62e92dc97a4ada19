"""How generated features lie among reference features, by balls around images that reach to their k-th nearest neighbour.

    B_k(x_i) has the radius NND_k(x_i), the distance from x_i to the k-th nearest of the other x; x reference (N), y generated (M)

    precision = share of y in any B_k(x_i),  recall = share of x in any B_k(y_j);  balls closed, k = 3
                                                              (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2)
    density = mean_j #{i: y_j in B_k(x_i)} / k,  coverage = share of x_i with any y in B_k(x_i);  balls open, k = 5
                                                              (Naeem et al. 2020, arXiv 2002.09797, and its code)

Closed or open decides where features repeat: a copy of a reference image lies on the rims of its neighbours' balls. So no digit
may be lost. |x|^2 + |y|^2 - 2 x . y is quick, but off by up to 8 (D + 4) 2^-52 (|x|^2 + |y|^2); it decides only what that
leaves no doubt about, and all else is decided by differences: sqrt(sum (x - y)^2) in float64, the same bits for the same two
images wherever they stand, exactly 0 of equal ones. A block of at most 32 MiB of distances, and a few like it, is held at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.metrics.moments import comparable

_BLOCK = 2**22  # distances held at a time
_PAIRS = 2**24  # numbers of pairs held at a time, where differences decide
_MANY = 0.05  # share of pairs in doubt from which it is quicker to do all
_EPSILON = 2.0**-52


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1], with the k of their balls."""

    precision: float
    recall: float
    k: int


@dataclass(frozen=True)
class DensityCoverage:
    """Density, >= 0 and about 1 of equal distributions, and coverage in [0, 1], with the k of their balls."""

    density: float
    coverage: float
    k: int


def precision_recall(reference: Tensor, generated: Tensor, k: int = 3) -> PrecisionRecall:
    """Of features (N, D) and (M, D), any float dtype, on their device. The two change places when the sets do.

    ValueError unless 1 <= k < N and k < M, and for sets that are not comparable. They depend on N and M: compare equal ones.
    """
    x, y = _checked(reference, generated, k, k)
    real, fake = _radii(x, k), _radii(y, k)
    precise, recalled = 0, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for rows, block in _blocks(y, x):
        precise += int(_within(block, real, closed=True).any(1).sum())
        recalled |= _within(block, fake[rows, None], closed=True).any(0)
    return PrecisionRecall(precise / len(y), float(recalled.double().mean()), k)


def density_coverage(reference: Tensor, generated: Tensor, k: int = 5) -> DensityCoverage:
    """Of features (N, D) and (M, D), any float dtype, on their device.

    ValueError unless 1 <= k < N, and for sets that are not comparable. They depend on N and M: compare equal ones.
    """
    x, y = _checked(reference, generated, k)
    radii = _radii(x, k)
    held, covered = 0, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for _, block in _blocks(y, x):
        inside = _within(block, radii, closed=False)
        held += int(inside.sum())
        covered |= inside.any(0)
    return DensityCoverage(held / (k * len(y)), float(covered.double().mean()), k)


def _checked(reference: Tensor, generated: Tensor, *neighbours: int) -> tuple[Tensor, Tensor]:
    """In float64; k of the reference, and of the generated where that has balls too."""
    sets = comparable(reference, generated)
    for features, k in zip(sets, neighbours, strict=False):
        if not 1 <= k < len(features):
            raise ValueError(f"k is {k} for {len(features)} images: use 1 <= k < images, or more images")
    return sets


# ---- distances ----


@dataclass(frozen=True, eq=False)
class _Block:
    """Of rows (n, D) to others (m, D): squared distances (n, m) by products, and by how much they may be off."""

    rows: Tensor
    others: Tensor
    squares: Tensor
    slack: Tensor

    def exact(self, where: Tensor) -> Tensor:
        """float64 (P,): the distances of the pairs that bool (n, m) `where` names, row by row, by differences."""
        pairs = where.nonzero()
        if len(pairs) > _MANY * where.numel():
            return _differences(self.rows, self.others)[where]
        chunks = pairs.split(max(1, _PAIRS // self.rows.shape[1]))
        found = [_differences(self.rows[i, None], self.others[j, None]).flatten() for i, j in (c.T for c in chunks)]
        return torch.cat([self.squares.new_empty(0), *found])


def _differences(x: Tensor, y: Tensor) -> Tensor:
    """Distances (..., n, m) of (..., n, D) and (..., m, D). Equal pairs have equal bits, however many are found at a time."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _blocks(x: Tensor, y: Tensor) -> Iterator[tuple[slice, _Block]]:
    """Distances of all x to all y, some rows of x at a time."""
    own, count = y.square().sum(1), max(1, _BLOCK // len(y))
    for start in range(0, len(x), count):
        rows = x[start : start + count]
        lengths = rows.square().sum(1, keepdim=True) + own
        slack = lengths * (8 * (x.shape[1] + 4) * _EPSILON)
        yield slice(start, start + len(rows)), _Block(rows, y, lengths - 2 * rows @ y.T, slack)


def _radii(x: Tensor, k: int) -> Tensor:
    """float64 (N,): from each to the k-th nearest of the others. It is itself the nearest of all, at distance 0."""
    return torch.cat([_kth(block, k + 1) for _, block in _blocks(x, x)])


def _kth(block: _Block, k: int) -> Tensor:
    """The k-th smallest distance of each row, found among all that may be it."""
    most = (block.squares + block.slack).kthvalue(k, dim=1, keepdim=True).values
    near = block.squares - block.slack <= most
    distances = torch.full_like(block.squares, torch.inf)
    distances[near] = block.exact(near)
    return distances.kthvalue(k, dim=1).values


def _within(block: _Block, radii: Tensor, closed: bool) -> Tensor:
    """bool (n, m): whether each distance is at most (`closed`) or below its radius, (m,) or (n, 1)."""
    margin = block.squares - radii.square()
    inside = margin < 0
    doubtful = margin.abs() <= block.slack
    exact, limits = block.exact(doubtful), radii.expand_as(margin)[doubtful]
    inside[doubtful] = exact <= limits if closed else exact < limits
    return inside
