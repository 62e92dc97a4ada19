"""The step-budget sweep: every solver at every budget, on the same seeds, against the same references.

Each measurement samples `blocks` disjoint blocks of n seeds; by default n is the number of held-out images, so that every
distance has the image count of the floor. It reports means over blocks and their standard deviations: distances to the data in
every feature space, and the solver's own error, the distance to the exact solution of the same seeds. The grid of each solver is
chosen before, on other seeds (choice.py). Few-step models, each of its own weights, are measured at their budgets, baselines at
their own number of evaluations, external images at none.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.core.environment import hardware
from midway.gen.core.processes import ProcessInfo, at_work
from midway.gen.core.text import echo
from midway.gen.data.images import ImageData
from midway.gen.data.pictures import grid_png
from midway.gen.data.pixels import Images, part_of
from midway.gen.evaluation.metrics import Features, joined_features, possible
from midway.gen.evaluation.records import CEILING, EXACT, FLOOR, LIMITS, SOLVER, Estimate, Measurement
from midway.gen.evaluation.spaces import Spaces, distance_errors, distances_and_metrics, extract, further
from midway.gen.features.reference import balanced
from midway.gen.progress.bar import Progress
from midway.gen.sweep.choice import Choice, choose_grids
from midway.gen.sweep.costs import forecast
from midway.gen.sweep.fine import FineSolution, StoredSolution
from midway.gen.sweep.guidance import GuidanceChoice, choose_guidance
from midway.gen.sweep.jobs import Job, Plan, SweepConfig
from midway.gen.sweep.measure import COLUMNS, SHOWN, TIMES, EvaluationContext, measure
from midway.gen.sweep.store import PART, Cell, CellStore, Numbers
from midway.gen.sweep.tally import Tally


def measure_images(name: str, images: Images, spaces: Spaces, metrics: tuple[str, ...] = ()) -> Measurement:
    """The row `name` of `LIMITS` for uint8 images (n, C, H, W) against the training images."""
    seen = _Seen(spaces)
    for part in images.split(PART):
        seen.add(part)
    return _limit(name, seen.features(), spaces, metrics)


def _limit(name: str, features: Mapping[str, Features], spaces: Spaces, metrics: tuple[str, ...]) -> Measurement:
    """The row `name` of `LIMITS` for images of these features; the errors of its distances are a jackknife's."""
    n, errors = len(features[""].features), distance_errors(features, spaces)
    found = distances_and_metrics(possible(metrics, n, spaces[""].statistics.dim), features, spaces)
    return Measurement(
        solver=name,
        grid="",
        nfe=0,
        metrics={metric: Estimate(value, errors.get(metric)) for metric, value in found.items()},
        n=n,
        blocks=1,
        seconds=0.0,
        features=spaces[""].features,
        reference=spaces[""].name,
        seeds="",
        further=further(spaces),
    )


def held_out_images(held_out: ImageData, n: int) -> Images:
    """uint8 (n, C, H, W), or all if there are fewer, in an order in which the classes take turns; read when they are needed."""
    return part_of(held_out.images, balanced(held_out.labels)[:n])


@dataclass(frozen=True)
class Sweep:
    """All measurements, the limits first, a PNG of the same seeds for each, and the job of each: (solver, grid, NFE)."""

    measurements: list[Measurement]
    pictures: dict[tuple[str, str, int], bytes | None] = field(default_factory=dict)
    """Of every cell, and of the limits."""
    jobs: dict[tuple[str, str, int], Job] = field(default_factory=dict)
    fine: FineSolution | None = None
    """The exact solution of every seed, if there was one."""
    choice: Choice | GuidanceChoice | None = None

    @property
    def grids(self) -> dict[tuple[str, int], bytes]:
        """Pictures of solvers, few-step models and baselines by (solver, NFE)."""
        found = {(solver, nfe): png for (solver, _, nfe), png in self.pictures.items() if solver not in LIMITS}
        return {key: png for key, png in found.items() if png is not None}

    @property
    def limits(self) -> dict[str, bytes]:
        """Pictures of the limits, by their names."""
        return {name: png for (name, _, _), png in self.pictures.items() if name in LIMITS and png is not None}


