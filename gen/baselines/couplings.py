"""Couplings: a network of one part of an image shifts and scales the other part, so that the inverse is exact.

    fixed pixels:   y = x
    moved pixels:   y = x exp(s) + t,     (r, t) = network(fixed pixels, cond),     s = b tanh(r)         log-det = sum s

"affine" (Dinh et al. 2016, RealNVP, arXiv 1605.08803, equations 4-8), "additive" is s = 0 (Dinh et al. 2014, NICE, arXiv
1410.8516, equation 12). The scale is bounded by a learned b per channel, initially 1: tanh starts at the identity and both
stretches and shrinks; Glow's sigmoid(r + 2) starts at 0.88 and can only shrink, which other layers must undo, and an unbounded
exp overflows on images unlike the training images.

Fixed are every other pixel, as on a checkerboard (RealNVP, section 3.4; NICE's odd and even components), or half of the channels.
The last layer of a network is initially zero, so every new coupling is the identity. Networks may run under autocast; x, s and t
are float32, and fixed pixels pass unchanged, so forward and inverse have the same network input.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.baselines.flow_layers import Flow, Shape, half_of
from midway.gen.core.ranges import LAYERS, WIDTH, check_ranges

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
    """conv: a learned bias for every pixel in the first layer, for images whose content depends on the position."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.hidden < 0:
            raise ValueError(
                f"width {self.width}, hidden {self.hidden}: a coupling network needs width >= 1 and hidden >= 0"
            )
        check_ranges(self, width=WIDTH, hidden=(0, LAYERS[1]))


class CouplingNetwork(nn.Module):
    """(visible (B, C, H, W), cond (B, E, h, w) | None) -> (B, out, H, W), initially zero: convolutions or linear layers."""

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    def __init__(self, config: CouplingNetworkConfig, shape: Shape, out: int, cond: Shape | None) -> None:
        super().__init__()
        width, self.flat, self.out = config.width, config.kind == "mlp", (out, *shape[1:])

        def layer(inputs: int, outputs: int, side: int = 1, bias: bool = True) -> nn.Linear | nn.Conv2d:
            if self.flat:
                return nn.Linear(inputs, outputs, bias)
            return nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=bias)

        self.first = layer(self._size(shape), width, 3)
        positions = config.positions and not self.flat
        self.positions = nn.Parameter(torch.zeros(width, *shape[1:])) if positions else None
        self.cond = layer(self._size(cond), width, bias=False) if cond else None
        self.hidden = nn.ModuleList(layer(width, width) for _ in range(config.hidden))
        self.last = layer(width, self._size(self.out), 3)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def _size(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) if self.flat else shape[0]

    def forward(self, visible: Tensor, cond: Tensor | None) -> Tensor:
        h = self.first(visible.flatten(1) if self.flat else visible)
        if self.positions is not None:
            h = h + self.positions
        if self.cond is not None:
            if cond is None:
                raise ValueError("this coupling was built for a condition, and none was given: pass labels")
            h = h + self.cond(cond.flatten(1) if self.flat else cond)
        for layer in self.hidden:
            h = layer(F.relu(h))
        return self.last(F.relu(h)).view(-1, *self.out)


def checkerboard(height: int, width: int, parity: int) -> Tensor:
    """float32 (1, H, W): 1 where row + column + parity is even."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((rows + columns + parity) % 2 == 0).float()[None]


class Coupling(Flow):
    """x exp(s) + t for the moved part of images (C, H, W): `visible` selects the network's input, `place` positions its outputs.

    `parity` 0 or 1 chooses which part is fixed. As many channels are moved as the network's input has.
    """

    def __init__(
        self,
        shape: Shape,
        parity: int,
        transform: Transform,
        network: CouplingNetworkConfig,
        cond: Shape | None = None,
    ) -> None:
        super().__init__()
        self.transform, self.parity = transform, parity % 2
        moved = self.split(shape)
        outputs = 2 * moved if transform == "affine" else moved
        self.network = CouplingNetwork(network, (moved, *shape[1:]), outputs, cond)
        self.bound = nn.Parameter(torch.ones(moved, 1, 1)) if transform == "affine" else None

    @abstractmethod
    def split(self, shape: Shape) -> int:
        """Choose the fixed values of images (C, H, W); the number of channels of the network's input."""

    @abstractmethod
    def visible(self, x: Tensor) -> Tensor:
        """The network's input, a function of the fixed values of x (B, C, H, W)."""

    @abstractmethod
    def place(self, value: Tensor) -> Tensor:
        """(B, moved, H, W) -> (B, C, H, W), 0 at fixed values."""

    def scale_shift(self, x: Tensor, cond: Tensor | None) -> tuple[Tensor, Tensor]:
        """s and t (B, C, H, W), functions of the fixed values and 0 there."""
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
    """Fixes the pixels where row + column + parity is even."""

    mask: Tensor

    def split(self, shape: Shape) -> int:
        self.register_buffer("mask", checkerboard(*shape[1:], self.parity), persistent=False)
        return shape[0]

    def visible(self, x: Tensor) -> Tensor:
        return x * self.mask

    def place(self, value: Tensor) -> Tensor:
        return value * (1 - self.mask)


class ChannelCoupling(Coupling):
    """Fixes the first half of the channels, or with `parity` 1 the second. ValueError for an odd number of channels."""

    def split(self, shape: Shape) -> int:
        return half_of(shape[0], "split into a fixed and a moved half")

    def visible(self, x: Tensor) -> Tensor:
        return x.chunk(2, dim=1)[self.parity]

    def place(self, value: Tensor) -> Tensor:
        zeros = torch.zeros_like(value)
        return torch.cat([value, zeros] if self.parity else [zeros, value], dim=1)
