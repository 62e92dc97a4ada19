"""fit(): the one training loop, under Accelerate, for everything that learns.

Step s sees the samples at global positions s B .. (s + 1) B - 1 of an endless stream: the permutations of epochs 0, 1, 2, ...
laid end to end. Its noise, times, flips and dropped labels are functions of (seed, s, global position). Hence the same run on
any number of processes, or with any accumulation, sees the same samples with the same noise, and a run that goes on from a
checkpoint is the run that was never stopped, bit for bit.

A step whose loss or gradient is not finite changes nothing. After `patience` of them in a row the run goes back to its last
checkpoint, once; if that does not help it ends. Every collective is reached by every process in every step.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from midway.gen import checkpoint, randomness
from midway.gen.checkpoint import Checkpoint
from midway.gen.context import Context
from midway.gen.ema import EMA
from midway.gen.errors import DiskError, DivergedError, UsageError
from midway.gen.guard import Guard, Wishes
from midway.gen.interrupts import Interrupted, Interrupts
from midway.gen.optim import checkpoint_activations, compile_networks, make_optimizers, set_rate, step_if
from midway.gen.posthoc import PowerAverage, save_snapshot
from midway.gen.progress import Averages, Clock, Reporter, words_of
from midway.gen.runs import Run, lock
from midway.gen.train_config import TrainConfig, flat, learning_rate, refuse_changes
from midway.gen.training_state import TrainingState, config_hash, not_finite, posthoc_file, size_of, write_files

START_SAMPLES = 1024


class Trainable(Protocol):
    """What fit() asks of a model (an nn.Module)."""

    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, a mean over the batch, and logs (see progress.Averages) of the same names every time."""
        ...

    def after_step(self, kept: Tensor) -> None:
        """Between optimizer steps. When the 0-dim bool `kept` is false the step did not count and nothing may be learned."""
        ...


@runtime_checkable
class Startable(Protocol):
    """A model that initialises something from data."""

    def start(self, batch: Any, context: Context) -> None:
        """Called once, before the first step, with the first (at most 1024) samples of step 0, the same on all processes."""
        ...


@dataclass(frozen=True)
class Items:
    """A data set: `fetch` maps item indices int64 (b,) to a batch on the accelerator's device; `fingerprint` names its images."""

    fetch: Callable[[Tensor], Any]
    size: int
    fingerprint: str = ""


@dataclass(frozen=True)
class Hooks:
    """What a script adds, on the main process: `preview(step)`, called with the averaged weights in the model, and
    `export(folder, averaged)`, which puts files for other commands into every checkpoint."""

    preview: Callable[[int], None] | None = None
    export: Callable[[Path, dict[str, Tensor]], None] | None = None


@dataclass(frozen=True)
class FitResult:
    """Optimizer steps done, seconds of training, the average (None when `ema` is 0), the last interval's means, and whether
    all of `steps` are done."""

    steps: int
    seconds: float
    ema: EMA | None
    last: dict[str, float]
    finished: bool


def make_accelerator(config: TrainConfig, out: Path | None = None) -> Accelerator:
    """An Accelerator whose DDP leaves buffers alone: quantizers keep theirs equal themselves. Trackers write below `out`.

    Without a GPU several processes find each other only when told to use the CPU; else each would train alone.
    UsageError when the global batch cannot be shared equally, or a tracker is not installed.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks of cuBLAS
        torch.backends.cudnn.benchmark = False
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=several and not torch.cuda.is_available(),
            log_with=list(config.log_with) or None,
            project_dir=out,
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        )
    except (ValueError, ImportError) as error:
        raise UsageError("the accelerator cannot be set up", str(error), "change --log-with or --precision") from None
    missing = set(config.log_with) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
    if missing:
        names = ", ".join(sorted(missing))
        raise UsageError(f"--log-with {names}", "it is not installed", f"pip install {names}, or drop the flag")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError(
            "FSDP 1 is not supported", "its flattened parameters have no names", "set fsdp_version: 2 in its config"
        )
    _share(config, accelerator)
    return accelerator


def fit(
    model: nn.Module,
    items: Items,
    config: TrainConfig,
    run: Run,
    accelerator: Accelerator,
    hooks: Hooks | None = None,
    resume: bool = False,
) -> FitResult:
    """Train `model` in place, from the newest valid checkpoint of `run` if `resume` and there is one.

    Raises DivergedError when loss and gradients stop being finite, DiskError when a checkpoint cannot be written, UsageError
    when a resumed run was started with another configuration, Interrupted after SIGTERM or SIGINT.
    """
    training = _Training(model, items, config, run, accelerator, hooks or Hooks())
    with lock(run.path) if accelerator.is_main_process else nullcontext(), Interrupts() as interrupts:
        return training.run_from(training.resume() if resume else 0, interrupts)


class _Loss(nn.Module):
    """Routes `loss` through forward, where DDP and autocast act."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        return cast(Trainable, self.model).loss(batch, context)


