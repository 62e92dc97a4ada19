"""The two Triton kernels beside torch: the weighted sum of a solver's row, and the search for the nearest code.

Accuracy is against float64 on fresh random numbers; outputs that were not written would show in it.
"""

import statistics
from collections.abc import Iterator
from functools import partial

import torch
from common import Result
from gpu_parts.part import Maker, Setting, compared, relative, time_rows, turns
from torch import Tensor

from midway.samplers import fused
from midway.tokenizers import nearest_kernel
from midway.tokenizers.clustering import full_precision, rows_per_chunk

TERMS = (3, 5, 17)
SEARCHES = ((4096, 16384, 8), (65536, 1024, 8), (65536, 16384, 8), (16384, 16384, 64))
"""Vectors N, codes K, channels D."""


def makers(setting: Setting) -> dict[str, Maker]:
    """First whether the library uses them on this device."""
    seconds = 0.3 * setting.seconds / (2 * len(TERMS) + len(SEARCHES))
    searches = SEARCHES if not setting.tiny else ((70, 33, 3),)
    sums = {
        f"sum of {terms} terms, {str(dtype).removeprefix('torch.')}": partial(row_sum, setting, seconds, terms, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for terms in TERMS
    }
    found = {
        f"nearest code, N = {n}, K = {k}, D = {d}": partial(search, setting, seconds, n, k, d) for n, k, d in searches
    }
    return {"in use": partial(in_use, setting), **sums, **found}


def in_use(setting: Setting) -> Iterator[Result]:
    """Whether each kernel passes the library's own trial here: 0 means that torch is used in its place."""
    target, judged = ("= 1", True) if setting.cuda else ("", False)
    for name, works in (
        ("the row sum's kernel is used", fused._kernel_works(setting.device)),
        ("the nearest-code kernel is used", nearest_kernel.works(setting.device, 8)),
    ):
        yield Result(name, "", float(works), "", None, None, target, works if judged else None)


def row_sum(setting: Setting, seconds: float, terms: int, dtype: torch.dtype) -> Iterator[Result]:
    """One kernel for all terms beside one operation a term, on one image's state and on tensors larger than the caches."""
    weights = torch.randn(terms).tolist()
    for what, size in (("a state of 4x32x32", 4 * 32 * 32), ("64 Mi numbers", 2**26)):
        xs = random_terms(setting, terms, 1000 if setting.tiny else size, dtype)
        exact = sum(w * x.double() for w, x in zip(weights, xs, strict=True))
        assert isinstance(exact, Tensor)
        name = f"sum of {terms} terms, {what}, {str(dtype).removeprefix('torch.')}"
        errors = [relative(made(weights, xs), exact) for made in (fused.fused, fused.chain)]
        yield compared(f"{name}, error", "relative", errors[0], "torch", errors[1])
        sides = {"kernel": lambda xs=xs: fused.fused(weights, xs), "torch": lambda xs=xs: fused.chain(weights, xs)}
        taken = turns(sides, setting, seconds, calls=1 if size > 2**20 or setting.tiny else 50)
        yield from time_rows(name, taken)
        if size > 2**20:
            bytes_moved = (terms + 1) * xs[0].numel() * xs[0].element_size()
            speeds = [bytes_moved / statistics.median(taken[side]) / 1e9 for side in ("kernel", "torch")]
            yield Result(f"{name}, needed bytes over time", "GB/s", round(speeds[0], 1), "", None, None, "", None)


def random_terms(setting: Setting, terms: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """`terms` tensors (size,)."""
    return [torch.randn(size, device=setting.device, dtype=dtype) for _ in range(terms)]


def search(setting: Setting, seconds: float, count: int, size: int, dim: int) -> Iterator[Result]:
    """Beside torch by the chunk in IEEE float32, which the library uses where there is no kernel."""
    device = setting.device
    rows, codes = torch.randn(count, dim, device=device), torch.randn(size, dim, device=device)
    bias = codes.square().sum(1) / -2

    def by_chunk() -> Tensor:
        with full_precision():
            chunks = rows.split(rows_per_chunk(size))
            return torch.cat([torch.addmm(bias, chunk, codes.T).argmax(1) for chunk in chunks])

    def by_kernel() -> Tensor:
        return nearest_kernel.highest_score(rows, codes, bias)

    name = f"nearest code, N = {count}, K = {size}, D = {dim}"
    deficits = [deficit(rows, codes, bias, found()) for found in (by_kernel, by_chunk)]
    yield compared(f"{name}, largest deficit of a chosen score", "score", deficits[0], "torch", deficits[1])
    differing = (by_kernel() != by_chunk()).double().mean().item()
    taken = turns({"kernel": by_kernel, "torch by the chunk": by_chunk}, setting, seconds)
    yield from time_rows(name, taken, {"torch by the chunk": {"indices": differing}})


def deficit(rows: Tensor, codes: Tensor, bias: Tensor, chosen: Tensor) -> float:
    """How far the scores of the chosen codes lie below the best ones, at most, in float64."""
    worst = 0.0
    for part, index in zip(rows.split(1024), chosen.split(1024), strict=True):
        scores = torch.addmm(bias.double(), part.double(), codes.double().T)
        worst = max(worst, (scores.amax(1) - scores.gather(1, index[:, None])[:, 0]).max().item())
    return worst
