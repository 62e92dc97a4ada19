"""Tensors that tests draw, and gradients that they compare."""

from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers, the same at every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def pixels(count: int, channels: int = 1, size: int = 8) -> Tensor:
    """Random images, uint8 (count, channels, size, size), the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)


def grad(tensor: Tensor) -> Tensor:
    """The gradient of a leaf that a backward pass has reached."""
    assert tensor.grad is not None
    return tensor.grad


def gradients(network: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, then the gradient of its mean square with respect to every parameter."""
    out = network(x)
    return [out.detach(), *torch.autograd.grad(out.float().square().mean(), list(network.parameters()))]


def randomised(module: M, seed: int = 0, std: float = 0.1) -> M:
    """`module` with a little noise on every parameter, so that nothing is zero or equal by initialisation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += std * torch.randn(parameter.shape, generator=generator)
    return module
