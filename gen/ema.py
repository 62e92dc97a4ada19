"""Exponential moving average of everything that learns: parameters, and buffers that learn (codebooks, statistics).

    shadow <- d shadow + (1 - d) value,   d = min(decay, (1 + s) / (10 + s)) after optimizer step s

The warm-up is what makes an average useful in short runs (a decay of 0.9999 alone shows noise for 10,000 steps).
"""

from collections.abc import Iterator, Mapping
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

    def decay_after(self, step: int) -> float:
        """The decay used after optimizer step `step` (counted from 0)."""
        return decay_at(step, self.decay)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model` after optimizer step `step`."""
        values = model.state_dict()
        averaged = [name for name, shadow in self.shadow.items() if shadow.is_floating_point()]
        weight = 1 - self.decay_after(step)
        torch._foreach_lerp_([self.shadow[n] for n in averaged], [values[n] for n in averaged], weight)
        for name in self.shadow.keys() - set(averaged):
            self.shadow[name].copy_(values[name])

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over an average of the same model; KeyError when names differ."""
        if state.keys() != self.shadow.keys():
            raise KeyError(f"an average of other tensors: {sorted(state.keys() ^ self.shadow.keys())[:5]}")
        for name, shadow in self.shadow.items():
            shadow.copy_(state[name])

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` holds the averaged state; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(own)
