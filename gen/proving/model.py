"""A mixture as a model that is sampled and that solvers are learned for; seeds, their exact solutions, and distances to both.

Three figures of a solver, each on blocks of seeds:

    RMSE                  to the exact solution from the same seed's noise: the solver's error alone
    distance to exact     Fréchet distance of its samples to the exact solution's, from the same seeds: 0 at convergence
    distance to data      Fréchet distance of its samples to the mixture's own mean and covariance, known in closed form

The exact solution is a fine one, and its own error, against one of twice the steps, is a figure as well.
"""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.sampling import SeededNoise, noise_of
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics
from midway.samplers.grids import GRIDS
from midway.samplers.guidance import ConditionalField
from midway.samplers.mixture import Mixture
from midway.samplers.prediction import Field, Prediction
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import EDM, Schedule
from midway.samplers.solvers import SOLVERS

BATCH = 256
"""Samples at a time: more no longer fit a processor's cache."""
EXACT = ("unipc3", "logsnr")
"""Solver and grid of the exact solution."""
KNOWN = 10**9
"""Count of samples that stands for a covariance in closed form."""


@dataclass(frozen=True, eq=False)
class MixtureModel:
    """What a `LatentModel` is to samplers and distillation, with an exact field in place of a network; labels do nothing."""

    mixture: Mixture
    schedule: Schedule = field(default_factory=EDM)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.mixture.dim,)

    @property
    def feature_dim(self) -> int:
        return len(self.mixture.weights)

    @property
    def shift(self) -> float:
        return 1.0

    @cached_property
    def exact_field(self) -> Field:
        return self.mixture.field(self.schedule)

    def conditional_field(self, x: Tensor, t: Tensor, labels: Tensor) -> Prediction:
        return self.exact_field(x, t)

    def field(self, labels: Tensor, guidance: float = 1.0, network: ConditionalField | None = None) -> Field:
        """The field, counted where `network` counts. ValueError for guidance: there are no classes."""
        if guidance != 1:
            raise ValueError(f"guidance {guidance} of a mixture without classes: nothing can be guided")
        return self.exact_field if network is None else lambda x, t: network(x, t, labels)

    @cached_property
    def truth(self) -> FeatureStatistics:
        """Mean and covariance of the data."""
        mean, covariance = self.mixture.mean.double(), self.mixture.covariance.double()
        return FeatureStatistics(KNOWN, mean, covariance * (KNOWN - 1))

    @torch.no_grad()
    def run(self, sampler: Sampler, seeds: Tensor) -> Tensor:
        """One sample per seed, float32 (N, D)."""
        parts = []
        for some in seeds.split(BATCH):
            x = start_state(self.schedule, sampler.grid[0], noise_of(some, self.latent_shape))
            parts.append(sampler.run(self.exact_field, x, SeededNoise(some)))
        return torch.cat(parts)

    @torch.no_grad()
    def solve(self, seeds: Tensor, steps: int) -> Tensor:
        """The fine solution from the noise of seeds."""
        solver, grid = EXACT
        return self.run(SOLVERS[solver].build(self.schedule, GRIDS[grid](self.schedule, steps)), seeds)

    def draw(self, seeds: Tensor) -> Tensor:
        """Data, float32 (N, D), independent of the noise of the same seeds."""
        uniform = randomness.uniform(0, "component", 0, seeds)
        return self.mixture.sample(uniform, randomness.normal(0, "data", 0, seeds, self.latent_shape)).float()


@dataclass(frozen=True)
class Block:
    """Seeds and the exact solution from their noise."""

    seeds: Tensor
    exact: Tensor

    @cached_property
    def statistics(self) -> FeatureStatistics:
        return FeatureStatistics.of(self.exact)


@dataclass(frozen=True)
class Figures:
    """Of one block; infinite for samples that are not finite."""

    rmse: float
    to_exact: float
    to_data: float


def figures(model: MixtureModel, block: Block, found: Tensor) -> Figures:
    """The three figures of the samples found from a block's seeds."""
    if not found.isfinite().all():
        return Figures(*[float("inf")] * 3)
    statistics = FeatureStatistics.of(found)
    return Figures(
        rmse=(found.double() - block.exact.double()).square().mean().sqrt().item(),
        to_exact=frechet_distance(statistics, block.statistics),
        to_data=frechet_distance(statistics, model.truth),
    )


def make_block(model: MixtureModel, first: int, count: int, steps: int) -> Block:
    """Seeds `first` on, solved exactly."""
    seeds = torch.arange(first, first + count)
    return Block(seeds, model.solve(seeds, steps))


def exact_error(model: MixtureModel, block: Block, steps: int) -> float:
    """RMSE of the exact solution to one with twice the steps."""
    finer = model.solve(block.seeds, 2 * steps)
    return sample_rmse(block.exact, finer)


def sample_rmse(first: Tensor, second: Tensor) -> float:
    return (first.double() - second.double()).square().mean().sqrt().item()
