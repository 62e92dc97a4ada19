"""Pipelines of diffusers under our solvers: what a sweep measures of them (diffusers_files.py reads their folders).

Samples come from our solvers, on tables built for the model's own schedule. A seed gives the noise and the class that it gives
for our own models; evaluations are counted at the network.
"""

import time
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from midway.gen.core.errors import DataError, UsageError, nearest
from midway.gen.data.images import to_float, to_uint8
from midway.gen.data.pixels import Images
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.load import LEARNED
from midway.gen.diffusion.sampler_checks import check_guidance
from midway.gen.diffusion.samplers import SamplerConfig, build_table
from midway.gen.diffusion.sampling import SamplingConfig, SeededNoise, drawn, labels_of, noise_of
from midway.gen.evaluation.sources import EXACT_SOLUTION, LATENT_LIMIT, UNKNOWN, Config, ModelFacts, SampledBatch
from midway.samplers.denoisers import field_from_diffusers
from midway.samplers.grids import NAMED
from midway.samplers.interop import trained_range
from midway.samplers.operations import flops
from midway.samplers.prediction import NetworkField
from midway.samplers.sample import ForwardCounter
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS
from midway.tokenizers.memory import all_memory, batch_within, peak_bytes, without_numbers

NETWORK = "UNet2DModel"


