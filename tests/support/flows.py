"""Baselines with random weights, and the autodiff Jacobian that log-determinants are compared with."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from midway.gen.baselines.flow_layers import ActNorm
from midway.gen.core import randomness
from midway.gen.data.levels import from_levels
from midway.gen.training.batches import Context, ImageBatch

Module = TypeVar("Module", bound=nn.Module)


def randomise(module: Module, std: float = 0.4) -> Module:
    """Every parameter random and a function of its shape alone: zeros would hide errors. ActNorms count as initialised."""
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data.copy_(std * torch.randn(p.shape, generator=generator))
    for layer in module.modules():
        if isinstance(layer, ActNorm):
            layer.initialised.fill_(True)
    return module


def images(count: int, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal noise (count, *shape), the same at every call."""
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)


def jacobian_log_det(function: Callable[..., Tensor], x: Tensor, *others: Tensor | None) -> Tensor:
    """(B,): ln|det| of the autodiff Jacobian in x of each sample of function(x, *others)."""
    found = []
    for i in range(len(x)):
        rest = [None if other is None else other[i : i + 1] for other in others]
        row = torch.autograd.functional.jacobian(lambda v, rest=rest: function(v[None], *rest)[0], x[i])
        found.append(torch.linalg.slogdet(row.reshape(x[0].numel(), -1))[1])  # pyright: ignore
    return torch.stack(found)


def context(count: int, step: int = 0, first: int = 0) -> Context:
    """Of samples first .. first + count - 1."""
    return Context(0, step, torch.arange(first, first + count))


def batch(count: int, shape: tuple[int, int, int], levels: int = 17, classes: int = 3) -> ImageBatch:
    """Images of `levels` levels, darker ones more often, with labels 0, 1, ... by turns."""
    k = (randomness.uniform(0, "test", 0, torch.arange(count), shape).square() * levels).long()
    return ImageBatch(from_levels(k, levels), torch.arange(count) % classes)
