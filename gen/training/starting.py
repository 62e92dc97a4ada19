"""Before the first step: a model initialises itself from data, the same on all processes (`interface.Startable`)."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from midway.gen.training.batches import Context, Order
from midway.gen.training.interface import Items, Startable, Trainable
from midway.gen.training.loading import on_device
from midway.gen.training.state import placed

START_SAMPLES = 1024


class Routed(nn.Module):
    """Routes `loss` and `start` through forward, where DDP, FSDP and autocast act."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.gathered: dict[str, Tensor] = {}
        """Of a start: the parameters that FSDP had gathered for it, in which it may have written."""

    def forward(self, batch: Any, context: Context, start: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
        if not start:
            return cast(Trainable, self.model).loss(batch, context)
        cast(Startable, self.model).start(batch, context)
        self.gathered = {name: p.clone() for name, p in self.model.named_parameters() if not isinstance(p, DTensor)}
        return torch.zeros(()), {}


@torch.no_grad()
def start(wrapped: nn.Module, routed: Routed, items: Items, order: Order, batch_size: int) -> None:
    """Call the model's `start` with the first samples of step 0, `batch_size` or START_SAMPLES; `wrapped` is around `routed`."""
    device = next(routed.parameters()).device
    count = min(batch_size, START_SAMPLES)
    context = Context(order.seed, 0, torch.arange(count, device=device))
    wrapped(on_device(items, items.read(order(0, count)), context, device), context, start=True)
    for module in wrapped.modules():  # FSDP goes back to its shards, where nothing has been written
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, parameter in routed.model.named_parameters():
        if isinstance(parameter, DTensor) and name in routed.gathered:
            parameter.copy_(placed(parameter, routed.gathered[name]))
    routed.gathered = {}
