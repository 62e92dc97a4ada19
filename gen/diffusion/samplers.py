"""From names to samplers: which table, or which learned solver, a solver's name, a grid's name and a budget mean for a model.

Invalid combinations raise UsageError here, before the first sample is drawn, with what is possible instead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Literal, TypeVar

import torch
from torch import nn

from midway.gen.core import randomness
from midway.gen.core.errors import UsageError, nearest, raising
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.load import BEST, LEARNED, TrainedModel, load_solver, solver_path
from midway.gen.diffusion.model import EVERYWHERE, Guidance
from midway.gen.diffusion.sampler_checks import check_flags, check_guidance, check_jump
from midway.gen.diffusion.sampling import SamplingConfig, labels_of
from midway.samplers.adaptive import AdaptiveSampler
from midway.samplers.card import SolverCard
from midway.samplers.gits import FINE_STEPS, GITS, WarmUp, fitted_grid, warm_up
from midway.samplers.grids import NAMED, RHO_MAX, RHO_MIN, Grid, karras, named
from midway.samplers.jumps import JUMPS
from midway.samplers.prediction import Field
from midway.samplers.sample import ForwardCounter
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS, ddim
from midway.samplers.table import Table

ADAPTIVE = "rk45"
"""The sampler that chooses its steps, where a tolerance is given in place of a budget."""
LEARNED_ON = (*NAMED, GITS, BEST)
"""What a solver may have been learned on; `best`: whichever grid it began nearest to the teacher on."""

WARM_UP = 64
"""Trajectories that the grid `gits` is fitted to, of noise that no evaluated seed has."""
_fits: dict[object, "Fit"] = {}


@dataclass(frozen=True)
class SamplerConfig:
    """Everything about a sampler but its solver's name and its budget. UsageError for guidance that guides nothing."""

    grids: tuple[str, ...] = ("uniform", "logsnr", "karras")
    analytic_first: bool = False
    eta: float = 0.0
    rho_max: float = RHO_MAX
    rho_min: float = RHO_MIN
    guidance: float = 1.0
    interval: tuple[float, float] = EVERYWHERE
    """Noise levels rho that are guided."""
    weak: TrainedModel | None = None
    """The worse model of autoguidance."""
    batch_size: int = 256
    precision: Literal["no", "bf16"] = "no"
    graph: bool = False
    draw: ClassDraw | None = None
    """How seeds draw their classes; None: in turn."""
    tolerances: tuple[float, float] | None = None
    """Relative and absolute, of `ADAPTIVE`; None where samplers have a budget."""

    def __post_init__(self) -> None:
        check_flags(self.guidance, self.interval, self.weak is not None, (self.rho_max, self.rho_min))

    def sampling(self) -> SamplingConfig:
        """How samples are drawn; one object, which hashes the worse model once."""
        return self._sampling

    @cached_property
    def _sampling(self) -> SamplingConfig:
        guidance = Guidance(self.guidance, self.interval, None if self.weak is None else self.weak.model)
        return SamplingConfig(guidance, self.batch_size, self.precision, self.graph, self.draw)


Config = TypeVar("Config", bound=SamplerConfig)


def make_table(solver: str, grid: str, nfe: int, trained: TrainedModel, config: SamplerConfig) -> Table:
    """The table of a named solver at exactly `nfe` evaluations; UsageError for a name or a budget that does not exist."""
    if solver not in SOLVERS:
        raise UsageError(
            f"unknown solver '{solver}'",
            "it is not in the registry",
            nearest(solver, [*SOLVERS, ADAPTIVE, *LEARNED, *JUMPS]),
        )
    check_grid(grid)
    if config.eta and solver != "ddim":
        raise UsageError(
            f"--eta {config.eta} with {solver}", "only ddim has that parameter", "drop --eta, or use ddim alone"
        )
    return build_table(trained.model.schedule, solver, nfe, config, grid, trained)


