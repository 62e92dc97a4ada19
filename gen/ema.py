"""Exponential moving average of everything that learns: parameters, and buffers that learn (codebooks, statistics).

    shadow <- d shadow + (1 - d) value,   d = min(decay, (1 + s) / (10 + s)) after optimizer step s

The warm-up is what makes an average useful in short runs (a decay of 0.9999 alone shows noise for 10,000 steps).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """The decay used after optimizer step `step` (counted from 0)."""
    return min(decay, (1 + step) / (10 + step))


class EMA:
    """Averages the floating-point state of `model`; integer and boolean state is copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}; 0 means the newest weights")
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model` after optimizer step `step`."""
        weight = 1 - decay_at(step, self.decay)
        averaged = [(s, v) for s, v in self._pairs(model) if s.is_floating_point()]
        torch._foreach_lerp_([s for s, _ in averaged], [v for _, v in averaged], weight)
        for shadow, value in self._pairs(model):
            if not shadow.is_floating_point():
                shadow.copy_(value)

    def _pairs(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        for name, value in model.state_dict().items():
            yield self.shadow[name], value.detach()

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` holds the averaged state; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(own)
