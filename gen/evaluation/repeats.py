"""One sweep of several trainings of the same configuration: their seeds are part of the error bar.

Training again moves a Fréchet distance more than drawing samples again, so an error bar over blocks of samples says nothing of
how well a method does, only how well this one model does. Of T trainings every figure is the mean over trainings of the mean over
blocks, and its deviation that among the trainings.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from midway.gen.core.config import to_dict
from midway.gen.core.errors import DataError
from midway.gen.diffusion.load import TrainedModel
from midway.gen.evaluation.records import FLOOR, MEASURES, Cell, mark_best
from midway.gen.features.open import same_images
from midway.gen.tokenizer.latents import tokenizer_hash
from midway.gen.training.config import flat, is_bookkeeping

TIMES = ("seconds", "decode_seconds", "feature_seconds")


def check_repeats(first: TrainedModel, others: Sequence[TrainedModel]) -> None:
    """DataError unless all are trainings of one configuration, on the same images and tokenizer, with different weights."""
    known = {first.hash: first}
    for other in others:
        differing = _differences(first, other)
        if differing:
            raise DataError(
                f"{other.run.path} is no repeat of {first.run.path}",
                f"these differ: {', '.join(differing)}",
                "give runs that differ in --seed alone",
            )
        if other.hash in known:
            raise DataError(
                f"{other.run.path} holds the weights of {known[other.hash].run.path}",
                "a repeat with the same weights is no repeat",
                "train it with another --seed",
            )
        known[other.hash] = other


def _differences(first: TrainedModel, other: TrainedModel) -> list[str]:
    """What makes another training of it than another seed does."""
    before, now = flat(first.run.config), flat(other.run.config)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    found = [key for key in keys if key != "train.seed" and not key.startswith("data.") and not is_bookkeeping(key)]
    found += ["its model's configuration"] * (to_dict(first.model.config) != to_dict(other.model.config))
    found += ["its images"] * (not same_images(other.data, first.data))
    return found + ["its tokenizer"] * (tokenizer_hash(first.tokenizer) != tokenizer_hash(other.tokenizer))


def left_out(sweeps: Sequence[Sequence[Cell]]) -> list[str]:
    """Cells that not all trainings have, which have no mean over them."""
    keys = [dict.fromkeys(_key(cell) for cell in cells if not _stays(cell)) for cells in sweeps]
    every, common = dict.fromkeys(key for one in keys for key in one), set.intersection(*map(set, keys))
    return [f"{solver} on {grid} at NFE {nfe}" for solver, grid, nfe in every if (solver, grid, nfe) not in common]


def _stays(cell: Cell) -> bool:
    return cell.solver == FLOOR or cell.baseline


def merge_trainings(sweeps: Sequence[Sequence[Cell]]) -> list[Cell]:
    """The cells of several trainings as one list, without what only some have; the floor and baselines are the first's."""
    first, *rest = sweeps
    found = [{_key(cell): cell for cell in cells} for cells in rest]
    merged = []
    for cell in first:
        others = [cells[_key(cell)] for cells in found if _key(cell) in cells]
        if _stays(cell):
            merged.append(cell)
        elif len(others) == len(rest):
            merged.append(_merged([cell, *others]))
    return mark_best(merged)  # the mean may have another best grid than the first training


def _key(cell: Cell) -> tuple[str, str, int]:
    return (cell.solver, cell.grid, cell.nfe)


def _merged(cells: Sequence[Cell]) -> Cell:
    """Means over trainings; the distance's and KID's deviations among them."""
    distances = tuple(cell.distance for cell in cells)
    means = {name: _mean([getattr(cell, name) for cell in cells]) for name in MEASURES}
    times = {name: round(sum(getattr(cell, name) for cell in cells) / len(cells), 3) for name in TIMES}
    spread = _std(distances)
    return replace(
        cells[0],
        distance=sum(distances) / len(distances),
        distance_std=spread if math.isfinite(spread) else None,
        kid_std=_std([cell.kid for cell in cells if cell.kid is not None]) if means["kid"] is not None else None,
        distances=distances,
        trainings=len(cells),
        record=" ".join(cell.record for cell in cells if cell.record),
        nonfinite=sum(cell.nonfinite for cell in cells),
        **means,
        **times,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _std(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
