"""One sweep of several trainings of the same configuration: their seeds are part of the error bar.

Training again moves a Fréchet distance more than drawing samples again, so an error bar over blocks of samples says nothing of
how well a method does, only how well this one model does. Of T trainings every figure is the mean over trainings of the mean over
blocks, and its deviation that among the trainings.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from midway.gen.artefacts import TrainedModel
from midway.gen.config import to_dict
from midway.gen.errors import DataError
from midway.gen.feature_runs import same_images
from midway.gen.report_cells import FLOOR, MEASURES, Cell, mark_best

TIMES = ("seconds", "decode_seconds", "feature_seconds")


def check_repeats(first: TrainedModel, others: Sequence[TrainedModel]) -> None:
    """DataError unless all are trainings of one configuration, on the same images, with different weights."""
    known = {first.hash: first}
    for other in others:
        if not same_images(other.data, first.data) or to_dict(other.model.config) != to_dict(first.model.config):
            raise DataError(
                f"{other.run.path} is no repeat of {first.run.path}",
                "its images or its model's configuration differ",
                "give runs that differ in --seed alone",
            )
        if other.hash in known:
            raise DataError(
                f"{other.run.path} holds the weights of {known[other.hash].run.path}",
                "a repeat with the same weights is no repeat",
                "train it with another --seed",
            )
        known[other.hash] = other


def merge_trainings(sweeps: Sequence[Sequence[Cell]]) -> list[Cell]:
    """The cells of several trainings as one list, in the first's order; what only some have, and baselines, are the first's."""
    first, *rest = sweeps
    found = [{_key(cell): cell for cell in cells} for cells in rest]
    merged = []
    for cell in first:
        others = [cells[_key(cell)] for cells in found if _key(cell) in cells]
        alone = cell.solver == FLOOR or cell.baseline or len(others) < len(rest)
        merged.append(cell if alone else _merged([cell, *others]))
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
