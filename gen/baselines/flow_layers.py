"""Flows: bijections x <-> y of images that keep the shape (B, C, H, W), with their log-determinants.

    log p(x) = log p(y) + log |det dy/dx|,      y = f_n(... f_1(x)),      log-det of a chain = sum of log-dets

ActNorm          y = (x + shift) exp(log_scale) per channel, initially zero mean and unit variance over the first batch
                 (Kingma & Dhariwal 2018, Glow, arXiv 1807.03039, section 3.1)
InvertibleConv   y = W x per pixel, W = P L (U + diag(sign exp(log_scale))); P is fixed, L unit lower and U strictly upper
                 triangular, so log-det = H W sum(log_scale) (Glow, section 3.2, equation 10). Averages (EMA) of such weights are
                 invertible too
DiagonalScale    y = x exp(log_scale) per pixel and channel (Dinh et al. 2014, NICE, arXiv 1410.8516, section 3.3)
Squeezed         f on 2x2 blocks: (C, H, W) -> (4 C, H/2, W/2), f, and back (Dinh et al. 2016, RealNVP, arXiv 1605.08803, 3.6)
FactorOut        f on the first half of the channels; the other half goes to the prior unchanged (RealNVP, section 3.6)

Squeezing is undone, so every flow preserves the shape: the latent of a multi-scale model is an image whose factored-out values
are at their own positions. A coupling before FactorOut that moves the second half given the first is Glow's learned prior of the
factored-out half. `cond` (B, E, h, w) is the condition, read by couplings, or None.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from midway.tokenizers.shuffle import pixel_shuffle

Shape = tuple[int, int, int]


class Flow(nn.Module, ABC):
    """A bijection of x (B, C, H, W), shape-preserving, exact in both directions."""

    @abstractmethod
    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """y (B, C, H, W) and log |det dy/dx| (B,)."""

    @abstractmethod
    def inverse(self, y: Tensor, cond: Tensor | None = None) -> Tensor:
        """The x whose forward is y."""

    def initialise(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """Initialise ActNorms, once, from the input x (B, C, H, W) of this flow; returns y."""
        return self(x, cond)[0]


def require_initialised(module: nn.Module) -> None:
    """ValueError if an ActNorm inside is not initialised. Synchronises with the device: not for the training loop."""
    layers = [layer for layer in module.modules() if isinstance(layer, ActNorm)]
    missing = sum(not bool(layer.initialised) for layer in layers)
    if missing:
        raise ValueError(
            f"{missing} of {len(layers)} ActNorm layers have not been initialised from data: "
            "call start() with a batch of training images, or load trained weights"
        )


def half_of(channels: int, what: str) -> int:
    """channels / 2; ValueError for an odd number."""
    if channels % 2:
        raise ValueError(f"{channels} channels cannot be {what}: use an even number, squeezing 2x2 pixels first")
    return channels // 2


class Chain(Flow):
    """Flows one after another."""

    def __init__(self, flows: Sequence[Flow]) -> None:
        super().__init__()
        self.flows = nn.ModuleList(flows)

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(len(x))
        for flow in self.flows:
            x, log_det = flow(x, cond)
            total = total + log_det
        return x, total

    def inverse(self, y: Tensor, cond: Tensor | None = None) -> Tensor:
        for flow in reversed(self.flows):
            y = cast(Flow, flow).inverse(y, cond)
        return y

    def initialise(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        for flow in self.flows:
            x = cast(Flow, flow).initialise(x, cond)
        return x


class Within(Flow):
    """`inner` on a part of x, or on a view of it; `split` and `join` are inverse to each other."""

    def __init__(self, inner: Flow) -> None:
        super().__init__()
        self.inner = inner

    @abstractmethod
    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input of `inner`, and the rest of x, which stays."""

    @abstractmethod
    def join(self, y: Tensor, rest: Tensor) -> Tensor:
        """An image (B, C, H, W) of an output of `inner` and the rest."""

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        part, rest = self.split(x)
        y, log_det = self.inner(part, cond)
        return self.join(y, rest), log_det

    def inverse(self, y: Tensor, cond: Tensor | None = None) -> Tensor:
        part, rest = self.split(y)
        return self.join(self.inner.inverse(part, cond), rest)

    def initialise(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        part, rest = self.split(x)
        return self.join(self.inner.initialise(part, cond), rest)


class Squeezed(Within):
    """`inner` at half the resolution, on images (4 C, H/2, W/2). ValueError for odd sides. Conditions must be (B, E, 1, 1)."""

    def __init__(self, inner: Flow, shape: Shape) -> None:
        super().__init__(inner)
        squeezed_shape(shape)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return squeeze(x), x[:, :0]

    def join(self, y: Tensor, rest: Tensor) -> Tensor:
        return unsqueeze(y)


class FactorOut(Within):
    """`inner` on the first half of the channels; the second stays. ValueError for an odd number of channels."""

    def __init__(self, inner: Flow, channels: int) -> None:
        super().__init__(inner)
        half_of(channels, "factored out by halves")

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.chunk(2, dim=1)
        return first, second

    def join(self, y: Tensor, rest: Tensor) -> Tensor:
        return torch.cat([y, rest], dim=1)


def squeeze(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4 C, H/2, W/2). The first half of the channels is a checkerboard of the pixels, the second the rest."""
    parts = [x[:, :, ::2, ::2], x[:, :, 1::2, 1::2], x[:, :, ::2, 1::2], x[:, :, 1::2, ::2]]
    return torch.cat(parts, dim=1)


def unsqueeze(y: Tensor) -> Tensor:
    """The inverse of `squeeze`."""
    upper_left, lower_right, upper_right, lower_left = y.chunk(4, dim=1)
    return pixel_shuffle(torch.stack([upper_left, upper_right, lower_left, lower_right], dim=2).flatten(1, 2), 2)


def squeezed_shape(shape: Shape) -> Shape:
    """(C, H, W) -> (4 C, H/2, W/2); ValueError for odd sides."""
    channels, height, width = shape
    if height % 2 or width % 2:
        raise ValueError(
            f"images of {height}x{width} cannot be squeezed into 2x2 blocks: use fewer scales, or resize to even sides"
        )
    return 4 * channels, height // 2, width // 2


class ActNorm(Flow):
    """Shift and scale per channel. `initialised` is a buffer, so initialisation happens once, also after a resume."""

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._check()
        log_det = self.log_scale.sum() * x.shape[2:].numel()
        return (x + self.shift) * self.log_scale.exp(), log_det.expand(len(x))

    def inverse(self, y: Tensor, cond: Tensor | None = None) -> Tensor:
        self._check()
        return y * (-self.log_scale).exp() - self.shift

    @torch.no_grad()
    def initialise(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        if not self.initialised:
            variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0)
            self.shift.copy_(-mean.view_as(self.shift))
            # a channel without variance is not scaled
            varies = variance > 1e-12
            self.log_scale.copy_(torch.where(varies, -0.5 * variance.log(), 0.0).view_as(self.log_scale))
            self.initialised.fill_(True)
        return self(x, cond)[0]

    def _check(self) -> None:
        if not self.training:  # training follows start(); reading the buffer there would synchronise
            require_initialised(self)


class InvertibleConv(Flow):
    """A learned mixing of the channels, initially a random rotation."""

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))[0]
        p, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_scale = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("sign", diagonal.sign().float())
        self.register_buffer("permutation", p.argmax(1))  # row i of P v is v[permutation[i]]

    def factors(self) -> tuple[Tensor, Tensor]:
        """L and U + diag(sign exp(log_scale)), (C, C) each."""
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        return lower, self.upper.triu(1) + torch.diag(self.sign * self.log_scale.exp())

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            lower, upper = self.factors()
            y = (lower @ upper)[self.permutation] @ x.flatten(2)
        log_det = self.log_scale.sum() * x.shape[2:].numel()
        return y.view_as(x), log_det.expand(len(x))

    def inverse(self, y: Tensor, cond: Tensor | None = None) -> Tensor:
        with torch.autocast(y.device.type, enabled=False):
            lower, upper = self.factors()
            v = y[:, self.permutation.argsort()].flatten(2)
            v = torch.linalg.solve_triangular(lower, v, upper=False, unitriangular=True)
            return torch.linalg.solve_triangular(upper, v, upper=True).view_as(y)


class DiagonalScale(Flow):
    """A learned scale for every pixel and channel, initially 1."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor, cond: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return x * self.log_scale.exp(), self.log_scale.sum().expand(len(x))

    def inverse(self, y: Tensor, cond: Tensor | None = None) -> Tensor:
        return y * (-self.log_scale).exp()
