"""Precision that does not depend on the dtype of the weights around it."""

from collections.abc import Callable

import torch
from torch import Tensor

Convert = Callable[[Tensor], Tensor]
"""What `nn.Module._apply` does to every parameter and buffer, for `.to()`, `.half()`, `.cuda()` and the like."""


def widened(x: Tensor) -> Tensor:
    """x in float32, or in float64 if that is its dtype."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def of_same_dtype(convert: Convert) -> Convert:
    """`convert` without its changes of dtype: devices alone."""

    def moved(x: Tensor) -> Tensor:
        new = convert(x)
        return new if new.dtype == x.dtype else x.to(new.device)

    return moved


def at_least_float32(convert: Convert) -> Convert:
    """`convert` without its changes to half precision: devices and float64."""

    def moved(x: Tensor) -> Tensor:
        new = convert(x)
        return new if new.element_size() >= 4 or new.dtype == x.dtype else x.to(new.device)

    return moved
