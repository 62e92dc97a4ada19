"""The step-budget sweep: every solver on every grid at every budget, on the same seeds, against the same references.

Each cell samples `blocks` disjoint blocks of n seeds, n being the number of held-out images unless told otherwise, so that
every distance is measured at the same image count as the floor: distance(train images, held-out images). A cell reports the
mean over blocks and their standard deviation. Beside it stands the root-mean-square distance of the standardised latents to
a fine solution from the same noise, which sees the solver's error alone. Baselines are cells too, at their own cost, and so are
images that somebody else made, at none.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from midway.gen.artefacts import LEARNED, TrainedModel, card_of
from midway.gen.baseline import TrainedBaseline
from midway.gen.cell_metrics import check_metrics, mean_std, measure_metrics
from midway.gen.cell_store import PART, CellStore
from midway.gen.data import ImageData
from midway.gen.diffusers_model import DiffusersModel
from midway.gen.diffusers_source import DiffusersSource, diffusers_plans, within_training
from midway.gen.errors import UsageError
from midway.gen.external_images import ExternalImages, ImagesSource, check_count
from midway.gen.fitted_grid import fitting_nfe
from midway.gen.measured_cell import Bench, Reference, Seeds, look, measure, picture
from midway.gen.measurer import Measurer, balanced
from midway.gen.plans import PlanConfig, is_reachable, make_plans
from midway.gen.report_cells import FLOOR, Cell
from midway.gen.sampling import Plan
from midway.gen.shard import Shard
from midway.gen.sources import BaselineSource, SolverSource, Source
from midway.gen.splits import Splits
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS


@dataclass(frozen=True, kw_only=True)
class SweepConfig(PlanConfig):
    """What to measure."""

    solvers: tuple[str, ...] = ("euler", "ddim", "heun", "dpm2", "dpmpp2m")
    nfe: tuple[int, ...] = (4, 6, 8, 10, 20)
    n: int | None = None
    blocks: int = 2
    first_seed: int = 0
    reference_nfe: int = 128
    """Evaluations of the fine solution behind RMSE; 0: leave RMSE out."""
    metrics: tuple[str, ...] = ("kid",)
    """Beside the Fréchet distance: names in cell_metrics.METRICS."""
    overlap: bool = False
    """Decode and look at images while the next are sampled; times then overlap too."""
    skip: bool = False
    """Leave out budgets that a solver cannot reach, instead of refusing them."""

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


def reference_plan(schedule: Schedule, config: SweepConfig) -> Plan:
    """The fine solution that RMSE is measured against: Heun's method on EDM's grid."""
    times = GRIDS["karras"](schedule, config.reference_nfe // 2, config.rho_max, config.rho_min)
    return SOLVERS["heun"].build(schedule, times)


def floor_cell(measurer: Measurer, held_out: ImageData, n: int, metrics: tuple[str, ...] = ()) -> Cell:
    """What real images score: the distance of n held-out images, or all if there are fewer, to the training images."""
    chosen = balanced(held_out.labels)[:n]
    seen = look(measurer, held_out.images[chosen])
    values = {name: found[0] for name, found in measure_metrics(metrics, [seen], measurer).items()}
    return Cell(
        solver=FLOOR,
        grid="",
        nfe=0,
        distance=measurer.distance_of(seen.features),
        distance_std=None,
        rmse=None,
        n=len(chosen),
        blocks=1,
        seconds=0.0,
        features=measurer.features,
        reference=measurer.reference_name,
        seeds="",
        kid=values.get("kid"),
        precision=values.get("precision"),
        recall=values.get("recall"),
        density=values.get("density"),
        coverage=values.get("coverage"),
        inception_score=values.get("inception_score"),
        fd_infinity=values.get("fd_infinity"),
    )


@dataclass(frozen=True)
class Job:
    """One cell to be measured; `classes` of the seeds' labels, 0 without."""

    solver: str
    grid: str
    source: Source
    training_nfe: int = 0
    baseline: bool = False
    classes: int = 0


@dataclass(frozen=True)
class Sweep:
    """All cells, the floor first, a PNG of the same seeds for each best cell, and what made each cell: (solver, grid, NFE)."""

    cells: list[Cell]
    grids: dict[tuple[str, int], bytes]
    jobs: dict[tuple[str, str, int], Job] = field(default_factory=dict)


Model = TrainedModel | DiffusersModel
"""What solvers are measured on."""
Other = TrainedBaseline | ExternalImages
"""What is measured beside the solvers."""


def run_sweep(
    model: Model | None,
    measurer: Measurer,
    splits: Splits,
    config: SweepConfig,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    others: Mapping[str, Other] | None = None,
    shard: Shard | None = None,
) -> Sweep:
    """Measure every cell; those that are finished in folder/cells are read. All is checked before the first sample is drawn.

    Without a model only `others`, baselines and external images, are measured.
    """
    n = len(splits.held_out.images) if config.n is None else config.n
    config.check(n)
    check_metrics(config.metrics, min(n, len(splits.held_out.images)), measurer.reference.dim, measurer.has_logits)
    jobs = all_jobs(model, others or {}, config, n)
    shard, seeds = shard or Shard(), Seeds(config.first_seed, n, config.blocks)
    store = CellStore(folder / "cells")
    if shard.rank == 0:
        store.tidy()
    shard.wait()
    bench, fine = Bench(measurer, seeds, store, shard, config.metrics, config.overlap), None
    if model is not None and config.reference_nfe:
        progress("reference")
        fine_source = _source(model, fine_plan(model, config), config)
        fine = Reference(fine_source, seeds, store, shard)
        fine.make()
    cells, pictures, made = [floor_cell(measurer, splits.held_out, n, config.metrics)], {}, {}
    for job in jobs:
        progress(f"{job.solver} {job.grid}")
        its = None if job.baseline else fine
        cell = _cell(job, measure(job.source, bench, its), bench)
        cells.append(cell)
        made[job.solver, job.grid, cell.nfe] = job
        pictures[job.solver, job.grid, cell.nfe] = picture(job.source, bench, its)
    return replace(_with_best(cells, pictures), jobs=made)


