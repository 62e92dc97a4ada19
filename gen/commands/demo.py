"""The whole path on real images in minutes: what `make demo` runs.

images -> FSQ tokenizer -> latent DiT on a variance-preserving schedule -> AMED and a learned table -> sweep -> report
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from midway.gen.commands import evaluate
from midway.gen.core.errors import UsageError
from midway.gen.core.files import read_json, write_atomically
from midway.gen.core.locks import check_no_link, lock, locked_inside, made, remove
from midway.gen.core.processes import device_and_process, raised_by_all
from midway.gen.core.runs import Run
from midway.gen.core.signals import Interrupted, Stopped, stop_note
from midway.gen.core.text import echo
from midway.gen.diffusion.load import TABLE
from midway.gen.distillation.amed import DistillConfig
from midway.gen.flags.cli import resolve
from midway.gen.flags.tasks import LatentTask, TokenizerTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.recipes.latent_recipes import digits_dit, mnist5k_dit
from midway.gen.recipes.recipes import digits_fsq, mnist5k_fsq
from midway.gen.report.sweep import FILES
from midway.gen.sweep.store import CellStore
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_latent, train_solver, train_tokenizer
from midway.samplers.gits import GITS

TITLES = {"digits": "Digits", "mnist5k": "MNIST, 5,000 digits"}
BUDGETS = "4,6,8,10"
IMAGES = {"digits": None, "mnist5k": 500}
"""A block of seeds: as many as are held out, or half of them."""
PLUGIN = "amed-plugin-ipndm3"
LEARNED = ("amed", PLUGIN, TABLE)
RUNS = ("tokenizer", "model")
MARK = ".demo"
"""The file that marks the folder of an earlier demo, and holds its finished stages."""


@dataclass(frozen=True)
class DemoTask:
    """Train, sample and measure on real images that packages bring; ends with tables and runs/demo/report.html."""

    source: Literal["digits", "mnist5k"] = "digits"
    """digits: 1,797 of 8x8 pixels; mnist5k: 5,000 of 28x28 pixels brought to 32x32, which takes longer."""
    out: Path | None = None
    """Directory of all runs and of the report (default: runs/demo, runs/demo-mnist); a finished demo there is replaced, an
    interrupted one goes on."""
    quick: bool = False
    """A few steps of everything: shows that it runs, not what it can do."""

    @property
    def folder(self) -> Path:
        """`out`, or its default."""
        return self.out or Path({"digits": "runs/demo", "mnist5k": "runs/demo-mnist"}[self.source])


def run(task: DemoTask) -> Path:
    """All stages that are not finished; the path of the report. The folder and every finished run stay locked to the end.

    Stopped after a signal, also where a training has saved its state.
    """
    _, process = device_and_process()
    with ExitStack() as locks:
        with raised_by_all():
            if process.rank == 0:
                locks.enter_context(claimed(task))
        return _run(task, read_mark(task) or [], locks if process.rank == 0 else None)


@contextmanager
def claimed(task: DemoTask) -> Iterator[None]:
    """Within the block this demo's own folder, without what an earlier one of another configuration, or a finished one, made.

    UsageError while another demo writes there, and if it is a link or has runs or a report that no demo made.
    """
    out = task.folder
    check_no_link(out)
    there = [name for name in (*RUNS, *FILES) if os.path.lexists(out / name)]
    if there and not (out / MARK).exists() and not any(_made_by_a_demo(out / name) for name in RUNS):
        raise UsageError(f"{out / there[0]} is not of an earlier demo", "it would be replaced", "choose another --out")
    with made(out), lock(out, "written"):
        finished = read_mark(task)
        if finished is None or len(finished) == len(STAGES):
            clear(out)
            write_mark(task, [])
        yield


def _made_by_a_demo(run: Path) -> bool:
    """Whether an earlier version made this run, as its command has it."""
    try:
        return Path(read_json(run / "env.json")["command"].split()[1]).stem == "demo"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def clear(out: Path) -> None:
    """Remove the runs and measurements of an earlier demo; UsageError if one is in use."""
    for path in (out / name for name in RUNS if (out / name).exists()):
        check_no_link(path)
        with lock(path, "used"), locked_inside(path):
            remove(path)
    if (out / "cells").exists():
        with CellStore(out / "cells").claimed(fresh=True):
            pass


def _run(task: DemoTask, finished: list[str], locks: ExitStack | None) -> Path:
    start = time.monotonic()
    stop_note(f"what is finished is stored in {task.folder}; the same command goes on", last=True)
    for number, (name, stage) in enumerate(STAGES.items(), 1):
        began = time.monotonic()
        echo(f"[{number}/{len(STAGES)}] {name}{', finished before' * (name in finished)}")
        if name in finished:
            continue
        try:
            made_run = stage(task)
        except Interrupted as stop:
            raise Stopped(stop.number) from None
        if locks is not None:
            finished = [*finished, name]
            write_mark(task, finished)
            if isinstance(made_run, Run):
                locks.enter_context(lock(made_run.path, "used"))
        echo(f"      {time.monotonic() - began:.0f} s")
    report = task.folder / "report.html"
    echo(f"done in {time.monotonic() - start:.0f} s; open {report}")
    return report


# ---- what is finished ----


def read_mark(task: DemoTask) -> list[str] | None:
    """The finished stages of an earlier demo of the same configuration, None if there was none."""
    try:
        known = read_json(task.folder / MARK)
        return list(known["finished"]) if known["configuration"] == configuration(task) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


def write_mark(task: DemoTask, finished: list[str]) -> None:
    """Store them."""
    about = "the runs and the report here are of midway demo, which replaces them"
    content = {"about": about, "configuration": configuration(task), "finished": finished}
    write_atomically(task.folder / MARK, (json.dumps(content, indent=1) + "\n").encode())


def configuration(task: DemoTask) -> str:
    """Hash of everything that the stages are."""
    solvers = [solver_task(task, name) for name in LEARNED]
    tasks = [tokenizer_task(task), latent_task(task), *solvers, evaluate_task(task)]
    return hashlib.sha256(json.dumps([asdict(one) for one in tasks], default=str).encode()).hexdigest()


# ---- stages ----


def _steps(config: TrainConfig, task: DemoTask) -> TrainConfig:
    return replace(config, steps=10, batch_size=32) if task.quick else config


def tokenizer_task(task: DemoTask) -> TokenizerTask:
    """The recipe digits-fsq or mnist5k-fsq."""
    recipe = {"digits": digits_fsq, "mnist5k": mnist5k_fsq}[task.source]()
    model = replace(recipe.model, width=16, blocks=1) if task.quick else recipe.model
    return replace(recipe, out=task.folder / "tokenizer", model=model, train=_steps(recipe.train, task), resume="auto")


def latent_task(task: DemoTask) -> LatentTask:
    """The recipe digits-dit or mnist5k-dit."""
    recipe = {"digits": digits_dit, "mnist5k": mnist5k_dit}[task.source]()
    model = replace(recipe.model, dit=DiTConfig(width=32, depth=2, heads=2)) if task.quick else recipe.model
    return replace(
        recipe,
        out=task.folder / "model",
        tokenizer=task.folder / "tokenizer",
        model=model,
        train=_steps(recipe.train, task),
        resume="auto",
    )


def solver_task(task: DemoTask, name: str) -> train_solver.SolverTask:
    """One learned solver per budget of the sweep; of AMED on `gits`, without the trials of other grids."""
    default = replace(train_solver.recipes()[name](), model=task.folder / "model", resume="auto")
    half = replace(default.train, steps=300)  # of a table's steps: nearly its error
    short = replace(default.train, steps=60, batch_size=32)  # as benchmarks/amed_ablation.py
    default = (
        replace(default, train=half)
        if name == TABLE
        else replace(default, grid=GITS, train=short, distill=DistillConfig(trajectories=256, checkpointing=False))
    )
    if task.quick:
        return replace(
            default,
            nfe="4",
            distill=DistillConfig(trajectories=32),
            train=replace(default.train, steps=3, batch_size=16),
        )
    return replace(default, nfe=BUDGETS)


def evaluate_task(task: DemoTask) -> evaluate.EvaluateTask:
    """Every solver at every budget."""
    full = evaluate.EvaluateTask(
        model=task.folder / "model",
        out=task.folder,
        solvers=f"euler,ddim,heun,dpm2,dpmpp2m,dpmpp3m,ipndm3,{','.join(LEARNED)}",
        nfe=BUDGETS,
        n=IMAGES[task.source],
        grids="uniform,logsnr,karras,gits",
        title=f"{TITLES[task.source]}: solvers by step budget",
    )
    return (
        replace(full, nfe="4", grids="uniform", n=64, blocks=1, exact_nfe=16, choice_seeds=16) if task.quick else full
    )


STAGES: dict[str, Callable[[DemoTask], object]] = {
    "tokenizer": lambda task: train_tokenizer.train(tokenizer_task(task)),
    "latent model": lambda task: train_latent.train(latent_task(task)),
    "AMED": lambda task: train_solver.train(solver_task(task, "amed")),
    "AMED in iPNDM": lambda task: train_solver.train(solver_task(task, PLUGIN)),
    "learned table": lambda task: train_solver.train(solver_task(task, "table")),
    "sweep": lambda task: evaluate.run(evaluate_task(task)),
}


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(DemoTask, {}, arguments))
