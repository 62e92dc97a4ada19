"""Blocks whose activations may be computed again in the backward pass instead of being kept."""

from abc import ABC, abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputed(nn.Module, ABC):
    """Base of blocks whose forward is `compute`: run twice with `gradient_checkpointing`, which changes no value."""

    gradient_checkpointing: bool = False

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        """`compute`, its activations kept or not."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            # Nothing in it draws random numbers, so no generator has to be put back.
            return cast(Tensor, checkpoint(self.compute, x, *more, use_reentrant=False, preserve_rng_state=False))
        return self.compute(x, *more)

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """What the block does: x and the result have the same shape. It may draw no random numbers."""
