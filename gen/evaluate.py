"""The step-budget sweep: every solver on every grid at every budget, on the same seeds, against the same references.

Each cell samples `blocks` disjoint blocks of n seeds, n being the number of held-out images unless told otherwise, so that
every distance is measured at the same image count as the floor: distance(train images, held-out images). A cell reports the
mean over blocks and their standard deviation. Beside it stands the root-mean-square distance of the standardised latents to
a fine solution from the same noise, which sees the solver's error alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from midway.gen.artefacts import LEARNED, TrainedModel, card_of
from midway.gen.data import ImageData
from midway.gen.distances import frechet_distance
from midway.gen.errors import UsageError
from midway.gen.features import FeatureNetwork
from midway.gen.fitted_grid import fitting_nfe
from midway.gen.pictures import grid_png
from midway.gen.plans import PlanConfig, is_reachable, make_plans
from midway.gen.randomness import permutation
from midway.gen.report_cells import FLOOR, Cell
from midway.gen.sampling import Plan, Samples, decode, sample_latents
from midway.gen.splits import Splits
from midway.gen.statistics import FeatureStatistics
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS

SHOWN = 8  # seeds shown in the sample grids


@dataclass(frozen=True, kw_only=True)
class SweepConfig(PlanConfig):
    """What to measure."""

    solvers: tuple[str, ...] = ("euler", "ddim", "heun", "dpm2", "dpmpp2m")
    nfe: tuple[int, ...] = (4, 6, 8, 10, 20)
    n: int | None = None
    blocks: int = 2
    first_seed: int = 0
    reference_nfe: int = 128
    skip: bool = False
    """Leave out budgets that a solver cannot reach, instead of refusing them."""


def asked(config: SweepConfig) -> list[tuple[str, int]]:
    """Every (solver, NFE) to measure."""
    pairs = [(solver, nfe) for solver in config.solvers for nfe in config.nfe]
    return [(s, k) for s, k in pairs if not config.skip or is_reachable(s, k, config.analytic_first)]


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
    plans = {(solver, nfe): make_plans(trained, solver, nfe, config) for solver, nfe in asked(config)}
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
    for solver, nfe in asked(config):
        for grid in config.grids if solver not in LEARNED else ("learned",):
            yield f"{solver} {grid} {nfe}"
