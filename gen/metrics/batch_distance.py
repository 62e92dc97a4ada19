"""A distance between the distributions of two batches, to learn solvers that draw noise: Wasserstein distances of fixed features.

    d(X, Y) = mean over features f of W^2(f(X), f(Y)),      W^2 = mean over i of (sorted f(x))_i - (sorted f(y))_i squared

W is the 2-Wasserstein distance in one dimension, which sorting makes exact for two batches of one size. It is in the units of a
squared error, of which it is what remains when samples may be exchanged, feature by feature; equal batches score 0, and batches
from the same noise share their luck. (The energy distance in all D dimensions at once was tried first: to first order it sees the
total variance alone where D is large.)

There is nothing to train and no network: features are the numbers of the state, and the mean response of random 3x3 filters with
a ReLU, which sees local contrast (random directions for states without a grid). They are functions of the shape alone, and no
metric uses them.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core import randomness

FILTERS = 64


def marginal_distance(x: Tensor, y: Tensor) -> Tensor:
    """Mean over the columns of W^2 between x and y (n, D), scalar, differentiable in both."""
    return (x.sort(dim=0).values - y.sort(dim=0).values).square().mean()


class BatchDistance:
    """Mean distance over two groups of features of two batches of states (n, *shape)."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        side = (3, 3) if len(shape) == 3 else ()
        size = (shape[0], *side)
        drawn = randomness.normal(0, "batch-distance", 0, torch.arange(FILTERS), size)
        self.filters = drawn / math.sqrt(math.prod(size))
        self.offsets = randomness.normal(0, "batch-distance", 1, torch.arange(FILTERS), (1,))[:, 0] / 2

    def features(self, x: Tensor) -> list[Tensor]:
        """(n, *shape) -> (n, D) and (n, FILTERS)."""
        filters, offsets = self.filters.to(x), self.offsets.to(x)
        if x.dim() == 4:
            response = F.conv2d(x, filters, offsets, padding=1).relu().mean((2, 3))
        else:
            response = F.linear(x, filters, offsets).relu()
        return [x.flatten(1), response]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Scalar, differentiable in both."""
        pairs = zip(self.features(x), self.features(y), strict=True)
        return torch.stack([marginal_distance(a, b) for a, b in pairs]).mean()
