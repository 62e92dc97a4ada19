"""What the tests of resuming share: tiny trainings, processes that can be killed, and what makes two runs the same."""

import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NoReturn

import torch
from multiprocess import together
from regression import records
from safetensors.torch import load_file
from torch import Tensor

from midway.gen.core import checkpoints, signals
from midway.gen.core.runs import Run
from midway.gen.data.splits import DataConfig
from midway.gen.flags.baseline_tasks import BaselineTask
from midway.gen.flags.cli import main
from midway.gen.flags.tasks import FinetuneTask, LatentTask, PriorTask, TokenizerConfig, TokenizerTask
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import (
    finetune,
    train_baseline,
    train_features,
    train_latent,
    train_prior,
    train_solver,
    train_tokenizer,
)

Task = (
    TokenizerTask
    | LatentTask
    | FinetuneTask
    | PriorTask
    | BaselineTask
    | train_features.FeaturesTask
    | train_solver.SolverTask
)

DATA = DataConfig(held_out=0.9)
"""180 training images: with batches of 32 an epoch ends in the middle of step 5."""
TRAIN = TrainConfig(
    steps=11, batch_size=32, lr=1e-2, warmup=2, weight_decay=0.01, ema=0.9, posthoc=(0.1,), posthoc_every=4, log_every=4
)
VQ = TokenizerConfig(quantizer="vq", width=8, blocks=1, codebook_size=128, dim=4, shortcut="principal")


def train(task: Task) -> Path:
    """What the script of this task does, in this process; the run directory."""
    if isinstance(task, TokenizerTask):
        runs = [train_tokenizer.train(task)]
    elif isinstance(task, LatentTask):
        runs = [train_latent.train(task)]
    elif isinstance(task, FinetuneTask):
        runs = [finetune.train(task)]
    elif isinstance(task, PriorTask):
        runs = [train_prior.train(task)]
    elif isinstance(task, BaselineTask):
        runs = [train_baseline.train(task)]
    elif isinstance(task, train_features.FeaturesTask):
        runs = [train_features.train(task)]
    else:
        runs = list[Run | None](train_solver.train(task))
    return next((run.path for run in runs if run is not None), Path())


# ---- what makes two runs the same ----


def newest(run: Path) -> Path:
    """The newest checkpoint directory, which must be a valid one."""
    return checkpoints.verify(checkpoints.directories(run / "checkpoints")[0]).path


def seal(checkpoint: Path) -> None:
    """Write a manifest that agrees with the files, as if they had been saved so."""
    (checkpoint / checkpoints.MANIFEST).unlink()
    checkpoints.write_manifest(checkpoint, int(checkpoint.name[5:]), {})
    checkpoints.verify(checkpoint)


def steps_of(run: Path) -> list[int]:
    """The steps of the checkpoints, newest first."""
    return [int(path.name[5:]) for path in checkpoints.directories(run / "checkpoints")]


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below `folder`, but for those that tell the time and the place."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return {name: sorted_bytes(p) for name, p in files.items() if p.name not in ("state.json", "manifest.json")}


def sorted_bytes(file: Path) -> bytes:
    """The bytes of a file; the header of a safetensors file, whose remarks stand in a random order, is sorted."""
    content = file.read_bytes()
    if file.suffix != ".safetensors":
        return content
    end = 8 + int.from_bytes(content[:8], "little")
    return json.dumps(json.loads(content[8:end]), sort_keys=True).encode() + content[end:]


def assert_same_run(run: Path, expected: Path) -> None:
    """Bit for bit: weights, buffers, averages, optimizer, counters, exports, snapshots, what was best; the same records."""
    assert newest(run).name == newest(expected).name
    for file in sorted(p.name for p in newest(expected).glob("*.safetensors")):
        assert_same_tensors(load_file(newest(run) / file), load_file(newest(expected) / file), file)
    assert_same_files(newest(run), newest(expected))
    assert_same_files(run / "posthoc", expected / "posthoc")
    assert_same_files(run / "best", expected / "best")
    assert records(run) == records(expected)


