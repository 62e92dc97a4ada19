"""Which codes a sum of codes consists of: what residual quantization (residual.py) forgets when it adds up.

    s = ((c_1 + c_2) + c_3) + ... + c_n,   c_i of codebook i        s is known in float32, bit for bit

Stage by stage the nearest code to what is left of s need not do: c_1 was nearest to z, and s is not z but z - r, with r the
residual of the last stage. A beam search: half of the partial sums that go on to the next stage are those nearest to s, and half
those for which z need be moved least. z is nearer to code c than to c', hence at least so far from a point p nearer to c'
(p the rest of s, squares added over stages):

    (|p - c|^2 - |p - c'|^2) / (2 |c - c'|)          c' the code nearest to p

In the end a sum has to equal s. A search can miss it: there are K^n sums, and finding one of a given value is hard in general.
"""

import torch
from torch import Tensor

from midway.tokenizers.clustering import full_precision, rows_per_chunk

_WIDTHS = (16, 256, 4096)  # partial sums that go on; the next number where one is not enough
_MOST_PARTIAL = 2**20  # of all rows together, beyond which no wider search is tried
_MOST_SCORES = 2**24  # of one row and codebook: 64 MiB


def summands(sums: Tensor, books: list[Tensor]) -> Tensor:
    """Indices (N, n) int64 of codes of n `books` (K, D) whose sum is `sums` (N, D) float32, where such were found."""
    indices = torch.zeros(len(sums), len(books), dtype=torch.int64, device=sums.device)
    missing = torch.ones(len(sums), dtype=torch.bool, device=sums.device)
    for width in _WIDTHS:
        scores = width * len(books[0])
        if width > _WIDTHS[0] and (int(missing.sum()) * width > _MOST_PARTIAL or scores > _MOST_SCORES):
            break
        found = [_beam(chunk, books, width) for chunk in sums[missing].split(rows_per_chunk(scores))]
        indices[missing] = torch.cat([paths for paths, _ in found])
        missing[missing.clone()] = torch.cat([~equal for _, equal in found])
    return indices


def _beam(rows: Tensor, books: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    """(indices (N, n), whether their sum is the row (N,)) of rows (N, D)."""
    partial, moved = rows.new_zeros(len(rows), 1, rows.shape[1]), rows.new_zeros(len(rows), 1)
    paths = torch.zeros(len(rows), 1, 0, dtype=torch.int64, device=rows.device)
    for book in books:
        with full_precision():
            scores = _squared_distances(rows.unsqueeze(1) - partial, book)
            least, closest = scores.min(2)
            apart = _squared_distances(book[closest], book)
        further = (scores - least.unsqueeze(2)).square() / (4 * apart).clamp(min=1e-20)
        needed = (moved.unsqueeze(2) + further).flatten(1)
        chosen = _best_of_both(scores.flatten(1), needed, width // 2)
        parent, code = (chosen // len(book)).unsqueeze(2), chosen % len(book)
        moved = needed.gather(1, chosen)
        partial = partial.gather(1, parent.expand(-1, -1, rows.shape[1])) + book[code]
        paths = torch.cat([paths.gather(1, parent.expand(-1, -1, paths.shape[2])), code.unsqueeze(2)], 2)
    equal = (partial == rows.unsqueeze(1)).all(2)
    best = equal.int().argmax(1)
    return paths[torch.arange(len(rows), device=rows.device), best], equal.any(1)


def _best_of_both(scores: Tensor, needed: Tensor, count: int) -> Tensor:
    """Places of the `count` least scores and of the `count` least others by `needed`, all (N, M) -> (N, <= 2 count)."""
    nearest = scores.topk(min(count, scores.shape[1]), largest=False).indices
    others = needed.scatter(1, nearest, torch.inf)
    left = min(count, scores.shape[1] - nearest.shape[1])
    return torch.cat([nearest, others.topk(left, largest=False).indices], 1)


def _squared_distances(points: Tensor, book: Tensor) -> Tensor:
    """(N, W, D), (K, D) -> (N, W, K)."""
    squares = points.square().sum(2, keepdim=True) + book.square().sum(1)
    return (squares - 2 * points @ book.T).clamp(min=0)
