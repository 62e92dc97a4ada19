"""A small regression in float64 to train with fit(), and the same training as a plain loop of torch."""

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from midway.gen.core import randomness
from midway.gen.core.config import to_dict
from midway.gen.core.runs import Run
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.batches import Context
from midway.gen.training.config import TrainConfig, learning_rate
from midway.gen.training.ema import EMA
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Hooks, Items

SIZE, BATCH = 10, 4
TIMES = ("seconds", "images_per_second")
"""Entries of metrics.jsonl that differ between two equal runs."""
Fault = Callable[[Context], Tensor]
"""bool (B,): which samples of this micro-batch are bad."""


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * math.inf


class Regression(nn.Module):
    """Linear regression on inputs with noise of a random size; a running mean and a counter as buffers.

    Samples of `fault` make the loss NaN, or with `gradient` only its gradient infinite. `noise` and `seen` record the noise and
    the step of every micro-batch."""

    average: Tensor
    updates: Tensor

    def __init__(self, fault: Fault | None = None, gradient: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        self.bias = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.register_buffer("average", torch.zeros(3, dtype=torch.float64))
        self.register_buffer("updates", torch.tensor(0))
        self.fault, self.gradient = fault, gradient
        self.noise: list[Tensor] = []
        self.seen: list[int] = []

    def loss(self, batch: Tensor, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        noise = context.normal("noise", (3,)).double()
        self.noise.append(noise)
        self.seen.append(context.step)
        x = batch + context.uniform("time")[:, None] * noise
        errors = (x @ self.weight + self.bias - batch.sum(1).sin()).square()
        if self.fault is not None and (bad := self.fault(context)).any():
            errors = Overflow.apply(errors) if self.gradient else torch.where(bad, torch.nan, errors)
        early = context.uniform("time") < 0.25
        logs = {"loss_time_0": torch.stack([errors[early].sum(), early.sum()]), "never": torch.zeros(2)}
        return errors.mean(), {**logs, "largest": errors.max()}

    def after_step(self, step_ok: Tensor) -> None:
        self.average.lerp_(self.weight.detach(), 0.3 * step_ok)
        self.updates += step_ok


def in_steps(*steps: int) -> Fault:
    """The last sample of these steps is bad: it belongs to the last process, and to its last micro-batch."""
    last = torch.tensor([(step + 1) * BATCH - 1 for step in steps])
    return lambda context: torch.isin(context.sample_ids, last)


def samples(wanted: Tensor) -> Tensor:
    """float64 (b, 3) of the items `wanted` of SIZE."""
    return torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[wanted]


@dataclass
class Trained:
    """A run after fit(), and the items that it fetched."""

    folder: Path
    model: Regression
    result: FitResult
    items: list[Tensor] = field(default_factory=list)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def lines(self) -> list[str]:
        return (self.folder / "log.txt").read_text().splitlines()


def train(
    folder: Path, config: TrainConfig, model: Regression | None = None, hooks: Hooks | None = None, resume: bool = False
) -> Trained:
    """Train in this process, which may be one of several."""
    model, fetched, accelerator = model or Regression(), list[Tensor](), make_accelerator(config, folder)
    folder.mkdir(parents=True, exist_ok=True)
    run = Run(folder, "test", {"train": to_dict(config)})
    items = Items(lambda wanted: fetched.append(wanted) or samples(wanted), SIZE, "ten samples")
    return Trained(folder, model, fit(model, items, config, run, accelerator, hooks, resume), fetched)


def records(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def saved(folder: Path, step: int | None = None) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, the newest by default, as file/name."""
    steps = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    path = folder / "checkpoints" / f"step-{max(steps) if step is None else step}"
    files = {file.stem: load_file(file) for file in path.glob("*.safetensors")}
    return {f"{stem}/{name}": value for stem, tensors in files.items() for name, value in tensors.items()}


@dataclass(frozen=True)
class Loop:
    """Results of a plain loop: the tensors of its checkpoint, the loss of each step, the means of each interval, and how many
    samples of each step fell into the first bucket of times."""

    state: dict[str, Tensor]
    losses: list[float]
    intervals: list[dict[str, float]]
    counts: list[float]


def plain_loop(config: TrainConfig, skipped: Collection[int] = ()) -> Loop:
    """What fit() should do. In a skipped step the optimizer does not step and nothing is logged, but order, noise and learning
    rate follow the number of the step, and the weight average averages the unchanged weights once more."""
    model = Regression()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    stream = torch.cat([randomness.permutation(config.seed, "order", epoch, SIZE) for epoch in range(10)])
    average, sums, rows, intervals = EMA(model, config.ema), list[Tensor](), list[Tensor](), list[dict[str, float]]()
    for step in range(config.steps):
        if step not in skipped:
            ids = torch.arange(step * config.batch_size, (step + 1) * config.batch_size)
            optimizer.param_groups[0]["lr"] = learning_rate(config, step)
            optimizer.zero_grad()
            loss, logs = model.loss(samples(stream[ids]), Context(config.seed, step, ids))
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            model.after_step(torch.tensor(True))
            sums.append(torch.stack([loss, logs["largest"], norm, *logs["loss_time_0"]]).detach())
            rows.append(sums[-1])
        average.update(model, step)
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            intervals.append(_means(sums))
            sums = []
    state = {f"model/{name}": value.detach() for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        state |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[parameter].items()}
    state |= {f"ema/{name}": value for name, value in average.shadow.items()}
    table = torch.stack(rows)
    return Loop(state, table[:, 0].tolist(), intervals, table[:, -1].tolist())


def _means(sums: list[Tensor]) -> dict[str, float]:
    if not sums:
        return {}
    loss, largest, norm, early, count = torch.stack(sums).sum(0).tolist()
    means = {"loss": loss, "largest": largest, "gradient_norm": norm}
    return {k: v / len(sums) for k, v in means.items()} | ({"loss_time_0": early / count} if count else {})


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], atol: float) -> None:
    """All tensors of `expected` are in `found`, equal to within `atol`."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=0, atol=atol, msg=name)


def assert_same_bits(run: Path, expected: Path) -> None:
    """Weights, buffers, moments and averages in the newest checkpoints of two runs are equal, and so are the records."""
    mine, theirs = saved(run), saved(expected)
    assert mine.keys() == theirs.keys()
    assert [name for name, value in theirs.items() if not torch.equal(mine[name], value)] == []
    assert records(run) == records(expected)
