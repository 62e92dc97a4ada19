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


def assert_bijection(
    forward: Callable[..., tuple[Tensor, Tensor]], inverse: Callable[..., Tensor], x: Tensor, *others: Tensor | None
) -> None:
    """In float64: the inverse undoes forward, and forward returns the log-determinant of its Jacobian."""
    y, log_det = forward(x, *others)
    assert y.shape == x.shape
    assert log_det.shape == (len(x),)
    torch.testing.assert_close(inverse(y, *others), x, rtol=0, atol=1e-9)
    expected = jacobian_log_det(lambda v, *rest: forward(v, *rest)[0], x, *others)
    torch.testing.assert_close(log_det, expected, rtol=0, atol=1e-6)


def assert_undone_in_float32(
    forward: Callable[..., tuple[Tensor, Tensor]], inverse: Callable[..., Tensor], x: Tensor, *others: Tensor | None
) -> None:
    """Up to its rounding."""
    x, *others = (value.float() if value is not None and value.is_floating_point() else value for value in (x, *others))  # pyright: ignore
    torch.testing.assert_close(inverse(forward(x, *others)[0], *others), x, rtol=0, atol=1e-5)


def context(count: int, step: int = 0, first: int = 0) -> Context:
    """Of samples first .. first + count - 1."""
    return Context(0, step, torch.arange(first, first + count))


def batch(count: int, shape: tuple[int, int, int], levels: int = 17, classes: int = 3) -> ImageBatch:
    """Images of `levels` levels, darker ones more often, with labels 0, 1, ... by turns."""
    k = (randomness.uniform(0, "test", 0, torch.arange(count), shape).square() * levels).long()
    return ImageBatch(from_levels(k, levels), torch.arange(count) % classes)