def check_grid(name: str) -> None:
    """UsageError for a grid that is not in the registry, also for one given as numbers."""
    if name not in (*NAMED, GITS):
        why = "commands take grids by name; of numbers, `grids.explicit` makes one in Python"
        raise UsageError(f"unknown grid '{name}'", why, nearest(name, [*NAMED, GITS]))


def build_table(
    schedule: Schedule, solver: str, nfe: int, config: SamplerConfig, grid: str, trained: TrainedModel | None = None
) -> Table:
    """The table of a solver of the registry; only a fitted grid needs the model. UsageError for a budget that does not exist."""
    entry = SOLVERS[solver]

    def build(times: Grid) -> Table:
        return (
            ddim(schedule, times, config.analytic_first, config.eta)
            if config.eta
            else entry.on(schedule, times, config.analytic_first)
        )

    with raising(UsageError, f"{solver} on grid {grid} at NFE {nfe} is not possible", "change --nfe"):
        steps = entry.steps(nfe, config.analytic_first)
        if grid != GITS or trained is None:
            shift = 1.0 if trained is None else trained.model.shift
            return build(named(grid, schedule, steps, config.rho_max, config.rho_min, trained=shift))
        silent = build if not (entry.stochastic or config.eta) else partial(ddim, schedule)
        fit = _fit(trained, config.sampling().guidance, config.rho_max, config.rho_min)
        times, cost = fit.grid(steps, silent)
        table = build(times)
        fit.spent[table.hash] = cost
        return table


def fitting_nfe(trained: TrainedModel, config: SamplerConfig, sampler: Sampler) -> int:
    """Passes of samples through the networks that fitting the grid of a sampler costs, were it fitted alone."""
    config = within(config, trained)
    fit = _fit(trained, config.sampling().guidance, config.rho_max, config.rho_min)
    return fit.spent.get(sampler.hash, fit.nfe)


def gits_for(trained: TrainedModel, guidance: float, steps: int, build: Callable[[Grid], Table]) -> tuple[Grid, int]:
    """The grid `gits` of this many steps for the solver that `build` makes, and the passes through the network that it costs."""
    return _fit(trained, Guidance(guidance), RHO_MAX, RHO_MIN).grid(steps, build)


@dataclass(frozen=True)
class Fit:
    """Fine trajectories and their field; `nfe` passes of samples through the networks that they took.

    spent: those of whole fits, by the hash of the table that one was made for.
    """

    warm: WarmUp
    field: Field
    networks: tuple[nn.Module, ...]
    nfe: int
    spent: dict[str, int]

    def grid(self, steps: int, build: Callable[[Grid], Table]) -> tuple[Grid, int]:
        """`fitted_grid`, and what it costs with the fine trajectories."""
        with ForwardCounter(*self.networks) as counter:
            return fitted_grid(self.warm, self.field, steps, build), self.nfe + counter.evaluations


def _fit(trained: TrainedModel, guidance: Guidance, rho_max: float, rho_min: float) -> Fit:
    key = (trained.hash, guidance, rho_max, rho_min)
    if key not in _fits:
        model = trained.model
        device, order = next(model.parameters()).device, torch.arange(WARM_UP)
        networks = tuple(one.network for one in (model, guidance.weak) if one is not None)
        fine = karras(model.schedule, FINE_STEPS, rho_max, rho_min)
        noise = randomness.normal(0, "gits", 0, order, model.latent_shape).to(device)
        field = model.field(labels_of(order, model.classes, model.empty).to(device), guidance)
        with ForwardCounter(*networks) as counter:
            warm = warm_up(field, model.schedule, start_state(model.schedule, fine[0], noise), fine)
        _fits[key] = Fit(warm, field, networks, counter.evaluations, {})
    return _fits[key]


def is_reachable(solver: str, nfe: int, analytic_first: bool) -> bool:
    """Whether the solver can spend exactly `nfe` evaluations. True for any learned solver."""
    if solver not in SOLVERS:
        return True
    try:
        return SOLVERS[solver].steps(nfe, analytic_first) > 0
    except ValueError:
        return False


