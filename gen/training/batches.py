"""What a training step sees: its batch, and the source of its randomness.

Every draw of step s is a function of (seed, s, global position of the sample), so that neither the number of processes nor
accumulation nor a restart changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.core import randomness


@dataclass(frozen=True)
class ImageBatch:
    """images uint8 (B, C, H, W), labels int64 (B,)."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class LatentBatch:
    """Standardised latents float32 (B, C, H, W), labels int64 (B,); `mirrored` are the latents of the mirrored images."""

    latents: Tensor
    labels: Tensor
    mirrored: Tensor | None = None


@dataclass(frozen=True)
class Context:
    """Where randomness of a step comes from: (seed, step, global position of each sample)."""

    seed: int
    step: int
    sample_ids: Tensor

    def uniform(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """float64 (B, *shape) on (0, 1), one independent set per purpose."""
        return randomness.uniform(self.seed, purpose, self.step, self.sample_ids, shape)

    def uniforms(self, *purposes: str) -> list[Tensor]:
        """`uniform` of each purpose, float64 (B,)."""
        return randomness.uniforms(self.seed, purposes, self.step, self.sample_ids)

    def normal(self, purpose: str, shape: Sequence[int] = ()) -> Tensor:
        """float32 (B, *shape), standard normal."""
        return randomness.normal(self.seed, purpose, self.step, self.sample_ids, shape)

    def keep(self, purpose: str, shape: Sequence[int], probability: float) -> Tensor:
        """bool (B, *shape), each True with `probability` in (0, 1]."""
        return randomness.keep(self.seed, purpose, self.step, self.sample_ids, shape, probability)

    def either(self, a: Tensor, b: Tensor, purpose: str) -> Tensor:
        """For each sample of (B, *) the one of `a` or, with probability 1/2, that of `b`."""
        other = self.uniform(purpose) < 0.5
        return torch.where(other.view(-1, *[1] * (a.dim() - 1)), b, a)
