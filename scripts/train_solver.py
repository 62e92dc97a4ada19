"""Learn a solver for a trained model: python scripts/train_solver.py amed --model runs/digits-dit --nfe 6,8

`table` learns every number of a multistep solver and its grid, end to end. `amed` is AMED-Solver, `amed-plugin-<base>` AMED
inside another solver, with constants per step; with `-predictor` every sample has numbers of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from accelerate import Accelerator

from cli import Flat, main, numbers, resolve
from midway.gen.core.config import PER_CALL, to_dict
from midway.gen.core.errors import UsageError, nearest, raising
from midway.gen.core.runs import Run
from midway.gen.diffusion.distill_amed import DistillConfig, SolverTarget, objective_for
from midway.gen.diffusion.distill_table import TableConfig, TableObjective, TableTarget, make_distance
from midway.gen.diffusion.distillation import Distillation
from midway.gen.diffusion.load import BEST, LEARNED, TABLE, TrainedModel, load_model, solver_path
from midway.gen.diffusion.samplers import SamplerConfig, check_guidance
from midway.gen.diffusion.sampling import labels_of
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks, Items
from midway.gen.training.precision import resolve_precision
from midway.samplers.card import SolverCard
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS
from midway.samplers.learned_solver import LEARNED as AMED
from midway.samplers.solvers import SOLVERS
from running import open_run
from tasks import Resume


@dataclass(frozen=True)
class SolverTask:
    """Learn a solver for one model: one per budget, stored with the model."""

    model: Path
    """Run directory of the latent model."""
    solver: str = "amed"
    """table (all numbers of a multistep solver), amed (constants per step), or AMED in another solver: amed-plugin-<base> with
    base euler, dpm2, ipndm3, ipndm4, dpmpp2m or dpmpp3m. AMED with -predictor has numbers per sample. Also the first argument."""
    nfe: str = "6"
    """Budgets, comma-separated; at odd ones AMED takes the first slope analytically."""
    grid: str = "karras"
    """Grid of the learned solver, also gits, fitted for it; a table begins there, or on the best of all (best), and learns
    its own."""
    guidance: float = 1.0
    """Classifier-free guidance scale that the solver is learned for."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """How AMED is distilled."""
    table: TableConfig = field(default_factory=TableConfig)
    """How a table is learned."""
    train: Annotated[TrainConfig, Flat] = field(
        default_factory=lambda: TrainConfig(
            steps=80, batch_size=64, lr=0.01, warmup=0, decay="cosine", ema=0, clip=1e6, log_every=20
        )
    )
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace solvers that were already learned."""
    resume: Resume = field(default="no", metadata=PER_CALL)
    """auto: go on with solvers that were begun, from their newest checkpoints."""


TABLE_TRAIN = TrainConfig(steps=600, batch_size=16, lr=0.005, warmup=0, decay="cosine", ema=0, clip=1.0, log_every=50)


def recipes() -> dict[str, Callable[[], SolverTask]]:
    """The solver's name is the first argument."""
    amed = {name: (lambda name=name: SolverTask(model=tyro.MISSING, solver=name)) for name in AMED}
    return {TABLE: lambda: SolverTask(model=tyro.MISSING, solver=TABLE, grid=BEST, train=TABLE_TRAIN), **amed}


@dataclass(frozen=True)
class Parts:
    """What is trained, on what."""

    model: Distillation
    items: Items


def train(task: SolverTask) -> list[Run]:
    """One run per budget, on the main process."""
    check(task)
    check_unused(task.train)
    config, precision = resolve_precision(task.train)
    task = replace(task, train=config)
    accelerator = make_accelerator(task.train, task.model)
    trained = load(task, accelerator)
    objectives = {nfe: make_objective(task, nfe, trained) for nfe in numbers(task.nfe, "--nfe")}  # all, before any run
    shared: dict[Any, Any] = {}
    runs = [
        train_one(task, nfe, objective, trained, accelerator, shared, precision)
        for nfe, objective in objectives.items()
    ]
    return [run for run in runs if run is not None]


def load(task: SolverTask, accelerator: Accelerator) -> TrainedModel:
    """The model; UsageError for guidance that it cannot have."""
    trained = load_model(task.model, accelerator.device)
    check_guidance(SamplerConfig(guidance=task.guidance), trained)
    return trained


