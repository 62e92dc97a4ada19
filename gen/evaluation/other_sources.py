"""Sources of samples beside solvers: priors over codes, baselines at their own number of evaluations, external images at none."""

import math
import time
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.data.external import ExternalImages
from midway.gen.data.images import to_uint8
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.sampling import drawn, labels_of
from midway.gen.evaluation.sources import SampledBatch
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.sampling import CodeSampling, decode_codes, identity_of, sample_codes


@dataclass(frozen=True)
class PriorSource:
    """Samples of a prior over codes by one rule, in one number of evaluations."""

    trained: TrainedPrior
    sampling: CodeSampling

    @property
    def identity(self) -> dict[str, Any]:
        """Prior, decoder, tiles, how codes are drawn, precision, classes."""
        return identity_of(self.trained, self.sampling)

    @property
    def kind(self) -> Hashable:
        """The prior, with guidance or without."""
        return (self.trained.hash, self.sampling.decoding.guidance != 1)

    def sample(self, seeds: Tensor) -> SampledBatch:
        """Tokens float64 (n, L, *), whole numbers or latents, NaN where the prior had no finite law."""
        found = sample_codes(self.trained, seeds, self.sampling)
        values = found.tokens.double().masked_fill(~found.finite[:, None, None], math.nan)
        return SampledBatch(values, found.nfe, found.seconds, found.token_evaluations, found.head_nfe)

    def images(self, raw: SampledBatch) -> Tensor:
        """Decoded."""
        return decode_codes(self.trained, raw.values.nan_to_num())


@dataclass(frozen=True)
class BaselineSource:
    """Samples of a VAE or a flow: `sample_nfe` evaluations each."""

    trained: TrainedBaseline
    batch_size: int = 256
    draw: ClassDraw | None = None
    """How seeds draw their classes; None: in turn."""

    @property
    def identity(self) -> dict[str, Any]:
        """The model, and how classes are drawn."""
        return {"baseline": self.trained.hash} | drawn(self.draw)

    @property
    def kind(self) -> str:
        """The model."""
        return self.trained.hash

    def sample(self, seeds: Tensor) -> SampledBatch:
        """Float images (n, C, H, W) in [-1, 1], with the class of each seed."""
        model, begun, parts = self.trained.model, time.perf_counter(), []
        for some in seeds.split(self.batch_size):
            labels = labels_of(some, model.classes, model.empty, self.draw) if model.classes else None
            parts.append(model.sample(some, labels).cpu())
        return SampledBatch(torch.cat(parts), model.sample_nfe, time.perf_counter() - begun)

    def images(self, raw: SampledBatch) -> Tensor:
        """In 256 levels."""
        return to_uint8(raw.values.nan_to_num())


@dataclass(frozen=True)
class ImagesSource:
    """External images as a source of samples: seed `first` is the first image; no evaluation is counted."""

    external: ExternalImages
    first: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """The pixels, wherever they lie."""
        return {"images": self.external.fingerprint}

    @property
    def kind(self) -> str:
        """No network."""
        return "images"

    def sample(self, seeds: Tensor) -> SampledBatch:
        """The images themselves."""
        return SampledBatch(self.external.pixels[seeds - self.first].contiguous(), 0.0, 0.0)

    def images(self, raw: SampledBatch) -> Tensor:
        """As they are."""
        return raw.values
