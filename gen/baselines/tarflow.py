"""TarFlow: a stack of autoregressive flows over patches (Zhai et al. 2024, arXiv 2412.06329).

An image y is cut into N patches of D numbers; T flows (autoregressive.py) change them by turns in raster order and from the end:

    ln p(y) = ln N(z; 0, 1) + sum over flows of ln|det|,   loss = -ln p / (C H W ln 2)
                                                           (theirs up to constants: 1/2 mean z^2 - mean ln|det| per number)

Noise makes a density of what is discrete:
    uniform    x = (k + u) / L in (0, 1), y = 2 x - 1 or logit(a + (1 - 2a) x)      bits per dimension, see likelihood.py
    gaussian   y = image in [-1, 1] + sigma eps, removed from samples by one step   better samples, and no bits of integers
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.baselines.base import Baseline
from midway.gen.baselines.tarflow_blocks import AutoregressiveFlow
from midway.gen.baselines.tarflow_sampling import SEQUENTIAL, Cost, Inversion, guided, invert, tweedie
from midway.gen.core import randomness
from midway.gen.data.images import to_float
from midway.gen.data.levels import (
    bits_per_dim,
    dequantised_bound,
    from_levels,
    inverse_logit,
    logit_transform,
    uniform_dequantise,
)
from midway.gen.training.batches import Context, ImageBatch

DENOISING_EVALUATIONS = 2  # a forward pass and its gradient


@dataclass(frozen=True)
class TarFlowConfig:
    """Size and noise of a TarFlow. The paper's for 64 x 64: patch 2, width 768, 8 flows of 8 blocks."""

    patch: int = 2
    """Pixels a side of a token; sampling is sequential in (H / patch) (W / patch) tokens."""
    flows: int = 4
    depth: int = 2
    """Transformer blocks of a flow."""
    width: int = 64
    heads: int = 4
    mlp_ratio: float = 4.0
    noise: Literal["uniform", "gaussian"] = "uniform"
    sigma: float = 0.05
    """gaussian: standard deviation of the noise, on images in [-1, 1]."""
    entry: Literal["logit", "symmetric"] = "logit"
    """uniform: what the flows see of x; symmetric is the paper's."""
    logit_margin: float = 0.05
    """a of the logit entry."""
    draws: int = 1
    """uniform: draws of u over which log_likelihood averages inside the logarithm; more give a tighter bound."""
    label_dropout: float = 0.1
    """Conditional models: share of samples trained without their class, for guidance."""

    def __post_init__(self) -> None:
        for name in ("patch", "flows", "depth", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma is {self.sigma}; give a positive number, 0.05 by default")
        if not 0 <= self.label_dropout < 1:
            raise ValueError(f"label_dropout is {self.label_dropout}; give a number in [0, 1)")
        if not 0 <= self.logit_margin < 0.5:
            raise ValueError(f"logit_margin is {self.logit_margin}; give a number in [0, 0.5), 0.05 by default")


class TarFlow(Baseline):
    """The model. `sample` gives stored levels as floats for uniform noise, and denoised floats for Gaussian noise."""

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
        self.sample_nfe = tokens[0] + self._denoising  # each evaluation but the denoising is of one token

    # ---- the protocol ----

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean bits per dimension of one draw of noise for each image.

        Logs `bits_per_dim`; for Gaussian noise `density_bits`, those of the density of noisy images, which may be negative.
        """
        labels = self.labels_in(batch.labels, len(batch.images))
        if labels is not None and self.config.label_dropout:
            kept = context.uniform("label").to(self.device) >= self.config.label_dropout
            labels = torch.where(kept, labels, self.classes)
        uniform = self.config.noise == "uniform"
        nats = (
            self._bound(batch.images, labels, context, 0)
            if uniform
            else self.log_density(self._noisy(batch.images, context), labels)
        )
        bits = bits_per_dim(nats, self.dims).mean()
        return bits, {"bits_per_dim" if uniform else "density_bits": bits.detach()}

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        """Nats (B,) float64, a lower bound, over `draws` draws. ValueError for a model of Gaussian noise."""
        if self.config.noise != "uniform":
            raise ValueError(
                f"this model knows images under Gaussian noise of {self.config.sigma}, which is no likelihood of integers: "
                "train one with noise 'uniform' for bits per dimension"
            )
        labels = self.labels_in(labels, len(images))
        draws = [self._bound(images, labels, context, draw).double() for draw in range(self.config.draws)]
        return torch.stack(draws).logsumexp(0) - math.log(len(draws))

    def sample(
        self,
        seeds: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        how: Inversion = SEQUENTIAL,
    ) -> Tensor:
        """Images (n, C, H, W), each of its seed alone; `temperature` multiplies the standard deviation of z."""
        return self.sample_counted(seeds, labels, temperature, how)[0]

    @torch.no_grad()
    def sample_counted(
        self,
        seeds: Tensor,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        how: Inversion = SEQUENTIAL,
    ) -> tuple[Tensor, Cost]:
        """`sample`, and what it cost. ValueError for guidance that the model was not trained for, and for samples not finite."""
        if not 0 <= temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; give a finite number that is not negative")
        labels = self.labels_in(labels, len(seeds))
        z = temperature * randomness.normal(0, "sample", 0, seeds.cpu(), self.image_shape)
        y, cost = self.inverse(z.to(self.flows[0].head.weight), labels, how)  # pyright: ignore
        if self.config.noise == "gaussian":
            y = tweedie(y, lambda noisy: self.log_density(noisy, labels), self.config.sigma)
        if not bool(y.isfinite().all()):
            raise ValueError("samples are not finite: the weights are damaged or diverged, use an earlier checkpoint")
        return self._leave(y), cost

    # ---- its parts ----

    def forward(self, y: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, C, H, W) and ln|det dz/dy| (B,) of y (B, C, H, W), with labels (B,) if conditional, `classes` for no class."""
        tokens, total = self.tokens(y), y.new_zeros(len(y))
        for flow in self.flows:
            tokens, log_det = flow(tokens, labels)
            total = total + log_det
        return self.image(tokens), total

    @torch.no_grad()
    def inverse(self, z: Tensor, labels: Tensor | None = None, how: Inversion = SEQUENTIAL) -> tuple[Tensor, Cost]:
        """y (B, C, H, W) of z (B, C, H, W), and what it cost."""
        if how.copies > 1 and self.classes and not self.config.label_dropout:
            raise ValueError(
                f"guidance {how.guidance} needs a model that also knows images without a class: train with label_dropout 0.1"
            )
        tokens, calls = self.tokens(z), []
        for flow in reversed(self.flows):
            moments = guided(cast(AutoregressiveFlow, flow), labels, self.classes, how)
            tokens, count = invert(tokens, moments, how)
            calls.append(count)
        share = 1 / tokens.shape[1] if how.method == "sequential" else 1.0
        return self.image(tokens), Cost(torch.stack(calls, dim=1), share, how.copies, self._denoising)

    def log_density(self, y: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(y) (B,) of what the flows see, y (B, C, H, W)."""
        z, log_det = self(y, labels)
        return log_det - 0.5 * z.square().flatten(1).sum(1) - self.dims / 2 * math.log(2 * math.pi)

    def tokens(self, image: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, C p p)."""
        return F.pixel_unshuffle(image, self.config.patch).flatten(2).transpose(1, 2)

    def image(self, tokens: Tensor) -> Tensor:
        """(B, N, C p p) -> (B, C, H, W)."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), self.config.patch)

    @property
    def _denoising(self) -> int:
        return DENOISING_EVALUATIONS if self.config.noise == "gaussian" else 0

    # ---- from images to what the flows see, and back ----

    def _bound(self, images: Tensor, labels: Tensor | None, context: Context, draw: int) -> Tensor:
        """Nats (B,) that one draw of u vouches for."""
        u = context.uniform(f"dequantise {draw}", self.image_shape).to(self.device)
        y, log_det = self._enter(uniform_dequantise(self.levels_in(images), u, self.levels))
        return dequantised_bound(self.log_density(y, labels) + log_det, self.dims, self.levels)

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y of x in (0, 1), and ln|det dy/dx| (B,), in the dtype of the weights."""
        if self.config.entry == "logit":
            y, log_det = logit_transform(x, self.config.logit_margin)
        else:
            y, log_det = 2 * x - 1, x.new_full((len(x),), self.dims * math.log(2))
        dtype = next(self.parameters()).dtype
        return y.to(dtype), log_det.to(dtype)

    def _noisy(self, images: Tensor, context: Context) -> Tensor:
        """Images in [-1, 1] plus noise."""
        self.levels_in(images)  # refuses other shapes and values
        clean = to_float(images).to(next(self.parameters()))
        return clean + self.config.sigma * context.normal("noise", self.image_shape).to(clean)

    def _leave(self, y: Tensor) -> Tensor:
        """Float images in [-1, 1]; for uniform noise, the level of the cell that y is in."""
        if self.config.noise == "gaussian":
            return y.float().clamp(-1, 1)
        x = inverse_logit(y, self.config.logit_margin) if self.config.entry == "logit" else (y + 1) / 2
        cells = (x * self.levels).floor().clamp(0, self.levels - 1).long()
        return to_float(from_levels(cells, self.levels))
