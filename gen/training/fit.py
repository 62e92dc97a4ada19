"""fit(): the one training loop, under Accelerate, for everything that learns.

Step s takes the samples at global positions s B .. (s + 1) B - 1 of an endless stream: the permutations of epochs 0, 1, 2, ...
laid end to end. Its noise, times, flips and dropped labels are functions of (seed, s, global position). Hence training on any
number of processes, or with any accumulation, uses the same samples with the same noise, and a run resumed from a checkpoint
equals the uninterrupted run bit for bit. Batches are read ahead by threads (loading.py), which changes none of that.

A step whose loss or gradient is not finite changes nothing. After `patience` of them in a row the run is reset to its last
checkpoint, once; the second time it raises DivergedError. Every process calls every collective in every step.

Validation runs before checkpointing, so the checkpoint includes its result.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from midway.gen.core.errors import UsageError
from midway.gen.core.processes import at_work, raised_by_all
from midway.gen.core.runs import Run
from midway.gen.core.signals import Interrupted, Interrupts, stop_note
from midway.gen.progress.bar import duration
from midway.gen.progress.memory import peak_memory
from midway.gen.training.accelerator import check_sharding, check_unused, explaining_memory
from midway.gen.training.batches import Context, seed_global
from midway.gen.training.checkpointing import CheckpointManager
from midway.gen.training.config import TrainConfig, learning_rate
from midway.gen.training.early_stopping import Validation
from midway.gen.training.ema import EMA
from midway.gen.training.interface import FitResult, Hooks, Items, Startable, Trainable
from midway.gen.training.loading import Loader, batches_like
from midway.gen.training.nonfinite import NonFiniteGuard, StopFlags
from midway.gen.training.optim import (
    checkpoint_activations,
    clip,
    compile_networks,
    make_optimizers,
    parameter_groups,
    set_rate,
    step_if,
)
from midway.gen.training.power_ema import PowerAverage, save_snapshot
from midway.gen.training.progress import Averages, PreviewTimer, Reporter
from midway.gen.training.starting import Routed, start
from midway.gen.training.state import TrainingState, posthoc_file

Shown = TypeVar("Shown")


def fit(
    model: nn.Module,
    items: Items,
    config: TrainConfig,
    run: Run,
    accelerator: Accelerator,
    hooks: Hooks | None = None,
    resume: bool = False,
) -> FitResult:
    """Train `model` in place, from the newest valid checkpoint of `run` if `resume` and there is one; the caller has its lock.

    Raises DivergedError when loss and gradients stop being finite, DiskError when a checkpoint cannot be written, UsageError
    when a resumed run was started with another configuration, Interrupted after a stop signal.
    """
    training = Training(model, items, config, run, accelerator, hooks or Hooks())
    with Interrupts() as interrupts, training.loader:
        return training.run_from(training.checkpointing.resume() if resume else 0, interrupts)


class Training:
    """One call of fit(), step by step."""

    def __init__(
        self, model: nn.Module, items: Items, config: TrainConfig, run: Run, accelerator: Accelerator, hooks: Hooks
    ) -> None:
        self.model, self.items, self.config, self.run = model, items, config, run
        self.accelerator, self.hooks = accelerator, hooks
        self.loader = Loader(items, config, accelerator, run.say if accelerator.is_main_process else None)
        model.to(accelerator.device).train()
        if config.gradient_checkpointing:
            checkpoint_activations(model)
        if config.compile:
            compile_networks(model)
        optimizers = make_optimizers(model, config, accelerator.device)
        check_sharding(model, accelerator)
        self.routed = Routed(model)
        self.wrapped, *prepared = accelerator.prepare(self.routed, *optimizers)
        # the wrapper searches for a package at every step
        self.optimizers = [getattr(o, "optimizer", o) for o in prepared]
        self.parameter_groups = parameter_groups(model)
        self.parameters = [p for group in self.parameter_groups for p in group]
        self.sharded = any(isinstance(p, DTensor) for p in self.parameters)
        if self.sharded and len(self.parameter_groups) > 1:
            raise UsageError(
                "FSDP cannot train a tokenizer with a discriminator",
                "the discriminator is evaluated with fixed parameters, which FSDP does not support",
                "use DDP (accelerate launch --multi_gpu), or --loss.adversary none",
            )
        check_unused(config, self.hooks.validate is not None, self.hooks.measure is not None, self.sharded)
        self.ema = EMA(model, config.ema) if config.ema else None
        self.posthoc = [PowerAverage(model, std) for std in config.posthoc]
        self.averages, self.guard = Averages(), NonFiniteGuard(accelerator)
        self.validation = Validation(config.patience_validations)
        self.state = TrainingState(
            model, self.optimizers, self.ema, self.posthoc, self.averages, self.guard, self.validation, accelerator
        )
        self.checkpointing = CheckpointManager(run, config, self.state, items.fingerprint, hooks.export)
        self.previews = PreviewTimer(config, self.checkpointing.clock)
        self.last: dict[str, float] = {}

    # ---- the loop ----

    def run_from(self, step: int, interrupts: Interrupts) -> FitResult:
        """Train from optimizer step `step`."""
        config, first = self.config, step
        self._announce(step)
        if step == 0:
            self.start()
        report = Reporter(config, self.run, self.accelerator, step)
        while step < config.steps and not self.validation.is_over:
            self.take(step, self._stop_flags(interrupts))
            step += 1
            decision = self.guard.read()
            if decision.streak >= config.patience:
                step = self.checkpointing.go_back(step)
                report.back_to(step)
                continue
            stop = decision.stop_flags.stop or decision.stop_flags.late or step - first == config.max_steps
            if step == config.steps or _due(config.validate_every, step):
                self._validate(step, report)
            done = step == config.steps or self.validation.is_over
            if _due(config.measure_every, step) or (done and config.measure_every):
                report.measured(step, self._show(self.hooks.measure, step) or {})
            self._log(step, report, stop, done)
            due = decision.stop_flags.save or _due(config.save_every, step)
            if done or stop or (due and not self.guard.streak):  # a reset goes to the step before a streak
                self.checkpointing.save(step)
            report.tick(step)
            if decision.stop_flags.stop:  # the sender of the signal may not wait for previews
                report.close()
                raise Interrupted(interrupts.number or 15, step, self.run.checkpoints / f"step-{step}")
            wanted = _due(config.preview_every, step) if config.preview_every else decision.stop_flags.preview
            if wanted or done or stop:
                with self.previews.timed():
                    report.pictured(step, self._show(self.hooks.preview, step))
            if stop:
                break
        if step == config.steps:  # also when there are no steps
            self.checkpointing.save(step)
        report.close()
        return self._result(step)

    def take(self, step: int, stop_flags: StopFlags) -> None:
        """One optimizer step; MidwayError with the --accumulation that fits if memory runs out."""
        with explaining_memory(self.config, self.accelerator, self.model, self._batches):
            self._step(step, stop_flags)

    def _step(self, step: int, stop_flags: StopFlags) -> None:
        """One optimizer step, and whatever follows each of them."""
        set_rate(self.optimizers, learning_rate(self.config, step))
        losses, logs = zip(*(self._micro(step, i) for i in range(self.config.accumulation)))
        norms = [clip(group, self.config.clip, self.accelerator) for group in self.parameter_groups]
        norm = norms[0] if len(norms) == 1 else norms[0] + norms[1]
        step_ok = self.guard.judge(losses[0] if len(losses) == 1 else torch.stack(losses).mean(), norm, stop_flags)
        step_if(step_ok, self.optimizers)
        for parameter in self.parameters:
            parameter.grad = None
        cast(Trainable, self.model).after_step(step_ok)
        measured = dict(zip(("gradient_norm", "critic_gradient_norm"), norms))
        self.averages.add([{**log, **measured} for log in logs], step_ok, self.accelerator.num_processes)
        for average in (self.ema, *self.posthoc):
            if average is not None:
                average.update(self.model, step)

    def _micro(self, step: int, micro: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradients of one micro-batch of this process; its loss and logs."""
        accelerator, config = self.accelerator, self.config
        start = self.loader.position(step, micro)
        seed_global(config.seed, start, accelerator.device)
        context = Context(config.seed, step, torch.arange(start, start + self.loader.share, device=accelerator.device))
        is_last = micro == config.accumulation - 1
        with nullcontext() if is_last else accelerator.no_sync(self.wrapped):
            loss, logs = self.wrapped(self.loader(step, micro, context), context)
            (loss / config.accumulation).backward()
        return loss.detach(), {"loss": loss.detach(), **logs}

    def _batches(self) -> Callable[[int], Any]:
        return batches_like(self.items, self.accelerator.device)

    def start(self) -> None:
        """Let the model initialise from data; averages begin there."""
        if isinstance(self.model, Startable):
            start(self.wrapped, self.routed, self.items, self.loader.order, self.config.batch_size)
            for average in (self.ema, *self.posthoc):
                if average is not None:
                    average.load(self.model.state_dict())

    def _stop_flags(self, interrupts: Interrupts) -> StopFlags:
        limit = self.config.max_seconds
        late = limit is not None and self.checkpointing.clock.here >= limit
        preview = self.accelerator.is_main_process and self.previews.is_due()
        return StopFlags(bool(interrupts.number), late, self.checkpointing.is_due, preview)

    def _log(self, step: int, report: Reporter, stop: bool, done: bool) -> None:
        """Log the interval if it is over and store snapshots if due; the checkpoint of this step assumes both."""
        config = self.config
        full = step % config.log_every == 0 or done
        if full or stop:
            self.last = self.averages.read(self.accelerator)
            report.interval(step, self.checkpointing.clock.total, self.last, self.guard.skipped, partial=not full)
        if full:
            self.averages.clear()
        if self.posthoc and (_due(config.posthoc_every, step) or done):
            self._snapshot(step)

    def _show(self, hook: Callable[[int], Shown] | None, step: int) -> Shown | None:
        """Call the hook on the main process with the averaged weights in the model (not if the model is sharded)."""
        if hook is None or self.sharded:
            return None
        with raised_by_all(), self._averaged(), at_work("previews"):
            return hook(step) if self.accelerator.is_main_process else None

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Within the block the model is in eval mode and holds the averaged weights."""
        self.model.eval()
        with self.ema.applied(self.model) if self.ema is not None else nullcontext(), torch.no_grad():
            yield
        self.model.train()

    def _validate(self, step: int, report: Reporter) -> None:
        """Validate on the main process, share the value, and store the weights if it is the best."""
        validate = self.hooks.validate
        if validate is None or not self.config.validate_every:
            return
        with raised_by_all(), self._averaged(), at_work("validation"):
            value = validate(step) if self.accelerator.is_main_process else 0.0
        if self.accelerator.num_processes > 1:
            mine = torch.tensor(value, dtype=torch.float64, device=self.accelerator.device)
            value = float(cast(Tensor, self.accelerator.reduce(mine, "sum")))
        report.validated(step, value)
        if self.validation.judge(step, value):
            self.checkpointing.save_best(step)

    def _snapshot(self, step: int) -> None:
        files = self.state.capture()  # a collective when the model is sharded
        if self.accelerator.is_main_process:
            for average in self.posthoc:
                shadow = files[posthoc_file(average)]
                save_snapshot(self.run.path / "posthoc", step, average.std, shadow)

    def _result(self, step: int) -> FitResult:
        stop_note(f"step {step} is saved in {self.run.path}; the same command with --resume auto goes on")
        finished = step == self.config.steps or self.validation.is_over
        skipped = self.guard.skipped
        if self.accelerator.is_main_process:
            peak = peak_memory()
            self.run.note(peak.facts, again=True)
            self.run.say(f"{step} steps in {duration(self.checkpointing.clock.total)}; {peak}")
        if skipped and self.accelerator.is_main_process:
            self.run.say(f"{skipped} of {step} steps were skipped: their loss or gradient was not finite")
        if not finished and self.accelerator.is_main_process:
            self.run.say(f"stopped at step {step} of {self.config.steps}; --resume auto continues")
        if step < self.config.steps and finished and self.accelerator.is_main_process:
            best, count = self.validation.best, self.validation.since
            known = "none was finite" if best is None else f"the best is {best[1]:.6g}, at step {best[0]}"
            self.run.say(f"stopped early at step {step}: {count} validations without a better one; {known}")
        return FitResult(step, self.checkpointing.clock.total, self.ema, self.last, finished, self.validation.best)

    def _announce(self, step: int) -> None:
        """The first line in the log, and the entry in env.json."""
        config, accelerator = self.config, self.accelerator
        if not accelerator.is_main_process:
            return
        facts = {
            "step": step,
            "effective_batch": config.batch_size,
            "per_process_micro_batch": self.loader.share,
            "accumulation": config.accumulation,
            "processes": accelerator.num_processes,
            "device": accelerator.device.type,
            "precision": config.precision,
            "data_fingerprint": self.items.fingerprint,
            "items": self.items.size,
            "parameters": sum(p.numel() for p in self.parameters),
        }
        self.run.note(facts)
        begin = f"resuming from step {step}" if step else "training"
        parts = (
            f"{accelerator.num_processes} process(es) x {config.accumulation} micro-batch(es) of {self.loader.share}"
        )
        self.run.say(f"{begin} on {accelerator.device.type}: {config.batch_size} samples a step, {parts}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step % every == 0