@dataclass(frozen=True)
class DiffusersModel:
    """A pipeline's network and decoder, in eval mode and frozen, and the config of its scheduler."""

    network: nn.Module
    decoder: nn.Module | None
    scheduler: dict[str, Any]
    shape: tuple[int, int, int]
    """Of a state, (C, h, w)."""
    classes: int
    hash: str
    """12 hexadecimal digits of all weights and configurations."""
    path: Path
    schedule: Schedule
    empty: tuple[int, ...] = ()
    """No class is known to have had no training image."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @cached_property
    def at_once(self) -> int:
        """Images that the decoder takes at once, by memory; decoding takes more than encoding."""
        decoder: Any = None if self.decoder is None else without_numbers(self.decoder)
        if decoder is None:
            return 1
        latents = torch.empty(1, *self.shape, dtype=decoder.dtype, device="meta")
        with torch.no_grad():
            each = peak_bytes(lambda: decoder.decode(latents).sample)
        return batch_within(each, all_memory(self.device))

    def field(self, labels: Tensor) -> NetworkField:
        """What solvers see, for labels (B,), which an unconditional model ignores."""
        given = {"class_labels": labels.to(self.device)} if self.classes else {}
        return field_from_diffusers(self.network, self.scheduler, given)

    @property
    def description(self) -> str:
        """The model in a line."""
        count = sum(value.numel() for value in self.network.parameters())
        latent = "" if self.decoder is None else f" in latents of {type(self.decoder).__name__}"
        lowest = trained_range(self.schedule)[1]
        return (
            f"diffusers {self.path.name} ({self.hash}): {NETWORK} of {count:,} parameters{latent}, {self.schedule!r}, "
            f"sampled down to sigma / alpha = {lowest:.3g}"
        )

    @property
    def facts(self) -> ModelFacts:
        """Nothing is known of its training."""
        return UNKNOWN

    @property
    def exact(self) -> tuple[str, str]:
        """Solver and grid of its exact solution."""
        return EXACT_SOLUTION

    def check_guidance(self, config: SamplerConfig) -> None:
        """UsageError for any: these models have no missing class."""
        check_guidance(config.sampling().guidance, config.weak, None)

    def within(self, config: Config) -> Config:
        """The same with grids that stay on noise levels that the model was trained on."""
        highest, lowest = trained_range(self.schedule)
        return replace(config, rho_max=min(config.rho_max, highest), rho_min=max(config.rho_min, lowest))

    def reaches(self, solver: str, nfe: int) -> bool:
        """No solver is learned for it."""
        del solver, nfe
        return False

    def samplers(self, solver: str, nfe: int, config: SamplerConfig) -> dict[str, Sampler]:
        """One table per grid; UsageError for what such a model cannot have."""
        self.check_guidance(config)
        _check(solver, config)
        config = self.within(config)
        return {grid: build_table(self.schedule, solver, nfe, config, grid) for grid in config.grids}

    def source(self, sampler: Sampler, sampling: SamplingConfig) -> "DiffusersSource":
        """Samples by this sampler."""
        return DiffusersSource(self, sampler, sampling)

    @property
    def network_flops(self) -> int:
        """Floating-point operations of one evaluation."""
        field, x = self.field(torch.zeros(1, dtype=torch.long)), torch.zeros(1, *self.shape, device=self.device)
        return flops(lambda: field(x, torch.full((1,), 0.5, device=self.device)))

    @property
    def network_tokens(self) -> int:
        """A U-Net has none."""
        return 0

    def fitting_nfe(self, config: SamplerConfig, sampler: Sampler) -> int:
        """None of its grids is fitted."""
        del config, sampler
        return 0

    @torch.no_grad()
    def reconstruct(self, images: Tensor) -> Tensor | None:
        """uint8 images (n, C, H, W) through the autoencoder and back, on the CPU; None of a pixel model."""
        if self.decoder is None:
            return None
        return self.decode(torch.cat([self._encoded(to_float(part)) for part in images.split(self.at_once)]))

    def _encoded(self, images: Tensor) -> Tensor:
        """Float images -> latents as the network sees them, on the CPU: of a Gaussian posterior the mode."""
        decoder: Any = self.decoder
        found = decoder.encode(images.to(self.device))
        latents = found.latent_dist.mode() if hasattr(found, "latent_dist") else found.latents
        return (latents * decoder.config.scaling_factor).cpu()

    def check_images(self, reference: Images) -> None:
        """DataError unless the model makes images of the shape of a reference (N, C, H, W)."""
        made = tuple(self.decode(torch.zeros(1, *self.shape)).shape[1:])
        if made != tuple(reference.shape[1:]):
            raise DataError(
                f"{self.path} makes images of shape {made} (C, H, W)",
                f"the reference has {tuple(reference.shape[1:])}",
                f"name the images it imitates: --data, with --resize {made[1]} and --channels {made[0]} if need be",
            )

    @torch.no_grad()
    def decode(self, values: Tensor) -> Tensor:
        """States float32 (n, C, h, w) on the CPU -> uint8 images on the CPU."""
        if self.decoder is None:
            return to_uint8(values.nan_to_num())
        latents = values.nan_to_num().clamp(-LATENT_LIMIT, LATENT_LIMIT)
        return torch.cat([self._decoded(part) for part in latents.split(self.at_once)])

    def _decoded(self, latents: Tensor) -> Tensor:
        decoder: Any = self.decoder
        images = decoder.decode(latents.to(self.device) / decoder.config.scaling_factor).sample
        return to_uint8(images.nan_to_num()).cpu()


# ---- samples ----


@dataclass(frozen=True)
class DiffusersSource:
    """Samples of a diffusers model by one sampler."""

    model: DiffusersModel
    sampler: Sampler
    sampling: SamplingConfig

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, configurations, sampler, precision, and how classes are drawn."""
        own = {"diffusers": self.model.hash, "plan": self.sampler.hash, "precision": self.sampling.precision}
        return own | drawn(self.sampling.draw)

    @property
    def kind(self) -> str:
        """The model."""
        return self.model.hash

    @torch.no_grad()
    def sample(self, seeds: Tensor) -> SampledBatch:
        """States float32 (n, C, h, w), of noise that is a function of the seed."""
        model, begun = self.model, time.perf_counter()
        bf16 = torch.autocast(model.device.type, torch.bfloat16, enabled=self.sampling.precision == "bf16")
        with ForwardCounter(model.network) as counter, bf16:
            parts = [self._solved(some) for some in seeds.split(self.sampling.batch_size)]
        return SampledBatch(torch.cat(parts), counter.evaluations / len(seeds), time.perf_counter() - begun)

    def _solved(self, seeds: Tensor) -> Tensor:
        model = self.model
        x = start_state(model.schedule, self.sampler.grid[0], noise_of(seeds, model.shape).to(model.device))
        labels = labels_of(seeds, model.classes, draw=self.sampling.draw)
        return self.sampler.run(model.field(labels), x, SeededNoise(seeds)).cpu()

    def images(self, raw: SampledBatch) -> Tensor:
        """Decoded, or in 256 levels."""
        return self.model.decode(raw.values)


def _check(solver: str, config: SamplerConfig) -> None:
    for grid in config.grids:
        if grid not in NAMED:
            raise UsageError(f"grid '{grid}' with --diffusers", "its grids are functions alone", nearest(grid, NAMED))
    if solver not in SOLVERS:
        why = "it is learned for a model of ours" if solver in LEARNED else "it is not in the registry"
        raise UsageError(f"solver '{solver}' with --diffusers", why, nearest(solver, SOLVERS))
    if config.eta and solver != "ddim":
        raise UsageError(f"--eta {config.eta} with {solver}", "only ddim has that parameter", "drop --eta")
