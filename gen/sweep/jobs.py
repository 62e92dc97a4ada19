"""What a sweep measures, before anything is sampled: one `Job` for every (solver, grid, budget).

Every sampler is built here, so that an impossible combination raises an error before anything is sampled. Of several grids one
is chosen before the measurement (choice.py). Jobs of baselines and external images are in comparisons.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import EVERYWHERE
from midway.gen.diffusion.samplers import SamplerConfig, is_reachable
from midway.gen.evaluation.records import SOLVER, Kind
from midway.gen.evaluation.sources import UNKNOWN, EvaluatedModel, ModelFacts, SampleSource
from midway.gen.sweep.store import PART, Seeds
from midway.samplers.gits import GITS
from midway.samplers.guidance_checks import check_interval, check_scale
from midway.samplers.residual_solver import ResidualTable
from midway.samplers.sampler import Sampler
from midway.samplers.solvers import SOLVERS

EXACT_NFE = 48
"""Evaluations of the exact solution."""


@dataclass(frozen=True)
class GuidanceSearch:
    """Guidance among which a sweep chooses (guidance.py). ValueError for none, and for what guides nothing."""

    scales: tuple[float, ...]
    """1 is no guidance."""
    intervals: tuple[tuple[float, float], ...] = (EVERYWHERE,)
    """Noise levels rho with low < rho <= high are guided."""
    weak: TrainedModel | None = None
    """The worse model of autoguidance, beside the missing class."""

    def __post_init__(self) -> None:
        for scale in self.scales:
            check_scale(scale)
        for interval in self.intervals:
            check_interval(*interval)
        if not self.scales or not self.intervals:
            raise ValueError("no scale or no interval is named: give one or more of each")


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SamplerConfig):
    """What to measure."""

    solvers: tuple[str, ...] = ("euler", "ddim", "heun", "dpm2", "dpmpp2m")
    nfe: tuple[int, ...] = (4, 6, 8, 10, 20)
    n: int
    """Images of a block."""
    blocks: int = 4
    first_seed: int = 0
    exact_nfe: int = EXACT_NFE
    """Evaluations of the exact solution; 0: leave it out, and all that is compared with it."""
    choice: int = 128
    """Seeds on which grids are chosen; they follow those that are measured."""
    metrics: tuple[str, ...] = ("kid", "sliced")
    """Beside the Fréchet distance: names in metrics.METRICS."""
    overlap: bool = False
    """Decode and look at images while the next are sampled; times then overlap too."""
    skip: bool = False
    """Leave out budgets that a solver cannot reach, instead of raising an error."""
    search: GuidanceSearch | None = None
    """Choose the guidance of every solver and budget, in place of `guidance`, `interval` and `weak`."""

    @property
    def seeds(self) -> Seeds:
        """All seeds."""
        return Seeds(self.first_seed, self.n, self.blocks)

    @property
    def choice_seeds(self) -> Seeds:
        """Those on which grids are chosen, none of which is measured."""
        return Seeds(self.first_seed + self.n * self.blocks, self.choice, 1)

    def check(self) -> None:
        """UsageError for numbers that measure nothing."""
        if self.n < 2 or self.blocks < 1 or not 1 <= self.batch_size <= PART:
            raise UsageError(
                f"n {self.n}, blocks {self.blocks}, batch size {self.batch_size}",
                f"a distance needs 2 images in 1 block, and a batch is at most what is saved at once, {PART}",
                "change --n, --blocks or --batch-size",
            )
        if self.choice < 2:
            raise UsageError(f"--choice-seeds {self.choice}", "grids are chosen on several", "pass at least 2, say 128")


@dataclass(frozen=True)
class Job:
    """One measurement to be made; `classes` of the seeds' labels, 0 without, of which `empty` are not drawn, by `draw`."""

    solver: str
    """Of few-step models, priors, baselines and images their name."""
    grid: str
    source: SampleSource
    nfe: int = 0
    """Its budget, to which guidance adds; 0 of baselines and images."""
    stochastic: bool = False
    """Whether it draws noise on the way, so that it ends elsewhere than the exact solution by design."""
    training_nfe: int = 0
    network_flops: int = 0
    """Floating-point operations of an evaluation of the network; 0 where they are not counted."""
    further_flops: int = 0
    """Of what else a sample runs through."""
    network_tokens: int = 0
    """Tokens of an evaluation of the network; 0 where they are not known, or counted by the source."""
    kind: Kind = SOLVER
    model: ModelFacts = UNKNOWN
    """Of the model that is sampled."""
    sampler: str = ""
    """Of a few-step model, what it is sampled by; of a prior its rule."""
    classes: int = 0
    empty: tuple[int, ...] = ()
    draw: ClassDraw | None = None
    guidance: str = ""
    """Of a candidate of a search its guidance in words."""

    @property
    def named(self) -> str:
        """`ddim on karras at NFE 6`, for people."""
        grid, nfe = f" on {self.grid}" if self.grid else "", f" at NFE {self.nfe}" if self.nfe else ""
        return f"{self.solver}{grid}{nfe}"


