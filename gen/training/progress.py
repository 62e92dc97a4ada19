"""Progress of a training: means per interval, a progress bar or plain lines, metrics.jsonl, trackers."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.core.runs import Run
from midway.gen.progress.bar import Progress
from midway.gen.progress.trackers import Trackers
from midway.gen.training.config import TrainConfig, flat, learning_rate
from midway.gen.training.interface import Preview

WAITING_LOGS = 64


class Averages:
    """Logged values on the device; read, averaged and reduced over processes, once per interval.

    A log is a scalar, averaged over the interval, or a pair (sum, count), added up over interval and processes before dividing,
    or several pairs (n, 2), which are named with their numbers: loss_time_0, loss_time_1, ...

    Values are collected and put into tables many steps at a time, which saves arithmetic on small tensors in every step.
    """

    def __init__(self) -> None:
        self.tables: dict[tuple[str, ...], Tensor] = {}  # names -> (logs, n, 2) of sum and count
        self._waiting: list[tuple[dict[str, Tensor], float, Tensor]] = []  # log, its weight, whether its step counts

    def add(self, logs: list[dict[str, Tensor]], step_ok: Tensor, processes: int = 1) -> None:
        """The logs of a step's micro-batches, which must not change later; nothing when the 0-dim bool `step_ok` is false.

        A scalar weighs as its share of the step, so that all steps weigh the same however they are divided.
        """
        weight = 1 / (len(logs) * processes)
        self._waiting += [({name: value.detach() for name, value in log.items()}, weight, step_ok) for log in logs]
        if len(self._waiting) >= WAITING_LOGS:
            self._fill()

    def _fill(self) -> None:
        """Put collected logs into the tables, which do not depend on when this is done."""
        groups: dict[tuple[str, ...], list[tuple[dict[str, Tensor], float, Tensor]]] = {}
        for entry in self._waiting:
            groups.setdefault(_names(entry[0]), []).append(entry)
        self._waiting = []
        for names, entries in groups.items():
            logs, weights, kept = zip(*entries)
            table = torch.where(torch.stack(kept)[:, None, None], _table(logs, weights), 0)
            self.tables[names] = torch.cat([self.tables[names], table]) if names in self.tables else table

    def read(self, accelerator: Accelerator) -> dict[str, float]:
        """Means of everything added since the last `clear`; empty buckets are left out."""
        self._fill()
        if not self.tables:
            return {}
        sums = [table.sum(0) for table in self.tables.values()]
        total = cast(Tensor, accelerator.reduce(torch.cat(sums), "sum")).tolist()
        names = [name for group in self.tables for name in group]
        both: dict[str, tuple[float, float]] = {}
        for name, (value, count) in zip(names, total, strict=True):
            so_far = both.get(name, (0.0, 0.0))
            both[name] = (so_far[0] + value, so_far[1] + count)
        return {name: value / count for name, (value, count) in both.items() if count}

    def clear(self) -> None:
        """Begin a new interval."""
        self.tables, self._waiting = {}, []

    def state(self, accelerator: Accelerator) -> dict[str, Tensor]:
        """The open interval: per group of names, joined by spaces, (processes, logs, n, 2)."""
        self._fill()
        return {
            " ".join(names): cast(Tensor, accelerator.gather(table[None])).cpu() for names, table in self.tables.items()
        }

    def load(self, state: dict[str, Tensor], accelerator: Accelerator) -> None:
        """Continue an open interval; with another number of processes the first one takes all sums. ValueError for others."""
        mine, several = accelerator.process_index, accelerator.num_processes
        self.clear()
        for names, shares in state.items():
            if shares.dtype != torch.float32 or shares.dim() != 4 or shares.shape[2:] != (len(names.split(" ")), 2):
                raise ValueError(
                    f"the sums of {names} are {shares.dtype} {tuple(shares.shape)}, not (processes, logs, n, 2)"
                )
            together = shares.flatten(0, 1) if mine == 0 else torch.zeros_like(shares.flatten(0, 1))
            table = shares[mine] if len(shares) == several else together
            self.tables[tuple(names.split(" "))] = table.to(accelerator.device)


def _names(log: dict[str, Tensor]) -> tuple[str, ...]:
    """One name for each row of a log's table: the scalars, then the pairs."""
    pairs = [name for key, value in log.items() if value.dim() for name in _numbered(key, value)]
    return (*(key for key, value in log.items() if not value.dim()), *pairs)


