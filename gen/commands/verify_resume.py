"""Check on your own run that resuming from a checkpoint is exact: midway verify-resume runs/digits-dit

Steps are replayed from a checkpoint of the run, once in one go and once stopped halfway and resumed by new objects; every
tensor of the two ends must be equal bit for bit: weights, averages, optimizer, codebooks, the sums of the open log interval.
Losses that the run logged on the way must be equal too, and so must its next checkpoint, if it keeps one at most --steps
further on. The run itself is not touched, and may be in training.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator

from midway.gen.core import checkpoints
from midway.gen.core.checkpoints import Checkpoint
from midway.gen.core.config import from_file
from midway.gen.core.errors import DataError, DiskError, MidwayError, one_line, raising
from midway.gen.core.files import LOG_LIMIT, read_text, reading
from midway.gen.core.locks import made_empty
from midway.gen.core.processes import one_thread, raised_by_all
from midway.gen.core.ranges import EVENTS, check_flag_ranges
from midway.gen.core.runs import Run, kind_of
from midway.gen.data.places import DataPathFlag, images_at, moved_run, splits_of
from midway.gen.data.splits import Splits
from midway.gen.flags.cli import own_fields, resolve
from midway.gen.flags.tasks import FinetuneTask, LatentTask, PriorTask, TokenizerTask
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks
from midway.gen.trainings import (
    finetune,
    prior_parts,
    train_baseline,
    train_features,
    train_solver,
    train_tokenizer,
)

FILES = ("model", "ema", "optimizer", "progress")
TIMES = ("seconds", "images_per_second")
START, GOAL = "start", "goal"
"""Folders of the copies of two checkpoints."""


@dataclass(frozen=True)
class VerifyTask(DataPathFlag):
    """Replay steps from a checkpoint of a run, with and without a stop, and compare."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of a tokenizer, latent model, adapter, prior, baseline, feature network or learned solver."""
    steps: int = 20
    """Optimizer steps to replay, at least 2."""
    tokenizer: Path | None = None
    """Of a latent model or prior: where its tokenizer is, if it is neither where it was nor moved together with the run."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, steps=(2, EVENTS[1]))


@dataclass(frozen=True)
class Kind:
    """How a kind of run is rebuilt: the type of its task, by its configuration, and what is trained."""

    task: Callable[[dict[str, Any]], type]
    make_parts: Callable[[Any, Accelerator], Any]
    surroundings: Callable[[], AbstractContextManager[None]] = nullcontext
    """What the kind is trained within."""


KINDS = {
    "tokenizer": Kind(lambda _: TokenizerTask, train_tokenizer.make_parts),
    "latent_model": Kind(finetune.latent_task, finetune.latent_parts),
    "adapter": Kind(lambda _: FinetuneTask, finetune.make_parts),
    "prior": Kind(lambda _: PriorTask, prior_parts.make_parts),
    "features": Kind(lambda _: train_features.FeaturesTask, train_features.make_parts, one_thread),
    "solver": Kind(lambda _: train_solver.SolverTask, train_solver.make_parts),
    "baseline": Kind(train_baseline.task_type, train_baseline.make_parts),
}


class NotExact(MidwayError):
    """The replay ended elsewhere."""


def verify(task: VerifyTask) -> list[str]:
    """Lines that say what was found equal; NotExact if something was not."""
    run, job = open_any(task.run)
    job, splits = in_place(task, run, job)
    rebuild = partial(KINDS[run.kind].make_parts, **({} if splits is None else {"splits": splits}))
    accelerator = make_accelerator(job.train)
    with KINDS[run.kind].surroundings(), temporary_folder(run.path / ".verify", accelerator) as scratch:
        with raised_by_all():
            if accelerator.is_main_process:
                take(run, task.steps, scratch)
        start, goal = copied(scratch, START), copied(scratch, GOAL)
        assert start is not None
        count = goal.step - start.step if goal is not None else task.steps
        ends = [
            replay(run, job, rebuild, start, stops, scratch / name, accelerator)
            for name, stops in (("straight", [count]), ("stopped", [count // 2, count - count // 2]))
        ]
        accelerator.wait_for_everyone()  # all have read what the main process removes
        if not accelerator.is_main_process:
            return []
        found = [
            f"{run.path} ({run.kind}): {count} steps from step {start.step}, {accelerator.num_processes} process(es)"
        ]
        found += [compare("straight and stopped-and-resumed", *ends)]
        found += [compare(f"straight and the run's own step-{goal.step}", ends[0], goal)] if goal is not None else []
        found += compare_losses(run.path, scratch / "straight", start.step, start.step + count)
    return [*found, "resume is exact"]


@contextmanager
def temporary_folder(path: Path, accelerator: Accelerator) -> Iterator[Path]:
    """An empty folder for all processes, locked against other commands and removed at the end; UsageError if it is in use."""
    with ExitStack() as stack:
        with raised_by_all():
            if accelerator.is_main_process:
                stack.enter_context(made_empty(path))
        yield path


def open_any(path: Path) -> tuple[Run, Any]:
    """A run of any kind and the task it was started with."""
    kind = kind_of(path)
    if kind not in KINDS:
        raise DataError(
            f"{path} is not a run that was trained", f"its kind is {kind or None}", "give the --out of a training"
        )
    run = Run.open(path, kind)
    task, fix = KINDS[kind].task(run.config), "give a run whose config.yaml is as its training wrote it"
    return run, from_file(task, own_fields(task, run.config), run.path / "config.yaml", fix)


def in_place(task: VerifyTask, run: Run, job: Any) -> tuple[Any, Splits | None]:
    """The task of a run with the paths of today, and the images of one that trains on images; errors as `splits_of`."""
    if isinstance(job, LatentTask | PriorTask):
        stored = "latents" if isinstance(job, LatentTask) else "codes"
        cache = getattr(job, stored)
        others: dict[str, Any] = {stored: cache if cache is not None and cache.exists() else None}
        for name in ("init", "teacher"):
            if (path := getattr(job, name, None)) is not None:
                others[name] = moved_run(run, path)
        if isinstance(job, LatentTask) and job.reflow.source is not None:
            others["reflow"] = replace(job.reflow, source=moved_run(run, job.reflow.source))
        tokenizer = task.tokenizer or moved_run(run, job.tokenizer)
        return replace(job, tokenizer=tokenizer, data_path=task.data_path, **others), None
    if isinstance(job, train_solver.SolverTask | FinetuneTask):
        job = replace(job, model=moved_run(run, job.model))
    if isinstance(job, train_solver.SolverTask):
        return job, None
    return job, splits_of(run, images_at(run, task.data_path))


def choose(run: Run, steps: int) -> tuple[Checkpoint, Checkpoint | None]:
    """The newest checkpoint with another 2 to `steps` after it, and that one; else the newest and None."""
    valid = list(checkpoints.valid(run.checkpoints, print))
    if not valid:
        raise DataError(f"{run.path} has no valid checkpoint", "nothing to resume from", "train it first")
    for later, earlier in combinations(valid, 2):
        if 2 <= later.step - earlier.step <= steps:
            return earlier, later
    return valid[0], None


def take(run: Run, steps: int, scratch: Path) -> None:
    """Copy the checkpoints that `choose` finds; others if a training removes these meanwhile. DataError, DiskError."""
    while True:
        there = checkpoints.directories(run.checkpoints)
        try:
            for name, found in zip((START, GOAL), choose(run, steps), strict=True):
                if found is not None:
                    shutil.copytree(found.path, scratch / name / found.path.name)
            return
        except (DataError, OSError) as error:
            for name in (START, GOAL):
                shutil.rmtree(scratch / name, ignore_errors=True)
            if checkpoints.directories(run.checkpoints) != there:
                continue
            with raising(DiskError, f"{scratch} cannot be written", "free space", OSError, why=one_line):
                raise error


def copied(scratch: Path, name: str) -> Checkpoint | None:
    """The checkpoint that `take` copied, if there was one."""
    return next(map(checkpoints.verify, checkpoints.directories(scratch / name)), None)


def replay(
    run: Run,
    job: Any,
    rebuild: Callable[[Any, Accelerator], Any],
    start: Checkpoint,
    stops: list[int],
    folder: Path,
    accelerator: Accelerator,
) -> Checkpoint:
    """Train sum(stops) steps from `start` in a directory of its own, stopping and resuming with new objects in between."""
    if accelerator.is_main_process:
        shutil.copytree(start.path, folder / "checkpoints" / start.path.name)
    accelerator.wait_for_everyone()
    copy = Run(folder, run.kind, run.config, quiet=True)
    step = start.step
    for count in stops:
        parts = rebuild(job, accelerator)
        torch.manual_seed(0)  # whatever was drawn before must not matter
        config = replay_config(job.train, start, sum(stops), count)
        hooks = Hooks(validate=getattr(parts, "validate", None))
        step = fit(parts.model, parts.items, config, copy, accelerator, hooks, resume=True).steps
    return checkpoints.verify(folder / "checkpoints" / f"step-{step}")


def replay_config(train: TrainConfig, start: Checkpoint, total: int, count: int) -> TrainConfig:
    """`count` steps as the run would do them; past its end at the constant rate, since a cosine is 0 there."""
    over = start.step + total > train.steps
    return replace(
        train,
        steps=start.step + total if over else train.steps,
        decay="constant" if over else train.decay,
        max_steps=count,
        max_seconds=None,
        save_every=0,
        save_seconds=0,
        patience_validations=0,
        measure_every=0,
        log_with=(),
    )


def compare(what: str, a: Checkpoint, b: Checkpoint) -> str:
    """A line with the number of equal tensors; NotExact naming the first tensors that are not."""
    names = [name for name in FILES if (a.path / f"{name}.safetensors").exists()]
    names += sorted(path.stem for path in a.path.glob("posthoc-*.safetensors"))
    count = 0
    for name in names:
        mine, theirs = a.tensors(f"{name}.safetensors"), b.tensors(f"{name}.safetensors")
        other = [
            k for k in mine.keys() | theirs.keys() if k not in mine or k not in theirs or not _equal(mine[k], theirs[k])
        ]
        if other:
            raise NotExact(
                f"{what} differ in {len(other)} tensors of {name}",
                f"for example {', '.join(sorted(other)[:3])}",
                "look for randomness that is not a function of (seed, step, sample), or kernels that are not deterministic",
            )
        count += len(mine)
    return f"  equal, {what}: {count} tensors of {', '.join(names)}"


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit, so that NaN equals NaN."""
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def compare_losses(run: Path, replayed: Path, first: int, last: int) -> list[str]:
    """Logged means of the whole intervals between two steps; a list of one line, or of none if the run logged nothing there."""
    mine, theirs = (
        {r["step"]: _means(r) for r in _records(path) if first < r["step"] <= last} for path in (replayed, run)
    )
    shared = [step for step in mine if step in theirs]
    for step in shared:
        if mine[step] != theirs[step]:
            raise NotExact(
                f"the losses logged at step {step} differ",
                f"the run has {theirs[step].get('loss')}, the replay {mine[step].get('loss')}",
                "compare the versions and hardware in env.json with this machine's",
            )
    return [f"  equal, logged means of {len(shared)} interval(s)"] if shared else []


def _records(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    with reading(path, "move it elsewhere: then logged means are not compared"):
        whole = [line for line in read_text(path, LOG_LIMIT).splitlines(keepends=True) if line.endswith("\n")]
        found = map(json.loads, whole)  # not half a line, of a run in training
        return [r for r in found if "lr" in r and r["step"] > 0 and not r.get("partial") and not r.get("final")]


def _means(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in TIMES}


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    print("\n".join(verify(resolve(VerifyTask, {}, arguments))))