def fine_plan(model: Model, config: SweepConfig) -> Plan:
    """`reference_plan` on the noise levels that the model was trained on."""
    if isinstance(model, DiffusersModel):
        return reference_plan(model.schedule, within_training(config, model.schedule))
    return reference_plan(model.model.schedule, config)


def all_jobs(model: Model | None, others: Mapping[str, Other], config: SweepConfig, n: int) -> list[Job]:
    """Every cell of blocks of n; errors as `solver_jobs` and `other_jobs`. Nothing is sampled or written."""
    return [*(solver_jobs(model, config) if model else []), *other_jobs(others, config, n)]


def solver_jobs(model: Model, config: SweepConfig) -> list[Job]:
    """Every solver on every grid at every budget; UsageError for what cannot be."""
    classes = model.classes if isinstance(model, DiffusersModel) else model.model.classes
    plans = [(solver, _plans(model, solver, nfe, config)) for solver, nfe in asked(config)]
    return [
        Job(solver, grid, _source(model, plan, config), _training_nfe(plan, grid), classes=classes)
        for solver, by_grid in plans
        for grid, plan in by_grid.items()
    ]


def _plans(model: Model, solver: str, nfe: int, config: SweepConfig) -> dict[str, Plan]:
    if isinstance(model, DiffusersModel):
        return diffusers_plans(model, solver, nfe, config)
    return make_plans(model, solver, nfe, config)


def _source(model: Model, plan: Plan, config: SweepConfig) -> Source:
    if isinstance(model, DiffusersModel):
        return DiffusersSource(model, plan, config.sampling())
    return SolverSource(model, plan, config.sampling())


def other_jobs(others: Mapping[str, Other], config: SweepConfig, n: int) -> list[Job]:
    """One cell for each, a baseline at its own cost; DataError for fewer external images than the cells hold."""
    return [_other_job(name, its, config, n) for name, its in others.items()]


def _other_job(name: str, its: Other, config: SweepConfig, n: int) -> Job:
    if isinstance(its, TrainedBaseline):
        source = BaselineSource(its, config.batch_size)
        return Job(name, "", source, baseline=True, classes=its.model.classes)
    check_count(its, n, config.blocks)
    return Job(f"images: {name}", "", ImagesSource(its, config.first_seed), baseline=True)


def _training_nfe(plan: Plan, grid: str) -> int:
    card = card_of(plan)
    return card.training_nfe if card is not None else fitting_nfe() if grid == GITS else 0


def _cell(job: Job, numbers: Mapping[str, Any], bench: Bench) -> Cell:
    """A record of the store as a line of the report."""
    blocks = tuple(math.inf if value is None else float(value) for value in numbers["distances"])
    values = torch.tensor(blocks, dtype=torch.float64)
    seeds, seconds = bench.seeds, numbers["seconds"]
    kid, kid_std = mean_std(numbers["metrics"], "kid")

    def mean(name: str) -> float | None:
        return mean_std(numbers["metrics"], name)[0]

    return Cell(
        solver=job.solver,
        grid=job.grid,
        nfe=numbers["nfe"],
        distance=values.mean().item(),
        distance_std=values.std().item() if len(blocks) > 1 and not numbers["nonfinite"] else None,
        rmse=numbers["rmse"],
        n=seeds.n,
        blocks=seeds.blocks,
        seconds=round(seconds["solver"] / seeds.blocks, 3),
        features=bench.measurer.features,
        reference=bench.measurer.reference_name,
        seeds=f"{seeds.first}-{seeds.last}",
        training_nfe=job.training_nfe,
        baseline=job.baseline,
        distances=blocks,
        psnr=numbers["psnr"],
        kid=kid,
        kid_std=kid_std,
        precision=mean("precision"),
        recall=mean("recall"),
        density=mean("density"),
        coverage=mean("coverage"),
        inception_score=mean("inception_score"),
        fd_infinity=mean("fd_infinity"),
        nonfinite=numbers["nonfinite"],
        decode_seconds=round(seconds["decode"] / seeds.blocks, 3),
        feature_seconds=round(seconds["features"] / seeds.blocks, 3),
    )


def _with_best(cells: list[Cell], pictures: Mapping[tuple[str, str, int], bytes | None]) -> Sweep:
    """Mark the best grid of each (solver, NFE), and keep its picture."""
    best: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        key = (cell.solver, cell.nfe)
        if key not in best or cell.distance < best[key].distance:
            best[key] = cell
    marked = [replace(cell, best=cell is best[cell.solver, cell.nfe]) for cell in cells]
    grids = {key: pictures.get((cell.solver, cell.grid, cell.nfe)) for key, cell in best.items()}
    return Sweep(marked, {key: png for key, png in grids.items() if png is not None})


def planned_cells(config: SweepConfig, others: int = 0, model: bool = True) -> Iterator[str]:
    """Names of the cells in order, for a progress bar; a learned solver counts once, whatever its grids."""
    if model and config.reference_nfe:
        yield "reference"
    for solver, nfe in asked(config) if model else ():
        for grid in config.grids if solver not in LEARNED else ("learned",):
            yield f"{solver} {grid} {nfe}"
    yield from (f"other {number}" for number in range(others))
