"""--dry-run: two steps of a training on random images, to see whether it fits and how long it will take.

Everything is built as for the training, with random images in place of the data; nothing is read or written. A step has one
micro-batch: as many samples as the training gives a process, or fewer if these do not fit into memory, or if the device is a CPU,
where a step has at most 10^12 floating-point operations (or one sample).

    memory kept     weights, gradients, states of the optimizer and averages, in float32
    activations     of a micro-batch, counted without computing (tokenizers/memory.py)
    time            steps x batch size / (samples a second of the second step), at the same speed for every step
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import psutil
import torch
from accelerate import Accelerator
from torch import nn

from midway.gen.core.errors import UsageError
from midway.gen.core.runs import Run
from midway.gen.core.text import echo
from midway.gen.data.images import image_data
from midway.gen.data.splits import DataConfig, Splits
from midway.gen.progress.memory import gib, most_resident
from midway.gen.training.accelerator import ROOM, loss_flops, loss_need, share_of
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import Training
from midway.gen.training.interface import Hooks, Items
from midway.gen.training.loading import batches_like
from midway.gen.training.nonfinite import StopFlags
from midway.gen.training.optim import checkpoint_activations, state_bytes
from midway.tokenizers.memory import Need, memory_of

STEPS = 2
IMAGES = 64
"""Random images, which are trained on again and again."""
CPU_FLOPS = 1e12
SHAPES = {"digits": (1, 8), "mnist5k": (1, 28), "mnist": (1, 28), "fashion_mnist": (1, 28), "cifar10": (3, 32)}
"""Channels and side of named sources, which are not read."""


def random_splits(data: DataConfig, classes: int) -> Splits:
    """Random images of the size that the configuration states, as training and as held-out images.

    UsageError where it states none.
    """
    channels, side = SHAPES.get(data.data, (3, None))
    side = data.crop or data.resize or side
    if side is None:
        what, why = "--dry-run needs the size of the images", f"it does not read {data.data}"
        raise UsageError(what, why, "pass --resize 256, say, and --channels 1 if they are grey")
    shape = (IMAGES, data.channels or channels, side, side)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    names = tuple(str(label) for label in range(classes))
    images = image_data(pixels, torch.arange(IMAGES) % classes, names, f"random {side}x{side}", ())
    return Splits(images, images)


@dataclass(frozen=True)
class Rehearsal:
    """What two steps showed: bytes, seconds and samples of one process.

    `flops` are of one sample, forward and backward; None, like `activations`, where they cannot be counted.
    """

    parameters: int
    kept: int
    activations: int | None
    flops: int | None
    micro: int
    share: int
    processes: int
    seconds: float
    peak: int
    device: torch.device

    @property
    def speed(self) -> float:
        """Samples a second of all processes."""
        return self.micro * self.processes / self.seconds

    def lines(self, config: TrainConfig) -> list[str]:
        """The report."""
        total, flops = memory_of(self.device)[0], self.flops
        parts = f"{self.processes} process(es) x {config.accumulation} micro-batch(es) of {self.share}"
        fewer = "" if self.micro == self.share else f"; here micro-batches of {self.micro}"
        what = "allocated on the GPU" if self.device.type == "cuda" else "growth of the process"
        activations = "" if self.activations is None else f", {gib(self.activations)} of activations for {self.micro}"
        rate = f"{self.speed:.3g} images/s" + ("" if flops is None else f", {self.speed * flops / 1e12:.3g} TFLOP/s")
        hours = config.steps * config.batch_size / self.speed / 3600
        work = [] if flops is None else [f"operations    {flops / 1e9:.4g} GFLOP an image, forward and backward"]
        return [
            f"parameters    {self.parameters:,}",
            f"step          {config.batch_size} images: {parts}{fewer}",
            *work,
            f"memory        {gib(self.kept)} kept{activations}; peak {gib(self.peak)} ({what}) of {gib(total)}",
            f"speed         {rate} ({self.seconds:.3g} s a micro-batch, {self.device.type}, precision {config.precision})",
            f"time          {config.steps:,} steps in {hours:,.1f} hours at this speed",
        ]


def rehearse(
    model: nn.Module,
    items: Items,
    config: TrainConfig,
    accelerator: Accelerator,
    start: int,
    notes: tuple[str, ...] = (),
) -> None:
    """Train two steps and print the report; `start` is `resident()` of before the model was built."""
    measured = measure(model, items, config, accelerator, start)
    if accelerator.is_main_process:
        echo("dry run: two steps on random images; nothing is read or written", *measured.lines(config), *notes)


def measure(model: nn.Module, items: Items, config: TrainConfig, accelerator: Accelerator, start: int) -> Rehearsal:
    """`rehearse` without the report."""
    device, share, processes = accelerator.device, share_of(config, accelerator), accelerator.num_processes
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    kept, counted = state_bytes(model, config), count(model, items, config)
    micro = share if counted is None else micro_batch(share, *counted, kept, device)
    shown = replace(config, steps=STEPS, batch_size=micro * processes, accumulation=1)
    with TemporaryDirectory() as folder:  # of the run, in which nothing is stored
        training = Training(model, items, shown, Run(Path(folder), "dry run"), accelerator, Hooks())
        seconds = timed_steps(training, STEPS)
    return Rehearsal(
        parameters=sum(p.numel() for p in training.parameters),
        kept=kept,
        activations=None if counted is None else counted[0].of(micro),
        flops=None if counted is None else counted[1],
        micro=micro,
        share=share,
        processes=processes,
        seconds=seconds[-1],
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else max(0, most_resident() - start),
        device=device,
    )


def count(model: nn.Module, items: Items, config: TrainConfig) -> tuple[Need, int] | None:
    """Memory of activations, and operations of a sample; None of a model whose loss reads numbers on the host."""
    batches = batches_like(items, torch.device("cpu"))
    try:
        return loss_need(model, batches, config.precision == "bf16"), loss_flops(model, batches)
    except RuntimeError:  # also NotImplementedError, of operations without a shape rule
        return None


def micro_batch(share: int, need: Need, flops: int, kept: int, device: torch.device) -> int:
    """The largest divisor of `share` whose activations fit, on a CPU with its operations within 10^12; at least 1."""
    fits = need.fits(int(ROOM * memory_of(device)[1]) - kept)
    if device.type == "cpu":
        fits = min(fits, int(CPU_FLOPS // max(flops, 1)))
    return max((part for part in range(1, share + 1) if share % part == 0 and part <= fits), default=1)


def timed_steps(training: Training, count: int) -> list[float]:
    """Seconds of each of the first `count` steps; nothing is written."""
    device, seconds = training.accelerator.device, list[float]()
    with training.loader:
        training.start()
        for step in range(count):
            begun = time.perf_counter()
            training.take(step, StopFlags(stop=False, late=False, save=False))
            training.guard.read()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - begun)
    return seconds


def resident() -> int:
    """Bytes of memory in use by this process."""
    return psutil.Process().memory_info().rss


def without_perceptual(task: Any) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer's task whose discriminator acts from the first step, and without LPIPS if its weights are not given."""
    loss, notes = replace(task.loss, adversary_start=0), ()
    if loss.perceptual and loss.perceptual_weights is None:
        loss = replace(loss, perceptual=0.0)
        notes = ("LPIPS is left out, since --loss.perceptual-weights is not given: it takes memory and time too",)
    return replace(task, loss=loss), cast(tuple[str, ...], notes)
