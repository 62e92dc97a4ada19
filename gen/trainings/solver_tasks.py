"""What `midway train solver` learns: its flags and defaults, their checks, and the objective of one budget on its grid."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro

from midway.gen.core.config import PER_CALL
from midway.gen.core.errors import UsageError, nearest, raising
from midway.gen.diffusion.load import BEST, LEARNED, TABLE, TrainedModel, load_solver
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.sampling import labels_of
from midway.gen.distillation.amed import TRIED, DistillConfig, SolverObjective, SolverTarget, objective_for
from midway.gen.distillation.learning import Distillation, Lesson, learn
from midway.gen.distillation.noise import NoiseConfig, NoiseObjective
from midway.gen.distillation.residual import ResidualConfig, ResidualObjective
from midway.gen.distillation.table import TableConfig, TableObjective, TableTarget, make_distance
from midway.gen.flags.cli import Flat, with_text
from midway.gen.flags.tasks import Resume
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.rules import TrainedHead, head_of
from midway.gen.training.config import TrainConfig
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS, NAMED
from midway.samplers.guidance_checks import why_unguided
from midway.samplers.hub import LICENSE
from midway.samplers.learned_solver import EARLIER
from midway.samplers.learned_solver import LEARNED as AMED
from midway.samplers.residual_solver import NAMES as RESIDUALS
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import NOISY, Table


@dataclass(frozen=True)
class SolverTask:
    """Learn a solver for one model: one per budget, stored with the model."""

    model: Path
    """Run directory of the latent model, or of a continuous prior: a table for its head."""
    solver: str = "amed"
    """table (all numbers of a multistep solver), amed (constants per step), or AMED in another solver: amed-plugin-<base> with
    base euler, dpm2, ipndm3, ipndm4, dpmpp2m or dpmpp3m. AMED with -predictor has numbers per sample. Also the first argument."""
    nfe: str = "6"
    """Budgets, comma-separated, of a prior those of its head, a token; at odd ones AMED takes the first slope analytically."""
    grid: str = "karras"
    """Grid of the learned solver; gits is fitted for it. best, the default of amed and plugins: that of gits, vp and logsnr on
    which a quarter of the steps leads nearest to the teacher. A table begins on this grid, or on the best of all, and learns its
    own."""
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
    license: str = LICENSE
    """Licence of the solver, for the card of the folder to share."""
    overwrite: bool = field(default=False, metadata=PER_CALL)
    """Replace solvers that were already learned."""
    resume: Resume = field(default="no", metadata=PER_CALL)
    """auto: go on with solvers that were begun, from their newest checkpoints."""


TEXTS = {
    TABLE: "All numbers of a multistep solver and its grid, learned end to end.",
    "table-residual": "A small network beside a learned table of the same budget.",
    "table-residual-1x1": "The control of table-residual: as many parameters, without a look at neighbours.",
    NOISY: "How much noise each step adds, learned by a distance of distributions.",
}
MORE = "midway train solver SOLVER --help lists what that solver reads besides."
TABLE_TRAIN = TrainConfig(steps=600, batch_size=16, lr=0.005, warmup=0, decay="cosine", ema=0, clip=1.0, log_every=50)
NOISE_TRAIN = replace(TABLE_TRAIN, steps=300, batch_size=64)
RESIDUAL_TRAIN = replace(TABLE_TRAIN, steps=800, batch_size=32, lr=0.001, warmup=50, validate_every=50)


def recipes() -> dict[str, Callable[[], SolverTask]]:
    """The solver's name is the first argument."""
    made = {name: partial(SolverTask, model=tyro.MISSING, solver=name, grid=BEST) for name in (TABLE, *AMED)}
    made[TABLE].keywords["train"] = TABLE_TRAIN
    noisy = partial(SolverTask, tyro.MISSING, NOISY, "5", "vp", train=NOISE_TRAIN)
    found = {TABLE: made[TABLE], **{name: partial(residual_task, name) for name in RESIDUALS}, NOISY: noisy, **made}
    return {
        name: with_text("" if name in EARLIER else TEXTS.get(name) or _amed_text(name), make)
        for name, make in found.items()
    }


def _amed_text(name: str) -> str:
    learned = AMED[name]
    inside = "AMED-Solver" if learned.base == "none" else f"AMED inside {learned.base}"
    return f"{inside}, {'constants per step' if learned.constants else 'numbers predicted for every sample'}."


def unread(task: SolverTask | None) -> dict[str, str]:
    """The groups of flags that this solver does not read, and why; without one, all that only some do."""
    groups = dict.fromkeys(("distill", "table", "residual", "noise"), "some solvers read it")
    if task is not None:
        why = f"{task.solver} does not read it"
        own = ("noise",) if task.solver == NOISY else ("table",) if task.solver == TABLE else ("distill",)
        own = ("table", "residual") if task.solver in RESIDUALS else own
        groups = {name: why for name in groups if name not in own}
    return {f"{name}.": why for name, why in groups.items()}


def residual_task(name: str) -> SolverTask:
    """More pairs than a table: their number is what its error on others depends on."""
    pairs = TableConfig(pairs=4096)
    return SolverTask(model=tyro.MISSING, solver=name, grid=BEST, table=pairs, train=RESIDUAL_TRAIN)


