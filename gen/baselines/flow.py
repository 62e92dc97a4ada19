"""Flow baselines built from couplings: NICE, RealNVP and Glow as three configurations of one model.

With levels k, x = (k + u) / L in (0, 1)^D, y = entry(x) and z = f(y) (density.py),

    ln p(x) = ln prior(z | class) + ln|det df/dy| + ln|det dy/dx|

Dequantisation is uniform, q(u | k) = 1, or variational (Flow++: Ho et al. 2019, arXiv 1902.00275): u = sigmoid(g(e; k)) with
logistic noise e and g made of couplings conditioned on the image, so ln q = ln logistic(e) - ln|det dg/de| - ln sigmoid'(g). A
new g is the identity, so q = 1 exactly. In conditional models every coupling reads an embedding of the class, and the prior has a
mean and a standard deviation per class and value.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.baselines.couplings import CheckerboardCoupling, CouplingNetworkConfig
from midway.gen.baselines.density import DensityBaseline, finite
from midway.gen.baselines.flow_config import FlowConfig, build_flow
from midway.gen.baselines.flow_layers import Chain, Shape, require_initialised
from midway.gen.core import randomness
from midway.gen.data.levels import bits_per_dim, uniform_dequantise
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers.losses import mean


def log_standard(e: Tensor, prior: Literal["normal", "logistic"]) -> Tensor:
    """(B,): log-density of the standard normal or logistic distribution at e (B, C, H, W), summed."""
    if prior == "normal":
        return (-0.5 * e.square() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
    return (F.logsigmoid(e) + F.logsigmoid(-e)).flatten(1).sum(1)


class ClassPrior(nn.Module):
    """A mean and a standard deviation for every class and value, initially 0 and 1."""

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


class CouplingFlow(DensityBaseline):
    """NICE, RealNVP or Glow, by `config`. Samples are stored levels as floats: x is cut into L equal bins."""

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

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean bits per dimension of one draw of u for each image, and `bits_per_dim`."""
        k, labels = self.levels_in(batch.images), self.labels_in(batch.labels, len(batch.images))
        bits = mean(bits_per_dim(self.bound(k, labels, context), self.dims))
        return bits, {"bits_per_dim": bits.detach()}

    def start(self, batch: ImageBatch, context: Context) -> None:
        """Initialise every ActNorm from these images, unless it is initialised."""
        k, labels = self.levels_in(batch.images), self.labels_in(batch.labels, len(batch.images))
        x, _ = self.dequantise(k, context, 0)
        self.flow.initialise(self.enter(x)[0], self._condition(labels))

    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        """Nats (B,) float64: the bound of `config.draws` draws. ValueError before `start`."""
        require_initialised(self)
        return super().log_likelihood(images, labels, context)

    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(x) (B,) of x (B, C, H, W) in (0, 1), with labels (B,) on the model's device if conditional."""
        y, entered = self.enter(x)
        z, log_det = self.flow(y, self._condition(labels))
        total = log_det + entered
        if self.prior is not None and labels is not None:
            z, scaled = self.prior.standardise(z, labels)
            total = total + scaled
        return total + log_standard(z, self.config.prior)

    def dequantise(self, k: Tensor, context: Context, draw: int) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) in (0, 1) and ln q(u | k) (B,) of levels k."""
        if self.dequantiser is None:
            return super().dequantise(k, context, draw)
        centres = (2 * k + 1).to(self.dtype) / self.levels - 1
        u, log_q = self.dequantiser(centres, self.uniform(context, draw))
        return uniform_dequantise(k, u, self.levels), log_q

    @torch.no_grad()
    def sample(self, seeds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (n, C, H, W), each a function of its seed."""
        require_initialised(self)
        labels = self.labels_in(labels, len(seeds))
        z = self._noise(seeds.cpu())
        z = z if self.prior is None or labels is None else self.prior.restore(z, labels)
        return self.images_of(finite(self.leave(self.flow.inverse(z, self._condition(labels)))))

    def _condition(self, labels: Tensor | None) -> Tensor | None:
        """The condition of every coupling, (B, E, 1, 1)."""
        return None if self.embedding is None or labels is None else self.embedding(labels)[:, :, None, None]

    def _noise(self, seeds: Tensor) -> Tensor:
        """A draw of the standard prior for each seed, on the model's device."""
        if self.config.prior == "normal":
            e = randomness.normal(0, "sample", 0, seeds, self.image_shape)
        else:
            e = torch.logit(randomness.uniform(0, "sample", 0, seeds, self.image_shape))
        return e.to(self.device, self.dtype)
