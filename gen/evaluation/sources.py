"""What a sweep measures: sources of samples, and models that solvers are measured on.

`identity` lists everything that the images of a source depend on. An image depends on its seed alone, so any process can compute
any part of a measurement.
"""

import math
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from torch import Tensor

from midway.gen.core.errors import DivergedError
from midway.gen.data.pixels import Images
from midway.gen.diffusion.load import TrainedModel, origin_of, recorded_origin
from midway.gen.diffusion.sampler_checks import check_guidance
from midway.gen.diffusion.samplers import SamplerConfig, fitting_nfe, learned_for, make_samplers
from midway.gen.diffusion.sampling import SamplingConfig, decode, drawn, reconstruct, sample_latents
from midway.gen.objectives.jump_config import own_solver
from midway.samplers.operations import network_flops
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule

LATENT_LIMIT = 100.0
"""Standard deviations at which a latent is clamped before it is decoded; a cell with latents that are not finite is diverged."""
Config = TypeVar("Config", bound=SamplerConfig)


@dataclass(frozen=True)
class ModelFacts:
    """What rows of a model have besides their figures: the name of its run, and what its training took.

    images: those that its training took, and of the models that it was made from; 0: not known. evaluations: passes of images
    through networks in it. guided: guidance that was paid in training, in words.
    """

    name: str = ""
    images: int = 0
    evaluations: int = 0
    guided: str = ""


UNKNOWN = ModelFacts()
"""Of a model without a run."""
EXACT_SOLUTION = ("dpmpp3m", "logsnr")
"""Solver and grid: a multistep solver of order 3, whose 48 evaluations are as near to the limit as 128 of Heun's method."""
EXACT_JUMPS = ("jump", "uniform")
"""Of a model that jumps: many short jumps of its own."""


@dataclass(frozen=True)
class SampledBatch:
    """What was sampled for n seeds, before it is images: float values (n, *) on the CPU, evaluations of one, seconds of all.

    token_evaluations: tokens of a sample that went through the network, where the source counts them; 0: it does not. head_nfe:
    evaluations of a diffusion head for a token; 0: there is none.
    """

    values: Tensor
    nfe: float
    seconds: float
    token_evaluations: float = 0.0
    head_nfe: float = 0.0

    @property
    def finite(self) -> Tensor:
        """bool (n,): whether all values of a sample are finite."""
        return self.values.flatten(1).isfinite().all(1)


class SampleSource(Protocol):
    """Makes images by seed; `identity` is JSON of everything that they depend on."""

    @property
    def identity(self) -> dict[str, Any]: ...

    @property
    def kind(self) -> Hashable:
        """Equal for sources that run the same networks, so that what only a first call costs is paid once for all of them."""
        ...

    def sample(self, seeds: Tensor) -> SampledBatch:
        """One sample for each int64 seed (n,)."""
        ...

    def images(self, raw: SampledBatch) -> Tensor:
        """uint8 (n, C, H, W) on the CPU, also of samples that are not finite."""
        ...


class EvaluatedModel(Protocol):
    """A model that solvers are measured on."""

    @property
    def classes(self) -> int:
        """0 if it is unconditional."""
        ...

    @property
    def empty(self) -> tuple[int, ...]:
        """Classes without a training image, which no seed draws."""
        ...

    @property
    def schedule(self) -> Schedule: ...

    @property
    def description(self) -> str:
        """The model in a line."""
        ...

    @property
    def facts(self) -> ModelFacts:
        """Of its training."""
        ...

    @property
    def exact(self) -> tuple[str, str] | None:
        """Solver and grid of its exact solution; None where it has none."""
        ...

    def check_images(self, reference: Images) -> None:
        """DataError unless the model makes images of the shape of a reference (N, C, H, W)."""

    def check_guidance(self, config: SamplerConfig) -> None:
        """UsageError where there is nothing to guide."""

    def within(self, config: Config) -> Config:
        """The same with grids that stay on noise levels of the model's training: all of them, for a model of ours."""
        return config

    def reaches(self, solver: str, nfe: int) -> bool:
        """Whether a learned solver was learned for this model and budget."""
        ...

    def samplers(self, solver: str, nfe: int, config: SamplerConfig) -> dict[str, Sampler]:
        """One sampler per grid; UsageError for what this model cannot have."""
        ...

    def source(self, sampler: Sampler, sampling: SamplingConfig) -> SampleSource: ...

    @property
    def network_flops(self) -> int:
        """Floating-point operations of one evaluation of the network, without guidance."""
        ...

    @property
    def network_tokens(self) -> int:
        """Tokens of one evaluation; 0 where they are not known."""
        return 0

    def fitting_nfe(self, config: SamplerConfig, sampler: Sampler) -> int:
        """Passes of samples through the network that fitting the grid of a sampler costs."""
        ...

    def reconstruct(self, images: Tensor) -> Tensor | None:
        """uint8 images (n, C, H, W) through the tokenizer and back, on the CPU; None where there is no tokenizer."""
        ...


