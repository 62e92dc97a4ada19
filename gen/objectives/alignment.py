"""Alignment of hidden tokens with the feature map of a network that is trained already (REPA).

    L = -weight mean cos(P(h), y)     h: tokens after a block, P: a projector trained with the model, y: the map at their places

The mean is over samples and tokens. mlp: P = W3 silu(W2 silu(W1 h)), Yu et al. 2025, arXiv 2410.06940, section 3. conv: a 3x3
convolution over the grid of tokens; spatial: y <- (y - 0.6 mean y) / std y over the places of an image, by channel (Singh et al.
2025, arXiv 2512.10794, section 5; the share is that of the authors' code). The projector is part of the training alone: a model
that samples has none.
"""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.core.checkpoints import recorded_run
from midway.gen.core.config import RECORDED_AS
from midway.gen.core.ranges import EVENTS, LAYERS, WEIGHT, check_ranges
from midway.tokenizers.precision import widened

MEAN_SHARE, FLAT = 0.6, 1e-6
"""Of spatial normalisation: how much of the mean is removed, and what is added to the deviation."""


@dataclass(frozen=True)
class AlignConfig:
    """Alignment of hidden tokens with a teacher's features."""

    teacher: str | None = field(default=None, metadata={RECORDED_AS: recorded_run})
    """Feature network whose map the tokens learn to predict, a name or a run directory of midway train features; without one
    there is no alignment. A model cannot be measured by the network that it was aligned with."""
    block: int = 0
    """Block after which tokens are taken, counted from 1; 0: the middle one, of a U-Net the lowest resolution."""
    weight: float = 0.5
    """Factor of the cosine in the loss."""
    projector: Literal["mlp", "conv"] = "mlp"
    """From tokens to features: three linear layers token by token, or a 3x3 convolution."""
    normalize: Literal["none", "spatial"] = "none"
    """spatial: features of an image by channel, less 0.6 of their mean over its places, divided by their deviation."""
    until: float = 1.0
    """Share of the optimizer steps with alignment; afterwards the loss has none."""
    steps: int = 0
    """Optimizer steps with alignment; 0: by `until`."""

    def __post_init__(self) -> None:
        check_ranges(self, block=(0, LAYERS[1]), weight=WEIGHT, until=(1e-6, 1.0), steps=EVENTS)

    def is_on(self, step: int) -> bool:
        """Whether optimizer step `step`, from 0, has alignment."""
        return self.steps == 0 or step < self.steps


class Alignment(nn.Module):
    """The loss above and its projector, from tokens of `width` channels on a `grid` to features of `channels`."""

    def __init__(self, config: AlignConfig, width: int, grid: tuple[int, int], channels: int) -> None:
        super().__init__()
        if config.normalize == "spatial" and grid == (1, 1):
            raise ValueError("normalize spatial: there is one token, which has no deviation over places; use none")
        self.config, self.grid = config, grid
        self.projector = make_projector(config.projector, width, channels)

    def forward(self, hidden: Tensor, features: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """For tokens (B, N, W) and features (B, C, h, w): the term of the loss, and sum and count of cosines (2,) for the log.

        Switched off it is 0 and the projector's gradients are 0, which processes share.
        """
        if not self.config.is_on(step):
            nothing = torch.stack([p.sum() for p in self.projector.parameters()]).sum() * 0
            return nothing, features.new_zeros(2)
        predicted = self.projector(hidden.mT.unflatten(2, self.grid))
        wanted = spatial(features) if self.config.normalize == "spatial" else features
        found = F.cosine_similarity(widened(predicted), wanted, dim=1)
        total = found.detach().sum()
        mean = found.sum() / max(found.numel(), 1)
        return -self.config.weight * mean, torch.stack([total, torch.full_like(total, found.numel())])


def make_projector(kind: Literal["mlp", "conv"], width: int, channels: int) -> nn.Module:
    """(B, width, h, w) -> (B, channels, h, w); hidden layers are twice as wide as tokens."""
    if kind == "conv":
        return nn.Conv2d(width, channels, 3, padding=1)
    sizes = (width, 2 * width, 2 * width, channels)
    layers = [nn.Conv2d(a, b, 1) for a, b in pairwise(sizes)]
    return nn.Sequential(layers[0], nn.SiLU(), layers[1], nn.SiLU(), layers[2])


def spatial(features: Tensor) -> Tensor:
    """(B, C, h, w) without most of each channel's mean over places, divided by its deviation there."""
    deviation, mean = torch.std_mean(features, dim=(2, 3), keepdim=True)
    return (features - MEAN_SHARE * mean) / (deviation + FLAT)
