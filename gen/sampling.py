"""Samples by seed: one integer per image fixes its noise and its class, so an image depends on neither batch size, process
count nor device. Noise is drawn on the CPU."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen import randomness
from midway.gen.artefacts import TrainedModel
from midway.gen.data import to_uint8
from midway.gen.latent_model import start_state
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.prediction import Field
from midway.samplers.sample import EvaluationCounter, sample
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
    """Standardised latents float32 (N, C, h, w) on the CPU, evaluations per sample counted at the network, seconds."""

    latents: Tensor
    nfe: float
    seconds: float


@torch.no_grad()
def sample_latents(
    trained: TrainedModel,
    plan: Plan,
    seeds: Tensor,
    guidance: float = 1.0,
    batch_size: int = 256,
    labels: Tensor | None = None,
) -> Samples:
    """Sample one latent per seed (N,); `labels` (N,) override the seeds' own classes."""
    model = trained.model
    device = next(model.parameters()).device
    labels = labels_of(seeds, model.classes) if labels is None else labels
    counter = EvaluationCounter(model.conditional_field)
    start = time.perf_counter()
    parts = []
    for some, their_labels in zip(seeds.split(batch_size), labels.split(batch_size), strict=True):
        x = start_state(model.schedule, plan.grid[0], noise_of(some, model.latent_shape).to(device))
        field = model.field(their_labels.to(device), guidance, counter)
        parts.append(solve(plan, field, model.schedule, x, some).cpu())
    return Samples(torch.cat(parts), counter.evaluations / len(seeds), time.perf_counter() - start)


@torch.no_grad()
def decode(trained: TrainedModel, latents: Tensor, batch_size: int = 512) -> Tensor:
    """Standardised latents (N, C, h, w) -> uint8 images (N, C, H, W) on the CPU."""
    device = trained.tokenizer.device
    parts = [trained.tokenizer.decode_latents(part.to(device)) for part in latents.split(batch_size)]
    return torch.cat([to_uint8(part).cpu() for part in parts])
