"""What a sweep measures, before anything is sampled: one `Job` for every (solver, grid, budget), baseline and set of images.

Every sampler is built here, so that an impossible combination raises an error before anything is sampled. Baselines are measured
at their own number of evaluations, external images at none.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.core.errors import UsageError
from midway.gen.diffusion.load import LEARNED, TrainedModel
from midway.gen.diffusion.samplers import SamplerConfig, fitting_nfe, is_reachable, make_samplers
from midway.gen.evaluation.diffusers import DiffusersModel, DiffusersSource, diffusers_samplers, within_training
from midway.gen.evaluation.external import ExternalImages, ImagesSource, check_count
from midway.gen.evaluation.sources import BaselineSource, SampleSource, SolverSource
from midway.gen.evaluation.store import PART
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table

Model = TrainedModel | DiffusersModel
"""What solvers are measured on."""
Other = TrainedBaseline | ExternalImages
"""What is measured beside the solvers."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(SamplerConfig):
    """What to measure."""

    solvers: tuple[str, ...] = ("euler", "ddim", "heun", "dpm2", "dpmpp2m")
    nfe: tuple[int, ...] = (4, 6, 8, 10, 20)
    n: int | None = None
    blocks: int = 4
    first_seed: int = 0
    reference_nfe: int = 128
    """Evaluations of the fine solution behind RMSE; 0: leave RMSE out."""
    metrics: tuple[str, ...] = ("kid",)
    """Beside the Fréchet distance: names in cell_metrics.METRICS."""
    overlap: bool = False
    """Decode and look at images while the next are sampled; times then overlap too."""
    skip: bool = False
    """Leave out budgets that a solver cannot reach, instead of raising an error."""

    def check(self, n: int) -> None:
        """UsageError for numbers that measure nothing."""
        if n < 2 or self.blocks < 1 or not 1 <= self.batch_size <= PART:
            raise UsageError(
                f"n {n}, blocks {self.blocks}, batch size {self.batch_size}",
                f"a distance needs 2 images in 1 block, and a batch is at most what is saved at once, {PART}",
                "change --n, --blocks or --batch-size",
            )
        if self.reference_nfe < 0 or self.reference_nfe % 2:
            raise UsageError(
                f"--reference-nfe {self.reference_nfe}",
                "Heun's method costs 2 evaluations a step",
                "use an even number, or 0 to leave RMSE out",
            )


def asked(config: SweepConfig) -> list[tuple[str, int]]:
    """Every (solver, NFE) to measure."""
    pairs = [(solver, nfe) for solver in config.solvers for nfe in config.nfe]
    return [(s, k) for s, k in pairs if not config.skip or is_reachable(s, k, config.analytic_first)]


def reference_table(schedule: Schedule, config: SweepConfig) -> Table:
    """The fine solution that RMSE is measured against: Heun's method on EDM's grid."""
    times = GRIDS["karras"](schedule, config.reference_nfe // 2, config.rho_max, config.rho_min)
    return SOLVERS["heun"].build(schedule, times)


@dataclass(frozen=True)
class Job:
    """One cell to be measured; `classes` of the seeds' labels, 0 without."""

    solver: str
    grid: str
    source: SampleSource
    training_nfe: int = 0
    baseline: bool = False
    classes: int = 0


def fine_source(model: Model, config: SweepConfig) -> SampleSource:
    """What RMSE is measured against, as a source of samples."""
    return _source(model, fine_table(model, config), config)


def fine_table(model: Model, config: SweepConfig) -> Table:
    """`reference_table` on the noise levels that the model was trained on."""
    if isinstance(model, DiffusersModel):
        return reference_table(model.schedule, within_training(config, model.schedule))
    return reference_table(model.model.schedule, config)


def all_jobs(model: Model | None, others: Mapping[str, Other], config: SweepConfig, n: int) -> list[Job]:
    """Every cell of blocks of n; errors as `solver_jobs` and `other_jobs`. Nothing is sampled or written."""
    return [*(solver_jobs(model, config) if model else []), *other_jobs(others, config, n)]


def solver_jobs(model: Model, config: SweepConfig) -> list[Job]:
    """Every solver on every grid at every budget; UsageError for an impossible combination."""
    classes = model.classes if isinstance(model, DiffusersModel) else model.model.classes
    samplers = [(solver, _samplers(model, solver, nfe, config)) for solver, nfe in asked(config)]
    return [
        Job(solver, grid, _source(model, sampler, config), _training_nfe(model, sampler, grid, config), classes=classes)
        for solver, by_grid in samplers
        for grid, sampler in by_grid.items()
    ]


def _samplers(model: Model, solver: str, nfe: int, config: SweepConfig) -> dict[str, Sampler]:
    if isinstance(model, DiffusersModel):
        return diffusers_samplers(model, solver, nfe, config)
    return make_samplers(model, solver, nfe, config)


def _source(model: Model, sampler: Sampler, config: SweepConfig) -> SampleSource:
    if isinstance(model, DiffusersModel):
        return DiffusersSource(model, sampler, config.sampling())
    return SolverSource(model, sampler, config.sampling())


def other_jobs(others: Mapping[str, Other], config: SweepConfig, n: int) -> list[Job]:
    """One cell for each, a baseline at its own cost; DataError for fewer external images than the cells hold."""
    return [_other_job(name, its, config, n) for name, its in others.items()]


def _other_job(name: str, its: Other, config: SweepConfig, n: int) -> Job:
    if isinstance(its, TrainedBaseline):
        source = BaselineSource(its, config.batch_size)
        return Job(name, "", source, baseline=True, classes=its.model.classes)
    check_count(its, n, config.blocks)
    return Job(f"images: {name}", "", ImagesSource(its, config.first_seed), baseline=True)


def _training_nfe(model: Model, sampler: Sampler, grid: str, config: SweepConfig) -> int:
    if sampler.card is not None:
        return sampler.card.training_nfe
    return fitting_nfe(model, config) if grid == GITS and isinstance(model, TrainedModel) else 0


def planned_cells(config: SweepConfig, others: int = 0, model: bool = True) -> Iterator[str]:
    """Names of the cells in order, for a progress bar; a learned solver counts once, whatever its grids."""
    if model and config.reference_nfe:
        yield "reference"
    for solver, nfe in asked(config) if model else ():
        for grid in config.grids if solver not in LEARNED else ("learned",):
            yield f"{solver} {grid} {nfe}"
    yield from (f"other {number}" for number in range(others))