def check_head(task: SolverTask, trained: TrainedPrior) -> TrainedHead:
    """The head of a prior; UsageError for a prior over codes, and for what a table of tokens cannot be learned by."""
    head = head_of(trained)
    if task.solver != TABLE:
        raise UsageError(
            f"{task.solver} for {task.model}",
            "it is a continuous prior, and only tables are learned for its head",
            f"midway train solver table --model {task.model}",
        )
    if task.table.loss == "lpips":
        raise UsageError("--table.loss lpips", "the head draws single tokens, which are no images", "use l2 or l1")
    prior = trained.prior
    lacking = why_unguided(prior.classes, len(prior.empty), prior.config.label_dropout)
    if task.guidance != 1 and lacking:
        raise UsageError(f"--guidance {task.guidance:g} on {task.model}", f"it {lacking}", "drop --guidance")
    return head


def labels_for(task: SolverTask, model: LatentModel, device: torch.device) -> torch.Tensor:
    """Of the teacher's results, those that are held out behind those that are trained on."""
    count, first = pairs_of(task)
    held_out = task.residual.held_out if task.solver in RESIDUALS else 0
    return labels_of(torch.arange(first, first + count + held_out), model.classes, model.empty).to(device)


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
    return tuple(GRIDS) if solver == NOISY else (*NAMED, GITS, BEST)


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


def make_objective(task: SolverTask, nfe: int, trained: TrainedModel | TrainedHead) -> Distillation:
    """The objective of one budget; UsageError for a budget that does not exist."""
    torch.manual_seed(task.train.seed)
    fix = "change --nfe, --distill.analytic-first or --distill.teacher"
    with raising(UsageError, f"{task.solver} at NFE {nfe} is not possible", fix):
        if task.solver == TABLE:
            distance = make_distance(task.table, trained.tokenizer)
            return TableObjective(trained.model, TableTarget(nfe, task.grid, task.guidance), task.table, distance)
        assert isinstance(trained, TrainedModel)
        if task.solver == NOISY:
            return NoiseObjective(trained.model, nfe, task.grid, task.guidance, task.noise)
        if task.solver in RESIDUALS:
            distance = make_distance(task.table, trained.tokenizer)
            base = base_of(task, nfe, trained)
            return ResidualObjective(
                trained.model, task.solver, base, task.guidance, task.residual, task.table, distance
            )
        learned = AMED[task.solver]
        grid = tried_on(task)[0] if task.grid == BEST else task.grid  # the first, until one is chosen
        target = SolverTarget(nfe, grid, task.guidance, learned.constants, learned.base)
        return objective_for(trained, target, task.distill)


def base_of(task: SolverTask, nfe: int, trained: TrainedModel) -> Table:
    """The learned table that a residual stands beside; UsageError if there is none, or it is of another guidance."""
    base = load_solver(trained, TABLE, task.grid, nfe)
    if not isinstance(base, Table) or base.card is None or base.card.guidance != task.guidance:
        raise UsageError(
            f"{task.solver} at NFE {nfe} has no learned table to stand beside",
            f"{trained.run.path} has none on grid {task.grid} at guidance {task.guidance}",
            f"midway train solver table --model {trained.run.place} --nfe {nfe} --guidance {task.guidance}",
        )
    return base


def on_best_grid(
    task: SolverTask,
    nfe: int,
    objective: Distillation,
    trained: TrainedModel | TrainedHead,
    device: torch.device,
    shared: dict[Any, Any],
) -> tuple[Distillation, str]:
    """AMED on the grid of `TRIED` where a quarter of the steps leads nearest to the teacher, new, and a line about the choice.

    Its counter has the evaluations of all trials. Other solvers, and other grids, stay as they are.
    """
    if not isinstance(objective, SolverObjective) or task.grid != BEST:
        return objective, ""
    assert isinstance(trained, TrainedModel)
    errors, spent = dict[str, float](), 0
    lesson = Lesson(task.train.steps // 4, task.train.batch_size, task.train.lr, task.train.clip, task.train.seed)
    for grid in tried_on(task):
        trial = make_objective(replace(task, grid=grid), nfe, trained)
        assert isinstance(trial, SolverObjective)
        count = task.distill.trajectories
        take = trial.to(device).prepare(labels_for(task, trained.model, device), shared)
        learn(trial, take, count, replace(lesson, batch=min(lesson.batch, count)))
        errors[grid] = trial.end_rmse(take, count)
        spent += trial.counter.evaluations - trial.taught
    chosen = min(errors, key=lambda grid: errors[grid])
    found = make_objective(replace(task, grid=chosen), nfe, trained)
    found.counter.evaluations = spent  # a fitted grid's, too
    listed = ", ".join(f"{grid} {error:.4g}" for grid, error in errors.items())
    return (
        found,
        f"grid of {task.solver} at NFE {nfe}: {chosen}; RMSE to the teacher after {lesson.steps} steps: {listed}",
    )


def tried_on(task: SolverTask) -> tuple[str, ...]:
    """The grids of `TRIED` that this task can use."""
    return tuple(grid for grid in TRIED if grid != GITS or task.distill.mode == "end_to_end")
