"""Learn a solver for a trained model: midway train solver amed --model runs/digits-dit --nfe 6,8

`table` learns every number of a multistep solver and its grid, end to end. `amed` is AMED-Solver, `amed-plugin-<base>` AMED
inside another solver, with constants per step; with `-predictor` every sample has numbers of its own. `table-residual` adds a
small network to a learned table of the same budget (`-1x1`: the control with as many parameters), and `adasde` learns how much
noise each step adds.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator

from midway.gen.cards.solver import finish_solver
from midway.gen.core.checkpoints import split_step
from midway.gen.core.config import to_record
from midway.gen.core.errors import UsageError
from midway.gen.core.runs import Run, kind_of
from midway.gen.core.text import echo
from midway.gen.data.places import images_at, splits_of
from midway.gen.diffusion.load import TrainedModel, load_model, load_solver, solver_path
from midway.gen.diffusion.sampler_checks import check_guidance
from midway.gen.diffusion.samplers import SamplerConfig
from midway.gen.distillation.learning import Distillation
from midway.gen.distillation.residual import ResidualObjective
from midway.gen.flags.cli import Page, numbers, resolve
from midway.gen.priors.load import KIND, load_prior
from midway.gen.priors.rules import TrainedHead
from midway.gen.progress.bar import busy
from midway.gen.progress.finished import unfinished
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks, Items
from midway.gen.training.precision import resolve_precision
from midway.gen.trainings.head_vectors import hidden_vectors
from midway.gen.trainings.running import open_run
from midway.gen.trainings.solver_tasks import (
    MORE,
    SolverTask,
    check,
    check_head,
    labels_for,
    make_objective,
    on_best_grid,
    pairs_of,
    recipes,
    unread,
)
from midway.samplers.card import SolverCard
from midway.samplers.residual_solver import NAMES as RESIDUALS
from midway.samplers.residual_solver import ResidualTable, describe
from midway.samplers.table_facts import summary


@dataclass(frozen=True)
class Parts:
    """What is trained, on what."""

    model: Distillation
    items: Items


def train(task: SolverTask) -> list[Run]:
    """One run per budget, on the main process."""
    check(task)
    check_unused(task.train, task.solver in RESIDUALS)
    config, precision = resolve_precision(task.train)
    task = replace(task, train=config)
    accelerator = make_accelerator(task.train, split_step(task.model)[0])
    trained = load(task, accelerator)
    if accelerator.is_main_process:
        echo(*unfinished(trained.run))
    objectives = {nfe: make_objective(task, nfe, trained) for nfe in numbers(task.nfe, "--nfe")}  # all, before any run
    shared: dict[Any, Any] = {}
    runs = [
        train_one(task, nfe, objective, trained, accelerator, shared, precision)
        for nfe, objective in objectives.items()
    ]
    return [run for run in runs if run is not None]


def load(task: SolverTask, accelerator: Accelerator) -> TrainedModel | TrainedHead:
    """The model, or the head of a prior; UsageError for a model that jumps, for codes, and for guidance that it cannot have."""
    if kind_of(task.model) == KIND:
        return check_head(task, load_prior(task.model, accelerator.device))
    trained = load_model(task.model, accelerator.device)
    if trained.model.config.is_jump:
        raise UsageError(
            f"a solver for {task.model}",
            "solvers approximate what this model was trained to do in one evaluation",
            "sample it with --solver jump, or learn a solver for a flow model",
        )
    check_guidance(SamplerConfig(guidance=task.guidance).sampling().guidance, None, trained)
    return trained


def make_parts(task: SolverTask, accelerator: Accelerator) -> Parts:
    """The objective at the one budget of `task`, warm-started, and its teacher's trajectories."""
    trained = load(task, accelerator)
    (nfe,) = numbers(task.nfe, "--nfe")
    shared: dict[Any, Any] = {}
    objective, _ = on_best_grid(task, nfe, make_objective(task, nfe, trained), trained, accelerator.device, shared)
    return Parts(objective, run_teacher(task, objective, trained, accelerator.device, shared))


