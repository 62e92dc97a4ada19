"""How far the weights of a run are trained, and which of them commands use.

state.json of a checkpoint has `steps`, how many the training was to have, and `finished`, whether it ended there: at its last
step, or early. Of earlier versions, without `finished`, the counters of validation have it.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from midway.gen.core import checkpoints
from midway.gen.core.checkpoints import Checkpoint
from midway.gen.core.errors import MidwayError
from midway.gen.core.files import DAMAGE, read_json
from midway.gen.core.runs import Run, kind_of


@dataclass(frozen=True)
class Progress:
    """Optimizer step, of how many, and whether the training was over there."""

    step: int
    steps: int
    finished: bool

    def __str__(self) -> str:
        return f"step {self.step}" if self.finished else f"step {self.step} of {self.steps}"


def selected(run: Run) -> Path:
    """The directory of the weights that commands use, verified: the best in validation if there are any, else the newest.

    With `RUN@step` those of this step. DataError as of `Run.checkpoint`.
    """
    best = checkpoints.directories(run.best) if run.step is None else []
    return checkpoints.verify(best[0]).path if best else run.checkpoint


def progress_of(run: Run, folder: Path) -> Progress | None:
    """Of the weights in a checkpoint directory of a run; None of weights that no training of the run made (imported ones).

    The best weights of a validated run are as far as its newest checkpoint, unless their step was chosen.
    """
    newest = checkpoints.directories(run.checkpoints)
    if folder.parent == run.best and run.step is None and newest:
        folder = newest[0]
    step, steps = int(folder.name.removeprefix("step-")), _planned(run, "steps")
    if "posthoc" in run.config:
        return Progress(step, steps, step >= steps)
    try:
        state = dict(read_json(folder / "state.json"))
    except DAMAGE:
        return None
    early = state.get("finished", _was_over(run, Checkpoint(folder, step))) and state.get("steps") == steps
    return Progress(step, steps, step >= steps or bool(early))


def unfinished(*runs: Run | Path | str | None) -> tuple[str, ...]:
    """A warning for each of these runs whose weights are of an unfinished training; names that are no run have none."""
    opened = [named_run(run) for run in runs]
    return tuple(dict.fromkeys(line for run in opened if run is not None for line in _unfinished(run)))


def named_run(run: Run | Path | str | None) -> Run | None:
    """A run, or the one of any kind at a path, also `RUN@step`; None if there is none."""
    if isinstance(run, Run) or not run:
        return run or None
    kind = kind_of(Path(run))
    return Run.open(Path(run), kind) if kind else None


def _unfinished(run: Run) -> tuple[str, ...]:
    folders = checkpoints.directories(run.checkpoints)[:1]
    if run.step is not None:
        folders = [checkpoints.of_step(run.path, run.step, run.checkpoints, run.best)]
    found = progress_of(run, folders[0]) if folders else None
    if found is None or found.finished:
        return ()
    return (f"{run.path.resolve().name}: {found}; the training is not finished",)


def _was_over(run: Run, checkpoint: Checkpoint) -> bool:
    """Whether a training of an earlier version stopped early at this checkpoint."""
    with suppress(MidwayError, KeyError, IndexError):
        since = int(checkpoint.tensors("progress.safetensors")["validation/steps"][1])
        return 0 < _planned(run, "patience_validations") <= since
    return False


def _planned(run: Run, key: str) -> int:
    """A number of the training's configuration; 0 if there is none."""
    train: Any = run.config.get("train")
    found = train.get(key) if isinstance(train, dict) else None
    return found if isinstance(found, int) else 0
