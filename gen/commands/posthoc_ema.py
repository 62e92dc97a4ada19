"""Another width of the weight average, after training: midway posthoc-ema runs/a --std 0.10 --out runs/b

The run must have tracked power-function averages (--posthoc 0.05 0.10). What comes out is a run directory like the first,
whose averaged weights have the requested width, so that midway sample, train solver and evaluate
take it with --model.
"""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from safetensors.torch import save_file
from torch import Tensor

from midway.gen.core import checkpoints
from midway.gen.core.config import PER_CALL, absolute, from_file, to_record
from midway.gen.core.errors import DataError, UsageError, raising
from midway.gen.core.files import read_tensors, reading
from midway.gen.core.runs import Run, kind_of
from midway.gen.data.places import data_of, recorded_fingerprint
from midway.gen.flags.cli import own_fields, resolve
from midway.gen.flags.tasks import FinetuneTask, LatentTask, PriorTask
from midway.gen.priors.load import KIND as PRIOR
from midway.gen.training.power_ema import find_snapshots, reconstruct


@dataclass(frozen=True)
class PosthocTask:
    """Make a latent model or a prior with an average of another width from the snapshots of a run."""

    run: Annotated[Path, tyro.conf.Positional]
    """Run directory of a latent model or a prior trained with --posthoc."""
    std: float
    """Relative width of the average, as a share of the training so far; 0.05 to 0.15 is usual."""
    out: Path
    """Run directory to create."""
    step: int | None = None
    """Average up to this optimizer step (default: the last snapshot)."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Delete a run that is already at --out."""


def make(task: PosthocTask) -> Run:
    """Reconstruct and save; the new run."""
    kind = PRIOR if kind_of(task.run) == PRIOR else "latent_model"
    source = Run.open(task.run, kind)
    newest = source.checkpoint
    snapshots = find_snapshots(source.path / "posthoc")
    if not snapshots:
        raise DataError(
            f"{source.path} has no snapshots of averages",
            "it was trained without --posthoc",
            "train with --posthoc 0.05 0.10",
        )
    step = snapshots[-1].step if task.step is None else task.step
    with raising(UsageError, f"no average of width {task.std} at step {step}", "change --std or --step"):
        averaged = reconstruct(snapshots, step, task.std, trained_weights(newest))
    if task.out.exists() and task.out.samefile(source.path):
        raise UsageError(f"--out {task.out}", "the average is made from this run", "choose another --out")
    with Run.creating(task.out, kind, configuration(task, source, step), task.overwrite) as run:

        def write(folder: Path) -> None:
            save_file(averaged, folder / "ema.safetensors")
            shutil.copy(newest / "model.json", folder)
            shutil.copytree(newest / "tokenizer", folder / "tokenizer")

        checkpoints.save(run.checkpoints, step, write)
        if then := recorded_fingerprint(source):
            run.note({"data_fingerprint": then})
        run.say(f"saved {run.checkpoint}: average of width {task.std} at step {step} from {len(snapshots)} snapshots")
        return run


def trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The newest weights of the run, which its averages must be like; DataError if they cannot be read."""
    with reading(checkpoint / "model.safetensors", "train the model again with --overwrite"):
        return read_tensors(checkpoint / "model.safetensors")[0]


def configuration(task: PosthocTask, source: Run, step: int) -> dict[str, Any]:
    """What the source was trained with, and where the average comes from."""
    of = PriorTask if source.kind == PRIOR else FinetuneTask if "method" in source.config else LatentTask
    fix = f"give a run that midway train {'prior' if source.kind == PRIOR else 'latent'} made"
    trained = to_record(from_file(of, own_fields(of, source.config), source.path / "config.yaml", fix))
    origin = {"origin": source.config["origin"]} if "origin" in source.config else {}
    made = {"source": str(absolute(task.run)), "std": task.std, "step": step}
    return {**trained, "data": to_record(data_of(source)), **origin, "posthoc": made}


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    make(resolve(PosthocTask, {}, arguments))
