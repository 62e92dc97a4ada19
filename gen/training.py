"""fit(): the one training loop, under Accelerate, for everything that learns.

Step s sees the samples at global positions s B .. (s + 1) B - 1 of an endless stream: the permutations of epochs 0, 1, 2, ...
laid end to end. Its noise, times and label drops are functions of (seed, s, global position). Hence the same run on any
number of processes, or with any accumulation, sees the same samples with the same noise.

A model that can be trained has `loss(batch, context) -> (scalar, logs)` and `after_step()`. A log is a scalar, averaged over
the interval, or a pair (sum, count), added up over interval and processes before dividing.
"""

import math
import os
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm

from midway.gen import randomness
from midway.gen.context import Context
from midway.gen.ema import EMA
from midway.gen.errors import DivergedError, UsageError
from midway.gen.runs import Run


class Trainable(Protocol):
    """What fit() asks of a model (an nn.Module)."""

    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]: ...

    def after_step(self) -> None: ...


@dataclass(frozen=True)
class TrainConfig:
    """How to train. `batch_size` is the global batch of one optimizer step, whatever the processes and accumulation."""

    steps: int = 1000
    batch_size: int = 128
    lr: float = 1e-3
    warmup: int = 50
    """Optimizer steps of linear warm-up."""
    decay: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or cosine to 0 at `steps`."""
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.99)
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.999
    """Decay of the weight average; 0 keeps the newest weights only."""
    accumulation: int = 1
    """Micro-batches of one optimizer step."""
    precision: Literal["no", "bf16"] = "no"
    """bf16 runs the networks under autocast; parameters, noise and x_t stay float32."""
    max_seconds: float | None = None
    """Stop after this much training time, save, and exit normally."""
    log_every: int = 50
    preview_every: int = 0
    """Optimizer steps between preview grids (0: only at the end)."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("steps", "warmup", "lr", "weight_decay", "preview_every", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}; 0 keeps the newest weights")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")


def learning_rate(config: TrainConfig, step: int) -> float:
    """The rate of optimizer step `step` (from 0), in closed form."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.decay == "constant":
        return config.lr
    progress = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def make_accelerator(config: TrainConfig) -> Accelerator:
    """An Accelerator whose DDP leaves buffers alone: quantizers keep theirs equal themselves.

    Without a GPU several processes find each other only when told to use the CPU; else each would train alone.
    UsageError when the global batch cannot be shared equally.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        mixed_precision=config.precision,
        cpu=several and not torch.cuda.is_available(),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    _share(config, accelerator)
    return accelerator


