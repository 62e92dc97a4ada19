"""The search for the nearest code as one Triton kernel: scores stay on the chip instead of going through memory by the chunk.

    index_n = argmax_k (x_n . e_k + b_k), of ties the lowest; a score that is NaN counts as infinite (in torch as more)

Used on a CUDA device only after it has agreed with torch there, once per process and number of channels; anything that goes
wrong in that trial leaves it to torch.
"""

import contextlib
import functools
import warnings
from typing import Any

import torch
from torch import Tensor

ROWS, CODES = 64, 64
WIDEST = 128
"""Channels beyond which a block of rows and codes no longer fits beside its scores."""


def highest_score(rows: Tensor, codes: Tensor, bias: Tensor) -> Tensor:
    """(N, D), (K, D), (K,) float32 on a CUDA device, or on a CPU by Triton's interpreter -> (N,) int64."""
    rows, codes, bias = rows.contiguous(), codes.contiguous(), bias.contiguous()
    found = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    (count, dim), size = rows.shape, len(codes)
    width = max(16, 1 << (dim - 1).bit_length())
    blocks = (count + ROWS - 1) // ROWS
    with torch.cuda.device(rows.device) if rows.is_cuda else contextlib.nullcontext():
        _kernel()[(blocks,)](found, rows, codes, bias, count, size, dim, width, ROWS, CODES)
    return found


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def search(
        found, rows, codes, bias, count, size, dim, WIDTH: tl.constexpr, ROWS: tl.constexpr, CODES: tl.constexpr
    ):
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        channel = tl.arange(0, WIDTH)
        inside = (row[:, None] < count) & (channel[None, :] < dim)
        x = tl.load(rows + row[:, None] * dim + channel[None, :], mask=inside, other=0.0)
        best = tl.full((ROWS,), float("-inf"), tl.float32)
        index = tl.zeros((ROWS,), tl.int64)
        for first in range(0, size, CODES):
            code = first + tl.arange(0, CODES)
            known = (code[None, :] < size) & (channel[:, None] < dim)
            e = tl.load(codes + code[None, :].to(tl.int64) * dim + channel[:, None], mask=known, other=0.0)
            offset = tl.load(bias + code, mask=code < size, other=float("-inf"))
            score = tl.dot(x, e, input_precision="ieee") + offset[None, :]
            score = tl.where((score != score) & (code[None, :] < size), float("inf"), score)
            top, place = tl.max(score, 1, return_indices=True, return_indices_tie_break_left=True)
            index = tl.where(top > best, first + place, index)
            best = tl.maximum(top, best)
        tl.store(found + row, index, mask=row < count)

    return search


@functools.cache
def works(device: torch.device, dim: int) -> bool:
    """Whether the kernel finds on this device what torch finds, among small integers, whose scores are exact and often equal."""
    if dim > WIDEST:
        return False
    generator = torch.Generator().manual_seed(0)
    rows, codes, bias = (
        torch.randint(-3, 4, shape, generator=generator).float().to(device)
        for shape in ((501, dim), (203, dim), (203,))
    )
    rows[7, 0] = torch.nan
    try:
        expected = (rows.double() @ codes.double().T + bias).argmax(1)
        return torch.equal(highest_score(rows, codes, bias), expected)
    except Exception as error:  # a compiler that does not work is no reason not to train
        warnings.warn(f"no kernel on {device}, nearest codes are found by torch: {error}", stacklevel=2)
        return False
