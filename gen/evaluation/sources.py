"""Sources of samples: a latent model under a sampler, or a baseline.

`identity` lists everything that the images of a source depend on. An image depends on its seed alone, so any process can compute
any part of a measurement.
"""

import time
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.core.errors import DivergedError
from midway.gen.data.images import to_uint8
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.sampling import SamplingConfig, decode, labels_of, sample_latents
from midway.samplers.sampler import Sampler

LATENT_LIMIT = 100.0
"""Standard deviations at which a latent is clamped before it is decoded; a cell with latents that are not finite is diverged."""


@dataclass(frozen=True)
class SampledBatch:
    """What was sampled for n seeds, before it is images: float values (n, *) on the CPU, evaluations of one, seconds of all."""

    values: Tensor
    nfe: float
    seconds: float

    @property
    def finite(self) -> Tensor:
        """bool (n,): whether all values of a sample are finite."""
        return self.values.flatten(1).isfinite().all(1)


class SampleSource(Protocol):
    """Makes images by seed; `identity` is JSON of everything that they depend on."""

    @property
    def identity(self) -> dict[str, Any]: ...

    def sample(self, seeds: Tensor) -> SampledBatch:
        """One sample for each int64 seed (n,)."""
        ...

    def images(self, raw: SampledBatch) -> Tensor:
        """uint8 (n, C, H, W) on the CPU, also of samples that are not finite."""
        ...


@dataclass(frozen=True)
class SolverSource:
    """Samples of a latent model by one sampler: standardised latents, then decoded."""

    trained: TrainedModel
    sampler: Sampler
    sampling: SamplingConfig

    @property
    def identity(self) -> dict[str, Any]:
        """Model, decoder, sampler, guidance and precision; neither batch size nor graph, which change nothing beyond rounding."""
        guidance = self.sampling.guidance
        return {
            "model": self.trained.hash,
            "decoder": self.trained.decoder_hash,
            "plan": self.sampler.hash,
            "guidance": [guidance.scale, list(map(str, guidance.interval)), guidance.weak_hash],
            "precision": self.sampling.precision,
        }

    def sample(self, seeds: Tensor) -> SampledBatch:
        """Latents float32 (n, C, h, w)."""
        samples = sample_latents(self.trained, self.sampler, seeds, self.sampling)
        return SampledBatch(samples.latents, samples.nfe, samples.seconds)

    def images(self, raw: SampledBatch) -> Tensor:
        """Decoded. DivergedError if the decoder makes of finite latents what is not finite."""
        try:
            return decode(self.trained, raw.values.nan_to_num().clamp(-LATENT_LIMIT, LATENT_LIMIT))
        except ValueError as error:
            raise DivergedError(
                f"the decoder of model {self.trained.hash} gives no image for some latents",
                str(error),
                "train its tokenizer again; evaluate_tokenizer.py measures it on real images",
            ) from None


@dataclass(frozen=True)
class BaselineSource:
    """Samples of a VAE or a flow: `sample_nfe` evaluations each."""

    trained: TrainedBaseline
    batch_size: int = 256

    @property
    def identity(self) -> dict[str, Any]:
        """The model."""
        return {"baseline": self.trained.hash}

    def sample(self, seeds: Tensor) -> SampledBatch:
        """Float images (n, C, H, W) in [-1, 1], with the class of each seed."""
        model, begun, parts = self.trained.model, time.perf_counter(), []
        for some in seeds.split(self.batch_size):
            labels = labels_of(some, model.classes) if model.classes else None
            parts.append(model.sample(some, labels).cpu())
        return SampledBatch(torch.cat(parts), model.sample_nfe, time.perf_counter() - begun)

    def images(self, raw: SampledBatch) -> Tensor:
        """In 256 levels."""
        return to_uint8(raw.values.nan_to_num())
