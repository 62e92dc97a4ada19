"""What a training says: means per interval, a progress bar or plain lines, metrics.jsonl, trackers."""

import math
import time
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from midway.gen.runs import Run
from midway.gen.train_config import TrainConfig, flat, learning_rate

LINE_SECONDS = 30.0


class Averages:
    """Sums of logged values on the device; read, reduced over processes, once per interval.

    A log is a scalar, averaged over the interval, or a pair (sum, count), added up over interval and processes before dividing,
    or several pairs (n, 2), which are named with their numbers: loss_time_0, loss_time_1, ...
    """

    def __init__(self) -> None:
        self.sums: dict[tuple[str, ...], Tensor] = {}  # names -> (n, 2) of sum and count

    def add(self, logs: list[dict[str, Tensor]], kept: Tensor, processes: int = 1) -> None:
        """The logs of a step's micro-batches; nothing when the 0-dim bool `kept` is false.

        A scalar weighs as its share of the step, so that all steps weigh the same however they are divided.
        """
        weight = 1 / (len(logs) * processes)
        for log in logs:
            single = {name: value.detach() for name, value in log.items() if not value.dim()}
            pairs = {name: value.detach().view(-1, 2) for name, value in log.items() if value.dim()}
            values = torch.stack([value.float() for value in single.values()]) if single else torch.zeros(0)
            rows = [torch.stack([weight * values, torch.full_like(values, weight)], dim=1)] if single else []
            table = torch.where(kept, torch.cat([*rows, *(pair.float() for pair in pairs.values())]), 0)
            names = (*single, *(name for key, pair in pairs.items() for name in _numbered(key, log[key], len(pair))))
            self.sums[names] = self.sums[names] + table if names in self.sums else table

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means of everything added since the last `clear`; a bucket that nothing fell into is left out."""
        if not self.sums:
            return {}
        total = cast(Tensor, accelerator.reduce(torch.cat(list(self.sums.values())), "sum")).tolist()
        names = [name for group in self.sums for name in group]
        both: dict[str, tuple[float, float]] = {}
        for name, (value, count) in zip(names, total, strict=True):
            so_far = both.get(name, (0.0, 0.0))
            both[name] = (so_far[0] + value, so_far[1] + count)
        return {name: value / count for name, (value, count) in both.items() if count}

    def clear(self) -> None:
        """Begin a new interval."""
        self.sums = {}

    def state(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The open interval: per group of names, joined by spaces, (processes, n, 2)."""
        return {
            " ".join(names): cast(Tensor, accelerator.gather(table[None])).cpu() for names, table in self.sums.items()
        }

    def load(self, state: dict[str, Tensor], accelerator: Accelerator) -> None:
        """Go on with an open interval; with another number of processes the first one takes all sums."""
        mine, several = accelerator.process_index, accelerator.num_processes
        self.sums = {}
        for names, shares in state.items():
            alone = shares.sum(0) if mine == 0 else torch.zeros_like(shares[0])
            table = shares[mine] if len(shares) == several else alone
            self.sums[tuple(names.split(" "))] = table.to(accelerator.device)


def _numbered(name: str, value: Tensor, count: int) -> list[str]:
    return [name] if value.dim() == 1 else [f"{name}_{i}" for i in range(count)]


class Clock:
    """Training seconds, those of earlier starts included."""

    def __init__(self, before: float = 0.0) -> None:
        self.before, self.start = before, time.monotonic()

    @property
    def here(self) -> float:
        """Seconds of this start."""
        return time.monotonic() - self.start

    @property
    def total(self) -> float:
        """Seconds of all starts."""
        return self.before + self.here


class Reporter:
    """A progress bar on a terminal, else one plain line every 30 s; metrics.jsonl always. Only the main process speaks."""

    def __init__(self, config: TrainConfig, run: Run, accelerator: Accelerator, step: int) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.main = accelerator.is_main_process
        self.first, self.steps_before = step, step
        self.bar = tqdm(
            total=config.steps, initial=step, desc=run.kind, disable=None if self.main else True, leave=False
        )
        self.started = self.last_line = self.last_interval = time.monotonic()
        self.shown: dict[str, str] = {}
        if config.log_with:
            accelerator.init_trackers("midway", _scalars(run.config))

    def say(self, line: str) -> None:
        """A line of its own, from the main process."""
        if self.main:
            self.run.say(line)

    def back_to(self, step: int) -> None:
        """The run went back to an earlier step."""
        self.first = self.steps_before = step
        self.started = self.last_interval = time.monotonic()
        self.bar.n = step
        self.bar.refresh()

    def interval(self, step: int, seconds: float, means: dict[str, float], skipped: int, partial: bool) -> None:
        """Means over the steps since the last interval; `partial` when the run stops before the interval is full."""
        now = time.monotonic()
        rate = (step - self.steps_before) * self.config.batch_size / max(now - self.last_interval, 1e-9)
        record: dict[str, Any] = {"step": step, "seconds": round(seconds, 3), "images_per_second": round(rate, 1)}
        record |= {"lr": learning_rate(self.config, step - 1), **means}
        record |= {"skipped": skipped} if skipped else {}
        self.steps_before, self.last_interval = step, now
        if self.main:
            self.run.log(record | ({"partial": True} if partial else {}))
            self._show(step, means, rate, skipped)
        if self.config.log_with:
            self.accelerator.log({k: v for k, v in record.items() if k != "step"}, step=step)

    def _show(self, step: int, means: dict[str, float], rate: float, skipped: int) -> None:
        self.shown = {k: f"{v:.4g}" for k, v in means.items() if not k.startswith("loss_time")}
        self.shown |= {"skipped": str(skipped)} if skipped else {}
        self.bar.set_postfix(self.shown)
        if self.bar.disable and step == self.config.steps:
            self._line(step, rate)

    def tick(self, step: int) -> None:
        """Step `step` is done; a plain line if the last one is 30 s old and there is no bar."""
        self.bar.update()
        since = time.monotonic() - self.last_line
        if self.main and self.bar.disable and since >= LINE_SECONDS:
            self._line(step, (step - self.first) * self.config.batch_size / (time.monotonic() - self.started))

    def _line(self, step: int, rate: float) -> None:
        self.last_line = time.monotonic()
        eta = (self.last_line - self.started) / max(step - self.first, 1) * (self.config.steps - step)
        words = " ".join(f"{k} {v}" for k, v in self.shown.items())
        self.run.say(f"{self.run.kind} step {step}/{self.config.steps} {words} {rate:.0f} images/s eta {eta:.0f} s")

    def close(self) -> None:
        """End the bar and the trackers."""
        self.bar.close()
        if self.config.log_with:
            self.accelerator.end_training()


def _scalars(config: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """A flat configuration as trackers take it."""
    pairs = flat(config)
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in pairs.items()}


def words_of(losses: list[float]) -> str:
    """Losses for a message."""
    return ", ".join("nan" if math.isnan(loss) else f"{loss:.4g}" for loss in losses)