def run_teacher(
    task: SolverTask,
    objective: Distillation,
    trained: TrainedModel | TrainedHead,
    device: torch.device,
    shared: dict[Any, Any],
) -> Items:
    """Run the teacher, and start from the best of a few; `shared` keeps what the next budget can use."""
    count, first = pairs_of(task)
    if isinstance(trained, TrainedHead):
        prior = trained.prior
        train = splits_of(trained.run, images_at(trained.run)).train
        labels = hidden_vectors(prior, train.images, train.labels, first, count, task.guidance != 1)
    else:
        labels = labels_for(task, trained.model, device)
    take = objective.to(device).prepare(labels, shared)
    return Items(lambda items: take(items.to(device)), count, f"teacher of {trained.hash}")


def train_one(
    task: SolverTask,
    nfe: int,
    objective: Distillation,
    trained: TrainedModel | TrainedHead,
    accelerator: Accelerator,
    shared: dict[Any, Any],
    precision: tuple[str, ...],
) -> Run | None:
    """Distil at one budget and save."""
    path = solver_path(trained.run, task.solver, task.grid, nfe)
    config = to_record(replace(task, nfe=str(nfe)))
    with open_run(task, path, "solver", config, accelerator, *precision) as run:
        with busy(f"trying grids and running the teacher of {task.solver} at NFE {nfe}"):
            objective, chosen = on_best_grid(task, nfe, objective, trained, accelerator.device, shared)
            items = run_teacher(task, objective, trained, accelerator.device, shared)
        if chosen and run.is_new and accelerator.is_main_process:
            run.say(chosen)
        processes = accelerator.num_processes
        hooks = Hooks(
            export=lambda folder, averaged: objective.save(
                folder / "solver.safetensors", averaged, card_for(task, nfe, objective, trained, processes)
            ),
            validate=(lambda step: objective.validate()) if isinstance(objective, ResidualObjective) else None,
        )
        result = fit(objective, items, task.train, run, accelerator, hooks, task.resume == "auto")
        if not accelerator.is_main_process:
            return None
        cost = objective.counter.evaluations * processes
        finished = load_solver(trained, task.solver, task.grid, nfe)
        if finished is not None:
            run.say(f"card  {finish_solver(run, finished, task.license) / 'README.md'}")
        run.say(
            f"{task.solver} at NFE {nfe}: {cost:,} evaluations of training in {result.seconds:.0f} s; saved {run.checkpoint}"
        )
        learned = load_solver(trained, task.solver, task.grid, nfe)
        if learned is not None and learned.table is not None:
            run.say(f"its table: {summary(learned.table, trained.model.schedule)}")
        if isinstance(objective, ResidualObjective) and isinstance(trained, TrainedModel):
            report_residual(task, nfe, objective, trained, run)
        return run


def report_residual(task: SolverTask, nfe: int, objective: ResidualObjective, trained: TrainedModel, run: Run) -> None:
    """What it costs, and what it does on pairs that nothing was trained on."""
    sampler = load_solver(trained, task.solver, task.grid, nfe)
    assert isinstance(sampler, ResidualTable)
    found = objective.on_held_out(sampler)
    run.say(f"{describe(sampler.residual)}; a sample costs {sampler.costs.describe(nfe)}")
    run.say(
        f"{task.residual.held_out} held-out pairs: RMSE {found.rmse:.4f}, table alone {found.base:.4f}; "
        f"{100 * found.outside:.0f} % of what it adds is outside the span of the start and the clean estimates"
    )


def card_for(
    task: SolverTask, nfe: int, objective: Distillation, trained: TrainedModel | TrainedHead, processes: int
) -> SolverCard:
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


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(resolve(SolverTask, recipes(), arguments, Page("SOLVER", MORE), unread))  # pyright: ignore[reportArgumentType]