def _table(logs: Sequence[dict[str, Tensor]], weights: Sequence[float]) -> Tensor:
    """float32 (logs, n, 2) of logs with the same names."""
    single = [[value.float() for value in log.values() if not value.dim()] for log in logs]
    pairs = [[value.float().view(-1, 2) for value in log.values() if value.dim()] for log in logs]
    parts = [torch.stack([torch.cat(values) for values in pairs])] if pairs[0] else []
    if single[0]:
        values = torch.stack([value for log in single for value in log]).view(len(logs), -1)
        weight = torch.tensor(weights, dtype=values.dtype, device=values.device)[:, None]
        parts.insert(0, torch.stack([weight * values, weight.expand_as(values)], dim=2))
    return torch.cat(parts, dim=1)


def _numbered(name: str, value: Tensor) -> list[str]:
    return [name] if value.dim() == 1 else [f"{name}_{i}" for i in range(len(value))]


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


class PreviewTimer:
    """When previews are due by time: every `preview_seconds`, or after 50 times what the last took, or 2 % of the time so far.

    A preview writes a picture and changes nothing that is learned, so that its time is of no consequence for a run.
    """

    def __init__(self, config: TrainConfig, clock: Clock) -> None:
        self.config, self.clock = config, clock
        self._last = self._cost = 0.0

    def is_due(self) -> bool:
        """True once for every preview."""
        least = self.config.preview_seconds
        wait = max(least, 50 * self._cost, 0.02 * self.clock.total)
        due = not self.config.preview_every and least > 0 and self.clock.here - self._last >= wait
        self._last = self.clock.here if due else self._last
        return due

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Around a preview, whatever the reason for it."""
        before = self.clock.here
        yield
        self._last = self.clock.here
        self._cost = self._last - before


class Reporter:
    """A progress bar on a terminal, else plain lines; metrics.jsonl and trackers always. Only the main process reports."""

    def __init__(self, config: TrainConfig, run: Run, accelerator: Accelerator, step: int) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.main = accelerator.is_main_process
        self.steps_before = step
        self.shown: dict[str, str] = {}
        self.progress = Progress(
            run.kind, config.steps, "steps", step, self.main, write=run.say, text=self._line, clock=time.monotonic
        ).__enter__()
        self.last_interval = time.monotonic()
        names = accelerator.log_with if self.main and config.log_with else ()
        self.trackers = Trackers(names, run.path, _scalars(run.config), run.say)

    def back_to(self, step: int) -> None:
        """The run was reset to an earlier step."""
        self.steps_before, self.last_interval = step, time.monotonic()
        self.progress.back_to(step)

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
            self.shown = {k: f"{v:.4g}" for k, v in means.items() if not k.startswith("loss_time")}
            self.shown |= {"skipped": str(skipped)} if skipped else {}
            self.progress.at(", ".join(f"{k}={v}" for k, v in self.shown.items()))
        self.trackers.log({k: v for k, v in record.items() if k != "step"}, step)

    def validated(self, step: int, value: float) -> None:
        """A validation."""
        if self.main:
            self.run.log({"step": step, "validation": value})
        self.measured(step, {"validation": value})

    def measured(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures of held-out images or of samples, which are logged elsewhere, for trackers; they take those that are finite."""
        self.trackers.log({name: value for name, value in figures.items() if math.isfinite(value)}, step)

    def pictured(self, step: int, preview: Preview | None) -> None:
        """A preview and its figures, for trackers."""
        if preview is not None:
            self.measured(step, preview.figures)
            self.trackers.picture(preview.title, preview.path, step)

    def tick(self, step: int) -> None:
        """Step `step` is done; a plain line if one is due and there is no bar, and at the end."""
        if step == self.config.steps and self.main and not self.progress.has_bar:
            self.progress.done = step
            self.progress.line()
        else:
            self.progress.advance(step - self.progress.done)

    def _line(self) -> str:
        made, config = self.progress.done - self.progress.before, self.config
        words = " ".join(f"{k} {v}" for k, v in self.shown.items())
        rate = f"{made * config.batch_size / max(self.progress.elapsed, 1e-9):.0f} images/s"
        parts = (f"{self.run.kind} step {self.progress.done}/{config.steps}", words, rate if made else "")
        return " ".join(part for part in (*parts, self.progress.eta) if part)

    def close(self) -> None:
        """End the bar and the trackers."""
        self.progress.close()
        self.trackers.close()


def _scalars(config: dict[str, Any]) -> dict[str, int | float | str | bool]:
    """A flat configuration with the types that trackers support."""
    pairs = flat(config)
    return {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in pairs.items()}


def words_of(losses: list[float]) -> str:
    """Losses for a message."""
    return ", ".join("nan" if math.isnan(loss) else f"{loss:.4g}" for loss in losses)
