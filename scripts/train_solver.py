"""Learn a solver for a trained model: python scripts/train_solver.py amed --model runs/digits-dit --nfe 6,8

`table` learns every number of a multistep solver and its grid, end to end. `amed` is AMED-Solver, `amed-plugin-<base>` AMED
inside another solver, with constants per step; with `-predictor` every sample has numbers of its own. `table-residual` adds a
small network to a learned table of the same budget (`-1x1`: the control with as many parameters), and `adasde` learns how much
noise each step adds.
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
from midway.gen.diffusion.distill_noise import NoiseConfig, NoiseObjective
from midway.gen.diffusion.distill_residual import ResidualConfig, ResidualObjective
from midway.gen.diffusion.distill_table import TableConfig, TableObjective, TableTarget, make_distance
from midway.gen.diffusion.distillation import Distillation
from midway.gen.diffusion.load import BEST, LEARNED, TABLE, TrainedModel, load_model, load_solver, solver_path
from midway.gen.diffusion.samplers import SamplerConfig, check_guidance
from midway.gen.diffusion.sampling import labels_of
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks, Items
from midway.gen.training.precision import resolve_precision
from midway.samplers.card import SolverCard
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS, NAMED
from midway.samplers.learned_solver import LEARNED as AMED
from midway.samplers.residual_solver import NAMES as RESIDUALS
from midway.samplers.residual_solver import ResidualTable, describe
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import NOISY, Table
from midway.samplers.table_facts import summary
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
    """Grid of the learned solver; gits, which amed and plugins take by default, is fitted for it. A table begins there, or on the
    best of all (best), and learns its own."""
    guidance: float = 1.0
    """Classifier-free guidance scale that the solver is learned for."""
    distill: DistillConfig = field(default_factory=DistillConfig)
    """How AMED is distilled."""
    table: TableConfig = field(default_factory=TableConfig)
    """How a table is learned, and the teacher and pairs of a residual."""
    residual: ResidualConfig = field(default_factory=ResidualConfig)
    """How a residual beside a learned table is made."""
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    """How the solver with noise is learned."""
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
NOISE_TRAIN = replace(TABLE_TRAIN, steps=300, batch_size=64)
RESIDUAL_TRAIN = replace(TABLE_TRAIN, steps=800, batch_size=32, lr=0.001, warmup=50, validate_every=50)


def recipes() -> dict[str, Callable[[], SolverTask]]:
    """The solver's name is the first argument."""
    amed = {name: (lambda name=name: SolverTask(model=tyro.MISSING, solver=name, grid=GITS)) for name in AMED}
    table = {TABLE: lambda: SolverTask(model=tyro.MISSING, solver=TABLE, grid=BEST, train=TABLE_TRAIN)}
    residual = {name: (lambda name=name: residual_task(name)) for name in RESIDUALS}
    return {**table, **residual, NOISY: lambda: SolverTask(tyro.MISSING, NOISY, "5", "vp", train=NOISE_TRAIN), **amed}


def residual_task(name: str) -> SolverTask:
    """More pairs than a table: their number is what its error on others depends on."""
    pairs = TableConfig(pairs=4096)
    return SolverTask(model=tyro.MISSING, solver=name, grid=BEST, table=pairs, train=RESIDUAL_TRAIN)


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
    count, first = pairs_of(task)
    held_out = task.residual.held_out if task.solver in RESIDUALS else 0
    objective.to(device)
    model = trained.model
    labels = labels_of(torch.arange(first, first + count + held_out), model.classes, model.empty).to(device)
    take = objective.prepare(labels, shared)
    return Items(lambda items: take(items.to(device)), count, f"teacher of {trained.hash}")


def pairs_of(task: SolverTask) -> tuple[int, int]:
    """How many of the teacher's results are trained on, and the first one's number."""
    if task.solver == NOISY:
        return task.noise.trajectories, task.noise.seed
    if task.solver in (TABLE, *RESIDUALS):
        return task.table.pairs, task.table.seed
    return task.distill.trajectories, task.distill.seed


def grids_of(solver: str) -> tuple[str, ...]:
    """What a solver of this name can be learned on, or begin on."""
    if solver in (TABLE, *RESIDUALS):
        return (*GRIDS, BEST)
    return tuple(GRIDS) if solver == NOISY else (*NAMED, GITS)


def check(task: SolverTask) -> None:
    """UsageError for unknown names, before anything is loaded."""
    for what, name, known in (
        ("solver", task.solver, LEARNED),
        ("grid", task.grid, grids_of(task.solver)),
        ("teacher", task.distill.teacher, SOLVERS),
    ):
        if name not in known:
            raise UsageError(f"unknown {what} '{name}'", "it is not in the registry", nearest(name, known))
    if task.solver in AMED and task.grid == GITS and task.distill.mode == "per_step":
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
        if task.solver == NOISY:
            return NoiseObjective(trained.model, nfe, task.grid, task.guidance, task.noise)
        if task.solver in RESIDUALS:
            distance = make_distance(task.table, trained.tokenizer)
            base = base_of(task, nfe, trained)
            return ResidualObjective(
                trained.model, task.solver, base, task.guidance, task.residual, task.table, distance
            )
        learned = AMED[task.solver]
        target = SolverTarget(nfe, task.grid, task.guidance, learned.constants, learned.base)
        return objective_for(trained, target, task.distill)


def base_of(task: SolverTask, nfe: int, trained: TrainedModel) -> Table:
    """The learned table that a residual stands beside; UsageError if there is none, or it is of another guidance."""
    base = load_solver(trained, TABLE, task.grid, nfe)
    if not isinstance(base, Table) or base.card is None or base.card.guidance != task.guidance:
        raise UsageError(
            f"{task.solver} at NFE {nfe} has no learned table to stand beside",
            f"{trained.run.path} has none on grid {task.grid} at guidance {task.guidance}",
            f"python scripts/train_solver.py table --model {trained.run.path} --nfe {nfe} --guidance {task.guidance}",
        )
    return base


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
            ),
            validate=(lambda step: objective.validate()) if isinstance(objective, ResidualObjective) else None,
        )
        result = fit(objective, items, task.train, run, accelerator, hooks, task.resume == "auto")
        if not accelerator.is_main_process:
            return None
        cost = objective.counter.evaluations * processes
        run.say(
            f"{task.solver} at NFE {nfe}: {cost:,} evaluations of training in {result.seconds:.0f} s; saved {run.checkpoint}"
        )
        learned = load_solver(trained, task.solver, task.grid, nfe)
        if learned is not None and learned.table is not None:
            run.say(f"its table: {summary(learned.table, trained.model.schedule)}")
        if isinstance(objective, ResidualObjective):
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
