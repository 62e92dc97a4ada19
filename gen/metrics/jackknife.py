"""The standard error of a figure of one set of images (grouped jackknife: Efron & Tibshirani 1993, chapter 11)."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

GROUPS = 10


def jackknife(figure: Callable[[Tensor], float], rows: Tensor, groups: int = GROUPS) -> float:
    """Standard error of figure(rows), rows (n, *), from leaving out each of `groups` runs of neighbours in turn.

    A figure's bias that depends on n alone is the same in all of them and cancels. ValueError for fewer than 2 rows a group.
    """
    if groups < 2 or len(rows) < 2 * groups:
        raise ValueError(f"{len(rows)} rows in {groups} groups: a jackknife needs at least 2 groups of 2 rows")
    parts = rows.tensor_split(groups)
    found = [figure(torch.cat([*parts[:i], *parts[i + 1 :]])) for i in range(groups)]
    mean = sum(found) / groups
    return math.sqrt((groups - 1) / groups * sum((value - mean) ** 2 for value in found))