def within(config: Config, trained: TrainedModel) -> Config:
    """The same with grids that stay on noise levels that an imported network was trained on; all of them, for a model of ours."""
    if trained.model.config.inputs == "own":
        return config
    least, most = trained.model.noise_levels
    return replace(config, rho_max=min(config.rho_max, most), rho_min=max(config.rho_min, least))


def make_samplers(trained: TrainedModel, solver: str, nfe: int, config: SamplerConfig) -> dict[str, Sampler]:
    """One sampler per grid; of a learned solver, the grids that it was learned on. UsageError when there is none."""
    for grid in config.grids:
        check_grid(grid)
    check_guidance(config.sampling().guidance, config.weak, trained)
    config = within(config, trained)
    if trained.model.config.is_jump or solver in JUMPS:
        return _jumps(trained, solver, nfe, config)
    if solver == ADAPTIVE:
        return {config.grids[0]: _adaptive(trained.model.schedule, nfe, config)}
    if solver not in LEARNED:
        return {grid: make_table(solver, grid, nfe, trained, config) for grid in config.grids}
    found = {grid: load_solver(trained, solver, grid, nfe) for grid in LEARNED_ON}
    samplers: dict[str, Sampler] = {grid: sampler for grid, sampler in found.items() if sampler is not None}
    if not samplers:
        raise UsageError(
            f"{solver} at NFE {nfe} has not been learned for {trained.run.path}",
            "a learned solver belongs to one model, grid and budget",
            f"midway train solver {solver} --model {trained.run.place} --nfe {nfe}",
        )
    mismatches = {grid: _mismatch(sampler.card, solver, grid, config) for grid, sampler in samplers.items()}
    fitting = {grid: sampler for grid, sampler in samplers.items() if mismatches[grid] is None}
    if not fitting:
        raise next(mismatch for mismatch in mismatches.values() if mismatch is not None)
    return fitting


def _jumps(trained: TrainedModel, solver: str, nfe: int, config: SamplerConfig) -> dict[str, Sampler]:
    """The samplers of a model of average velocities, on grids of the registry. UsageError for any other of either."""
    check_jump(trained, solver, config.eta, config.analytic_first, GITS in config.grids, nfe)
    schedule, shift, build = trained.model.schedule, trained.model.shift, JUMPS[solver]
    ends = (config.rho_max, config.rho_min)
    with raising(UsageError, f"{solver} at NFE {nfe} is not possible", "change --nfe"):
        grids = {grid: named(grid, schedule, nfe, *ends, trained=shift) for grid in config.grids}
        if nfe == 1:  # every grid has the same two times
            grids = dict([next(iter(grids.items()))])
        return {grid: build(schedule, times) for grid, times in grids.items()}


def _adaptive(schedule: Schedule, nfe: int, config: SamplerConfig) -> AdaptiveSampler:
    """Between the ends of the first grid; UsageError where a budget is measured, and for flags that it does not have."""
    if config.tolerances is None:
        raise UsageError(
            f"{ADAPTIVE} at NFE {nfe}", "it has a tolerance, not a budget", "use it in midway sample alone"
        )
    for flag, given in (("--eta", config.eta), ("--analytic-first", config.analytic_first)):
        if given:
            raise UsageError(
                f"{flag} with {ADAPTIVE}", "it solves the ODE from its first evaluation on", f"drop {flag}"
            )
    times = karras(schedule, nfe, config.rho_max, config.rho_min)
    with raising(UsageError, f"{ADAPTIVE} on this model", "change --rtol or --atol"):
        return AdaptiveSampler(schedule, times, *config.tolerances)


def learned_for(trained: TrainedModel, budgets: Sequence[int]) -> list[str]:
    """Names of the solvers that were learned for this model at every budget, on any grid."""

    def exists(name: str, nfe: int) -> bool:
        paths = (solver_path(trained.run, name, grid, nfe) for grid in LEARNED_ON)
        return any((path / "config.yaml").exists() for path in paths)

    return [name for name in LEARNED if all(exists(name, nfe) for nfe in budgets)]


def _mismatch(card: SolverCard | None, solver: str, grid: str, config: SamplerConfig) -> UsageError | None:
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
