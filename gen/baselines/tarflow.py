"""TarFlow: a stack of autoregressive flows over patches (Zhai et al. 2024, arXiv 2412.06329).

An image y is cut into N patches of D numbers; T flows (tarflow_blocks.py) transform them in alternating order, from the first
and from the last:

    ln p(y) = ln N(z; 0, 1) + sum over flows of ln|det|,   loss = -ln p / (C H W ln 2)
                                                           (the paper's up to constants: 1/2 mean z^2 - mean ln|det| per number)

Noise turns discrete values into a density:
    uniform    x = (k + u) / L in (0, 1), y = 2 x - 1 or logit(a + (1 - 2a) x)      bits per dimension, see density.py
    gaussian   y = image in [-1, 1] + sigma eps; samples are denoised by Tweedie's formula (Efron 2011),
               E[x | y] = y + sigma^2 grad ln p(y)                                  better samples, no bits of integers
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from midway.gen.baselines.density import DensityBaseline, check_margin, finite
from midway.gen.baselines.tarflow_blocks import AutoregressiveFlow
from midway.gen.core import randomness
from midway.gen.core.ranges import BATCH, LAYERS, RATIO, WIDTH, check_ranges
from midway.gen.data.images import to_float
from midway.gen.data.levels import bits_per_dim
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers.losses import mean
from midway.tokenizers.vit import patchify, unpatchify

DENOISING_EVALUATIONS = 2  # a forward pass and its gradient


@dataclass(frozen=True)
class TarFlowConfig:
    """Size and noise of a TarFlow. The paper's for 64 x 64: patch 2, width 768, 8 flows of 8 blocks."""

    patch: int = 2
    """Pixels a side of a token; sampling is sequential in (H / patch) (W / patch) tokens."""
    flows: int = 4
    """Flows, each in the reverse order of the one before."""
    depth: int = 2
    """Transformer blocks of a flow."""
    width: int = 64
    """Channels of a token."""
    heads: int = 4
    """Attention heads."""
    mlp_ratio: float = 4.0
    """Width of the hidden layer of each block, as a multiple of width."""
    noise: Literal["uniform", "gaussian"] = "uniform"
    """What makes levels continuous: uniform noise in a bin, or Gaussian noise, which has no bits per dimension."""
    sigma: float = 0.05
    """gaussian: standard deviation of the noise, on images in [-1, 1]."""
    entry: Literal["logit", "symmetric"] = "logit"
    """uniform: the map from x to the input of the flows; symmetric is the paper's."""
    logit_margin: float = 0.05
    """a of the logit entry."""
    draws: int = 1
    """uniform: draws of u averaged inside the logarithm in log_likelihood; more give a tighter bound."""
    label_dropout: float = 0.1
    """Conditional models: share of samples trained without their class, for densities without a class."""

    def __post_init__(self) -> None:
        for name in ("patch", "flows", "depth", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}; give a positive number, 0.05 by default")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout is {self.label_dropout}; give a number in [0, 1)")
        check_margin(self.logit_margin)
        check_ranges(self, width=WIDTH, heads=WIDTH, patch=WIDTH, flows=LAYERS, depth=LAYERS, draws=BATCH)
        check_ranges(self, mlp_ratio=RATIO)


