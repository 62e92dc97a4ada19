"""Exponential moving average of everything that learns: parameters, and buffers that learn (codebooks, statistics).

    shadow <- d shadow + (1 - d) value,   d = min(decay, (1 + s) / (10 + s)) after optimizer step s

The warm-up is what makes an average useful in short runs (a decay of 0.9999 alone shows noise for 10,000 steps).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from midway.tokenizers.weights import check_tensors


class EMA:
    """Averages the floating-point state of `model`; integer and boolean state is copied."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"EMA decay must be in [0, 1), got {decay}; 0 means the newest weights")
        self.decay = decay
        self.shadow = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self._bind(model)

    def _bind(self, model: nn.Module) -> None:
        places = _places(model)
        self._model = model
        averaged = [(s, *places[name]) for name, s in self.shadow.items() if s.is_floating_point()]
        # one operation takes sharded tensors or others
        kinds = {isinstance(shadow, DTensor) for shadow, *_ in averaged}
        groups = [[place for place in averaged if isinstance(place[0], DTensor) == kind] for kind in kinds]
        self._averaged = [([s for s, _, _ in group], [(holder, key) for _, holder, key in group]) for group in groups]
        self._copied = [(s, *places[name]) for name, s in self.shadow.items() if not s.is_floating_point()]

    def decay_after(self, step: int) -> float:
        """The decay used after optimizer step `step` (counted from 0)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Move the average towards `model` after optimizer step `step`."""
        if model is not self._model:
            self._bind(model)
        weight = 1 - self.decay_after(step)
        for shadows, places in self._averaged:
            torch._foreach_lerp_(shadows, [holder[key] for holder, key in places], weight)
        for shadow, holder, key in self._copied:
            shadow.copy_(holder[key])

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore a stored average, of whole tensors. ValueError unless they have the names, types and shapes of the model's."""
        check_tensors(state, self.shadow)
        for name, shadow in self.shadow.items():
            shadow.copy_(placed(shadow, state[name]))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the block `model` holds the averaged state; afterwards its own again."""
        own = {name: value.detach().clone() for name, value in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(own)


def placed(model: Tensor, value: Tensor) -> Tensor:
    """`value` cut into shards as `model` is, if it is and has the same shape."""
    if isinstance(model, DTensor) and model.shape == value.shape:
        return distribute_tensor(value.to(model.device), model.device_mesh, model.placements)
    return value


def _places(model: nn.Module) -> dict[str, tuple[dict[str, Any], str]]:
    """Where a model keeps each tensor of its state, so that reading them all need not build a state_dict every step."""
    places = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for holder in (module._parameters, module._buffers):
            for key, value in holder.items():
                if value is not None and key not in module._non_persistent_buffers_set:
                    places[f"{prefix}.{key}" if prefix else key] = (holder, key)
    return places
