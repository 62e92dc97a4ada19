"""Flow baselines made of couplings: NICE, RealNVP and Glow as three configurations of one model.

Images are integers k = 0 .. L - 1; with x = (k + u) / L in (0, 1)^D and z = f(y), y = entry(x),

    ln p(x) = ln prior(z | class) + ln|det df/dy| + ln|det dy/dx|
    ln P(k) >= E_q [ln p(x) - ln q(u | k)] - D ln L                      (Ho et al. 2019, Flow++, arXiv 1902.00275, equation 8)
    ln P(k) >= E ln (1/S) sum_s exp(ln p(x_s) - ln q(u_s | k)) - D ln L           (S draws; Burda et al. 2016, arXiv 1509.00519)

Dequantisation is uniform, q = 1, or variational: u = sigmoid(g(e; k)) with logistic noise e and g made of couplings that see
the image, so ln q = ln logistic(e) - ln|det dg/de| - ln sigmoid'(g). At the start g is the identity and q = 1 exactly.

Entries: "logit" (likelihood.py), "symmetric" y = 2 x - 1, "unit" y = x. The bound is of integers with each of them: their
Jacobians are counted. With classes, their embedding enters every coupling, and each class has a mean and a standard deviation
of its own for every value in the prior.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.baselines.base import Baseline
from midway.gen.baselines.couplings import CheckerboardCoupling, CouplingNetworkConfig
from midway.gen.baselines.flow_config import FlowConfig, build_flow
from midway.gen.baselines.flow_layers import Chain, Shape, require_initialised
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

# ---- priors and dequantisation ----


def log_standard(e: Tensor, prior: Literal["normal", "logistic"]) -> Tensor:
    """(B,): log-density of the standard normal or logistic distribution at e (B, C, H, W), summed."""
    if prior == "normal":
        return (-0.5 * e.square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
    return (F.logsigmoid(e) + F.logsigmoid(-e)).flatten(1).sum(1)


class ClassPrior(nn.Module):
    """A mean and standard deviation for every class and value, at first 0 and 1."""

    def __init__(self, classes: int, shape: Shape) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(classes, *shape))
        self.log_std = nn.Parameter(torch.zeros(classes, *shape))

    def standardise(self, z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """e = (z - mean) / std and -sum log std, (B,)."""
        log_std = self.log_std[labels]
        return (z - self.mean[labels]) * (-log_std).exp(), -log_std.flatten(1).sum(1)

    def restore(self, e: Tensor, labels: Tensor) -> Tensor:
        """z of e."""
        return self.mean[labels] + e * self.log_std[labels].exp()


class Dequantiser(nn.Module):
    """q(u | k), the variational dequantisation of Flow++ (section 3.1)."""

    def __init__(self, couplings: int, network: CouplingNetworkConfig, shape: Shape) -> None:
        super().__init__()
        width = network.width
        self.features = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()
        )
        cond = (width, *shape[1:])
        self.flow = Chain([CheckerboardCoupling(shape, i, "affine", network, cond) for i in range(couplings)])

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, C, H, W) in (0, 1) and ln q(u | k) (B,), for level centres x in [-1, 1] and `noise` uniform on (0, 1)."""
        e = torch.logit(noise).to(x.dtype)
        g, log_det = self.flow(e, self.features(x))
        return g.sigmoid(), log_standard(e, "logistic") - log_det - log_standard(g, "logistic")


