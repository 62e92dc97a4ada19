"""The whole path on real images in minutes: what `make demo` runs.

digits -> feature network -> FSQ tokenizer -> latent DiT on a variance-preserving schedule -> AMED -> sweep -> report
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import evaluate
import train_features
import train_latent
import train_solver
import train_tokenizer

from cli import main, resolve
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
    """Directory of all runs and of the report; an earlier demo there is replaced."""
    quick: bool = False
    """A few steps of everything: shows that it runs, not what it can do."""


def run(task: DemoTask) -> Path:
    """All stages; the path of the report."""
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
        stage()
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
