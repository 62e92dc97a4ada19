"""Continuous bottlenecks with the interface of a quantizer: the Gaussian posterior of a VAE, and the identity.

KL (Kingma and Welling 2013, arXiv 1312.6114; as latent space: Rombach et al. 2021, arXiv 2112.10752):

    z = (mu, ln s^2), 2 D channels        code = mu + s noise        loss = weight * kl
    kl = 1/2 sum(mu^2 + s^2 - 1 - ln s^2), summed over an image, averaged over the batch (eq. 10 with the sign turned)

Identity: code = z. Latents are mu and z; snapping changes nothing; there are no indices.
"""

import math

import torch
from torch import Tensor

from midway.tokenizers.base import Quantized, Quantizer, float32_island, zero_of
from midway.tokenizers.checks import check_channels, check_noise
from midway.tokenizers.losses import mean

LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Continuous(Quantizer):
    """Base of quantizers without a codebook."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        if dim < 1:
            raise ValueError(f"dim is {dim}; a latent has at least one channel")
        self.dim = dim
        self.codebook_size = None

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The latents themselves: every point is a code. No indices, (B, 0)."""
        check_channels(latents, self.dim, "latents")
        return latents, _no_indices(latents)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        name = type(self).__name__
        raise ValueError(f"{name} is continuous and has no indices; use latents, or a quantizer of type 'fsq' or 'vq'")

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        return self.indices_to_codes(codes)  # ValueError


class KL(Continuous):
    """Gaussian posterior with a standard normal prior."""

    def __init__(self, dim: int, weight: float = 1e-6) -> None:
        super().__init__(dim)
        if not (weight >= 0 and math.isfinite(weight)):
            raise ValueError(f"weight is {weight}; give a finite number >= 0 (1e-6 for latents, 1 for a VAE bound)")
        self.weight = weight
        self.noise_channels = dim

    @property
    def in_dim(self) -> int:
        return 2 * self.dim

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, 2 D, *S): a draw from the posterior if `noise` is given or in training, else its mean.

        Without `noise` the training draw comes from torch's global generator.
        """
        with float32_island(z):
            mu, log_variance = self.moments(z)
            if noise is None and self.training:
                noise = torch.randn_like(mu)
            if noise is not None:
                check_noise(noise, mu)
            codes = mu if noise is None else mu + torch.exp(log_variance / 2) * noise.to(mu)
            kl = mean(gaussian_kl(mu, log_variance))
            return _continuous(codes, {"kl": kl}, self.weight * kl + zero_of(z))

    def latents(self, z: Tensor) -> Tensor:
        return self.moments(z)[0]

    def moments(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(mu, ln s^2), each (B, D, *S) float32; ln s^2 is clamped to [-30, 20]."""
        check_channels(z, self.in_dim)
        mean, log_variance = z.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, weight={self.weight}"


class Identity(Continuous):
    """The identity: for plain autoencoders and the pixel model."""

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, D, *S) -> itself, in float32; `noise` is ignored."""
        return _continuous(self.latents(z), {}, zero_of(z))

    def latents(self, z: Tensor) -> Tensor:
        check_channels(z, self.dim)
        return z.float()

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(0, 1)) in nats, (B, ...) -> (B,)."""
    terms = mean.square() + log_variance.exp() - 1 - log_variance
    return terms.flatten(1).sum(1) / 2


def _continuous(codes: Tensor, losses: dict[str, Tensor], loss: Tensor) -> Quantized:
    return Quantized(codes=codes, indices=_no_indices(codes), losses=losses, loss=loss, counts=None)


def _no_indices(codes: Tensor) -> Tensor:
    return torch.empty(codes.shape[0], 0, dtype=torch.int64, device=codes.device)
