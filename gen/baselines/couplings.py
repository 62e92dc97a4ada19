"""Couplings: one part of an image is moved by an amount that a network reads off the rest, so that the inverse is exact.

    kept places:    y = x
    other places:   y = x exp(s) + t,     (r, t) = network(kept places, cond),     s = b tanh(r)         log-det = sum s

"affine" (Dinh et al. 2016, RealNVP, arXiv 1605.08803, equations 4-8), "additive" is s = 0 (Dinh et al. 2014, NICE, arXiv
1410.8516, equation 12). The scale is bounded by a learned b per channel, from 1: tanh starts at the identity and may stretch as
well as shrink; Glow's sigmoid(r + 2) starts at 0.88 and can only shrink, so that stacked layers need other layers to undo it,
and an unbounded exp overflows on images unlike the training images.

What is kept: every other pixel, as on a checkerboard (RealNVP, section 3.4; NICE's odd and even components), or half of the
channels. Networks end in zeros, hence every coupling starts as the identity. They may run under autocast; x, s and t are
float32, and kept places pass unchanged, so forward and inverse see the same input.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.baselines.flow_layers import Flow, Shape, half_of

Transform = Literal["additive", "affine"]


@dataclass(frozen=True)
class CouplingNetworkConfig:
    """The network inside each coupling."""

    kind: Literal["conv", "mlp"] = "conv"
    """conv: 3x3, 1x1, 3x3 convolutions; mlp: fully connected on all pixels, for small images."""
    width: int = 64
    """Channels of the hidden layers."""
    hidden: int = 1
    """Hidden layers (1x1 convolutions or linear) between the first and the last."""
    positions: bool = False
    """conv: a learned bias for every pixel in the first layer, for images in which places matter."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.hidden < 0:
            raise ValueError(
                f"width {self.width}, hidden {self.hidden}: a coupling network needs width >= 1 and hidden >= 0"
            )


class ConvNetwork(nn.Module):
    """(visible (B, C, H, W), cond (B, E, h, w) | None) -> (B, out, H, W), zero at first."""

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    def __init__(self, config: CouplingNetworkConfig, shape: Shape, out: int, cond: Shape | None) -> None:
        super().__init__()
        width, (channels, height, across) = config.width, shape
        self.first = nn.Conv2d(channels, width, 3, padding=1)
        self.positions = nn.Parameter(torch.zeros(width, height, across)) if config.positions else None
        self.cond = nn.Conv2d(cond[0], width, 1, bias=False) if cond else None
        self.hidden = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(config.hidden))
        self.last = _zero(nn.Conv2d(width, out, 3, padding=1))

    def forward(self, visible: Tensor, cond: Tensor | None) -> Tensor:
        h = self.first(visible)
        if self.positions is not None:
            h = h + self.positions
        return _finish(self, h, cond)


class MLPNetwork(nn.Module):
    """The same, fully connected: for images of a few hundred numbers."""

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    def __init__(self, config: CouplingNetworkConfig, shape: Shape, out: int, cond: Shape | None) -> None:
        super().__init__()
        self.out = (out, *shape[1:])
        self.first = nn.Linear(math.prod(shape), config.width)
        self.cond = nn.Linear(math.prod(cond), config.width, bias=False) if cond else None
        self.hidden = nn.ModuleList(nn.Linear(config.width, config.width) for _ in range(config.hidden))
        self.last = _zero(nn.Linear(config.width, math.prod(self.out)))

    def forward(self, visible: Tensor, cond: Tensor | None) -> Tensor:
        flat = None if cond is None else cond.flatten(1)
        return _finish(self, self.first(visible.flatten(1)), flat).view(-1, *self.out)


NETWORKS = {"conv": ConvNetwork, "mlp": MLPNetwork}


def _zero(layer: nn.Conv2d | nn.Linear) -> nn.Module:
    """The layer with weight and bias 0."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def _finish(network: "ConvNetwork | MLPNetwork", h: Tensor, cond: Tensor | None) -> Tensor:
    """From the first layer's output to the last's."""
    if network.cond is not None:
        if cond is None:
            raise ValueError("this coupling was built for a condition, and none was given: pass labels")
        h = h + network.cond(cond)
    for layer in network.hidden:
        h = layer(F.relu(h))
    return network.last(F.relu(h))


def checkerboard(height: int, width: int, parity: int) -> Tensor:
    """float32 (1, H, W): 1 where row + column + parity is even."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows + columns + parity) % 2 == 0).float()[None]


class Coupling(Flow):
    """The core: `visible` says what the network sees, `place` where its numbers act; the rest of x is kept.

    `seen` (C', H, W) is the shape of what the network sees, `moved` the number of channels that it moves.
    """

    def __init__(
        self, transform: Transform, network: CouplingNetworkConfig, seen: Shape, moved: int, cond: Shape | None
    ) -> None:
        super().__init__()
        self.transform = transform
        outputs = 2 * moved if transform == "affine" else moved
        self.network = NETWORKS[network.kind](network, seen, outputs, cond)
        self.bound = nn.Parameter(torch.ones(moved, 1, 1)) if transform == "affine" else None

    @abstractmethod
    def visible(self, x: Tensor) -> Tensor:
        """What the network sees of x (B, C, H, W): kept places alone."""

    @abstractmethod
    def place(self, value: Tensor) -> Tensor:
        """(B, moved, H, W) -> (B, C, H, W), 0 at kept places."""

    def scale_shift(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """s and t (B, C, H, W), 0 at kept places and functions of those alone."""
        value = self.network(self.visible(x), cond).to(x.dtype)
        if self.bound is None:
            return torch.zeros_like(x), self.place(value)
        raw, shift = value.chunk(2, dim=1)
        return self.place(self.bound * torch.tanh(raw)), self.place(shift)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        s, t = self.scale_shift(x, cond)
        return x * s.exp() + t, s.flatten(1).sum(1)

    def inverse(self, y: Tensor, cond: Tensor | None = None) -> Tensor:
        s, t = self.scale_shift(y, cond)
        return (y - t) * (-s).exp()


class CheckerboardCoupling(Coupling):
    """Keeps the pixels where row + column + parity is even."""

    mask: Tensor

    def __init__(
        self,
        shape: Shape,
        parity: int,
        transform: Transform,
        network: CouplingNetworkConfig,
        cond: Shape | None = None,
    ) -> None:
        super().__init__(transform, network, shape, shape[0], cond)
        self.register_buffer("mask", checkerboard(*shape[1:], parity), persistent=False)

    def visible(self, x: Tensor) -> Tensor:
        return x * self.mask

    def place(self, value: Tensor) -> Tensor:
        return value * (1 - self.mask)


class ChannelCoupling(Coupling):
    """Keeps the first half of the channels, or with `parity` 1 the second. ValueError for an odd number of channels."""

    def __init__(
        self,
        shape: Shape,
        parity: int,
        transform: Transform,
        network: CouplingNetworkConfig,
        cond: Shape | None = None,
    ) -> None:
        half = half_of(shape[0], "split into a kept and a moved half")
        super().__init__(transform, network, (half, *shape[1:]), half, cond)
        self.parity = parity % 2

    def visible(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=1)[self.parity]

    def place(self, value: Tensor) -> Tensor:
        zeros = torch.zeros_like(value)
        return torch.cat([value, zeros] if self.parity else [zeros, value], dim=1)
