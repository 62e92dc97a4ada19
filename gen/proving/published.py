"""The order of solvers here beside the published one: rank correlation (Spearman 1904) at every budget.

Published: FID of CIFAR-10, unconditional, 50,000 images, EDM's network (Zhou et al. 2024, arXiv 2312.00094, table 2; Chen et al.
2024, arXiv 2405.11326; the authors' repository diff-sampler). There each solver has a grid of its own, and two-evaluation
solvers take odd budgets with an analytic first step, as here. Nothing of them enters a figure of this ground.
"""

from collections.abc import Sequence

from midway.gen.proving.contest import Cell

PUBLISHED: dict[str, dict[int, float]] = {
    "euler": {3: 93.36, 4: 66.76, 5: 49.66, 6: 35.62, 7: 27.93, 8: 22.32, 9: 18.43, 10: 15.69},
    "heun": {3: 306.2, 4: 319.87, 5: 97.67, 6: 99.74, 7: 37.28, 8: 38.06, 9: 15.76, 10: 15.93},
    "dpm2": {3: 155.7, 4: 145.98, 5: 57.30, 6: 60.00, 7: 10.20, 8: 10.30, 9: 4.98, 10: 5.01},
    "dpmpp3m": {3: 110.03, 4: 46.52, 5: 24.97, 6: 11.99, 7: 6.74, 8: 4.54, 9: 3.42, 10: 3.00},
    "unipc3": {3: 109.61, 4: 45.20, 5: 23.98, 6: 11.14, 7: 5.83, 8: 3.99, 9: 3.21, 10: 2.89},
    "ipndm4": {3: 47.98, 4: 24.82, 5: 13.59, 6: 7.05, 7: 5.08, 8: 3.69, 9: 3.17, 10: 2.77},
    "amed": {3: 18.49, 4: 17.18, 5: 7.59, 6: 7.04, 7: 4.36, 8: 5.56, 9: 3.67, 10: 4.14},
    "amed-plugin-ipndm4": {3: 10.81, 5: 6.61, 6: 6.67, 7: 3.65, 8: 3.34, 9: 2.63, 10: 2.48},
}
RATIO = ("amed", "dpmpp3m", 5)
"""The quotient of these two solvers' figures at this budget is reported; published 7.59 / 24.97."""


def ranks(values: Sequence[float]) -> list[float]:
    """From 1, ties share the mean of theirs."""
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Rank correlation in [-1, 1]; None of fewer than 3 pairs, or where one side is all ties."""
    if len(first) < 3:
        return None
    a, b = ranks(first), ranks(second)
    middle = (len(a) + 1) / 2
    spread = [sum((rank - middle) ** 2 for rank in one) for one in (a, b)]
    if not min(spread):
        return None
    return sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)) / (spread[0] * spread[1]) ** 0.5


def correlations(cells: Sequence[Cell], name: str) -> dict[int, tuple[float, int]]:
    """At every budget, the correlation of a figure's mean with the published one, and of how many solvers."""
    found = {}
    for nfe in sorted({cell.nfe for cell in cells if cell.nfe}):
        one = overall([cell for cell in cells if cell.nfe == nfe], name)
        found |= {} if one is None else {nfe: one}
    return found


def overall(cells: Sequence[Cell], name: str) -> tuple[float, int] | None:
    """The correlation over all cells together, and of how many."""
    pairs = [
        (value, PUBLISHED[cell.solver][cell.nfe])
        for cell in cells
        if cell.nfe in PUBLISHED.get(cell.solver, {}) and (value := cell.mean(name)) is not None
    ]
    correlation = spearman([measured for measured, _ in pairs], [there for _, there in pairs])
    return None if correlation is None else (correlation, len(pairs))


def ratio(cells: Sequence[Cell], name: str) -> float | None:
    """That of `RATIO`; None where one of the two was not measured."""
    first, second, nfe = RATIO
    value = {cell.solver: cell.mean(name) for cell in cells if cell.nfe == nfe}
    above, below = value.get(first), value.get(second)
    return None if above is None or not below else above / below