def run_sweep(
    plan: Plan,
    spaces: Spaces,
    held_out: ImageData,
    config: SweepConfig,
    folder: Path,
    process: ProcessInfo | None = None,
    choice: Choice | GuidanceChoice | None = None,
) -> Sweep:
    """Measure the chosen jobs, with errors to the exact solution of those that are solvers; what is in folder/cells is read.

    The first process has claimed that folder, for all of them, and prints what will be measured at what cost. `choice`: that of
    the first of several trainings.
    """
    process, seeds, store, tally = process or ProcessInfo(), config.seeds, CellStore(folder / "cells"), Tally()
    context = EvaluationContext(
        spaces, seeds, store, process, config.metrics, config.overlap, timing(config, process), tally
    )
    solution, choosing = (
        None if plan.exact is None else FineSolution(plan.exact, some, store, process, spaces, tally, timed)
        for some, timed in ((seeds, True), (config.choice_seeds, False))
    )
    expected = forecast(plan, context, config, solution, None if choice else choosing)
    tally.expect(expected.work, process.world_size)
    if process.rank == 0:
        echo(f"to measure: {expected}")
    process.wait()  # all have looked at the store before one of them writes
    sweep = Sweep([])
    _measure_limits(sweep, held_out_images(held_out, seeds.n), plan, context)
    if config.search is not None:
        found = choose_guidance(plan, context, config.choice_seeds)
        return _measured(replace(sweep, choice=found), found.of(plan.jobs), context, None)
    assert not isinstance(choice, GuidanceChoice)
    if plan.exact is None or solution is None or choosing is None:
        return _measured(sweep, plan.jobs, context, None)
    choice = choice or choose_grids(plan, choosing)
    with at_work("sampling"), Progress("sampling", 0, left=tally.left) as progress:
        tally.name(progress, "the exact solution", seeds.n * seeds.blocks // process.world_size)
        solution.make()
    sweep = replace(sweep, fine=solution, choice=choice)
    process.wait()
    exact = measure(StoredSolution(solution), context)
    found = _measurement(Job(EXACT, "", plan.exact, model=plan.model), exact, context)
    sweep.measurements.append(found)
    sweep.pictures[EXACT, "", found.nfe] = grid_png(solution.images(SHOWN), columns=COLUMNS)
    return _measured(sweep, choice.of(plan.jobs), context, solution)


def _measure_limits(sweep: Sweep, images: Images, plan: Plan, context: EvaluationContext) -> None:
    """Add the floor, and the ceiling of a tokenizer that loses something; no seed has part in them.

    Images are read, reconstructed and seen part by part: there may be many, and large ones.
    """
    real, made, lossy = _Seen(context.spaces), _Seen(context.spaces), False
    with Progress("floor and ceiling", len(images), "images") as progress:
        for part in images.split(PART):
            real.add(part)
            reconstructed = plan.reconstruct(part)
            if reconstructed is not None:
                made.add(reconstructed)
                lossy = lossy or not torch.equal(reconstructed, part)
            progress.advance(len(part))
    for name, seen in [(FLOOR, real), (CEILING, made)][: 1 + lossy]:
        sweep.measurements.append(_limit(name, seen.features(), context.spaces, context.metrics))
        sweep.pictures[name, "", 0] = grid_png(seen.first(), columns=COLUMNS)


class _Seen:
    """Features of images that come part by part, and the first of these images."""

    def __init__(self, spaces: Spaces) -> None:
        self.spaces, self.parts, self.shown = spaces, list[dict[str, Features]](), list[Tensor]()

    def add(self, images: Tensor) -> None:
        """uint8 (n, C, H, W)."""
        self.parts.append(extract(self.spaces, images))
        if sum(map(len, self.shown)) < SHOWN:
            self.shown.append(images[:SHOWN])

    def features(self) -> dict[str, Features]:
        """Of all images, in every space."""
        return {space: joined_features([part[space] for part in self.parts]) for space in self.spaces}

    def first(self) -> Tensor:
        """At most `SHOWN`."""
        return torch.cat(self.shown)[:SHOWN]


def _measured(sweep: Sweep, jobs: Sequence[Job], context: EvaluationContext, solution: FineSolution | None) -> Sweep:
    """The sweep with the measurements of these jobs."""
    tally, seeds = context.tally, context.seeds
    with Progress("cell", len(jobs), left=tally.left) as progress:
        for job in jobs:
            tally.name(progress, job.named, seeds.n * seeds.blocks // context.process.world_size)
            cell = measure(job.source, context, solution if job.kind == SOLVER else None)
            found = _measurement(job, cell, context)
            sweep.measurements.append(found)
            key = (job.solver, job.grid, found.nfe)
            sweep.jobs[key], sweep.pictures[key] = job, cell.png()
            progress.advance()
    return sweep


def timing(config: SweepConfig, process: ProcessInfo) -> str:
    """What seconds depend on, in a line."""
    graphs = ", CUDA graphs" if config.graph else ""
    overlapped = ", overlapped" if config.overlap else ""
    return f"{hardware()}; {process.world_size} process(es), batches of {config.batch_size}{graphs}{overlapped}"


def _measurement(job: Job, cell: Cell, context: EvaluationContext) -> Measurement:
    """A finished cell as a measurement."""
    seeds, numbers = context.seeds, cell.numbers()
    assert numbers is not None
    sampling, decoding, features = (seconds_of_blocks(numbers, seeds.blocks, name) for name in TIMES)
    return Measurement(
        solver=job.solver,
        grid=job.grid,
        nfe=numbers.nfe,
        metrics={
            "distance": _distance(numbers),
            **{name: Estimate.of(values) for name, values in numbers.metrics.items()},
            **({"rmse": _rmse(numbers.metrics["rmse"])} if "rmse" in numbers.metrics else {}),
        },
        n=seeds.n,
        blocks=seeds.blocks,
        seconds=sampling[0],
        seconds_blocks=sampling[1],
        features=context.spaces[""].features,
        reference=context.spaces[""].name,
        seeds=str(seeds),
        training_nfe=job.training_nfe,
        flops=numbers.nfe * job.network_flops + job.further_flops,
        kind=job.kind,
        nonfinite=numbers.nonfinite,
        record=cell.id,
        timing=numbers.timing,
        decode_seconds=decoding[0],
        feature_seconds=features[0],
        further=further(context.spaces),
        model=job.model.name,
        sampler=job.sampler,
        training_images=job.model.images,
        model_nfe=job.model.evaluations,
        guided=job.model.guided,
        token_evaluations=numbers.token_evaluations or numbers.nfe * job.network_tokens,
        head_nfe=numbers.head_nfe,
        guidance=job.guidance,
    )


def seconds_of_blocks(numbers: Numbers, blocks: int, name: str) -> tuple[float, tuple[float, ...]]:
    """Seconds of a block, the median, so that another program that was busy meanwhile does not count; and those of each.

    Of cells of earlier versions the mean, and none of each.
    """
    each = tuple(getattr(its, name) for its in numbers.block_seconds)
    value = statistics.median(each) if each else getattr(numbers.seconds, name) / blocks
    return round(value, 4), each


def _rmse(blocks: tuple[float, ...]) -> Estimate:
    """Over all seeds, of blocks of as many, with the deviation among the blocks."""
    return replace(Estimate.of(blocks), mean=math.sqrt(sum(value**2 for value in blocks) / len(blocks)))


def _distance(numbers: Numbers) -> Estimate:
    """Over blocks; infinite without a deviation if any sample is not finite."""
    blocks = tuple(math.inf if value is None else value for value in numbers.distances)
    values = torch.tensor(blocks, dtype=torch.float64)
    std = values.std().item() if len(blocks) > 1 and not numbers.nonfinite else None
    return Estimate(values.mean().item(), std, blocks)
