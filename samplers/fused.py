"""A weighted sum of tensors, in as few passes over memory as the device allows.

On a CPU, and for two terms, torch's own operations; on a CUDA device one Triton kernel reads every term once and writes once.
The kernel is used only after it has agreed with torch on that device, once per process.
"""

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from midway.samplers.prediction import expand

BLOCK = 1024
MOST_TERMS = 16
"""More are added up in groups."""


def combine(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j weights[j] tensors[j], at least one term; a first weight of exactly 1 saves an operation."""
    first = tensors[0]
    narrow = first.dtype != torch.float64  # the kernel adds in float32
    if len(weights) > 2 and first.is_cuda and narrow and not _needs_gradient(tensors) and _kernel_works(first.device):
        return fused(weights, tensors)
    return chain(weights, tensors)


def chain(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum by torch, one operation a term."""
    if weights[0] != 1 or len(weights) == 1:
        total, rest = torch.mul(tensors[0], scalar(weights[0], tensors[0].dtype)), 1
    else:
        total, rest = torch.add(tensors[0], tensors[1], alpha=weights[1]), 2
    for j in range(rest, len(weights)):
        total.add_(tensors[j], alpha=weights[j])
    return total


def weighted_sum(weights: Sequence[Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """sum_j weights[j] tensors[j] for tensors (B, *) and weights (B,) or (), differentiable in both."""
    terms = [expand(weight.to(x.dtype), x) * x for weight, x in zip(weights, tensors, strict=True)]
    return functools.reduce(torch.add, terms)


@functools.lru_cache(maxsize=4096)
def scalar(weight: float, dtype: torch.dtype) -> Tensor:
    """A number () on the host that torch multiplies tensors of this dtype by in half the time that a Python number takes it.

    Lower precisions get it in float32, in which torch multiplies them.
    """
    with torch.inference_mode(False):
        return torch.tensor(weight, dtype=dtype if dtype == torch.float64 else torch.float32)


def fused(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    """The sum by one kernel for every 16 terms: float32 arithmetic whatever the dtype."""
    tensors = [tensor.contiguous() for tensor in tensors]
    total, size = torch.empty_like(tensors[0]), tensors[0].numel()
    for start in range(0, len(tensors), MOST_TERMS):
        terms, factors = (tuple(each[start : start + MOST_TERMS]) for each in (tensors, weights))
        _kernel()[((size + BLOCK - 1) // BLOCK,)](total, terms, factors, size, start > 0, len(terms), BLOCK)
    return total


@functools.cache
def _kernel() -> Any:
    import triton
    import triton.language as tl

    @triton.jit
    def weighted_sum(out, terms, weights, size, ADD: tl.constexpr, TERMS: tl.constexpr, BLOCK: tl.constexpr):
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        total = tl.zeros((BLOCK,), tl.float32)
        if ADD:
            total += tl.load(out + place, mask=inside).to(tl.float32)
        for j in tl.static_range(TERMS):  # pyright: ignore[reportGeneralTypeIssues]
            total += weights[j] * tl.load(terms[j] + place, mask=inside).to(tl.float32)
        tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)

    return weighted_sum


def _needs_gradient(tensors: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@functools.cache
def _kernel_works(device: torch.device) -> bool:
    """Whether the kernel gives on this device what torch gives."""
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(3, 701, generator=generator).to(device) for _ in range(MOST_TERMS + 1)]
    weights = torch.randn(len(terms), generator=generator).tolist()
    try:
        return torch.allclose(fused(weights, terms), chain(weights, terms), atol=1e-4)
    except Exception as error:  # a compiler that does not work is no reason not to sample
        warnings.warn(f"no fused kernel on {device}, sums take one operation a term: {error}", stacklevel=2)
        return False
