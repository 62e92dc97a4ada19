"""Learn a solver for a trained model: python scripts/train_solver.py amed --model runs/digits-dit --nfe 6,8

`amed` is AMED-Solver, `amed-plugin-<base>` AMED inside another solver; with `-constants` all samples share its numbers.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor

from cli import main, numbers, resolve
from midway.gen.artefacts import TrainedModel, load_model, solver_path
from midway.gen.config import to_dict
from midway.gen.errors import UsageError, nearest
from midway.gen.launch import make_accelerator
from midway.gen.runs import Run
from midway.gen.sampling import labels_of
from midway.gen.solver_training import DistillConfig, SolverObjective, SolverTarget, TrajectoryBatch
from midway.gen.train_config import TrainConfig
from midway.gen.trainable import Hooks, Items
from midway.gen.training import fit
from midway.samplers.grids import GRIDS
from midway.samplers.learned_solver import LEARNED, LearnedSolver, SolverCard
from midway.samplers.solvers import SOLVERS
from recipes import Flat, Resume


@dataclass(frozen=True)
class SolverTask:
    """Distil AMED for one model: one learned solver per budget, stored with the model."""

    model: Path
    """Run directory of the latent model."""
    solver: str = "amed"
    """amed (per-sample predictor), amed-constants (constants per step), or AMED inside another solver, amed-plugin-<base> and
    amed-plugin-<base>-constants with base euler, dpm2, ipndm3, ipndm4, dpmpp2m or dpmpp3m; also the first argument."""
    nfe: str = "6"
    """Budgets, comma-separated; odd ones take the first slope analytically."""
    grid: str = "karras"
    """Grid of the learned solver."""
    guidance: float = 1.0
    """Classifier-free guidance scale that the solver is learned for."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    train: Annotated[TrainConfig, Flat] = field(
        default_factory=lambda: TrainConfig(
            steps=80, batch_size=64, lr=3e-3, warmup=0, decay="cosine", ema=0, clip=1e6, log_every=20
        )
    )
    overwrite: bool = False
    """Replace solvers that were already learned."""
    resume: Resume = "no"
    """auto: go on with solvers that were begun, from their newest checkpoints."""


def recipes() -> dict[str, object]:
    """The solver's name is the first argument."""
    return {name: (lambda name=name: SolverTask(model=tyro.MISSING, solver=name)) for name in LEARNED}


@dataclass(frozen=True)
class Parts:
    """What is trained, on what."""

    model: SolverObjective
    items: Items


def train(task: SolverTask) -> list[Run]:
    """One run per budget, on the main process."""
    check(task)
    accelerator = make_accelerator(task.train, task.model)
    trained = load(task, accelerator)
    objectives = {nfe: make_objective(task, nfe, trained) for nfe in numbers(task.nfe, "--nfe")}  # all, before any run
    runs = [train_one(task, nfe, objective, trained, accelerator) for nfe, objective in objectives.items()]
    return [run for run in runs if run is not None]


def load(task: SolverTask, accelerator: Accelerator) -> TrainedModel:
    """The model; UsageError for guidance that it cannot have."""
    trained = load_model(task.model, accelerator.device)
    if task.guidance != 1 and not trained.model.classes:
        raise UsageError(f"--guidance {task.guidance}", "this model was trained without classes", "drop --guidance")
    return trained


def make_parts(task: SolverTask, accelerator: Accelerator) -> Parts:
    """The objective at the one budget of `task`, warm-started, and its teacher's trajectories."""
    trained = load(task, accelerator)
    (nfe,) = numbers(task.nfe, "--nfe")
    objective = make_objective(task, nfe, trained)
    return Parts(objective, run_teacher(objective, trained, accelerator.device))


def run_teacher(objective: SolverObjective, trained: TrainedModel, device: torch.device) -> Items:
    """Compute the teacher's trajectories and start the rule from the best of a few."""
    config = objective.config
    objective.to(device)
    order = torch.arange(config.seed, config.seed + config.trajectories)
    labels = labels_of(order, trained.model.classes).to(device)
    teacher = objective.run_teacher(labels)
    objective.warm_start(teacher, labels)
    return Items(
        lambda items: TrajectoryBatch(teacher.take(items.to(device)), labels[items.to(device)]),
        config.trajectories,
        f"teacher of {trained.hash}",
    )


def check(task: SolverTask) -> None:
    """Refuse names that do not exist before anything is loaded."""
    for what, name, known in (
        ("solver", task.solver, LEARNED),
        ("grid", task.grid, GRIDS),
        ("teacher", task.distill.teacher, SOLVERS),
    ):
        if name not in known:
            raise UsageError(f"unknown {what} '{name}'", "it is not in the registry", nearest(name, known))


def make_objective(task: SolverTask, nfe: int, trained: TrainedModel) -> SolverObjective:
    """What is learned at one budget; UsageError for a budget that does not exist."""
    learned = LEARNED[task.solver]
    target = SolverTarget(nfe, task.grid, task.guidance, learned.constants, learned.base)
    torch.manual_seed(task.train.seed)
    try:
        return SolverObjective(trained.model, target, task.distill)
    except ValueError as error:
        raise UsageError(
            f"{task.solver} at NFE {nfe} is not possible",
            str(error),
            "change --nfe, --distill.analytic-first or --distill.teacher",
        ) from None


def train_one(
    task: SolverTask, nfe: int, objective: SolverObjective, trained: TrainedModel, accelerator: Accelerator
) -> Run | None:
    """Distil at one budget and save."""
    path = solver_path(task.model, task.solver, task.grid, nfe)
    config = to_dict(replace(task, nfe=str(nfe)))
    run = Run(path, "solver", config)
    if accelerator.is_main_process:
        run = Run.create(path, "solver", config, task.overwrite, task.resume == "auto")
    accelerator.wait_for_everyone()
    items = run_teacher(objective, trained, accelerator.device)
    processes = accelerator.num_processes
    hooks = Hooks(export=lambda folder, averaged: export(folder, task, objective, trained, averaged, processes))
    result = fit(objective, items, task.train, run, accelerator, hooks, task.resume == "auto")
    if not accelerator.is_main_process:
        return None
    cost = objective.counter.evaluations * processes
    run.say(
        f"{task.solver} at NFE {nfe}: {cost:,} evaluations of training in {result.seconds:.0f} s; saved {run.checkpoint}"
    )
    return run


def export(
    folder: Path,
    task: SolverTask,
    objective: SolverObjective,
    trained: TrainedModel,
    averaged: dict[str, Tensor],
    processes: int,
) -> None:
    """The learned solver as evaluate.py reads it."""
    card = SolverCard(
        name=task.solver,
        grid_name=task.grid,
        schedule=trained.model.config.schedule,
        model_hash=trained.hash,
        nfe=objective.target.nfe,
        analytic_first=objective.solver.analytic_first,
        guidance=task.guidance,
        training_nfe=objective.counter.evaluations * processes,
        teacher=f"{objective.config.teacher}, {len(objective.teacher.grid) - 1} steps",
        base=objective.target.base,
        mode=objective.config.mode,
    )
    rule = copy.deepcopy(objective.rule).cpu().eval()
    rule.load_state_dict({k.removeprefix("rule."): v for k, v in averaged.items() if k.startswith("rule.")})
    LearnedSolver(card, objective.grid, rule).save(folder / "solver.safetensors")


if __name__ == "__main__":
    main(lambda arguments: train(resolve(SolverTask, recipes(), arguments)) and None)  # pyright: ignore[reportArgumentType]
