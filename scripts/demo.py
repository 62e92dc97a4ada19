"""The whole path on real images in minutes: what `make demo` runs.

digits -> feature network -> FSQ tokenizer -> latent DiT on a variance-preserving schedule -> AMED -> sweep -> report
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import evaluate
import train_features
import train_latent
import train_solver
import train_tokenizer

from cli import main, resolve
from midway.gen.core.files import write_atomically
from midway.gen.core.runs import Run, lock
from midway.gen.core.signals import Interrupted, Stopped, stop_note
from midway.gen.core.text import echo
from midway.gen.diffusion.distill_amed import DistillConfig
from midway.gen.diffusion.dit import DiTConfig
from midway.gen.training.config import TrainConfig
from recipes import digits_dit, digits_fsq
from tasks import LatentTask, TokenizerTask


@dataclass(frozen=True)
class DemoTask:
    """Train, sample and measure on the bundled digits; ends with a table and runs/demo/report.html."""

    out: Path = Path("runs/demo")
    """Directory of all runs and of the report; a finished demo there is replaced, an interrupted one goes on."""
    quick: bool = False
    """A few steps of everything: shows that it runs, not what it can do."""


def run(task: DemoTask) -> Path:
    """All stages that are not finished; the path of the report. Stopped after a signal, also where a training saved its state."""
    start, state = time.monotonic(), Progress(task.out / "demo.json", configuration(task))
    stages: dict[str, Callable[[], object]] = {
        "feature network": lambda: train_features.train(features_task(task)),
        "tokenizer": lambda: train_tokenizer.train(tokenizer_task(task)),
        "latent model": lambda: train_latent.train(latent_task(task)),
        "AMED, constants": lambda: train_solver.train(solver_task(task, "amed-constants")),
        "AMED, predictor": lambda: train_solver.train(solver_task(task, "amed")),
        "sweep": lambda: evaluate.run(evaluate_task(task)),
    }
    stop_note(f"what is finished is stored in {task.out}; the same command goes on", last=True)
    finished = state.begin(lambda: clear(task))
    for number, (name, stage) in enumerate(stages.items(), 1):
        began = time.monotonic()
        echo(f"[{number}/{len(stages)}] {name}{' was finished before' * (name in finished)}")
        if name in finished:
            continue
        try:
            stage()
        except Interrupted as stop:
            raise Stopped(stop.number) from None
        state.add(name)
        echo(f"      {time.monotonic() - began:.0f} s")
    state.end()
    report = task.out / "report.html"
    echo(f"done in {time.monotonic() - start:.0f} s; open {report}")
    return report


@dataclass(frozen=True)
class Progress:
    """The file that names the finished stages of a demo, as long as there are others."""

    path: Path
    configuration: str

    def begin(self, clear: Callable[[], object]) -> list[str]:
        """The finished stages of a demo of the same configuration; any other is removed by `clear`."""
        try:
            known = json.loads(self.path.read_text())
            if known["configuration"] == self.configuration:
                return list(known["finished"])
        except (OSError, ValueError, LookupError, TypeError):
            pass
        clear()
        self._write([])
        return []

    def add(self, name: str) -> None:
        """A stage is finished."""
        self._write([*json.loads(self.path.read_text())["finished"], name])

    def end(self) -> None:
        """All are."""
        self.path.unlink()

    def _write(self, finished: list[str]) -> None:
        content = {"configuration": self.configuration, "finished": finished}
        write_atomically(self.path, (json.dumps(content, indent=1) + "\n").encode())


def configuration(task: DemoTask) -> str:
    """Hash of everything that the stages are."""
    solvers = [solver_task(task, name) for name in ("amed-constants", "amed")]
    tasks = [features_task(task), tokenizer_task(task), latent_task(task), *solvers, evaluate_task(task)]
    return hashlib.sha256(json.dumps([asdict(one) for one in tasks], default=str).encode()).hexdigest()


def clear(task: DemoTask) -> None:
    """Remove an earlier demo. DataError for runs of another kind."""
    runs = {"features": "features", "tokenizer": "tokenizer", "model": "latent_model"}
    found = [
        Run.open(task.out / name, kind) for name, kind in runs.items() if (task.out / name / "config.yaml").exists()
    ]
    for run in found:
        with lock(run.path):
            shutil.rmtree(run.path)
    shutil.rmtree(task.out / "cells", ignore_errors=True)


def _steps(config: TrainConfig, task: DemoTask) -> TrainConfig:
    return replace(config, steps=10, batch_size=32) if task.quick else config


def features_task(task: DemoTask) -> train_features.FeaturesTask:
    """The offline feature network of the digits."""
    default = train_features.FeaturesTask()
    return replace(default, out=task.out / "features", train=_steps(default.train, task), resume="auto")


def tokenizer_task(task: DemoTask) -> TokenizerTask:
    """The recipe digits-fsq."""
    recipe = digits_fsq()
    model = replace(recipe.model, width=16, blocks=1) if task.quick else recipe.model
    return replace(recipe, out=task.out / "tokenizer", model=model, train=_steps(recipe.train, task), resume="auto")


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
        resume="auto",
    )


def solver_task(task: DemoTask, name: str) -> train_solver.SolverTask:
    """One learned solver per budget of the sweep."""
    default = train_solver.SolverTask(model=task.out / "model", solver=name, grid="uniform", resume="auto")
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
        title="Digits: Fréchet distance per step budget",
    )
    return replace(full, nfe="4", grids="uniform", n=64, blocks=1, reference_nfe=16) if task.quick else full


if __name__ == "__main__":
    main(lambda arguments: run(resolve(DemoTask, {}, arguments)) and None, alone=True)
