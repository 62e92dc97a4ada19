"""From names to plans: which table, or which learned solver, a solver's name, a grid's name and a budget mean for a model.

Everything that cannot be is refused here, before the first sample is drawn, with what is possible instead.
"""

from dataclasses import dataclass
from typing import Literal

from midway.gen.core.errors import UsageError, nearest
from midway.gen.diffusion.distill_table import BEST
from midway.gen.diffusion.field import EVERYWHERE, Guidance
from midway.gen.diffusion.fitted_grid import gits_grid
from midway.gen.diffusion.load import LEARNED, TrainedModel, card_of, load_solver
from midway.gen.diffusion.model import LatentModel
from midway.gen.diffusion.sampling import Plan, SamplingConfig
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS, RHO_MAX, RHO_MIN, Grid
from midway.samplers.learned_solver import SolverCard
from midway.samplers.solvers import SOLVERS, ddim, steps_for
from midway.samplers.table import Table

LEARNED_ON = (*GRIDS, BEST)
"""What a solver may have been learned on; `best`: whichever grid it began nearest to the teacher on."""


@dataclass(frozen=True)
class PlanConfig:
    """What a solver's name leaves open."""

    grids: tuple[str, ...] = ("uniform", "logsnr", "karras")
    analytic_first: bool = False
    eta: float = 0.0
    rho_max: float = RHO_MAX
    rho_min: float = RHO_MIN
    guidance: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    """Noise levels rho that are guided."""
    weak: LatentModel | None = None
    """The worse model of autoguidance."""
    batch_size: int = 256
    precision: Literal["no", "bf16"] = "no"
    graph: bool = False

    def sampling(self) -> SamplingConfig:
        """How samples are drawn."""
        guidance = Guidance(self.guidance, self.interval, self.weak)
        return SamplingConfig(guidance, self.batch_size, self.precision, self.graph)


def make_table(solver: str, grid: str, nfe: int, trained: TrainedModel, config: PlanConfig) -> Table:
    """The table of a named solver at exactly `nfe` evaluations; UsageError for a name or a budget that does not exist."""
    if solver not in SOLVERS:
        raise UsageError(
            f"unknown solver '{solver}'", "it is not in the registry", nearest(solver, [*SOLVERS, *LEARNED])
        )
    if config.eta and solver != "ddim":
        raise UsageError(
            f"--eta {config.eta} with {solver}", "only ddim has that parameter", "drop --eta, or use ddim alone"
        )
    entry, schedule = SOLVERS[solver], trained.model.schedule
    try:
        times = _times(grid, steps_for(entry.evaluations, nfe, config.analytic_first), trained, config)
        if config.eta:
            return ddim(schedule, times, config.analytic_first, config.eta)
        return entry.build(schedule, times, config.analytic_first)
    except ValueError as error:
        raise UsageError(f"{solver} on grid {grid} at NFE {nfe} is not possible", str(error), "change --nfe") from None


def _times(grid: str, steps: int, trained: TrainedModel, config: PlanConfig) -> Grid:
    if grid == GITS:
        return gits_grid(trained, steps, config.sampling().guidance, config.rho_max, config.rho_min)
    return GRIDS[grid](trained.model.schedule, steps, config.rho_max, config.rho_min)


def is_reachable(solver: str, nfe: int, analytic_first: bool) -> bool:
    """Whether the solver can spend exactly `nfe` evaluations. Of a learned solver nothing is said."""
    if solver not in SOLVERS:
        return True
    try:
        return steps_for(SOLVERS[solver].evaluations, nfe, analytic_first) > 0
    except ValueError:
        return False


def make_plans(trained: TrainedModel, solver: str, nfe: int, config: PlanConfig) -> dict[str, Plan]:
    """One plan per grid; of a learned solver, the grids that it was learned on. UsageError when there is none."""
    for grid in config.grids:
        if grid not in (*GRIDS, GITS):
            raise UsageError(f"unknown grid '{grid}'", "it is not in the registry", nearest(grid, [*GRIDS, GITS]))
    check_guidance(trained, config)
    if solver not in LEARNED:
        return {grid: make_table(solver, grid, nfe, trained, config) for grid in config.grids}
    found = {grid: load_solver(trained, solver, grid, nfe) for grid in LEARNED_ON}
    plans = {grid: plan for grid, plan in found.items() if plan is not None}
    if not plans:
        raise UsageError(
            f"{solver} at NFE {nfe} has not been learned for {trained.run.path}",
            "a learned solver belongs to one model, grid and budget",
            f"python scripts/train_solver.py {solver} --model {trained.run.path} --nfe {nfe}",
        )
    refusals = {grid: _refusal(card_of(plan), solver, grid, config) for grid, plan in plans.items()}
    fitting = {grid: plan for grid, plan in plans.items() if refusals[grid] is None}
    if not fitting:
        raise next(refusal for refusal in refusals.values() if refusal is not None)
    return fitting


def check_guidance(trained: TrainedModel, config: PlanConfig) -> None:
    """UsageError for guidance that this model cannot have."""
    low, high = config.interval
    if config.guidance == 1 and (config.weak is not None or config.interval != EVERYWHERE):
        raise UsageError(
            "--guide or --guidance-interval without --guidance",
            "at scale 1 nothing is guided",
            "give --guidance, say 2",
        )
    if not 0 <= low < high:
        raise UsageError(
            f"--guidance-interval {low} {high}",
            "it is two noise levels sigma / alpha",
            "give 0 <= low < high, say 0.3 5",
        )
    if config.guidance != 1 and config.weak is None and not trained.model.classes:
        raise UsageError(f"--guidance {config.guidance}", "this model was trained without classes", "drop --guidance")
    try:
        trained.model.check_guidance(Guidance(config.guidance, config.interval, config.weak))
    except ValueError as error:
        raise UsageError(
            "--guide names a model that cannot guide this one", str(error), "give a model of the same recipe"
        ) from None


def _refusal(card: SolverCard | None, solver: str, grid: str, config: PlanConfig) -> UsageError | None:
    """Why this learned solver cannot serve this sweep, None if it can."""
    assert card is not None
    if config.eta:
        return UsageError(
            f"--eta {config.eta} with {solver}", "only ddim has that parameter", "drop --eta, or use ddim alone"
        )
    if config.analytic_first and not card.analytic_first:
        return UsageError(
            f"{solver} on grid {grid} was learned without the analytic first step",
            "a learned solver cannot change it",
            "drop --analytic-first, or learn it again with --distill.analytic-first True",
        )
    if card.guidance != config.guidance or config.interval != EVERYWHERE or config.weak is not None:
        return UsageError(
            f"{solver} on grid {grid} was learned at guidance {card.guidance}, everywhere and without --guide",
            f"this run samples at guidance {config.guidance}"
            + (" under --guidance-interval or --guide" if config.guidance == card.guidance else ""),
            f"pass --guidance {card.guidance}, or learn it again",
        )
    return None