@dataclass
class _Order:
    """Item indices of stream positions; keeps the permutations of the epochs in use."""

    size: int
    seed: int
    epochs: dict[int, Tensor] = field(default_factory=dict)

    def __call__(self, start: int, count: int) -> Tensor:
        """int64 (count,): the items at positions start .. start + count - 1."""
        epochs = range(start // self.size, (start + count - 1) // self.size + 1)
        self.epochs = {e: self.epochs[e] if e in self.epochs else self._permutation(e) for e in epochs}
        first = start - epochs[0] * self.size
        table = self.epochs[epochs[0]] if len(epochs) == 1 else torch.cat([self.epochs[e] for e in epochs])
        return table[first : first + count]

    def _permutation(self, epoch: int) -> Tensor:
        return randomness.permutation(self.seed, "order", epoch, self.size)


class _Training:
    """One call of fit()."""

    def __init__(
        self, model: nn.Module, items: Items, config: TrainConfig, run: Run, accelerator: Accelerator, hooks: Hooks
    ) -> None:
        self.model, self.items, self.config, self.run = model, items, config, run
        self.accelerator, self.hooks = accelerator, hooks
        self.share, self.order = _share(config, accelerator), _Order(items.size, config.seed)
        model.to(accelerator.device).train()
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        if config.compile:
            compile_networks(model)
        optimizers = make_optimizers(model, config, accelerator.device)
        self.wrapped, *self.optimizers = accelerator.prepare(_Loss(model), *optimizers)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.sharded = any(isinstance(p, DTensor) for p in self.parameters)
        self.ema = EMA(model, config.ema) if config.ema else None
        self.posthoc = [PowerAverage(model, std) for std in config.posthoc]
        self.averages, self.guard, self.clock = Averages(), Guard(accelerator), Clock()
        inner = [getattr(o, "optimizer", o) for o in self.optimizers]
        self.state = TrainingState(model, inner, self.ema, self.posthoc, self.averages, self.guard, accelerator)
        self.identity = {**flat(run.config), "data fingerprint": items.fingerprint}
        self.rolled_back, self.saved_at, self.saved_seconds = False, -1, 0.0
        self.last: dict[str, float] = {}

    # ---- the loop ----

    def run_from(self, step: int, interrupts: Interrupts) -> FitResult:
        """Train from optimizer step `step`."""
        config, first = self.config, step
        self._announce(step)
        if step == 0:
            self._start()
        report = Reporter(config, self.run, self.accelerator, step)
        while step < config.steps:
            self._step(step, self._wishes(interrupts))
            step += 1
            verdict = self.guard.read()
            if verdict.streak >= config.patience:
                step = self._go_back(step, report)
                continue
            stop = verdict.wishes.stop or verdict.wishes.late or step - first == config.max_steps
            done = step == config.steps
            self._say(step, report, stop)
            if done or stop or verdict.wishes.save or _due(config.save_every, step):
                self._save(step)
            report.tick(step)
            if verdict.wishes.stop:
                report.close()
                raise Interrupted(interrupts.number or 15, step, self.run.checkpoints / f"step-{step}")
            if stop:
                break
        report.close()
        return self._result(step)

    def _step(self, step: int, wishes: Wishes) -> None:
        """One optimizer step, and whatever follows each of them."""
        set_rate(self.state.optimizers, learning_rate(self.config, step))
        losses, logs = zip(*(self._micro(step, i) for i in range(self.config.accumulation)))
        norm = self._clip()
        kept = self.guard.judge(losses[0] if len(losses) == 1 else torch.stack(losses).mean(), norm, wishes)
        step_if(kept, self.optimizers)
        for parameter in self.parameters:
            parameter.grad = None
        cast(Trainable, self.model).after_step(kept)
        self.averages.add([{**log, "gradient_norm": norm} for log in logs], kept)
        for average in (self.ema, *self.posthoc):
            if average is not None:
                average.update(self.model, step)

    def _clip(self) -> Tensor:
        """Limit the norm of all gradients; the norm before."""
        if not self.sharded:
            return torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.config.clip)  # pyright: ignore[reportArgumentType]
        return norm.full_tensor() if isinstance(norm, DTensor) else cast(Tensor, norm)

    def _micro(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of one micro-batch of this process; its loss and logs."""
        accelerator, config = self.accelerator, self.config
        start = step * config.batch_size + (micro * accelerator.num_processes + accelerator.process_index) * self.share
        _seed_global(config.seed, start, accelerator.device)
        context = Context(config.seed, step, torch.arange(start, start + self.share, device=accelerator.device))
        is_last = micro == config.accumulation - 1
        with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
            loss, logs = self.wrapped(self.items.fetch(self.order(start, self.share)), context)
            accelerator.backward(loss / config.accumulation)
        return loss.detach(), {"loss": loss.detach(), **logs}

    def _start(self) -> None:
        """Let the model initialise from data, the same on all processes."""
        if isinstance(self.model, Startable):
            count = min(self.config.batch_size, START_SAMPLES)
            ids = torch.arange(count, device=self.accelerator.device)
            with torch.no_grad():
                self.model.start(self.items.fetch(self.order(0, count)), Context(self.config.seed, 0, ids))

    def _wishes(self, interrupts: Interrupts) -> Wishes:
        limit, every = self.config.max_seconds, self.config.save_seconds
        return Wishes(
            stop=bool(interrupts.number),
            late=limit is not None and self.clock.here >= limit,
            save=0 < every <= self.clock.here - self.saved_seconds,
        )

    def _say(self, step: int, report: Reporter, stop: bool) -> None:
        """Log an interval that is over or broken off; previews and snapshots that are due."""
        config, done = self.config, step == self.config.steps
        full = step % config.log_every == 0 or done
        if full or stop:
            self.last = self.averages.read(self.accelerator)
            report.interval(step, self.clock.total, self.last, self.guard.skipped, partial=not full)
        if full:
            self.averages.clear()
        if (_due(config.preview_every, step) or done or stop) and self.hooks.preview is not None:
            self._preview(step)
        if self.posthoc and (_due(config.posthoc_every, step) or done):
            self._snapshot(step)

    def _preview(self, step: int) -> None:
        """Call the preview on the main process with the averaged weights in the model (not if the model is sharded)."""
        preview = self.hooks.preview
        if preview is not None and not self.sharded:
            self.model.eval()
            with self.averaged_weights(), torch.no_grad():
                if self.accelerator.is_main_process:
                    preview(step)
            self.model.train()
        self.accelerator.wait_for_everyone()

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the model holds its averaged weights, if there are any."""
        with self.ema.applied(self.model) if self.ema is not None else nullcontext():
            yield

    def _snapshot(self, step: int) -> None:
        files = self.state.capture()  # a collective when the model is sharded
        if self.accelerator.is_main_process:
            for average in self.posthoc:
                shadow = files[posthoc_file(average)]
                save_snapshot(self.run.path / "posthoc", step, average.std, shadow)

    def _result(self, step: int) -> FitResult:
        finished = step == self.config.steps
        skipped = self.guard.skipped
        if skipped and self.accelerator.is_main_process:
            self.run.say(f"{skipped} of {step} steps were skipped: their loss or gradient was not finite")
        if not finished and self.accelerator.is_main_process:
            self.run.say(f"stopped at step {step} of {self.config.steps}; --resume auto goes on")
        return FitResult(step, self.clock.total, self.ema, self.last, finished)

    # ---- going on, going back ----

    def resume(self) -> int:
        """Take over the newest valid checkpoint and tidy up after the process that wrote it; its step, or 0."""
        run, main = self.run, self.accelerator.is_main_process
        found = self._newest()
        rounding = [] if found is None else self._check(found)
        step = 0 if found is None else found.step
        if main:
            checkpoint.clear_leftovers(run.checkpoints)
            checkpoint.set_aside(run.checkpoints, -1 if found is None else step)
            run.forget_after(step)
            run.write_config()
            if rounding:
                run.say(f"note: {', '.join(rounding)} changed, so that last digits may differ from an unbroken run")
        self.accelerator.wait_for_everyone()
        if found is not None:
            self._restore(found)
        return step

    def _newest(self) -> Checkpoint | None:
        """The newest valid checkpoint, as the main process sees it."""
        say = self.run.say
        found = checkpoint.newest_valid(self.run.checkpoints, say) if self.accelerator.is_main_process else None
        mine = torch.tensor(0 if found is None else found.step + 1, device=self.accelerator.device)
        step = int(cast(Tensor, self.accelerator.reduce(mine, "sum"))) - 1
        return None if step < 0 else Checkpoint(self.run.checkpoints / f"step-{step}", step)

    def _check(self, found: Checkpoint) -> list[str]:
        """What differs by rounding alone; UsageError for what makes it another run."""
        before = found.json("state.json")
        rounding = refuse_changes(before["config"], self.identity, self.config)
        return rounding + (["processes"] if before["processes"] != self.accelerator.num_processes else [])

    def _restore(self, found: Checkpoint) -> None:
        state = found.json("state.json")
        self.state.restore(found)
        self.clock.before, self.rolled_back = state["seconds"], state["rolled_back"]
        self.saved_at = found.step

    def _go_back(self, step: int, report: Reporter) -> int:
        """After too many bad steps: the step of the last checkpoint, taken over; DivergedError the second time."""
        losses = words_of(self.guard.losses())
        found = None if self.rolled_back else self._newest()
        if found is None:
            report.close()
            why = "it had gone back once already" if self.rolled_back else "there is no checkpoint to go back to"
            raise DivergedError(
                f"training diverged by step {step}",
                f"loss or gradient was not finite in {self.config.patience} steps in a row, and {why}; "
                f"the last losses were {losses}",
                "lower --lr, raise --warmup, or train with --precision no",
            )
        report.say(f"step {step}: {self.config.patience} bad steps in a row ({losses}); back to step {found.step}")
        seconds = self.clock.total
        self._restore(found)
        self.clock.before, self.rolled_back = seconds - self.clock.here, True
        if self.accelerator.is_main_process:
            self.run.forget_after(found.step)
        report.back_to(found.step)
        return found.step

    # ---- saving ----

    def _save(self, step: int) -> None:
        """Write a checkpoint, unless this step has one. Every process takes part, and all of them fail if the main one does."""
        if step == self.saved_at:
            return
        files = self.state.capture()
        bad = ["every loss so far"] if self.guard.skipped == step else not_finite(files)
        if bad:
            why = f"not finite: {', '.join(bad[:5])}"
            raise DivergedError(f"step {step} cannot be saved", why, "lower --lr, raise --warmup, or check the data")
        failure: DiskError | None = None
        if self.accelerator.is_main_process:
            try:
                self._write(step, files)
            except DiskError as error:
                failure = error
        failed = torch.tensor(float(failure is not None), device=self.accelerator.device)
        if cast(Tensor, self.accelerator.reduce(failed, "sum")).item():
            raise failure or DiskError(f"checkpoint step-{step} was not written", "see the main process", "free space")
        self.saved_at, self.saved_seconds = step, self.clock.here

    def _write(self, step: int, files: dict[str, dict[str, Tensor]]) -> None:
        state = {
            "step": step,
            "steps": self.config.steps,
            "seconds": round(self.clock.total, 3),
            "rolled_back": self.rolled_back,
            "processes": self.accelerator.num_processes,
            "config": self.identity,
        }
        averaged = files.get("ema.safetensors", files["model.safetensors"])

        def write(folder: Path) -> None:
            write_files(folder, files, state)
            if self.hooks.export is not None:
                self.hooks.export(folder, averaged)

        header = {"config_hash": config_hash(self.identity)}
        checkpoint.save(self.run.checkpoints, step, write, self.config.keep, int(1.2 * size_of(files)), header)

    def _announce(self, step: int) -> None:
        """The first line of a training, and what env.json says of it."""
        config, accelerator = self.config, self.accelerator
        if not accelerator.is_main_process:
            return
        facts = {
            "step": step,
            "effective_batch": config.batch_size,
            "per_process_micro_batch": self.share,
            "accumulation": config.accumulation,
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "precision": config.precision,
            "data_fingerprint": self.items.fingerprint,
            "items": self.items.size,
            "parameters": sum(p.numel() for p in self.parameters),
        }
        self.run.note(facts)
        begin = f"going on from step {step}" if step else "training"
        parts = f"{accelerator.num_processes} process(es) x {config.accumulation} micro-batch(es) of {self.share}"
        self.run.say(f"{begin} on {accelerator.device.type}: {config.batch_size} samples a step, {parts}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0


def _seed_global(seed: int, start: int, device: torch.device) -> None:
    """Fix torch's own generators, for modules that draw from them; ours never do."""
    word = randomness.integer(seed, "global", start)
    torch.default_generator.manual_seed(word)  # torch.manual_seed asks every kind of device, which takes 0.2 ms
    if device.type == "cuda":
        torch.cuda.manual_seed(word)


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