def make_parts(task: SolverTask, accelerator: Accelerator) -> Parts:
    """The objective at the one budget of `task`, warm-started, and its teacher's trajectories."""
    trained = load(task, accelerator)
    (nfe,) = numbers(task.nfe, "--nfe")
    objective = make_objective(task, nfe, trained)
    return Parts(objective, run_teacher(task, objective, trained, accelerator.device, {}))


def run_teacher(
    task: SolverTask, objective: Distillation, trained: TrainedModel, device: torch.device, shared: dict[Any, Any]
) -> Items:
    """Run the teacher, and start from the best of a few; `shared` keeps what the next budget can use."""
    count, first = (
        (task.table.pairs, task.table.seed) if task.solver == TABLE else (task.distill.trajectories, task.distill.seed)
    )
    objective.to(device)
    model = trained.model
    labels = labels_of(torch.arange(first, first + count), model.classes, model.empty).to(device)
    take = objective.prepare(labels, shared)
    return Items(lambda items: take(items.to(device)), count, f"teacher of {trained.hash}")


def check(task: SolverTask) -> None:
    """UsageError for unknown names, before anything is loaded."""
    for what, name, known in (
        ("solver", task.solver, LEARNED),
        ("grid", task.grid, (*GRIDS, BEST) if task.solver == TABLE else (*GRIDS, GITS)),
        ("teacher", task.distill.teacher, SOLVERS),
    ):
        if name not in known:
            raise UsageError(f"unknown {what} '{name}'", "it is not in the registry", nearest(name, known))
    if task.solver != TABLE and task.grid not in GRIDS and task.distill.mode == "per_step":
        raise UsageError(
            f"--grid {task.grid} with --distill.mode per_step",
            "per step the teacher passes the student's nodes, on a rule that is refined; a fitted grid has none",
            f"use --distill.mode end_to_end, the default, or one of {', '.join(GRIDS)}",
        )


def make_objective(task: SolverTask, nfe: int, trained: TrainedModel) -> Distillation:
    """The objective of one budget; UsageError for a budget that does not exist."""
    torch.manual_seed(task.train.seed)
    fix = "change --nfe, --distill.analytic-first or --distill.teacher"
    with raising(UsageError, f"{task.solver} at NFE {nfe} is not possible", fix):
        if task.solver == TABLE:
            distance = make_distance(task.table, trained.tokenizer)
            return TableObjective(trained.model, TableTarget(nfe, task.grid, task.guidance), task.table, distance)
        learned = AMED[task.solver]
        target = SolverTarget(nfe, task.grid, task.guidance, learned.constants, learned.base)
        return objective_for(trained, target, task.distill)


def train_one(
    task: SolverTask,
    nfe: int,
    objective: Distillation,
    trained: TrainedModel,
    accelerator: Accelerator,
    shared: dict[Any, Any],
    precision: tuple[str, ...],
) -> Run | None:
    """Distil at one budget and save."""
    path = solver_path(task.model, task.solver, task.grid, nfe)
    config = to_dict(replace(task, nfe=str(nfe)))
    with open_run(task, path, "solver", config, accelerator, *precision) as run:
        items = run_teacher(task, objective, trained, accelerator.device, shared)
        processes = accelerator.num_processes
        hooks = Hooks(
            export=lambda folder, averaged: objective.save(
                folder / "solver.safetensors", averaged, card_for(task, nfe, objective, trained, processes)
            )
        )
        result = fit(objective, items, task.train, run, accelerator, hooks, task.resume == "auto")
        if not accelerator.is_main_process:
            return None
        cost = objective.counter.evaluations * processes
        run.say(
            f"{task.solver} at NFE {nfe}: {cost:,} evaluations of training in {result.seconds:.0f} s; saved {run.checkpoint}"
        )
        return run


def card_for(task: SolverTask, nfe: int, objective: Distillation, trained: TrainedModel, processes: int) -> SolverCard:
    """What the learned solver belongs to and what it cost."""
    return SolverCard(
        name=task.solver,
        grid_name=task.grid,
        schedule=trained.model.config.schedule,
        model_hash=trained.hash,
        nfe=nfe,
        guidance=task.guidance,
        training_nfe=objective.counter.evaluations * processes,
        **objective.facts(),
    )


if __name__ == "__main__":
    main(lambda arguments: train(resolve(SolverTask, recipes(), arguments)) and None)  # pyright: ignore[reportArgumentType]
