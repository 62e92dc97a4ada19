"""Saving, resuming and resetting a training: collective calls around gen/core/checkpoints.py."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.core import checkpoints
from midway.gen.core.checkpoints import Checkpoint
from midway.gen.core.config import read_as
from midway.gen.core.errors import DataError, DivergedError, UsageError
from midway.gen.core.files import clear_temporaries
from midway.gen.core.processes import at_work, raised_by_all
from midway.gen.core.runs import Run
from midway.gen.training.config import TrainConfig, check_resumable, flat
from midway.gen.training.early_stopping import MANY, keep_only
from midway.gen.training.progress import Clock, words_of
from midway.gen.training.state import MISFIT, Files, TrainingState, config_hash, not_finite, size_of, write_files

Export = Callable[[Path, dict[str, Tensor]], None]


@dataclass(frozen=True)
class SavedState:
    """state.json: where a training was."""

    step: int
    steps: int
    seconds: float
    rolled_back: bool
    processes: int
    config: dict[str, Any]
    stateless: tuple[str, ...] | None = field(default=(), metadata={"absent": None})
    """Parameters without a state of their optimizer; None in files of earlier versions, which do not list them."""
    finished: bool | None = field(default=None, metadata={"absent": None})
    """Whether the training ended here, at its last step or early; None in files of earlier versions."""

    def __post_init__(self) -> None:
        if not (0 <= self.step <= self.steps and 0 <= self.seconds < math.inf and self.processes >= 1):
            raise ValueError(f"step {self.step} of {self.steps}, {self.seconds} s, {self.processes} processes")


def read_state(checkpoint: Checkpoint) -> SavedState:
    """DataError for a state.json of other keys or types, or of another step."""
    file = checkpoint.path / "state.json"
    state = read_as(SavedState, file, MISFIT)
    if state.step != checkpoint.step:
        raise DataError(f"{file} cannot be used", f"it is of step {state.step}", MISFIT)
    return state


class CheckpointManager:
    """The checkpoints of one run. Every process calls every method; only the main process reads and writes."""

    def __init__(
        self, run: Run, config: TrainConfig, state: TrainingState, fingerprint: str, export: Export | None
    ) -> None:
        self.run, self.config, self.state, self.export = run, config, state, export
        self.accelerator: Accelerator = state.accelerator
        self.identity: dict[str, Any] = {**flat(run.config), "data fingerprint": fingerprint}
        self.clock = Clock()
        self.rolled_back = False
        self._saved_at, self._saved_seconds = -1, 0.0
        self._saved_best = -1

    @property
    def is_due(self) -> bool:
        """Whether `save_seconds` have passed since the last checkpoint, by the clock of this process."""
        return 0 < self.config.save_seconds <= self.clock.here - self._saved_seconds

    # ---- resuming ----

    def resume(self) -> int:
        """Restore the newest valid checkpoint and remove what later steps left; its step, or 0.

        UsageError when the run was started with another configuration; the run is not changed then.
        """
        found = self._newest()
        rounding = [] if found is None else self._compare(found)
        step = 0 if found is None else found.step
        if found is not None:
            self._take_over(found)
        with raised_by_all():
            if self.accelerator.is_main_process:
                self._tidy(step, found is not None)
                if rounding:
                    self.run.say(
                        f"note: {', '.join(rounding)} changed, so that last digits may differ from an unbroken run"
                    )
        return step

    def _tidy(self, step: int, found: bool) -> None:
        """Leave the run directory as if nothing had been done after this step."""
        root = self.run.checkpoints
        checkpoints.set_aside(root, step if found else -1)
        if found:
            checkpoints.prune(root, self.config.keep, root / f"step-{step}")
            checkpoints.point_to(root, step)
        keep_only(self.run.best, self._saved_best)
        self.run.tidy()
        self.run.forget_after(step)
        self.run.write_config()

    def _newest(self) -> Checkpoint | None:
        """The newest valid checkpoint, as the main process sees it."""
        main = self.accelerator.is_main_process
        if main:
            clear_temporaries(self.run.checkpoints)
        found = next(checkpoints.valid(self.run.checkpoints, self.run.say), None) if main else None
        mine = torch.tensor(0 if found is None else found.step + 1, device=self.accelerator.device)
        step = int(cast(Tensor, self.accelerator.reduce(mine, "sum"))) - 1
        return None if step < 0 else Checkpoint(self.run.checkpoints / f"step-{step}", step)

    def _compare(self, found: Checkpoint) -> list[str]:
        """Settings that change the result by rounding only; UsageError for any other change."""
        before = read_state(found)
        rounding = check_resumable(before.config, self.identity, self.config)
        if found.step > self.config.steps:
            raise UsageError(
                f"--steps {self.config.steps} is less than was done",
                f"the run is at step {found.step}",
                "give at least that many, or start a new run with another --out",
            )
        return rounding + (["processes"] if before.processes != self.accelerator.num_processes else [])

    def _take_over(self, found: Checkpoint) -> None:
        state = read_state(found)
        self.state.restore(found, state.stateless)
        self.clock.before, self.rolled_back = state.seconds, state.rolled_back
        self._saved_at, self._saved_best = found.step, self.state.validation.step

    # ---- resetting ----

    def go_back(self, step: int) -> int:
        """Restore the last checkpoint after too many bad steps; its step. DivergedError the second time."""
        losses = words_of(self.state.guard.losses())
        found = None if self.rolled_back else self._newest()
        if found is None:
            raise self._diverged(step, losses)
        if self.accelerator.is_main_process:
            self.run.say(
                f"step {step}: {self.config.patience} bad steps in a row ({losses}); back to step {found.step}"
            )
            self.run.forget_after(found.step)
        seconds = self.clock.total
        self._take_over(found)
        if self.accelerator.is_main_process:
            keep_only(self.run.best, self._saved_best)
        self.clock.before, self.rolled_back = seconds - self.clock.here, True
        return found.step

    def _diverged(self, step: int, losses: str) -> DivergedError:
        reason = "it was reset once already" if self.rolled_back else "there is no checkpoint to return to"
        return DivergedError(
            f"training diverged by step {step}",
            f"loss or gradient was not finite in {self.config.patience} steps in a row, and {reason}; "
            f"the last losses were {losses}",
            "lower --lr, raise --warmup, or train with --precision no",
        )

    # ---- saving ----

    def save(self, step: int) -> None:
        """Write a checkpoint, unless this step has one. All processes fail if the main one does.

        DivergedError rather than a checkpoint with numbers that are not finite; DiskError.
        """
        if step == self._saved_at:
            return
        files = self.state.capture()
        learned = step < self.config.steps or step == 0 or self.state.guard.skipped < step
        bad = not_finite(files) if learned else ["every loss so far"]
        if bad:
            why = f"not finite: {', '.join(bad[:5])}"
            raise DivergedError(f"step {step} cannot be saved", why, "lower --lr, raise --warmup, or check the data")
        self._write(self.run.checkpoints, step, files, self.config.keep, self._facts(step), {})
        self._saved_at, self._saved_seconds = step, self.clock.here
        self._saved_best = self.state.validation.step
        if self.accelerator.is_main_process:
            keep_only(self.run.best, self._saved_best)

    def save_best(self, step: int) -> None:
        """Write the averaged weights and the exports to best/. All processes fail if the main one does. DiskError."""
        files, header = self.state.averaged(), {"validation": self.state.validation.value}
        self._write(self.run.best, step, files, MANY, None, header)
        if self.accelerator.is_main_process:
            keep_only(self.run.best, self._saved_best, step)

    def _write(
        self, root: Path, step: int, files: Files, keep: int, state: dict[str, Any] | None, header: dict[str, Any]
    ) -> None:
        """Write a checkpoint below `root` on the main process; an error there is raised on all."""

        def write(folder: Path) -> None:
            write_files(folder, files, state)
            if self.export is not None:
                self.export(folder, files.get("ema.safetensors") or files["model.safetensors"])

        with raised_by_all(), at_work("saving"):
            if self.accelerator.is_main_process:
                header = {"config_hash": config_hash(self.identity), **header}
                checkpoints.save(root, step, write, keep, int(1.2 * size_of(files)), header)

    def _facts(self, step: int) -> dict[str, Any]:
        """state.json of the checkpoint of `step`."""
        return {
            "step": step,
            "steps": self.config.steps,
            "seconds": round(self.clock.total, 3),
            "rolled_back": self.rolled_back,
            "processes": self.accelerator.num_processes,
            "config": self.identity,
            "stateless": self.state.stateless,
            "finished": step == self.config.steps or self.state.validation.is_over,
        }