def assert_same_tensors(tensors: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    assert tensors.keys() == expected.keys(), where
    differ = [name for name in expected if not torch.equal(tensors[name].nan_to_num(), expected[name].nan_to_num())]
    assert not differ, f"{where}: {differ}"


def assert_same_files(folder: Path, expected: Path) -> None:
    """The names of those that differ are the message."""
    mine, theirs = contents(folder), contents(expected)
    assert [name for name in {**mine, **theirs} if mine.get(name) != theirs.get(name)] == []


def everything(folder: Path) -> dict[str, bytes | None]:
    """Every file and directory below `folder`, with its bytes; not the log, which may grow."""
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.name != "log.txt"}
    return {name: p.read_bytes() if p.is_file() else None for name, p in found.items()}


@contextmanager
def unchanged(run: Path) -> Iterator[None]:
    """The block changes nothing in the run directory; its log may only grow."""
    before, log = everything(run), run / "log.txt"
    logged = log.read_text() if log.exists() else ""
    yield
    after = everything(run)
    assert [name for name in {**before, **after} if before.get(name, "") != after.get(name, "")] == []
    assert not logged or log.read_text().startswith(logged)


# ---- other processes ----


@dataclass(frozen=True)
class Conditions:
    """Under what a training runs: bytes a file may have, seconds added to every step, a file that every step waits
    for, signals.REPEAT_AFTER."""

    file_limit: int | None = None
    pause: float = 0.0
    gate: Path | None = None
    repeat_after: float = signals.REPEAT_AFTER


@dataclass(frozen=True)
class Child:
    """A training in a process of its own; `output` is what it wrote on its terminal."""

    process: BaseProcess
    run: Path
    output: Path

    def finish(self, number: int | None = None, timeout: float = 60.0) -> int:
        """Send it a signal, if any, and wait for its end; the exit code, minus the number of a signal that ended it."""
        if number is not None and self.process.is_alive():
            assert self.process.pid is not None
            os.kill(self.process.pid, number)
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.output.read_text()[-3000:]}")
        return self.process.exitcode

    def wait_for(self, what: Callable[[], object], timeout: float = 60.0) -> None:
        """Until `what()` is true; an AssertionError if the process ends before."""
        end = time.monotonic() + timeout
        while not what():
            assert self.process.is_alive() and time.monotonic() < end, self.output.read_text()[-3000:]
            time.sleep(0.0005)


def start(task: TokenizerTask, conditions: Conditions | None = None) -> Child:
    """Train as the command does, in a process forked from one that has imported everything; returns when it begins."""
    output, begun = task.out.with_name(f"{task.out.name}.terminal"), task.out.with_name(f"{task.out.name}.begun")
    begun.unlink(missing_ok=True)
    output.touch()
    arguments = (task, conditions or Conditions(), str(output), str(begun))
    process = multiprocessing.get_context("forkserver").Process(target=_command, args=arguments, daemon=True)
    process.start()
    child = Child(process, task.out, output)
    child.wait_for(begun.exists)
    return child


def _command(task: TokenizerTask, conditions: Conditions, output: str, begun: str) -> NoReturn:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal, whatever started the tests
    with open(output, "a") as terminal:
        os.dup2(terminal.fileno(), 1)
        os.dup2(terminal.fileno(), 2)
    checkpoints.BACKOFF = ()
    signals.REPEAT_AFTER = conditions.repeat_after
    if conditions.file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (conditions.file_limit, resource.RLIM_INFINITY))
    if conditions.pause or conditions.gate:
        _slow_down(conditions.pause, conditions.gate)
    sys.argv = ["train_tokenizer.py"]
    Path(begun).touch()
    main(lambda _: train_tokenizer.train(task) and None)


def _slow_down(seconds: float, gate: Path | None) -> None:
    after_step = TokenizerObjective.after_step

    def slower(self: TokenizerObjective, step_ok: Tensor) -> None:
        time.sleep(seconds)
        while gate is not None and not gate.exists():
            time.sleep(0.01)
        after_step(self, step_ok)

    TokenizerObjective.after_step = slower


def train_together(task: Task) -> None:
    """Train in two gloo processes."""
    together(_train_share, 2, task)


def _train_share(_: int, task: Task) -> None:
    train(task)
