"""The whole path on real images in minutes: what `make demo` runs.

digits -> feature network -> FSQ tokenizer -> latent DiT on a variance-preserving schedule -> AMED -> sweep -> report
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import evaluate
import train_features
import train_latent
import train_solver
import train_tokenizer

from cli import main, resolve
from midway.gen.core.errors import UsageError
from midway.gen.core.files import read_json, write_atomically
from midway.gen.core.locks import check_no_link, lock, made
from midway.gen.core.processes import device_and_process
from midway.gen.core.runs import Run
from midway.gen.core.text import echo
from midway.gen.diffusion.distill_amed import DistillConfig
from midway.gen.diffusion.dit import DiTConfig
from midway.gen.report.sweep import FILES
from midway.gen.training.config import TrainConfig
from recipes import digits_dit, digits_fsq
from tasks import LatentTask, TokenizerTask

RUNS = ("features", "tokenizer", "model")
MARK = ".demo"
"""The file by which a demo knows the folder of an earlier one."""


@dataclass(frozen=True)
class DemoTask:
    """Train, sample and measure on the bundled digits; ends with a table and runs/demo/report.html."""

    out: Path = Path("runs/demo")
    """Directory of all runs and of the report; an earlier demo there is replaced."""
    quick: bool = False
    """A few steps of everything: shows that it runs, not what it can do."""


def run(task: DemoTask) -> Path:
    """All stages; the path of the report. The folder and every finished run stay locked to the end."""
    _, process = device_and_process()
    with claimed(task.out) if process.rank == 0 else nullcontext(), ExitStack() as finished:
        process.wait()
        return _run(task, finished if process.rank == 0 else None)


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Within the block this demo's own folder.

    UsageError while another demo writes there, and if it is a link or has runs or a report that no demo made.
    """
    check_no_link(out)
    there = [name for name in (*RUNS, *FILES) if os.path.lexists(out / name)]
    if there and not (out / MARK).exists() and not any(_made_by_a_demo(out / name) for name in RUNS):
        raise UsageError(f"{out / there[0]} is not of an earlier demo", "it would be replaced", "choose another --out")
    with made(out), lock(out, "written"):
        write_atomically(out / MARK, b"the runs and the report here are of scripts/demo.py, which replaces them\n")
        yield


def _made_by_a_demo(run: Path) -> bool:
    """Whether an earlier version made this run, as its command has it."""
    try:
        return Path(read_json(run / "env.json")["command"].split()[1]).name == "demo.py"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def _run(task: DemoTask, finished: ExitStack | None) -> Path:
    start = time.monotonic()
    stages: dict[str, Callable[[], object]] = {
        "feature network": lambda: train_features.train(features_task(task)),
        "tokenizer": lambda: train_tokenizer.train(tokenizer_task(task)),
        "latent model": lambda: train_latent.train(latent_task(task)),
        "AMED, constants": lambda: train_solver.train(solver_task(task, "amed-constants")),
        "AMED, predictor": lambda: train_solver.train(solver_task(task, "amed")),
        "sweep": lambda: evaluate.run(evaluate_task(task)),
    }
    for number, (name, stage) in enumerate(stages.items(), 1):
        began = time.monotonic()
        echo(f"[{number}/{len(stages)}] {name}")
        made_run = stage()
        if finished is not None and isinstance(made_run, Run):
            finished.enter_context(lock(made_run.path, "used"))
        echo(f"      {time.monotonic() - began:.0f} s")
    report = task.out / "report.html"
    echo(f"done in {time.monotonic() - start:.0f} s; open {report}")
    return report


def _steps(config: TrainConfig, task: DemoTask) -> TrainConfig:
    return replace(config, steps=10, batch_size=32) if task.quick else config


def features_task(task: DemoTask) -> train_features.FeaturesTask:
    """The offline feature network of the digits."""
    default = train_features.FeaturesTask()
    return replace(default, out=task.out / "features", train=_steps(default.train, task), overwrite=True)


def tokenizer_task(task: DemoTask) -> TokenizerTask:
    """The recipe digits-fsq."""
    recipe = digits_fsq()
    model = replace(recipe.model, width=16, blocks=1) if task.quick else recipe.model
    return replace(recipe, out=task.out / "tokenizer", model=model, train=_steps(recipe.train, task), overwrite=True)


def latent_task(task: DemoTask) -> LatentTask:
    """The recipe digits-dit."""
    recipe = digits_dit()
    model = replace(recipe.model, dit=DiTConfig(width=32, depth=2, heads=2)) if task.quick else recipe.model
    return replace(
        recipe,
        out=task.out / "model",
        tokenizer=task.out / "tokenizer",
        model=model,
        train=_steps(recipe.train, task),
        overwrite=True,
    )


def solver_task(task: DemoTask, name: str) -> train_solver.SolverTask:
    """One learned solver per budget of the sweep."""
    default = train_solver.SolverTask(model=task.out / "model", solver=name, grid="uniform", overwrite=True)
    if task.quick:
        return replace(
            default,
            nfe="4",
            distill=DistillConfig(trajectories=32),
            train=replace(default.train, steps=3, batch_size=16),
        )
    return replace(default, nfe="4,6,8,10,20")


def evaluate_task(task: DemoTask) -> evaluate.EvaluateTask:
    """Every solver at every budget."""
    full = evaluate.EvaluateTask(
        model=task.out / "model",
        features=task.out / "features",
        out=task.out,
        solvers="euler,ddim,heun,dpm2,dpmpp2m,amed-constants,amed",
        fresh=True,
        title="Digits: Fréchet distance per step budget",
    )
    return replace(full, nfe="4", grids="uniform", n=64, blocks=1, reference_nfe=16) if task.quick else full


if __name__ == "__main__":
    main(lambda arguments: run(resolve(DemoTask, {}, arguments)) and None)