def facts_of(trained: TrainedModel) -> ModelFacts:
    """Of a latent model of ours."""
    took, jump = origin_of(trained), trained.model.config.jump
    paid = trained.model.config.is_jump and max(jump.guidance, jump.teacher_guidance) > 1
    name = Path(trained.run.place).resolve().name
    return ModelFacts(name, took.images, took.evaluations, "guidance in training" if paid else "")


@dataclass(frozen=True)
class EvaluatedLatentModel(EvaluatedModel):
    """A latent model of ours with everything it can be sampled by."""

    trained: TrainedModel

    @property
    def classes(self) -> int:
        return self.trained.model.classes

    @property
    def empty(self) -> tuple[int, ...]:
        return self.trained.model.empty

    @property
    def schedule(self) -> Schedule:
        return self.trained.model.schedule

    @property
    def description(self) -> str:
        config = self.trained.model.config
        network = f"{config.size.about}, schedule {config.schedule}, target {config.target}"
        network += f", objective {config.objective}" if config.is_jump else ""
        tiles = self.trained.tokenizer.tiles
        tiled = "" if tiles is None else f"; decoded in tiles of {tiles[0]} pixels, margin {tiles[1]}"
        teachers = ", ".join(recorded_origin(self.trained.run).aligned)
        aligned = f"; hidden tokens aligned with {teachers}" if teachers else ""
        return f"{self.trained.hash}: {network}; weights {self.trained.weights}{tiled}{aligned}"

    @property
    def facts(self) -> ModelFacts:
        """The name of its run, and what its training took."""
        return facts_of(self.trained)

    @property
    def exact(self) -> tuple[str, str] | None:
        """Solver and grid of its exact solution; a consistency model, whose jumps all end at the data, has none."""
        config = self.trained.model.config
        if not config.is_jump:
            return EXACT_SOLUTION
        return None if config.jump.ends == "data" else EXACT_JUMPS

    @property
    def few_step(self) -> str:
        """What it is sampled by at few evaluations."""
        config = self.trained.model.config
        return own_solver(config.objective, config.jump)[0] if config.is_jump else "euler"

    def check_guidance(self, config: SamplerConfig) -> None:
        """UsageError where there is nothing to guide."""
        check_guidance(config.sampling().guidance, config.weak, self.trained)

    def reaches(self, solver: str, nfe: int) -> bool:
        """Whether a learned solver was learned for this model and budget."""
        return solver in learned_for(self.trained, [nfe])

    def samplers(self, solver: str, nfe: int, config: SamplerConfig) -> dict[str, Sampler]:
        """One per grid; of a learned solver, the grids that it was learned on. UsageError when there is none."""
        return make_samplers(self.trained, solver, nfe, config)

    def source(self, sampler: Sampler, sampling: SamplingConfig) -> "SolverSource":
        """Samples by this sampler."""
        return SolverSource(self.trained, sampler, sampling)

    @property
    def network_flops(self) -> int:
        """Counted without guidance."""
        model = self.trained.model
        return network_flops(model.conditional_field, model.latent_shape, next(model.parameters()).device)

    @property
    def network_tokens(self) -> int:
        """Patches of its latents, or pixels at a U-Net's lowest resolution."""
        return math.prod(self.trained.model.network.grid)

    def fitting_nfe(self, config: SamplerConfig, sampler: Sampler) -> int:
        """As if it were fitted alone; the fine trajectories are shared by all grids of a model."""
        return fitting_nfe(self.trained, config, sampler)

    def reconstruct(self, images: Tensor) -> Tensor | None:
        """uint8 images (n, C, H, W) encoded and decoded, on the CPU."""
        return reconstruct(self.trained, images)


@dataclass(frozen=True)
class SolverSource:
    """Samples of a latent model by one sampler: standardised latents, then decoded."""

    trained: TrainedModel
    sampler: Sampler
    sampling: SamplingConfig

    @property
    def identity(self) -> dict[str, Any]:
        """Model, decoder, tiles, sampler, guidance, precision, classes; batch size and graph change nothing beyond rounding."""
        guidance, tiles = self.sampling.guidance, self.trained.tokenizer.tiles
        tiled = {} if tiles is None else {"tiles": list(tiles)}
        return (
            {
                "model": self.trained.hash,
                "decoder": self.trained.decoder_hash,
                "plan": self.sampler.hash,
                "guidance": [guidance.scale, list(map(str, guidance.interval)), guidance.weak_hash],
                "precision": self.sampling.precision,
            }
            | tiled
            | drawn(self.sampling.draw)
        )

    @property
    def kind(self) -> Hashable:
        """The model and the kind of sampler, whose own network may be part of it."""
        return (self.trained.hash, type(self.sampler).__name__, self.sampling.guidance)

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
                "train its tokenizer again; midway evaluate-tokenizer measures it on real images",
            ) from None