def solver_jobs(model: EvaluatedModel, config: SweepConfig) -> list[Job]:
    """Every solver on every grid at every budget; UsageError for an impossible combination. Nothing is sampled or written."""
    pairs = [(solver, nfe) for solver in config.solvers for nfe in config.nfe]
    learned = {s for s, k in pairs if s not in SOLVERS and model.reaches(s, k)}
    if config.skip:  # a solver that was learned for no budget at all is an error
        pairs = [(s, k) for s, k in pairs if is_reachable(s, k, config.analytic_first)]
        pairs = [(s, k) for s, k in pairs if s not in learned or model.reaches(s, k)]
    samplers = [(solver, nfe, model.samplers(solver, nfe, config)) for solver, nfe in pairs]
    several = next(((solver, nfe) for solver, nfe, by_grid in samplers if len(by_grid) > 1), None)
    if several and not config.exact_nfe and config.search is None:
        raise UsageError(
            f"{several[0]} at NFE {several[1]} on several grids, without an exact solution",
            "the grid of a solver is chosen by its error to the exact solution",
            "pass one of --grids, or drop --exact-nfe 0",
        )
    flops, facts = model.network_flops, model.facts
    return [
        Job(
            solver,
            grid,
            model.source(sampler, config.sampling()),
            nfe,
            sampler.table is not None and sampler.table.stochastic,
            _training_nfe(model, sampler, grid, config),
            flops,
            sampler.costs.residual if isinstance(sampler, ResidualTable) else 0,
            model.network_tokens,
            model=facts,
            classes=model.classes,
            empty=model.empty,
            draw=config.draw,
        )
        for solver, nfe, by_grid in samplers
        for grid, sampler in by_grid.items()
    ]


def _training_nfe(model: EvaluatedModel, sampler: Sampler, grid: str, config: SweepConfig) -> int:
    if sampler.card is not None:
        return sampler.card.training_nfe
    return model.fitting_nfe(config, sampler) if grid == GITS else 0


def exact_source(model: EvaluatedModel, config: SweepConfig, finer: int = 1) -> SampleSource | None:
    """The exact solution, of `finer` times its evaluations, on noise levels of the model's training; None if there is none.

    UsageError where there is nothing to guide.
    """
    model.check_guidance(config)
    if not config.exact_nfe or model.exact is None:
        return None
    solver, grid = model.exact
    plain = replace(config, grids=(grid,), analytic_first=False, eta=0.0)
    sampler = model.samplers(solver, finer * config.exact_nfe, plain)[grid]
    return model.source(sampler, config.sampling())


@dataclass(frozen=True)
class Plan:
    """What is sampled of one training: its jobs, the exact solution, and the same at twice the evaluations."""

    jobs: list[Job]
    exact: SampleSource | None = None
    finer: SampleSource | None = None
    exact_nfe: int = 0
    """Evaluations of the exact solution."""
    model: ModelFacts = UNKNOWN
    reconstruct: Callable[[Tensor], Tensor | None] = lambda images: None
    """uint8 images (n, C, H, W) through the tokenizer and back; None where the model has none."""


def plan_of(model: EvaluatedModel, config: SweepConfig) -> Plan:
    """Everything of a model; errors as of `solver_jobs` and `exact_source`."""
    exact, finer = (exact_source(model, config, times) for times in (1, 2))
    return Plan(solver_jobs(model, config), exact, finer, config.exact_nfe, model.facts, model.reconstruct)
