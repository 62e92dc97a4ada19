"""Add an adapter to the weights of its model: midway merge-adapter runs/my-adapter --model runs/digits-flow --out runs/merged

What comes out is a run directory of a latent model, which every command takes with --model.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from safetensors.torch import save_file

from midway.gen.core import checkpoints
from midway.gen.core.config import PER_CALL, absolute
from midway.gen.core.errors import UsageError
from midway.gen.core.runs import Run
from midway.gen.data.places import recorded_fingerprint
from midway.gen.diffusion.adapters import folder_of, load_adapted
from midway.gen.diffusion.load import CPU, write_model
from midway.gen.flags.cli import resolve


@dataclass(frozen=True)
class MergeTask:
    """Make a latent model of another one and its adapter."""

    adapter: Annotated[Path, tyro.conf.Positional]
    """Run directory of the adapter, or its folder."""
    model: Path
    """Run directory of the latent model that it is for."""
    out: Path
    """Run directory to create."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Delete a run that is already at --out."""


def make(task: MergeTask) -> Run:
    """Merge and save; the new run."""
    trained = load_adapted(task.model, task.adapter, CPU)
    source = trained.run
    for path in (task.model, folder_of(task.adapter)[1], source.path):
        if task.out.exists() and path.exists() and task.out.samefile(path):
            raise UsageError(f"--out {task.out}", "the merged model is made from it", "choose another --out")
    merged = {"model": str(absolute(task.model)), "adapter": str(absolute(task.adapter))}
    config, averaged = {**source.config, "merged": merged}, (source.checkpoint / "ema.safetensors").exists()
    with Run.creating(task.out, "latent_model", config, task.overwrite) as run:

        def write(folder: Path) -> None:
            state = {name: value.contiguous() for name, value in trained.model.state_dict().items()}
            save_file(state, folder / ("ema.safetensors" if averaged else "model.safetensors"))
            write_model(folder, trained.model, trained.tokenizer)

        checkpoints.save(run.checkpoints, int(source.checkpoint.name.removeprefix("step-")), write)
        if then := recorded_fingerprint(source):
            run.note({"data_fingerprint": then})
        run.say(f"saved {run.checkpoint}: {trained.weights}")
        return run


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    make(resolve(MergeTask, {}, arguments))
