"""A convolutional VAE with a likelihood bound for integer pixel values (Kingma and Welling 2013, arXiv 1312.6114).

    q(z | x, y) = N(mu, s^2),  (mu, ln s^2) = encoder(x) + embedding(y)        p(z) = N(0, 1), whatever the label y
    p(x | z, y) = discretised logistic mixture of decoder(z + embedding'(y))   (logistic_mixture.py)

    ln P(x) >= ELBO = E_q ln w,      ln w = ln p(x | z) + ln p(z) - ln q(z | x)
    ln P(x) >= E ln 1/K sum_k w_k >= ELBO                                      (IWAE: Burda et al. 2015, arXiv 1509.00519, eq. 8)
    loss = (-ln p(x | z) + beta w_t sum_j max(free_bits, KL_j)) / (D ln 2)

w_t rises linearly from 1 / kl_warmup to 1 in the first `kl_warmup` steps. KL_j is the divergence of latent channel j over all
positions. Free bits (Kingma et al. 2016, arXiv 1606.04934, appendix C.8) apply to each image, not to the minibatch's mean, whose
maximum would depend on how a batch is divided. `bits_per_dim` in the logs is the bound itself, for every loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from midway.gen.baselines.base import Baseline
from midway.gen.baselines.logistic_mixture import PARAMETERS, LogisticMixture
from midway.gen.core import randomness
from midway.gen.core.ranges import LAYERS, WIDTH, check_ranges
from midway.gen.data.images import to_float
from midway.gen.data.levels import bits_per_dim
from midway.gen.training.batches import Context, ImageBatch
from midway.tokenizers import losses
from midway.tokenizers.kl import LOG_VARIANCE_RANGE, gaussian_kl
from midway.tokenizers.networks import Decoder, Encoder


@dataclass(frozen=True)
class VAEConfig:
    """Network and objective of a VAE."""

    latent_dim: int = 8
    """Latent channels at each position."""
    downsample: int = 4
    """Side of a latent position in pixels: a power of two."""
    width: int = 64
    """Channels at the lowest resolution."""
    blocks: int = 2
    """Residual blocks of the encoder, and of the decoder."""
    mixtures: int = 3
    """Logistic components of every value; 1 is a single logistic."""
    beta: float = 1.0
    """Weight of the KL divergence in the loss; the reported bound has 1."""
    kl_warmup: int = 0
    """Optimizer steps in which that weight rises linearly."""
    free_bits: float = 0.0
    """Nats of KL divergence per latent channel and image that are not penalised."""

    def __post_init__(self) -> None:
        for name in ("latent_dim", "width", "mixtures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("blocks", "beta", "kl_warmup", "free_bits"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and not negative, got {getattr(self, name)}")
        check_ranges(self, latent_dim=WIDTH, width=WIDTH, mixtures=WIDTH, downsample=WIDTH, blocks=(0, LAYERS[1]))


class VAE(Baseline):
    """VAE of uint8 images; latents are float (B, latent_dim, H / downsample, W / downsample)."""

    kind: ClassVar[str] = "vae"
    config_type: ClassVar[type] = VAEConfig
    config: VAEConfig

    def __init__(self, config: VAEConfig, image_shape: tuple[int, int, int], levels: int, classes: int = 0) -> None:
        super().__init__(config, image_shape, levels, classes)
        channels, height, width = image_shape
        if height % config.downsample or width % config.downsample:
            raise ValueError(
                f"images are {height}x{width}, downsample {config.downsample}: choose one that divides both sides"
            )
        dim, factor = config.latent_dim, config.downsample
        self.latent_shape = (dim, height // factor, width // factor)
        self.encoder = Encoder(channels, config.width, factor, config.blocks, 2 * dim)
        parameters = PARAMETERS * config.mixtures * channels
        self.decoder = Decoder(dim, config.width, factor, config.blocks, parameters, "pixel_shuffle")
        if classes:
            size = math.prod(self.latent_shape)
            self.posterior_label = _embedding(classes, 2 * size)
            self.latent_label = _embedding(classes, size)

    # ---- encoder and decoder ----

    def posterior(self, images: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(mu, ln s^2), each (B, D, h, w) in float32 or better, of uint8 images (B, C, H, W)."""
        labels = self.labels_in(labels, len(images))
        moments = self.encoder(to_float(images).to(next(self.parameters())))
        if labels is not None:
            moments = moments + self.posterior_label(labels).view_as(moments)
        mean, log_variance = (moments if moments.dtype == torch.float64 else moments.float()).chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def likelihood(self, latents: Tensor, labels: Tensor | None = None) -> LogisticMixture:
        """p(x | z) for latents (B, D, h, w)."""
        labels = self.labels_in(labels, len(latents))
        if labels is not None:
            latents = latents + self.latent_label(labels).view_as(latents)
        return LogisticMixture.of(self.decoder(latents), self.image_shape[0], self.levels)

    # ---- training ----

    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The objective above; logs: the bound and its KL divergence in bits per dimension."""
        k = self.levels_in(batch.images)
        mean, log_variance = self.posterior(batch.images, batch.labels)
        noise = context.normal("posterior", self.latent_shape).to(mean)
        likelihood = self.likelihood(mean + torch.exp(log_variance / 2) * noise, batch.labels)
        fit = likelihood.log_prob(k).flatten(1).sum(1)
        kl = channel_kl(mean, log_variance)
        penalty = self._kl_weight(context.step) * kl.clamp(min=self.config.free_bits).sum(1)
        logs = {"bits_per_dim": fit - kl.sum(1), "kl_bits_per_dim": -kl.sum(1)}
        logs = {name: losses.mean(bits_per_dim(nats.detach(), self.dims)) for name, nats in logs.items()}
        return losses.mean(bits_per_dim(fit - penalty, self.dims)), logs

    def _kl_weight(self, step: int) -> float:
        return self.config.beta * min(1.0, (step + 1) / max(self.config.kl_warmup, 1))

    # ---- bounds ----

    @torch.no_grad()
    def log_weights(self, images: Tensor, labels: Tensor | None, context: Context, draws: int) -> Tensor:
        """ln w in nats, float64 (B, draws), draw d with the context's normals named `posterior-d`."""
        if draws < 1:
            raise ValueError(f"the bound needs at least one draw of the latents, got {draws}")
        k, columns = self.levels_in(images), []
        mean, log_variance = self.posterior(images, labels)
        for draw in range(draws):
            noise = context.normal(f"posterior-{draw}", self.latent_shape).to(mean)
            latents = mean + torch.exp(log_variance / 2) * noise
            fit = self.likelihood(latents, labels).log_prob(k)
            # the 2 pi of p(z) and q(z | x) cancel
            prior_over_posterior = (noise.double().square() + log_variance.double() - latents.double().square()) / 2
            columns.append(fit.double().flatten(1).sum(1) + prior_over_posterior.flatten(1).sum(1))
        return torch.stack(columns, dim=1)

    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context, samples: int = 16) -> Tensor:
        """The ELBO (beta = 1), averaged over `samples` draws of the latents: nats (B,) float64."""
        return self.log_weights(images, labels, context, samples).mean(1)

    def iwae(self, images: Tensor, labels: Tensor | None, context: Context, draws: int) -> Tensor:
        """ln 1/K sum_k w_k of K = `draws`: nats (B,) float64, the ELBO of that draw for K = 1."""
        return torch.logsumexp(self.log_weights(images, labels, context, draws), dim=1) - math.log(draws)

    # ---- images ----

    @torch.no_grad()
    def sample(self, seeds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (n, C, H, W) in [-1, 1] for int64 seeds (n,): the expectation of every value, given latents from N(0, 1)."""
        noise = randomness.normal(0, "vae-latents", 0, seeds.cpu(), self.latent_shape)
        return self.decode(noise.to(next(self.parameters())), labels)

    @torch.no_grad()
    def decode(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Expected images (n, C, H, W) in [-1, 1] of latents (n, D, h, w)."""
        return self.likelihood(latents, labels).mean().float().clamp(-1, 1)


# ---- pictures of the latent space: float images in [-1, 1] ----


def reconstruct(model: VAE, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """(n, C, H, W): uint8 images through the posterior's mean."""
    return model.decode(_means(model, images, labels), labels)


def interpolate(model: VAE, first: Tensor, second: Tensor, labels: Tensor | None = None, steps: int = 8) -> Tensor:
    """(n, steps, C, H, W): decoded points on the line between the posterior means of `first` and `second`, uint8 (n, C, H, W).

    In a conditional model both images of a pair have one label.
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; an interpolation has at least its two ends")
    a, b = _means(model, first, labels), _means(model, second, labels)
    share = torch.linspace(0, 1, steps).to(a).view(1, -1, 1, 1, 1)
    return _decode_all(model, (1 - share) * a[:, None] + share * b[:, None], labels)


def traverse(
    model: VAE, images: Tensor, coordinates: Sequence[int], values: Sequence[float], labels: Tensor | None = None
) -> Tensor:
    """(n, coordinates, values, C, H, W): the posterior mean of each image with one flat latent coordinate set to a value.

    ValueError for a coordinate that does not exist.
    """
    means = _means(model, images, labels).flatten(1)
    if not all(0 <= index < means.shape[1] for index in coordinates):
        raise ValueError(f"coordinates are {list(coordinates)}; the latents have 0 to {means.shape[1] - 1}")
    latents = means[:, None, None].repeat(1, len(coordinates), len(values), 1)
    for row, index in enumerate(coordinates):
        latents[:, row, :, index] = torch.tensor(values).to(means)
    return _decode_all(model, latents.unflatten(-1, model.latent_shape), labels)


@torch.no_grad()
def coordinate_kl(model: VAE, images: Tensor, labels: Tensor | None = None) -> Tensor:
    """Nats (D h w,) of KL divergence of each flat latent coordinate, the mean over uint8 images (n, C, H, W)."""
    moments = model.posterior(images, labels)
    each = gaussian_kl(*(m.flatten().unsqueeze(1) for m in moments))
    return each.view(len(images), -1).mean(0)


def channel_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from N(0, 1) in nats of each channel, (B, D, h, w) -> (B, D)."""
    return gaussian_kl(mean.flatten(0, 1), log_variance.flatten(0, 1)).unflatten(0, mean.shape[:2])


@torch.no_grad()
def _means(model: VAE, images: Tensor, labels: Tensor | None) -> Tensor:
    return model.posterior(images, labels)[0]


def _decode_all(model: VAE, latents: Tensor, labels: Tensor | None) -> Tensor:
    """Images (n, *S, C, H, W) of latents (n, *S, D, h, w), each with its image's label."""
    shape = latents.shape[:-3]
    repeated = None if labels is None else labels.repeat_interleave(math.prod(shape[1:]))
    return model.decode(latents.flatten(0, -4), repeated).unflatten(0, shape)


def _embedding(classes: int, size: int) -> nn.Embedding:
    """Class embeddings that are initially nearly equal."""
    layer = nn.Embedding(classes, size)
    nn.init.normal_(layer.weight, std=0.02)
    return layer