class TarFlow(DensityBaseline):
    """TarFlow of uint8 images. Samples are stored levels as floats for uniform noise, denoised floats for Gaussian noise."""

    kind: ClassVar[str] = "tarflow"
    config_type: ClassVar[type] = TarFlowConfig
    config: TarFlowConfig

    def __init__(self, config: TarFlowConfig, image_shape: tuple[int, int, int], levels: int, classes: int = 0) -> None:
        super().__init__(config, image_shape, levels, classes)
        (channels, height, width), patch = image_shape, config.patch
        if height % patch or width % patch:
            raise ValueError(
                f"images of {height}x{width} cannot be cut into patches of {patch}: choose one that divides both sides"
            )
        self.grid = (height // patch, width // patch)
        tokens = (math.prod(self.grid), channels * patch**2)
        network = (config.width, config.depth, config.heads, config.mlp_ratio)
        self.flows = nn.ModuleList(
            AutoregressiveFlow(tokens, *network, classes, flipped=bool(i % 2)) for i in range(config.flows)
        )
        self.gaussian = config.noise == "gaussian"
        self.sample_nfe = tokens[0] + DENOISING_EVALUATIONS * self.gaussian  # one evaluation per token

    # ---- the protocol ----

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean bits per dimension of one draw of noise for each image.

        Logs `bits_per_dim`; for Gaussian noise `density_bits`, those of the density of noisy images, which may be negative.
        """
        k, labels = self.levels_in(batch.images), self.labels_in(batch.labels, len(batch.images))
        if labels is not None and self.config.label_dropout:
            keep = context.uniform("label").to(self.device) >= self.config.label_dropout
            labels = torch.where(keep, labels, self.classes)
        noisy = self._noisy(batch.images, context) if self.gaussian else None
        nats = self.bound(k, labels, context) if noisy is None else self.flow_density(noisy, labels)
        bits = mean(bits_per_dim(nats, self.dims))
        return bits, {"density_bits" if self.gaussian else "bits_per_dim": bits.detach()}

    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        """Nats (B,) float64: the bound of `config.draws` draws. ValueError for a model of Gaussian noise."""
        if self.gaussian:
            raise ValueError(
                f"this model has a density of images with Gaussian noise of {self.config.sigma}, and no likelihood of "
                "integers: train one with noise 'uniform' for bits per dimension"
            )
        return super().log_likelihood(images, labels, context)

    @torch.no_grad()
    def sample(self, seeds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (n, C, H, W), each a function of its seed."""
        labels = self.labels_in(labels, len(seeds))
        z = randomness.normal(0, "sample", 0, seeds.cpu(), self.image_shape)
        y = self.inverse(z.to(self.device, self.dtype), labels)
        if not self.gaussian:
            return self.images_of(self.leave(finite(y)))
        clean = tweedie(y, lambda noisy: self.flow_density(noisy, labels), self.config.sigma)
        return finite(clean).float().clamp(-1, 1)

    # ---- its parts ----

    def forward(self, y: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, C, H, W) and ln|det dz/dy| (B,) of y (B, C, H, W), with labels (B,) if conditional, `classes` for no class."""
        tokens, total = patchify(y, self.config.patch), y.new_zeros(len(y))
        for flow in self.flows:
            tokens, log_det = flow(tokens, labels)
            total = total + log_det
        return unpatchify(tokens, self.grid, self.config.patch), total

    @torch.no_grad()
    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """y (B, C, H, W) of z (B, C, H, W)."""
        tokens = patchify(z, self.config.patch)
        for flow in reversed(self.flows):
            tokens = cast(AutoregressiveFlow, flow).inverse(tokens, labels)
        return unpatchify(tokens, self.grid, self.config.patch)

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(x) (B,) of x (B, C, H, W) in (0, 1), with labels (B,) on the model's device if conditional."""
        y, entered = self.enter(x)
        return self.flow_density(y, labels) + entered

    def flow_density(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(y) (B,) of the input y (B, C, H, W) of the flows."""
        z, log_det = self(y, labels)
        return log_det - 0.5 * z.square().flatten(1).sum(1) - self.dims / 2 * math.log(2 * math.pi)

    def _noisy(self, images: Tensor, context: Context) -> Tensor:
        """Images in [-1, 1] plus noise."""
        clean = to_float(images).to(next(self.parameters()))
        return clean + self.config.sigma * context.normal("noise", self.image_shape).to(clean)


def tweedie(y: Tensor, log_density: Callable[[Tensor], Tensor], sigma: float) -> Tensor:
    """E[x | y] = y + sigma^2 grad ln p(y) for y (B, *) = x + sigma eps, given ln p (B,)."""
    with torch.inference_mode(False), torch.enable_grad():
        noisy = y.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_density(noisy).sum(), noisy)
    return y + sigma**2 * slope
