"""Samples by seed: one integer per image fixes its noise and its class, so an image depends on neither batch size, process
count nor device. Noise is drawn on the CPU."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.data.images import to_float, to_uint8
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import Guidance, LatentModel
from midway.samplers.graph import Graphs
from midway.samplers.sample import ForwardCounter
from midway.samplers.sampler import Sampler
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.tokenizer import ImageTokenizer


def noise_of(seeds: Tensor, shape: tuple[int, ...], draw: int = 0) -> Tensor:
    """float32 (B, *shape) on the CPU: draw 0 is the initial noise, later draws feed stochastic solvers."""
    return randomness.normal(0, "sample", draw, seeds.cpu(), shape)


def labels_of(seeds: Tensor, classes: int, empty: Sequence[int] = (), draw: ClassDraw | None = None) -> Tensor:
    """The class of each seed, int64 (B,), by `draw`; without one classes take turns, but those without training images, `empty`.

    An unconditional model has 0 classes, and its label is 0. ValueError for a draw of another number of classes.
    """
    if classes == 0:
        return torch.zeros_like(seeds, device="cpu")
    draw = draw or ClassDraw.in_turn(classes, empty)
    if len(draw.counts) != classes:
        raise ValueError(f"a draw among {len(draw.counts)} classes for a model of {classes}: make it with class_draw()")
    return draw.labels(seeds)


def drawn(draw: ClassDraw | None) -> dict[str, str]:
    """What the identity of a measurement holds of how its classes were drawn."""
    return {} if draw is None else {"labels": draw.identity}


class SeededNoise:
    """A NoiseSource: the k-th call gives draw k + 1 of every seed."""

    def __init__(self, seeds: Tensor) -> None:
        self.seeds, self.draw = seeds, 0

    def __call__(self, x: Tensor) -> Tensor:
        self.draw += 1
        return noise_of(self.seeds, tuple(x.shape[1:]), self.draw).to(x)


@dataclass(frozen=True)
class Samples:
    """Standardised latents float32 (N, C, h, w) on the CPU, evaluations per sample counted at the network, and seconds."""

    latents: Tensor
    nfe: float
    seconds: float


@dataclass(frozen=True)
class SamplingConfig:
    """How samples are drawn; but for guidance and classes nothing of it changes what is drawn beyond rounding."""

    guidance: Guidance = field(default_factory=Guidance)
    batch_size: int = 256
    precision: Literal["no", "bf16"] = "no"
    """bf16: the network runs under autocast; the solver's state stays float32."""
    graph: bool = False
    """On a GPU, run the trajectory of every full batch as one CUDA graph."""
    draw: ClassDraw | None = None
    """How seeds draw their classes; None: in turn."""


Start = Callable[[Tensor, Tensor], Tensor]
"""(seeds (B,), their noise (B, C, h, w)) -> the states at the first time of a sampler's grid, on the CPU."""


@torch.no_grad()
def sample_batches(
    trained: TrainedModel,
    sampler: Sampler,
    batches: Iterable[tuple[Tensor, Tensor]],
    config: SamplingConfig | None = None,
    start: Start | None = None,
) -> Iterator[Samples]:
    """The samples of each batch of seeds (B,) and labels (B,), drawn one batch at a time; from noise unless `start` is given."""
    config, model = config or SamplingConfig(), trained.model
    device = next(model.parameters()).device
    graphs, table, guidance = Graphs(), sampler.table, config.guidance
    make_field = partial(model.field, guidance=guidance)
    networks = [model.network, *([guidance.weak.network] if guidance.weak is not None else [])]
    for some, classes in batches:
        before = time.perf_counter()
        with ForwardCounter(*networks) as counter, _autocast(device, config):
            noise = noise_of(some, model.latent_shape)
            x = start_state(model.schedule, sampler.grid[0], noise) if start is None else start(some, noise)
            x, classes = x.to(device), classes.to(device)
            if config.graph and table is not None and not table.stochastic and len(some) == config.batch_size:
                key = (id(model), guidance, config.precision)
                latents = graphs.sample(make_field, table, x, (classes,), key, counter).cpu()
            else:
                latents = sampler.run(make_field(classes), x, SeededNoise(some)).cpu()
        yield Samples(latents, counter.evaluations / len(some), time.perf_counter() - before)


