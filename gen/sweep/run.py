"""The step-budget sweep: every solver on every grid at every budget, on the same seeds, against the same references.

Each measurement samples `blocks` disjoint blocks of n seeds; by default n is the number of held-out images, so that every
distance has the image count of the floor, distance(training images, held-out images). It reports the mean over blocks and their
standard deviation, and the root-mean-square distance of the standardised latents to a fine solution from the same noise, which
contains the solver's error alone. Baselines are measured at their own number of evaluations, external images at none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from midway.gen.core.environment import hardware
from midway.gen.core.processes import ProcessInfo, at_work
from midway.gen.data.images import ImageData
from midway.gen.evaluation.metrics import measure_metrics, possible
from midway.gen.evaluation.records import FLOOR, Estimate, Measurement, mark_best
from midway.gen.evaluation.sources import SampleSource
from midway.gen.features.reference import FeatureReference, balanced
from midway.gen.sweep.jobs import Job, SweepConfig
from midway.gen.sweep.measure import EvaluationContext, FineSolution, extract_features, measure
from midway.gen.sweep.store import Cell, CellStore, Numbers


def measure_floor(
    reference: FeatureReference, held_out: ImageData, n: int, metrics: tuple[str, ...] = ()
) -> Measurement:
    """Metrics of real images: n held-out images, or all if there are fewer, against the training images."""
    chosen = balanced(held_out.labels)[:n]
    features = extract_features(reference, held_out.images[chosen])
    found = measure_metrics(possible(metrics, len(chosen), reference.statistics.dim), features, reference)
    return Measurement(
        solver=FLOOR,
        grid="",
        nfe=0,
        metrics={
            "distance": Estimate(reference.distance_of(features.features)),
            **{name: Estimate(value) for name, value in found.items()},
        },
        n=len(chosen),
        blocks=1,
        seconds=0.0,
        features=reference.features,
        reference=reference.name,
        seeds="",
    )


@dataclass(frozen=True)
class Sweep:
    """All measurements, the floor first, a PNG of the same seeds for each best one, and the job of each: (solver, grid, NFE)."""

    measurements: list[Measurement]
    grids: dict[tuple[str, int], bytes]
    pictures: dict[tuple[str, str, int], bytes | None] = field(default_factory=dict)
    """Of every cell, best or not."""
    jobs: dict[tuple[str, str, int], Job] = field(default_factory=dict)
    fine: FineSolution | None = None
    """The fine solution of every seed, if there was one."""


def run_sweep(
    jobs: Sequence[Job],
    fine: SampleSource | None,
    reference: FeatureReference,
    held_out: ImageData,
    config: SweepConfig,
    folder: Path,
    progress: Callable[[str], None] = lambda _: None,
    process: ProcessInfo | None = None,
) -> Sweep:
    """Measure every job, with RMSE to `fine` of those that are solvers; what is finished in folder/cells is read.

    The first process has claimed that folder, for all of them.
    """
    process, seeds, store = process or ProcessInfo(), config.seeds, CellStore(folder / "cells")
    context = EvaluationContext(
        reference, seeds, store, process, config.metrics, config.overlap, timing(config, process)
    )
    solution = None
    if fine is not None:
        progress("reference")
        solution = FineSolution(fine, seeds, store, process)
        with at_work("sampling"):
            solution.make()
    sweep = Sweep([measure_floor(reference, held_out, seeds.n, config.metrics)], {}, fine=solution)
    for job in jobs:
        progress(f"{job.solver} {job.grid}")
        cell = measure(job.source, context, None if job.baseline else solution)
        found = _measurement(job, cell, context)
        sweep.measurements.append(found)
        key = (job.solver, job.grid, found.nfe)
        sweep.jobs[key], sweep.pictures[key] = job, cell.png()
    return with_best(sweep, sweep.measurements)


def timing(config: SweepConfig, process: ProcessInfo) -> str:
    """What seconds depend on, in a line."""
    graphs = ", CUDA graphs" if config.graph else ""
    overlapped = ", overlapped" if config.overlap else ""
    return f"{hardware()}; {process.world_size} process(es), batches of {config.batch_size}{graphs}{overlapped}"


def _measurement(job: Job, cell: Cell, context: EvaluationContext) -> Measurement:
    """A finished cell as a measurement."""
    seeds, numbers = context.seeds, cell.numbers()
    assert numbers is not None
    single = {name: value for name, value in (("rmse", numbers.rmse), ("psnr", numbers.psnr)) if value is not None}
    sampling, decoding, features = (
        round(value / seeds.blocks, 3)
        for value in (numbers.seconds.solver, numbers.seconds.decode, numbers.seconds.features)
    )
    return Measurement(
        solver=job.solver,
        grid=job.grid,
        nfe=numbers.nfe,
        metrics={
            "distance": _distance(numbers),
            **{name: Estimate(value) for name, value in single.items()},
            **{name: Estimate.of(values) for name, values in numbers.metrics.items()},
        },
        n=seeds.n,
        blocks=seeds.blocks,
        seconds=sampling,
        features=context.reference.features,
        reference=context.reference.name,
        seeds=str(seeds),
        training_nfe=job.training_nfe,
        baseline=job.baseline,
        nonfinite=numbers.nonfinite,
        record=cell.id,
        timing=numbers.timing,
        decode_seconds=decoding,
        feature_seconds=features,
    )


def _distance(numbers: Numbers) -> Estimate:
    """Over blocks; infinite without a deviation if any sample is not finite."""
    blocks = tuple(math.inf if value is None else value for value in numbers.distances)
    values = torch.tensor(blocks, dtype=torch.float64)
    std = values.std().item() if len(blocks) > 1 and not numbers.nonfinite else None
    return Estimate(values.mean().item(), std, blocks)


def with_best(sweep: Sweep, measurements: Sequence[Measurement]) -> Sweep:
    """The sweep with these measurements, the best grid of each (solver, NFE) marked, and its picture."""
    marked = mark_best(measurements)
    found = {(c.solver, c.nfe): sweep.pictures.get((c.solver, c.grid, c.nfe)) for c in marked if c.best}
    return replace(sweep, measurements=marked, grids={key: png for key, png in found.items() if png is not None})
