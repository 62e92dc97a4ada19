"""A distance between the distributions of two batches, to learn solvers that draw noise: energy distances of fixed features.

    E(X, Y) = 2 E|x - y| - E|x - x'| - E|y - y'| >= 0,    0 only for equal distributions      (Szekely & Rizzo 2013)

Its estimate from n samples each is the mean over i != j of |x_i - y_j| + |y_i - x_j| - |x_i - x_j| - |y_i - y_j|: without bias,
and where x_i and y_i come from the same noise their common part cancels, so that it is exactly 0 for equal batches. There is
nothing to train and no network: features are the state itself and the mean response of random 3x3 filters with a ReLU, which sees
local contrast (random directions for states without a grid). They are functions of the shape alone, and no metric uses them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core import randomness

FILTERS = 64


def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """The estimate of the squared energy distance, scalar, from x, y (n, D), n >= 2."""
    n = len(x)
    cross, own, theirs = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
    off = ~torch.eye(n, dtype=torch.bool, device=x.device)
    return ((cross + cross.T - own - theirs)[off]).sum() / (n * (n - 1))


class BatchDistance:
    """Mean energy distance of the features of two batches of states (n, *shape), each feature in units of one number."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        side = (3, 3) if len(shape) == 3 else ()
        size = (shape[0], *side)
        drawn = randomness.normal(0, "batch-distance", 0, torch.arange(FILTERS), size)
        self.filters = drawn / math.sqrt(math.prod(size))
        self.offsets = randomness.normal(0, "batch-distance", 1, torch.arange(FILTERS), (1,))[:, 0] / 2

    def features(self, x: Tensor) -> list[Tensor]:
        """(n, *shape) -> (n, D) and (n, FILTERS), each divided by the root of its length."""
        filters, offsets = self.filters.to(x), self.offsets.to(x)
        if x.dim() == 4:
            response = F.conv2d(x, filters, offsets, padding=1).relu().mean((2, 3))
        else:
            response = F.linear(x, filters, offsets).relu()
        return [part / math.sqrt(part.shape[1]) for part in (x.flatten(1), response)]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar, differentiable in both."""
        return torch.stack(
            [energy_distance(a, b) for a, b in zip(self.features(x), self.features(y), strict=True)]
        ).mean()