class CouplingFlow(Baseline):
    """The model. `sample` gives stored levels as floats: x is cut into L equal cells, and a cell's level is the sample."""

    kind: ClassVar[str] = "flow"
    config_type: ClassVar[type] = FlowConfig
    config: FlowConfig

    def __init__(self, config: FlowConfig, image_shape: Shape, levels: int, classes: int = 0) -> None:
        super().__init__(config, image_shape, levels, classes)
        cond = (config.class_width, 1, 1) if classes else None
        self.flow = build_flow(config, image_shape, cond)
        self.embedding = nn.Embedding(classes, config.class_width) if classes else None
        self.prior = ClassPrior(classes, image_shape) if classes else None
        variational = config.dequantise == "variational"
        self.dequantiser = (
            Dequantiser(config.dequantise_couplings, config.network, image_shape) if variational else None
        )

    # ---- the protocol ----

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean bits per dimension of one draw of u for each image, and `bits_per_dim`."""
        k, labels = self.levels_in(batch.images), self.labels_in(batch.labels, len(batch.images))
        bits = bits_per_dim(self._bound(k, labels, context, 0), self.dims).mean()
        return bits, {"bits_per_dim": bits.detach()}

    def start(self, batch: ImageBatch, context: Context) -> None:
        """Initialise every ActNorm from these images, unless it has been."""
        k, labels = self.levels_in(batch.images), self.labels_in(batch.labels, len(batch.images))
        x, _ = self._dequantise(k, context, 0)
        self.flow.initialise(self._enter(x)[0], self._condition(labels))

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        """Nats (B,) float64, a lower bound, over `draws` draws. ValueError before `start`."""
        require_initialised(self)
        k, labels = self.levels_in(images), self.labels_in(labels, len(images))
        draws = [self._bound(k, labels, context, draw).double() for draw in range(self.config.draws)]
        return torch.stack(draws).logsumexp(0) - math.log(len(draws))

    @torch.no_grad()
    def sample(self, seeds: Tensor, labels: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Images (n, C, H, W), each of its seed alone; `temperature` multiplies the prior's standard deviation."""
        if not temperature >= 0:
            raise ValueError(f"temperature is {temperature}; give 0 or more, 1 for the model's own distribution")
        require_initialised(self)
        labels = self.labels_in(labels, len(seeds))
        z = temperature * self._noise(seeds)
        z = z if self.prior is None or labels is None else self.prior.restore(z, labels)
        x = self._leave(self.flow.inverse(z, self._condition(labels)))
        if not bool(x.isfinite().all()):
            raise ValueError("samples are not finite: the weights are damaged or diverged, use an earlier checkpoint")
        cells = (x * self.levels).floor().clamp(0, self.levels - 1).long()
        return to_float(from_levels(cells, self.levels))

    # ---- its parts ----

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(x) (B,) of x (B, C, H, W) in (0, 1), with labels (B,) on the model's device if conditional."""
        y, entered = self._enter(x)
        z, log_det = self.flow(y, self._condition(labels))
        total = log_det + entered
        if self.prior is not None and labels is not None:
            z, scaled = self.prior.standardise(z, labels)
            total = total + scaled
        return total + log_standard(z, self.config.prior)

    def _bound(self, k: Tensor, labels: Tensor | None, context: Context, draw: int) -> Tensor:
        """Nats (B,) that one draw of u vouches for."""
        x, log_q = self._dequantise(k, context, draw)
        return dequantised_bound(self.log_density(x, labels) - log_q, self.dims, self.levels)

    def _dequantise(self, k: Tensor, context: Context, draw: int) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) in (0, 1) and ln q(u | k) (B,)."""
        noise = context.uniform(f"dequantise {draw}", self.image_shape).to(self.device)
        if self.dequantiser is None:
            return uniform_dequantise(k, noise, self.levels), noise.new_zeros(len(k), dtype=self._dtype)
        centres = (2 * k + 1).to(self._dtype) / self.levels - 1
        u, log_q = self.dequantiser(centres, noise)
        return uniform_dequantise(k, u, self.levels), log_q

    def _enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y of x, and ln|det dy/dx| (B,), in the dtype of the weights."""
        if self.config.entry == "logit":
            y, log_det = logit_transform(x, self.config.logit_margin)
            return y.to(self._dtype), log_det.to(self._dtype)
        slope, offset = (2, -1) if self.config.entry == "symmetric" else (1, 0)
        y = (slope * x + offset).to(self._dtype)
        return y, y.new_full((len(y),), self.dims * math.log(slope))

    def _leave(self, y: Tensor) -> Tensor:
        """x of y."""
        if self.config.entry == "logit":
            return inverse_logit(y, self.config.logit_margin)
        return (y + 1) / 2 if self.config.entry == "symmetric" else y

    def _condition(self, labels: Tensor | None) -> Tensor | None:
        """What couplings are told, (B, E, 1, 1)."""
        return None if self.embedding is None or labels is None else self.embedding(labels)[:, :, None, None]

    def _noise(self, seeds: Tensor) -> Tensor:
        """A draw of the standard prior for each seed, on the model's device."""
        seeds = seeds.cpu()
        if self.config.prior == "normal":
            e = randomness.normal(0, "sample", 0, seeds, self.image_shape)
        else:
            e = torch.logit(randomness.uniform(0, "sample", 0, seeds, self.image_shape))
        return e.to(self.device, self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype
