"""Floating-point operations: what a sample costs beyond the count of evaluations."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from midway.samplers.guidance import ConditionalField


@dataclass(frozen=True)
class Costs:
    """Floating-point operations per sample, of products alone: a multiplication and an addition are two."""

    network: int
    """One evaluation of the network, unguided."""
    residual: int
    """All calls of the residual on the way."""

    def describe(self, nfe: int) -> str:
        """In words, for a solver of `nfe` evaluations."""
        network, residual = (f"{value / 1e6:.3g} MFLOP" for value in (self.network, self.residual))
        share = 100 * self.residual / max(nfe * self.network, 1)
        return f"{nfe} evaluations of {network}, and {residual} of the residual ({share:.1f} % more)"


def flops(call: Callable[[], object]) -> int:
    """Of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def network_flops(network: ConditionalField, shape: tuple[int, ...], device: torch.device) -> int:
    """Of one unguided evaluation of one sample (*shape)."""
    labels = torch.zeros(1, dtype=torch.long, device=device)
    return flops(lambda: network(torch.zeros(1, *shape, device=device), torch.full((1,), 0.5, device=device), labels))
