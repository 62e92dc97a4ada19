"""The step-budget sweep: every solver on every grid at every budget, on the same seeds, against the same references.

Each cell samples `blocks` disjoint blocks of n seeds, n being the number of held-out images unless told otherwise, so that
every distance is measured at the same image count as the floor: distance(train images, held-out images). A cell reports the
mean over blocks and their standard deviation. Beside it stands the root-mean-square distance of the standardised latents to
a fine solution from the same noise, which sees the solver's error alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from midway.gen.artefacts import LEARNED, TrainedModel, card_of, load_solver
from midway.gen.data import ImageData
from midway.gen.distances import frechet_distance
from midway.gen.errors import UsageError, nearest
from midway.gen.features import FeatureNetwork
from midway.gen.fitted_grid import GITS, fitting_nfe, gits_grid
from midway.gen.latent_field import EVERYWHERE, Guidance
from midway.gen.latent_model import LatentModel
from midway.gen.pictures import grid_png
from midway.gen.randomness import permutation
from midway.gen.report_cells import FLOOR, Cell
from midway.gen.sampling import Plan, Samples, SamplingConfig, decode, sample_latents
from midway.gen.splits import Splits
from midway.gen.statistics import FeatureStatistics
from midway.samplers.grids import GRIDS, RHO_MAX, RHO_MIN, Grid
from midway.samplers.learned_solver import SolverCard
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS, ddim, steps_for
from midway.samplers.table import Table

LEARNED_ON = (*GRIDS, "best")
"""What a solver may have been learned on; `best`: whichever grid it began nearest to the teacher on."""
SHOWN = 8  # seeds shown in the sample grids


@dataclass(frozen=True)
class SweepConfig:
    """What to measure."""

    solvers: tuple[str, ...] = ("euler", "ddim", "heun", "dpm2", "dpmpp2m")
    nfe: tuple[int, ...] = (4, 6, 8, 10, 20)
    grids: tuple[str, ...] = ("uniform", "logsnr", "karras")
    n: int | None = None
    blocks: int = 2
    first_seed: int = 0
    guidance: float = 1.0
    analytic_first: bool = False
    eta: float = 0.0
    reference_nfe: int = 128
    rho_max: float = RHO_MAX
    rho_min: float = RHO_MIN
    batch_size: int = 256
    interval: tuple[float, float] = EVERYWHERE
    """Noise levels rho that are guided."""
    weak: LatentModel | None = None
    """The worse model of autoguidance."""
    skip: bool = False
    """Leave out budgets that a solver cannot reach, instead of refusing them."""
    precision: Literal["no", "bf16"] = "no"
    graph: Literal["auto", "on", "off"] = "auto"

    def sampling(self) -> SamplingConfig:
        """How every cell is sampled."""
        guidance = Guidance(self.guidance, self.interval, self.weak)
        return SamplingConfig(guidance, self.batch_size, self.precision, self.graph)


def make_table(solver: str, grid: str, nfe: int, trained: TrainedModel, config: SweepConfig) -> Table:
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


def _times(grid: str, steps: int, trained: TrainedModel, config: SweepConfig) -> Grid:
    if grid == GITS:
        return gits_grid(trained, steps, config.sampling().guidance, config.rho_max, config.rho_min)
    return GRIDS[grid](trained.model.schedule, steps, config.rho_max, config.rho_min)


def is_reachable(solver: str, nfe: int, config: SweepConfig) -> bool:
    """Whether the solver can spend exactly `nfe` evaluations. Of a learned solver nothing is said."""
    if solver not in SOLVERS:
        return True
    try:
        return steps_for(SOLVERS[solver].evaluations, nfe, config.analytic_first) > 0
    except ValueError:
        return False


def make_plans(trained: TrainedModel, solver: str, nfe: int, config: SweepConfig) -> dict[str, Plan]:
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


def check_guidance(trained: TrainedModel, config: SweepConfig) -> None:
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


def _refusal(card: SolverCard | None, solver: str, grid: str, config: SweepConfig) -> UsageError | None:
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


def reference_plan(schedule: Schedule, config: SweepConfig) -> Plan:
    """The fine solution that RMSE is measured against: Heun's method on EDM's grid."""
    times = GRIDS["karras"](schedule, config.reference_nfe // 2, config.rho_max, config.rho_min)
    return SOLVERS["heun"].build(schedule, times)


@dataclass(frozen=True)
class Measurer:
    """Turns images into a distance to the training images."""

    network: FeatureNetwork
    features: str
    reference: FeatureStatistics
    reference_name: str

    def distance(self, images: Tensor) -> float:
        """Fréchet distance of uint8 images (N, C, H, W) to the reference."""
        return frechet_distance(FeatureStatistics.of(self.network.features(images)), self.reference)


def make_measurer(network: FeatureNetwork, features: str, train: ImageData) -> Measurer:
    """Statistics of all training images under this feature network."""
    statistics = FeatureStatistics.of(network.features(train.images))
    return Measurer(network, features, statistics, f"{train.name}@{train.fingerprint[:12]}")


def balanced(labels: Tensor) -> Tensor:
    """int64 (N,): items in an order in which every class comes in turn, so that the first n are balanced like the seeds.

    A plain random subset has too many of some classes, which alone would raise the floor.
    """
    order = permutation(0, "floor", 0, len(labels))
    mine = labels[order]
    turn = torch.nn.functional.one_hot(mine).cumsum(0).gather(1, mine[:, None])[:, 0]  # this item is its class's k-th
    return order[torch.argsort(turn, stable=True)]


def floor_cell(measurer: Measurer, held_out: ImageData, n: int) -> Cell:
    """What real images score: the distance of n held-out images, or all if there are fewer, to the training images."""
    chosen = balanced(held_out.labels)[:n]
    return Cell(
        solver=FLOOR,
        grid="",
        nfe=0,
        distance=measurer.distance(held_out.images[chosen]),
        distance_std=None,
        rmse=None,
        n=len(chosen),
        blocks=1,
        seconds=0.0,
        features=measurer.features,
        reference=measurer.reference_name,
        seeds="",
    )


@dataclass(frozen=True)
class Sweep:
    """All cells, the floor first, and a PNG of the same seeds for each best cell."""

    cells: list[Cell]
    grids: dict[tuple[str, int], bytes]


def run_sweep(
    trained: TrainedModel,
    measurer: Measurer,
    splits: Splits,
    config: SweepConfig,
    progress: Callable[[str], None] = lambda _: None,
) -> Sweep:
    """Measure every cell. Names, budgets and learned solvers are checked before the first sample is drawn."""
    n = len(splits.held_out.images) if config.n is None else config.n
    if n < 2 or config.blocks < 1 or config.batch_size < 1:
        raise UsageError(
            f"n {n}, blocks {config.blocks}, batch size {config.batch_size}",
            "a distance needs 2 images in 1 block",
            "raise --n, --blocks or --batch-size",
        )
    if config.reference_nfe < 2 or config.reference_nfe % 2:
        raise UsageError(
            f"--reference-nfe {config.reference_nfe}", "Heun's method costs 2 evaluations a step", "use an even number"
        )
    pairs = [(s, k) for s in config.solvers for k in config.nfe if is_reachable(s, k, config) or not config.skip]
    plans = {(s, k): make_plans(trained, s, k, config) for s, k in pairs}
    seeds = torch.arange(config.first_seed, config.first_seed + n * config.blocks)
    progress("reference")
    exact = _sample(trained, reference_plan(trained.model.schedule, config), seeds, config).latents
    cells, grids = [floor_cell(measurer, splits.held_out, n)], {}
    for (solver, nfe), by_grid in plans.items():
        measured = []
        for grid, plan in by_grid.items():
            progress(f"{solver} {grid} {nfe}")
            samples = _sample(trained, plan, seeds, config)
            images = decode(trained, samples.latents.nan_to_num().clamp(-100, 100))
            cell = _cell(solver, grid, plan, samples, exact, images, measurer, config, seeds)
            measured.append((cell, images[:SHOWN]))
        best = min(range(len(measured)), key=lambda i: measured[i][0].distance)
        cells += [replace(cell, best=i == best) for i, (cell, _) in enumerate(measured)]
        grids[solver, measured[best][0].nfe] = grid_png(measured[best][1], columns=SHOWN // 2)
    return Sweep(cells, grids)


def _sample(trained: TrainedModel, plan: Plan, seeds: Tensor, config: SweepConfig) -> Samples:
    return sample_latents(trained, plan, seeds, config.sampling())


def _cell(
    solver: str,
    grid: str,
    plan: Plan,
    samples: Samples,
    exact: Tensor,
    images: Tensor,
    measurer: Measurer,
    config: SweepConfig,
    seeds: Tensor,
) -> Cell:
    finite = bool(torch.isfinite(samples.latents).all())
    distances = torch.tensor([measurer.distance(block) for block in images.chunk(config.blocks)], dtype=torch.float64)
    card = card_of(plan)
    spread = distances.std().item() if config.blocks > 1 else None
    return Cell(
        solver=solver,
        grid=grid,
        nfe=_whole(samples.nfe),
        distance=distances.mean().item() if finite else math.inf,
        distance_std=spread,
        rmse=(samples.latents - exact).square().mean().sqrt().item(),
        n=len(seeds) // config.blocks,
        blocks=config.blocks,
        seconds=round(samples.seconds / config.blocks, 3),
        features=measurer.features,
        reference=measurer.reference_name,
        seeds=f"{seeds[0].item()}-{seeds[-1].item()}",
        training_nfe=card.training_nfe if card is not None else fitting_nfe() if grid == GITS else 0,
    )


def _whole(nfe: float) -> int:
    """Evaluations per sample of the field as a whole number; guided evaluations run the network twice."""
    if nfe != int(nfe):
        raise RuntimeError(f"{nfe} evaluations per sample were counted; a fixed-step solver must make a whole number")
    return int(nfe)


def planned_cells(config: SweepConfig) -> Iterator[str]:
    """Names of the cells in order, for a progress bar; a learned solver counts once, whatever its grids."""
    yield "reference"
    for solver in config.solvers:
        for nfe in (k for k in config.nfe if is_reachable(solver, k, config) or not config.skip):
            for grid in config.grids if solver not in LEARNED else ("learned",):
                yield f"{solver} {grid} {nfe}"