def sample_latents(
    trained: TrainedModel,
    sampler: Sampler,
    seeds: Tensor,
    config: SamplingConfig | None = None,
    labels: Tensor | None = None,
    start: Start | None = None,
) -> Samples:
    """Sample one latent per seed (N,); `labels` (N,) override the seeds' own classes; `start` as of `sample_batches`."""
    config, model = config or SamplingConfig(), trained.model
    labels = labels_of(seeds, model.classes, model.empty, config.draw) if labels is None else labels
    batches = zip(seeds.split(config.batch_size), labels.split(config.batch_size), strict=True)
    parts = list(sample_batches(trained, sampler, batches, config, start))
    evaluations = sum(round(part.nfe * len(part.latents)) for part in parts)
    latents, seconds = torch.cat([part.latents for part in parts]), sum(part.seconds for part in parts)
    return Samples(latents, evaluations / len(seeds), seconds)


def _autocast(device: torch.device, config: SamplingConfig) -> torch.autocast:
    """A graph must not hold casts of the weights that autocast frees when it ends."""
    return torch.autocast(
        device.type, torch.bfloat16, enabled=config.precision == "bf16", cache_enabled=not config.graph
    )


@torch.no_grad()
def decode(trained: TrainedModel, latents: Tensor, batch_size: int | None = None) -> Tensor:
    """Standardised latents (N, C, h, w) -> uint8 images (N, C, H, W) on the CPU; `batch_size` by memory if it is None."""
    tokenizer = trained.tokenizer
    size = batch_size or images_at_once(tokenizer)
    parts = [tokenizer.decode_latents(part.to(tokenizer.device)) for part in latents.split(size)]
    return torch.cat([to_uint8(part).cpu() for part in parts])


@torch.no_grad()
def encode(trained: TrainedModel, images: Tensor, batch_size: int | None = None) -> Tensor:
    """uint8 images (N, C, H, W) -> standardised latents (N, C, h, w) on the CPU; `batch_size` by memory if it is None."""
    tokenizer = trained.tokenizer
    size = batch_size or images_at_once(tokenizer)
    parts = [tokenizer.encode_latents(to_float(part.to(tokenizer.device))) for part in images.split(size)]
    return torch.cat([part.cpu() for part in parts])


def initial(model: LatentModel, sampler: Sampler, seeds: Tensor) -> Tensor:
    """The states (B, C, h, w) of these seeds (B,) at which `sampler` begins, float32 on the CPU."""
    return start_state(model.schedule, sampler.grid[0], noise_of(seeds, model.latent_shape))


@torch.no_grad()
def draw(
    model: LatentModel,
    tokenizer: ImageTokenizer,
    sampler: Sampler,
    seeds: Iterable[int],
    labels: Iterable[int] | None = None,
    guidance: float | Guidance = 1.0,
) -> Tensor:
    """One image a seed, uint8 (N, C, H, W) on the CPU, all in one batch; without `labels` classes take turns by seed.

    The images of `midway sample` for the same seeds, classes, solver and guidance. ValueError as `LatentModel.field`.
    """
    numbers, device = torch.tensor([*seeds]), next(model.parameters()).device
    classes = labels_of(numbers, model.classes, model.empty) if labels is None else torch.tensor([*labels])
    field = model.field(classes.to(device), guidance)
    latents = sampler.run(field, initial(model, sampler, numbers).to(device), SeededNoise(numbers))
    return to_uint8(tokenizer.decode_latents(latents.to(tokenizer.device))).cpu()


def reconstruct(trained: TrainedModel, images: Tensor, batch_size: int | None = None) -> Tensor:
    """uint8 images (N, C, H, W) -> their reconstructions by the tokenizer, on the CPU."""
    return decode(trained, encode(trained, images, batch_size), batch_size)
