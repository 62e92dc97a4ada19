"""Models of diffusers as sources of cells: their samples by our solvers, on tables built for their own schedule.

A seed is the noise, and the class, that it is for our own models; evaluations are counted at the network.
"""

import time
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from midway.gen.core.errors import UsageError, nearest
from midway.gen.diffusion.load import LEARNED
from midway.gen.diffusion.model import EVERYWHERE, start_state
from midway.gen.diffusion.samplers import SamplerConfig, build_table
from midway.gen.diffusion.sampling import SamplingConfig, SeededNoise, labels_of, noise_of
from midway.gen.evaluation.diffusers_model import DiffusersModel
from midway.gen.evaluation.sources import SampledBatch
from midway.samplers.grids import GRIDS
from midway.samplers.interop import trained_range
from midway.samplers.sample import ForwardCounter
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS

Config = TypeVar("Config", bound=SamplerConfig)


@dataclass(frozen=True)
class DiffusersSource:
    """Samples of a diffusers model by one sampler."""

    model: DiffusersModel
    sampler: Sampler
    sampling: SamplingConfig

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, configurations, sampler and precision."""
        return {"diffusers": self.model.hash, "plan": self.sampler.hash, "precision": self.sampling.precision}

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
        return self.sampler.run(model.field(labels_of(seeds, model.classes)), x, SeededNoise(seeds)).cpu()

    def images(self, raw: SampledBatch) -> Tensor:
        """Decoded, or in 256 levels."""
        return self.model.decode(raw.values)


# ---- samplers ----


def within_training(config: Config, schedule: Schedule) -> Config:
    """The same with grids that stay on noise levels that the model was trained on."""
    highest, lowest = trained_range(schedule)
    return replace(config, rho_max=min(config.rho_max, highest), rho_min=max(config.rho_min, lowest))


def diffusers_samplers(model: DiffusersModel, solver: str, nfe: int, config: SamplerConfig) -> dict[str, Sampler]:
    """One table per grid, on the model's schedule; UsageError for what such a model cannot have."""
    _check(solver, config)
    config = within_training(config, model.schedule)
    return {grid: build_table(model.schedule, solver, nfe, config, grid) for grid in config.grids}


def _check(solver: str, config: SamplerConfig) -> None:
    for grid in config.grids:
        if grid not in GRIDS:
            raise UsageError(f"grid '{grid}' with --diffusers", "its grids are functions alone", nearest(grid, GRIDS))
    if solver not in SOLVERS:
        why = "it is learned for a model of ours" if solver in LEARNED else "it is not in the registry"
        raise UsageError(f"solver '{solver}' with --diffusers", why, nearest(solver, SOLVERS))
    if config.guidance != 1 or config.weak is not None or config.interval != EVERYWHERE:
        raise UsageError(
            "guidance with --diffusers", "these models have no missing class", "drop --guidance and --guide"
        )
    if config.eta and solver != "ddim":
        raise UsageError(f"--eta {config.eta} with {solver}", "only ddim has that parameter", "drop --eta")
