"""What a sweep measures, before anything is sampled: one `Job` for every (solver, grid, budget).

Every sampler is built here, so that an impossible combination raises an error before anything is sampled. Jobs of baselines and
external images are in comparisons.py.
"""

from dataclasses import dataclass

from midway.gen.core.errors import UsageError
from midway.gen.diffusion.samplers import SamplerConfig, is_reachable
from midway.gen.evaluation.sources import EvaluatedModel, SampleSource
from midway.gen.sweep.store import PART, Seeds
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS
from midway.samplers.sampler import Sampler
from midway.samplers.solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SamplerConfig):
    """What to measure."""

    solvers: tuple[str, ...] = ("euler", "ddim", "heun", "dpm2", "dpmpp2m")
    nfe: tuple[int, ...] = (4, 6, 8, 10, 20)
    n: int
    """Images of a block."""
    blocks: int = 4
    first_seed: int = 0
    reference_nfe: int = 128
    """Evaluations of the fine solution behind RMSE; 0: leave RMSE out."""
    metrics: tuple[str, ...] = ("kid",)
    """Beside the Fréchet distance: names in metrics.METRICS."""
    overlap: bool = False
    """Decode and look at images while the next are sampled; times then overlap too."""
    skip: bool = False
    """Leave out budgets that a solver cannot reach, instead of raising an error."""

    @property
    def seeds(self) -> Seeds:
        """All seeds."""
        return Seeds(self.first_seed, self.n, self.blocks)

    def check(self) -> None:
        """UsageError for numbers that measure nothing."""
        if self.n < 2 or self.blocks < 1 or not 1 <= self.batch_size <= PART:
            raise UsageError(
                f"n {self.n}, blocks {self.blocks}, batch size {self.batch_size}",
                f"a distance needs 2 images in 1 block, and a batch is at most what is saved at once, {PART}",
                "change --n, --blocks or --batch-size",
            )
        if self.reference_nfe < 0 or self.reference_nfe % 2:
            raise UsageError(
                f"--reference-nfe {self.reference_nfe}",
                "Heun's method costs 2 evaluations a step",
                "use an even number, or 0 to leave RMSE out",
            )


@dataclass(frozen=True)
class Job:
    """One measurement to be made; `classes` of the seeds' labels, 0 without, of which `empty` are not drawn."""

    solver: str
    grid: str
    source: SampleSource
    training_nfe: int = 0
    baseline: bool = False
    classes: int = 0
    empty: tuple[int, ...] = ()


def solver_jobs(model: EvaluatedModel, config: SweepConfig) -> list[Job]:
    """Every solver on every grid at every budget; UsageError for an impossible combination. Nothing is sampled or written."""
    pairs = [(solver, nfe) for solver in config.solvers for nfe in config.nfe]
    pairs = [(s, k) for s, k in pairs if not config.skip or is_reachable(s, k, config.analytic_first)]
    samplers = [(solver, model.samplers(solver, nfe, config)) for solver, nfe in pairs]
    return [
        Job(
            solver,
            grid,
            model.source(sampler, config.sampling()),
            _training_nfe(model, sampler, grid, config),
            classes=model.classes,
            empty=model.empty,
        )
        for solver, by_grid in samplers
        for grid, sampler in by_grid.items()
    ]


def _training_nfe(model: EvaluatedModel, sampler: Sampler, grid: str, config: SweepConfig) -> int:
    if sampler.card is not None:
        return sampler.card.training_nfe
    return model.fitting_nfe(config) if grid == GITS else 0


def fine_source(model: EvaluatedModel, config: SweepConfig) -> SampleSource | None:
    """The fine solution that RMSE is measured against: Heun's method on EDM's grid, on noise levels of the model's training.

    UsageError where there is nothing to guide.
    """
    model.check_guidance(config)
    if not config.reference_nfe:
        return None
    config = model.within(config)
    times = GRIDS["karras"](model.schedule, config.reference_nfe // 2, config.rho_max, config.rho_min)
    return model.source(SOLVERS["heun"].build(model.schedule, times), config.sampling())
