"""The step-budget sweep: every solver on every grid at every budget, on the same seeds, against the same references.

Each cell samples `blocks` disjoint blocks of n seeds, n being the number of held-out images unless told otherwise, so that
every distance is measured at the same image count as the floor: distance(train images, held-out images). A cell reports the
mean over blocks and their standard deviation. Beside it stands the root-mean-square distance of the standardised latents to
a fine solution from the same noise, which sees the solver's error alone. Baselines are cells too, at their own cost, and so are
images that somebody else made, at none.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from midway.gen.core.environment import hardware
from midway.gen.core.processes import ProcessInfo
from midway.gen.data.images import ImageData
from midway.gen.data.splits import Splits
from midway.gen.evaluation.jobs import Job, Model, Other, SweepConfig, all_jobs, fine_source
from midway.gen.evaluation.measure import EvaluationContext, FineSolution, Seeds, extract_features, measure, picture
from midway.gen.evaluation.metrics import check_metrics, mean_std, measure_metrics, possible
from midway.gen.evaluation.records import FLOOR, Cell, mark_best
from midway.gen.evaluation.store import CellStore
from midway.gen.features.reference import FeatureReference, balanced


def floor_cell(reference: FeatureReference, held_out: ImageData, n: int, metrics: tuple[str, ...] = ()) -> Cell:
    """What real images score: the distance of n held-out images, or all if there are fewer, to the training images."""
    chosen = balanced(held_out.labels)[:n]
    seen = extract_features(reference, held_out.images[chosen])
    cell = Cell(
        solver=FLOOR,
        grid="",
        nfe=0,
        distance=reference.distance_of(seen.features),
        distance_std=None,
        rmse=None,
        n=len(chosen),
        blocks=1,
        seconds=0.0,
        features=reference.features,
        reference=reference.name,
        seeds="",
    )
    found = measure_metrics(possible(metrics, len(chosen), reference.statistics.dim), seen, reference)
    return _with_metrics(cell, {name: [value] for name, value in found.items()})


@dataclass(frozen=True)
class Sweep:
    """All cells, the floor first, a PNG of the same seeds for each best cell, and what made each cell: (solver, grid, NFE)."""

    cells: list[Cell]
    grids: dict[tuple[str, int], bytes]
    pictures: dict[tuple[str, str, int], bytes | None] = field(default_factory=dict)
    """Of every cell, best or not."""
    jobs: dict[tuple[str, str, int], Job] = field(default_factory=dict)
    fine: FineSolution | None = None
    """The fine solution of every seed, if there was one."""


def run_sweep(
    model: Model | None,
    reference: FeatureReference,
    splits: Splits,
    config: SweepConfig,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    others: Mapping[str, Other] | None = None,
    process: ProcessInfo | None = None,
) -> Sweep:
    """Measure every cell; those that are finished in folder/cells are read. All is checked before the first sample is drawn.

    Without a model only `others`, baselines and external images, are measured.
    """
    n = len(splits.held_out.images) if config.n is None else config.n
    config.check(n)
    check_metrics(config.metrics, n, reference.statistics.dim, reference.has_logits)
    jobs = all_jobs(model, others or {}, config, n)
    process, seeds = process or ProcessInfo(), Seeds(config.first_seed, n, config.blocks)
    store = CellStore(folder / "cells")
    context = EvaluationContext(
        reference, seeds, store, process, config.metrics, config.overlap, timing(config, process)
    )
    with store.claimed() if process.rank == 0 else nullcontext():
        process.wait()
        return _run(model, jobs, context, splits, config, progress)


def timing(config: SweepConfig, process: ProcessInfo) -> str:
    """What seconds depend on, in a line."""
    graphs = ", CUDA graphs" if config.graph else ""
    overlapped = ", overlapped" if config.overlap else ""
    return f"{hardware()}; {process.world_size} process(es), batches of {config.batch_size}{graphs}{overlapped}"


def _run(
    model: Model | None,
    jobs: Sequence[Job],
    context: EvaluationContext,
    splits: Splits,
    config: SweepConfig,
    progress: Callable[[str], None],
) -> Sweep:
    fine, seeds = None, context.seeds
    if model is not None and config.reference_nfe:
        progress("reference")
        fine = FineSolution(fine_source(model, config), seeds, context.store, context.process)
        fine.make()
    cells, pictures, made = [floor_cell(context.reference, splits.held_out, seeds.n, config.metrics)], {}, {}
    for job in jobs:
        progress(f"{job.solver} {job.grid}")
        its = None if job.baseline else fine
        cell = _cell(job, measure(job.source, context, its), context, context.record(job.source, its))
        cells.append(cell)
        made[job.solver, job.grid, cell.nfe] = job
        pictures[job.solver, job.grid, cell.nfe] = picture(job.source, context, its)
    return with_best(Sweep(cells, {}, pictures, made, fine), cells)


def _cell(job: Job, numbers: Mapping[str, Any], context: EvaluationContext, record: str) -> Cell:
    """A record of the store as a line of the report."""
    blocks = tuple(math.inf if value is None else float(value) for value in numbers["distances"])
    values = torch.tensor(blocks, dtype=torch.float64)
    seeds, seconds = context.seeds, numbers["seconds"]
    cell = Cell(
        solver=job.solver,
        grid=job.grid,
        nfe=numbers["nfe"],
        distance=values.mean().item(),
        distance_std=values.std().item() if len(blocks) > 1 and not numbers["nonfinite"] else None,
        rmse=numbers["rmse"],
        n=seeds.n,
        blocks=seeds.blocks,
        seconds=round(seconds["solver"] / seeds.blocks, 3),
        features=context.reference.features,
        reference=context.reference.name,
        seeds=f"{seeds.first}-{seeds.last}",
        training_nfe=job.training_nfe,
        baseline=job.baseline,
        distances=blocks,
        psnr=numbers["psnr"],
        nonfinite=numbers["nonfinite"],
        record=record,
        timing=numbers["timing"],
        decode_seconds=round(seconds["decode"] / seeds.blocks, 3),
        feature_seconds=round(seconds["features"] / seeds.blocks, 3),
    )
    return _with_metrics(cell, numbers["metrics"])


def _with_metrics(cell: Cell, metrics: Mapping[str, list[float]]) -> Cell:
    """A cell with the means over blocks of what cell_metrics.py measured, and the deviation where a cell has one."""
    places = {place.name for place in fields(Cell)}
    found = {name: mean_std(metrics, name) for name in metrics}
    means = {name: mean for name, (mean, _) in found.items()}
    deviations = {f"{name}_std": std for name, (_, std) in found.items() if f"{name}_std" in places}
    return replace(cell, **means, **deviations)


def with_best(sweep: Sweep, cells: Sequence[Cell]) -> Sweep:
    """The sweep with these cells, the best grid of each (solver, NFE) marked, and its picture."""
    marked = mark_best(cells)
    found = {(c.solver, c.nfe): sweep.pictures.get((c.solver, c.grid, c.nfe)) for c in marked if c.best}
    return replace(sweep, cells=marked, grids={key: png for key, png in found.items() if png is not None})