class _Loss(nn.Module):
    """Routes `loss` through forward, where DDP and autocast act."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return cast(Trainable, self.model).loss(batch, context)


class _Order:
    """Item indices of stream positions; keeps the permutations of the epochs in use."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.epochs: dict[int, Tensor] = {}

    def __call__(self, start: int, count: int) -> Tensor:
        """int64 (count,): the items at positions start .. start + count - 1."""
        positions = torch.arange(start, start + count)
        epochs = range(start // self.size, (start + count - 1) // self.size + 1)
        self.epochs = {e: self.epochs[e] if e in self.epochs else self._permutation(e) for e in epochs}
        table = torch.cat([self.epochs[e] for e in epochs])
        return table[positions - epochs[0] * self.size]

    def _permutation(self, epoch: int) -> Tensor:
        return randomness.permutation(self.seed, "order", epoch, self.size)


class _Averages:
    """Sums of logged values on the device; read, reduced over processes, once per interval."""

    def __init__(self) -> None:
        self.pairs: dict[str, Tensor] = {}

    def add(self, logs: dict[str, Tensor]) -> None:
        for name, value in logs.items():
            pair = (
                value.detach().float()
                if value.dim()
                else torch.stack([value.detach().float(), torch.ones_like(value).float()])
            )
            self.pairs[name] = self.pairs[name] + pair if name in self.pairs else pair

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means of everything added since the last read; a bucket that nothing fell into is left out."""
        stacked = cast(Tensor, accelerator.reduce(torch.stack(list(self.pairs.values())), "sum")).tolist()
        means = {name: total / count for name, (total, count) in zip(self.pairs, stacked, strict=True) if count}
        self.pairs = {}
        return means


@dataclass(frozen=True)
class FitResult:
    """Optimizer steps done, seconds of training, the average (None when `ema` is 0), and the last interval's means."""

    steps: int
    seconds: float
    ema: EMA | None
    last: dict[str, float]


def fit(
    model: nn.Module,
    fetch: Callable[[Tensor], Any],
    size: int,
    config: TrainConfig,
    run: Run,
    accelerator: Accelerator,
    preview: Callable[[int], None] | None = None,
) -> FitResult:
    """Train `model` in place.

    fetch: item indices int64 (b,) -> batch on the accelerator's device. size: items in the data set. preview(step) is called
    on the main process with the averaged weights in `model`. Raises DivergedError when the loss stops being finite.
    """
    share = _share(config, accelerator)
    model.to(accelerator.device).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        weight_decay=config.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    wrapped, optimizer = accelerator.prepare(_Loss(model), optimizer)
    ema = EMA(model, config.ema) if config.ema else None
    order, averages, last = _Order(size, config.seed), _Averages(), {}
    clock = _Clock(config, accelerator)
    report = _Reporter(config, run, accelerator)
    done = 0
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        for micro in range(config.accumulation):
            start = step * config.batch_size + (micro * accelerator.num_processes + accelerator.process_index) * share
            context = Context(config.seed, step, torch.arange(start, start + share, device=accelerator.device))
            is_last = micro == config.accumulation - 1
            with nullcontext() if is_last else accelerator.no_sync(wrapped):
                loss, logs = wrapped(fetch(order(start, share)), context)
                accelerator.backward(loss / config.accumulation)
            averages.add({"loss": loss, **logs})
        averages.add({"gradient_norm": accelerator.clip_grad_norm_(parameters, config.clip)})  # pyright: ignore[reportArgumentType]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        cast(Trainable, model).after_step()
        if ema is not None:
            ema.update(model, step)
        done = step + 1
        stop = clock.is_over(done)
        if done % config.log_every == 0 or done == config.steps or stop:
            last = averages.read(accelerator)
            _refuse_non_finite(last, done)
            report.interval(done, clock.seconds, last)
        if preview is not None and (_due(config.preview_every, done) or done == config.steps or stop):
            model.eval()
            with ema.applied(model) if ema is not None else nullcontext(), torch.no_grad():
                if accelerator.is_main_process:
                    preview(done)
            model.train()
            accelerator.wait_for_everyone()
        report.tick()
        if stop:
            break
    report.close()
    return FitResult(done, clock.seconds, ema, last)


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _share(config: TrainConfig, accelerator: Accelerator) -> int:
    """Samples of one micro-batch of one process; UsageError when the batch cannot be shared equally."""
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"batch size {config.batch_size} cannot be shared equally",
            f"{accelerator.num_processes} processes x {config.accumulation} micro-batches are {parts} parts",
            f"use a multiple of {parts}",
        )
    return config.batch_size // parts


def _refuse_non_finite(means: dict[str, float], step: int) -> None:
    bad = [name for name, value in means.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"training diverged by step {step}",
            f"{', '.join(bad)} stopped being finite",
            "lower --lr, raise --warmup, or train with --precision no",
        )


class _Clock:
    """Training seconds; all processes agree on when the time is over."""

    def __init__(self, config: TrainConfig, accelerator: Accelerator) -> None:
        self.limit, self.accelerator, self.start = config.max_seconds, accelerator, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def is_over(self, step: int) -> bool:
        if self.limit is None:
            return False
        if self.accelerator.num_processes == 1:
            return self.seconds >= self.limit
        if step % 10:  # asking every process costs a collective
            return False
        late = torch.tensor(float(self.seconds >= self.limit), device=self.accelerator.device)
        return cast(Tensor, self.accelerator.reduce(late, "sum")).item() > 0


class _Reporter:
    """A progress bar on a terminal, else one plain line every 30 s; metrics.jsonl always. Only the main process speaks."""

    def __init__(self, config: TrainConfig, run: Run, accelerator: Accelerator) -> None:
        self.config, self.run, self.main = config, run, accelerator.is_main_process
        self.bar = tqdm(total=config.steps, desc=run.kind, disable=None if self.main else True, leave=False)
        self.last_line = time.monotonic()
        if self.main:
            parts = f"{accelerator.num_processes} processes, {config.accumulation} micro-batches"
            self.run.say(f"training on {accelerator.device.type}: {config.batch_size} samples a step, {parts}")

    def tick(self) -> None:
        self.bar.update()

    def interval(self, step: int, seconds: float, means: dict[str, float]) -> None:
        if not self.main:
            return
        rate = step * self.config.batch_size / seconds
        record = {"step": step, "seconds": round(seconds, 3), "images_per_second": round(rate, 1)}
        self.run.log({**record, "lr": learning_rate(self.config, step - 1), **means})
        shown = {k: f"{v:.4g}" for k, v in means.items() if not k.startswith("loss_time")}
        self.bar.set_postfix(shown)
        if self.bar.disable and (time.monotonic() - self.last_line >= 30 or step == self.config.steps):
            self.last_line = time.monotonic()
            eta = seconds / step * (self.config.steps - step)
            words = " ".join(f"{k} {v}" for k, v in shown.items())
            self.run.say(f"{self.run.kind} step {step}/{self.config.steps} {words} {rate:.0f} images/s eta {eta:.0f} s")

    def close(self) -> None:
        self.bar.close()
