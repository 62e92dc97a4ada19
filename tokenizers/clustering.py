"""Nearest codes and k-means without ever holding all N x K distances.

    argmin_k |x - e_k|^2 = argmax_k ((x - c) . (e_k - c) - |e_k - c|^2 / 2)     for any c; c = mean of the codes

The shift by c keeps float32 exact where the data is far from the origin. Seeding draws centres with probability
proportional to the squared distance to those already drawn, and keeps the best of a few trials (greedy k-means++, Arthur
and Vassilvitskii 2007). Beyond 64 centres it draws several at once, so that it costs a few passes over the N x K products
rather than K passes over the data.

Spherical k-means (Dhillon and Modha 2001) is k-means of unit vectors whose centres are made unit vectors after every iteration.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from midway.tokenizers import nearest_kernel
from midway.tokenizers.rotation import unit

_SCORES_PER_CHUNK = 2**20  # 4 MiB of float32: stays in cache, which is what makes it fast
_TRIALS = 6  # draws in each round of seeding, of which the best is kept
_ROUND = 32  # a round adds one centre for so many there are


def nearest_code(rows: Tensor, codebook: Tensor) -> Tensor:
    """Index of the code nearest to each row: (N, D), (K, D) float32 -> (N,) int64; of ties the lowest.

    A row with a NaN gets index 0, and its distance is NaN. A code with a NaN is nearest to every row (of several the first), so
    that a broken codebook shows in the distance instead of sending everything to some other code.
    """
    if (
        torch.compiler.is_compiling()
    ):  # whose tracer supports neither the settings of precision nor kernels to be tried out
        return torch.ops.midway.nearest_code(rows, codebook)
    return _nearest_code(rows.detach(), codebook.detach())


def _nearest_code(rows: Tensor, codebook: Tensor) -> Tensor:
    centre = codebook.nan_to_num(0, 0, 0).mean(0)
    codes = codebook - centre
    bias = codes.square().sum(1) / -2
    step = rows_per_chunk(len(codebook))
    if rows.is_cuda and len(rows) > step and nearest_kernel.works(rows.device, rows.shape[1]):
        return nearest_kernel.highest_score(rows - centre, codes, bias)
    # One buffer for all chunks: to allocate one each may cost as much as the product, in page faults.
    scores, found = rows.new_empty(min(step, len(rows)), len(codes)), rows.new_empty(len(rows), dtype=torch.int64)
    with full_precision():
        for chunk, index in zip(rows.split(step), found.split(step), strict=True):
            index.copy_(torch.addmm(bias, chunk - centre, codes.T, out=scores[: len(chunk)]).argmax(1))
    return found


@torch.library.custom_op("midway::nearest_code", _nearest_code, mutates_args=()).register_fake
def _(rows: Tensor, codebook: Tensor) -> Tensor:
    return rows.new_empty(len(rows), dtype=torch.int64)


def rows_per_chunk(size: int) -> int:
    """How many rows make 4 MiB of float32 scores with `size` codes, at least one."""
    return max(1, _SCORES_PER_CHUNK // size)


@contextmanager
def full_precision() -> Iterator[None]:
    """float32 products really in float32: TF32 picks a wrong code for about 1 % of vectors.

    Inside a torch.compile graph it does nothing: the process's own setting holds there.
    """
    if torch.compiler.is_compiling():
        yield
        return
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # pyright: ignore[reportAttributeAccessIssue]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def sums_by_code(rows: Tensor, indices: Tensor, size: int) -> Tensor:
    """(sum of the rows of each code, their number): rows (N, D), indices (N,) -> (size, D + 1)."""
    ones = rows.new_ones(len(rows), 1)
    return rows.new_zeros(size, rows.shape[1] + 1).index_add_(0, indices, torch.cat([rows, ones], 1))


def kmeans(rows: Tensor, size: int, iterations: int, generator: torch.Generator, spherical: bool = False) -> Tensor:
    """`size` centres of rows (N, D) after Lloyd `iterations`; with 0 iterations random rows.

    A CPU `generator` draws everything. Where there are no more different rows than centres, those are the centres, repeated.
    ValueError without rows. `spherical`: the rows are unit vectors, and so are the centres.
    """
    if not len(rows):
        raise ValueError("the first training batch is empty: a codebook is initialised from encoder vectors")
    different = rows.unique(dim=0)
    if len(different) <= size:
        return different.repeat(-(-size // len(different)), 1)[:size]
    centres = spread_rows(rows, size, generator) if iterations else random_rows(rows, size, generator)
    for _ in range(iterations):
        sums = sums_by_code(rows, nearest_code(rows, centres), size)
        means = sums[:, :-1] / sums[:, -1:].clamp(min=1)
        moved = torch.where(sums[:, -1:] > 0, unit(means) if spherical else means, centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def random_rows(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` different rows of (N, D), N >= size."""
    return rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)]


def spread_rows(rows: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` rows of (N, D), far from one another: greedy D^2 sampling, in rounds that grow with what is there."""
    centres = random_rows(rows, 1, generator)
    distances = squared_distance(rows, centres)
    while len(centres) < size:
        extra = min(max(1, len(centres) // _ROUND), size - len(centres))
        trials = [weighted_rows(rows, distances, extra, generator) for _ in range(_TRIALS)]
        remaining = [torch.minimum(distances, squared_distance(rows, trial)) for trial in trials]
        best = int(torch.stack([each.sum() for each in remaining]).argmin())
        centres, distances = torch.cat([centres, trials[best]]), remaining[best]
    return centres


def weighted_rows(rows: Tensor, weights: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """`size` different rows of (N, D), each drawn with probability proportional to its weight (N,).

    The largest weight / Exp(1) are such a sample (Efraimidis and Spirakis 2006).
    """
    clocks = torch.empty(len(rows), dtype=torch.float32).exponential_(generator=generator).to(rows.device)
    return rows[(weights / clocks).topk(size).indices]


def squared_distance(rows: Tensor, centres: Tensor) -> Tensor:
    """Squared distance of each row to its nearest centre, (N,)."""
    return (rows - centres[nearest_code(rows, centres)]).square().sum(1)
