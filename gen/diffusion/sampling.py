"""Samples by seed: one integer per image fixes its noise and its class, so an image depends on neither batch size, process
count nor device. Noise is drawn on the CPU."""

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.data.images import to_uint8
from midway.gen.diffusion.field import Guidance
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import LatentModel, start_state
from midway.samplers.graph import Graphs
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.parallel import ParallelConfig, sample_parallel
from midway.samplers.prediction import Field
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

Plan = Table | LearnedSolver


def noise_of(seeds: Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """float32 (B, *shape) on the CPU: draw 0 is the initial noise, later draws feed stochastic solvers."""
    return randomness.normal(0, "sample", draw, seeds.cpu(), shape)


def labels_of(seeds: Tensor, classes: int) -> Tensor:
    """The class of each seed, int64 (B,): seed modulo classes, so that every consecutive run of seeds is balanced.

    An unconditional model has 0 classes, and its label is 0.
    """
    return seeds.cpu() % max(classes, 1)


class SeededNoise:
    """A NoiseSource: the k-th call gives draw k + 1 of every seed."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds, self.draw = seeds, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.draw += 1
        return noise_of(self.seeds, tuple(x.shape[1:]), self.draw).to(x)


def solve(plan: Plan, field: Field, schedule: Schedule, x: Tensor, seeds: Tensor) -> Tensor:
    """Run a table or a learned solver from x (B, *) at the plan's first time."""
    if isinstance(plan, Table):
        return sample(field, plan, x, SeededNoise(seeds) if plan.stochastic else None)
    return plan.sample(field, schedule, x)


@dataclass(frozen=True)
class Samples:
    """Standardised latents float32 (N, C, h, w) on the CPU, evaluations per sample counted at the network, seconds, and the most
    waves of a batch if evaluated in parallel."""

    latents: Tensor
    nfe: float
    seconds: float
    waves: int = 0


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn; none of it changes what is drawn beyond rounding, guidance aside."""

    guidance: Guidance = field(default_factory=Guidance)
    batch_size: int = 256
    precision: Literal["no", "bf16"] = "no"
    """bf16: the network runs under autocast; the solver's state stays float32."""
    graph: bool = False
    """On a GPU, run the trajectory of every full batch as one CUDA graph."""
    parallel: ParallelConfig | None = None
    """Evaluate many times at once, in waves, until nothing changes; None: one after the other."""


@torch.no_grad()
def sample_latents(
    trained: TrainedModel,
    plan: Plan,
    seeds: Tensor,
    config: SamplingConfig | None = None,
    labels: Tensor | None = None,
    graphs: Graphs | None = None,
) -> Samples:
    """Sample one latent per seed (N,); `labels` (N,) override the seeds' own classes. `graphs` keeps captured trajectories."""
    config, model = config or SamplingConfig(), trained.model
    if isinstance(plan, LearnedSolver):
        plan = plan.table(model.schedule) or plan
    device = next(model.parameters()).device
    labels = labels_of(seeds, model.classes) if labels is None else labels
    graphs = graphs or Graphs()
    start = time.perf_counter()
    parts, waves = [], 0
    weak = config.guidance.weak
    networks = [model.network, *([weak.network] if weak is not None else [])]
    with ForwardCounter(*networks) as counter, _autocast(device, config):
        for some, their_labels in zip(seeds.split(config.batch_size), labels.split(config.batch_size), strict=True):
            x = start_state(model.schedule, plan.grid[0], noise_of(some, model.latent_shape).to(device))
            classes = their_labels.to(device)
            make_field = partial(_field, model, config.guidance)
            if config.parallel is not None and isinstance(plan, Table):
                found = sample_parallel(
                    lambda copies, c=classes, make=make_field: make(c.repeat(copies)),
                    plan,
                    model.schedule,
                    x,
                    config.parallel,
                    SeededNoise(some) if plan.stochastic else None,
                )
                waves = max(waves, found.waves)
                parts.append(found.x.cpu())
            elif config.graph and isinstance(plan, Table) and not plan.stochastic and len(some) == config.batch_size:
                key = (id(model), config.guidance, config.precision)
                parts.append(graphs.sample(make_field, plan, x, (classes,), key, counter).cpu())
            else:
                parts.append(solve(plan, make_field(classes), model.schedule, x, some).cpu())
    return Samples(torch.cat(parts), counter.evaluations / len(seeds), time.perf_counter() - start, waves)


def _field(model: LatentModel, guidance: Guidance, labels: Tensor) -> Field:
    return model.field(labels, guidance)


def _autocast(device: torch.device, config: SamplingConfig) -> torch.autocast:
    """A graph must not hold casts of the weights that autocast frees when it ends."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=not config.graph
    )


@torch.no_grad()
def decode(trained: TrainedModel, latents: Tensor, batch_size: int = 512) -> Tensor:
    """Standardised latents (N, C, h, w) -> uint8 images (N, C, H, W) on the CPU."""
    device = trained.tokenizer.device
    parts = [trained.tokenizer.decode_latents(part.to(device)) for part in latents.split(batch_size)]
    return torch.cat([to_uint8(part).cpu() for part in parts])
