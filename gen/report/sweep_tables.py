"""Tables of a sweep's report: which columns and notes it has. A metric is added by one more entry of `METRIC_COLUMNS`.

A table has a line per solver and a column per number of network evaluations (NFE): value ± standard deviation of the best
grid, and that grid's name. The floor is the same distance between two sets of real images.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from midway.gen.evaluation.records import (
    FLOOR,
    Difference,
    Measurement,
    baselines_of,
    critical_t,
    differences,
    distance_name,
    feature_names,
    floor_name,
    floor_of,
    least_rmse,
    shown,
    training_costs,
)
from midway.gen.report.table import ABSENT, Column, Entry, Line, Table, columns_table, decimals_for, number, with_floor

Measurements = Sequence[Measurement]


def metric(name: str, head: str) -> Column[Measurement]:
    """The column of a metric in "All figures"."""
    return Column(head, lambda m: m.value(name))


def _seconds(head: str, seconds: Callable[[Measurement], float]) -> Column[Measurement]:
    return Column(head, lambda m: None if m.solver == FLOOR else 1000 * seconds(m) / m.n)


METRIC_COLUMNS = [
    metric("rmse", "RMSE"),
    metric("psnr", "PSNR (dB)"),
    metric("kid", "KID"),
    metric("precision", "precision"),
    metric("recall", "recall"),
    metric("density", "density"),
    metric("coverage", "coverage"),
    metric("inception_score", "inception score"),
    metric("fd_infinity", "distance at n = ∞"),
]
_NFE = Column[Measurement]("NFE", lambda m: m.nfe or None, str)
_TIMES = (
    _seconds("solver s", lambda m: m.seconds),
    _seconds("decode s", lambda m: m.decode_seconds),
    _seconds("features s", lambda m: m.feature_seconds),
)

# ---- tables ----


def _by_budget(
    title: str, note: str, entries: Mapping[tuple[str, int], Entry], small: Mapping[str, str] | None = None
) -> Table:
    """A line per solver, in the order of first appearance, with small print by its name, and a column per NFE."""
    nfes = sorted({nfe for _, nfe in entries})
    solvers = dict.fromkeys(solver for solver, _ in entries)
    lines = (Line(s, tuple(entries.get((s, nfe)) for nfe in nfes), (small or {}).get(s, "")) for s in solvers)
    return Table(title, note, ("solver", *(f"NFE {nfe}" for nfe in nfes)), tuple(lines))


def metric_table(ms: Measurements, name: str, title: str, note: str) -> Table:
    """The shown measurements by one metric, the least of each NFE marked, the floor last; no lines if none was measured."""
    chosen = least_rmse(ms) if name == "rmse" else shown(ms)
    values = {key: value for key, m in chosen.items() if (value := m.value(name)) is not None}
    least = {
        nfe: min((v for (_, n), v in values.items() if n == nfe and math.isfinite(v)), default=None)
        for _, nfe in values
    }
    entries = {
        key: Entry(number(value, chosen[key].std(name)), chosen[key].grid, value == least[key[1]])
        for key, value in values.items()
    }
    small = {solver: f"trained, {cost:,} evaluations" for solver, cost in training_costs(ms).items()}
    table, floor = _by_budget(title, note, entries, small), floor_of(ms)
    score = None if floor is None else floor.value(name)
    if floor is None or score is None or not table.lines:
        return table
    return with_floor(table, floor_name(ms), [Entry(number(score, floor.std(name)))] * len(table.heads[1:]))


def distance_table(ms: Measurements) -> Table:
    """Fréchet distance by NFE."""
    name = f"{distance_name(ms)} ({feature_names(ms)})"
    return metric_table(ms, "distance", name, "lower is better; best grid of each solver and NFE")


def kid_table(ms: Measurements) -> Table:
    """Kernel distance by NFE, on the grids of the distance."""
    note = (
        "KID of the same features, on the grids above: unbiased in the number of images, where the Fréchet distance is not. "
        "Seeds and floor have every class equally often, which puts both a little below 0: compare with the floor."
    )
    return metric_table(ms, "kid", "Kernel distance", note)


def rmse_table(ms: Measurements) -> Table:
    """The solver's own error by NFE, on the grid of least error."""
    note = (
        "Root-mean-square difference from the same seeds' reference solution: it measures the solver alone, whatever the model. "
        "Solvers that draw noise on the way converge to other samples by design."
    )
    return metric_table(ms, "rmse", "Error of the solver itself", note)


def difference_table(ms: Measurements) -> Table:
    """How far each solver's distance lies above the best of its NFE; no lines below two blocks."""
    found = differences(ms)
    blocks = max((len(m.distances) for m in shown(ms).values()), default=0)
    what = "trainings" if any(m.trainings > 1 for m in ms) else "blocks of the same seeds"
    note = (
        f"Mean difference and standard error over {blocks} {what}: all solvers use the same seeds, so paired differences have "
        f"smaller errors. '≈' marks differences that are not statistically significant, below {critical_t(blocks):.3g} errors "
        "(Student's t, 95 %). The best was chosen among all of its column, which favours it; more --blocks give smaller errors."
    )
    return _by_budget("Difference from the best", note, {key: _difference(one) for key, one in found.items()})


def _difference(found: Difference) -> Entry:
    if found.best:
        return Entry("best", found.grid, True)
    decimals = decimals_for(found.error, 2)  # more digits than the error has carry no information
    sign = "" if found.significant else "≈ "
    return Entry(f"{sign}+{found.mean:.{decimals}f} ± {found.error:.{decimals}f}", found.grid)


def baseline_table(ms: Measurements) -> Table:
    """Baselines, lowest distance first, each at its own NFE; that of external images is unknown."""
    rows = baselines_of(ms)
    columns = (
        Column[Measurement]("NFE", lambda m: str(m.nfe) if m.nfe else ABSENT, str),
        Column[Measurement]("distance", lambda m: number(m.distance, m.std("distance")), str),
        Column[Measurement](
            "s / 1000 images", lambda m: number(1000 * m.image_seconds / m.n) if m.nfe else ABSENT, str
        ),
    )
    note = (
        "Other models, and external images, measured alike: the same image count, features and reference. Each costs its own "
        "number of network evaluations."
    )
    return columns_table("Baselines", note, "baseline", [m.solver for m in rows], rows, columns)


def all_figures(ms: Measurements) -> Table:
    """Every metric of the shown measurements, baselines and the floor, and seconds for 1000 images."""
    floor = floor_of(ms)
    rows = [*sorted(shown(ms).values(), key=lambda m: m.nfe), *baselines_of(ms), *([floor] if floor else [])]
    names = [floor_name(ms) if m is floor else m.solver for m in rows]
    note = (
        "Of the grids above; seconds are for 1000 images. Precision, recall, density, coverage, PSNR and the inception score are "
        "better when larger, the others when smaller."
    )
    columns = (_NFE, *METRIC_COLUMNS, *_TIMES)
    return columns_table("All figures and where the time went", note, "solver", names, rows, columns)
