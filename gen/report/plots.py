"""The plots of a sweep: distance against evaluations with the limits as bands, against the exact solution, and against time."""

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

from midway.gen.evaluation.comparing import (
    baselines_of,
    distance_name,
    feature_names,
    few_step,
    limits_of,
    own_weights,
    priors,
    question,
    shown,
    training_costs,
)
from midway.gen.evaluation.records import CEILING, EXACT, FEW_STEP, FLOOR, PRIOR, TO_EXACT, Measurement
from midway.gen.report.curves import PRIORS, Band, Curve, Panel, curves_figure, pareto_front, ratios
from midway.gen.report.drawing import Drawing
from midway.gen.report.table import number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cost = Literal["nfe", "seconds"]
Metric = Literal["distance", "to_exact"]
Measurements = Sequence[Measurement]
GROUP_TITLES = {FEW_STEP: "few-step models", PRIOR: PRIORS}
"""Titles of their lines in legends."""
DASHES: dict[str, Any] = {FLOOR: (0, (1, 2)), CEILING: (0, (5, 3)), EXACT: (0, (8, 2, 1, 2))}
"""Of the lines of the limits."""
PNGS: dict[str, tuple[Cost, Metric]] = {
    "exact_vs_nfe": ("nfe", "to_exact"),
    "distance_vs_nfe": ("nfe", "distance"),
    "distance_vs_seconds": ("seconds", "distance"),
}
"""What the files of a report show."""


def drawings(ms: Measurements) -> list[Drawing]:
    """The plots of a report, the first first; that of the distance to the exact solution only where it was measured."""
    spread = "trainings" if any(m.trainings > 1 for m in ms) else "seed blocks"
    read = f"Bars and strips: standard deviation over {spread}, of real images that of a jackknife. Hollow: trained solvers."
    lines = " Dash-dotted: few-step models, each of its own weights." * bool(few_step(ms))
    lines += " Dotted: priors over codes, each of its own weights, by rule." * bool(priors(ms))
    data = f"{read}{lines}"
    what, ranks = distance_name(ms), question(ms)
    below = f" Below: {_whose(ms, ranks)}, over the least of each budget." if ratios(_curves(ms, "nfe", ranks)) else ""
    found = [
        Drawing(
            "distance_vs_nfe",
            f"{what} to the data against NFE",
            f"{data}{below}",
            lambda narrow: distance_figure(ms, "nfe", narrow=narrow),
        ),
        Drawing(
            "exact_vs_nfe",
            f"{what} to the exact solution against NFE",
            f"The solver's own error, 0 at convergence. {read}",
            lambda n: distance_figure(ms, "nfe", "to_exact", n),
        ),
        Drawing(
            "distance_vs_seconds",
            f"{what} to the data against time",
            "The same measurements against the time to make the images, sampling and decoding, on the hardware named below. "
            f"Grey: the Pareto front, better than all others in distance or time.{lines}",
            lambda n: distance_figure(ms, "seconds", narrow=n),
        ),
    ]
    return [drawing for drawing in found if drawing.name != "exact_vs_nfe" or ranks == TO_EXACT]


def distance_figure(ms: Measurements, x: Cost = "nfe", metric: Metric = "distance", narrow: bool = False) -> "Figure":
    """Distance to the data, or to the exact solution, against `x`. ValueError for another `x`.

    Below the distance to the data by NFE: what ranks solvers, as a ratio to the best.
    """
    if x not in ("nfe", "seconds"):
        raise ValueError(f"x is {x!r}: a distance is plotted against 'nfe' or 'seconds'")
    curves = _curves(ms, x, metric)
    features = "" if narrow else f" ({feature_names(ms)})"
    bands = _bands(ms) if metric == "distance" else ()
    front = _front(curves) if x == "seconds" else ()
    panels = [Panel(f"{_whose(ms, metric)}{features}", curves, bands, front)]
    if x == "nfe" and metric == "distance" and (over := ratios(_curves(ms, x, question(ms)))):
        by = ", by distance to exact" if question(ms) == TO_EXACT else ""
        panels.append(Panel(f"Ratio to the best{by}", over, height=165))
    points = [m for m in ms if _plotted(m, x, metric)]
    counts = {m.n for m in points}
    images = f"{counts.pop()} images" if len(counts) == 1 else "all images"
    across = "NFE, network evaluations per image" if x == "nfe" else f"seconds to make {images}"
    return curves_figure(panels, across, sorted({m.nfe for m in points}) if x == "nfe" else None, narrow)


def distance_png(ms: Measurements, x: Cost = "nfe", metric: Metric = "distance") -> bytes:
    """`distance_figure` as PNG, the same bytes for the same measurements."""
    return Drawing("distance", "", "", lambda narrow: distance_figure(ms, x, metric, narrow)).png()


def _whose(ms: Measurements, metric: str) -> str:
    return f"{distance_name(ms)} to {'the exact solution' if metric == TO_EXACT else 'the data'}"


def _cost(m: Measurement, x: Cost) -> float:
    return float(m.nfe if x == "nfe" else m.image_seconds)


def _plotted(m: Measurement, x: Cost, metric: str) -> bool:
    """Whether a logarithmic plot can hold it."""
    return 0 < (m.value(metric) or 0.0) < math.inf and _cost(m, x) > 0


def _curves(ms: Measurements, x: Cost, metric: str) -> tuple[Curve, ...]:
    """A line per solver, few-step model and rule of a prior, and of the distance to the data a star per baseline."""
    learned, every, kinds = training_costs(ms), shown(ms), {m.solver: m.kind for m in own_weights(ms)}
    found: list[Curve] = []
    names = dict.fromkeys(solver for solver, _ in every)
    levels = [[name for name in names if kinds.get(name) == kind] for kind in (None, *GROUP_TITLES)]
    for index, solver in chain(*map(enumerate, levels)):
        own = [m for m in every.values() if m.solver == solver and _plotted(m, x, metric)]
        points = sorted((_cost(m, x), m.metrics[metric].mean, m.std(metric) or 0.0) for m in own)
        group = GROUP_TITLES[kinds[solver]] if solver in kinds else ""
        found += [Curve(solver, index, tuple(points), solver in learned, group=group)] if points else []
    stars = [m for m in baselines_of(ms) if metric == "distance" and _plotted(m, x, metric)]
    found += [Curve(m.solver, i, ((_cost(m, x), m.distance, 0.0),), star=True) for i, m in enumerate(stars)]
    return tuple(found)


def _bands(ms: Measurements) -> tuple[Band, ...]:
    return tuple(
        Band(f"{name} {number(m.distance)}", m.distance, m.std("distance") or 0.0, DASHES[m.solver])
        for name, m in limits_of(ms).items()
        if 0 < m.distance < math.inf
    )


def _front(curves: Sequence[Curve]) -> tuple[tuple[float, float], ...]:
    """What nothing else beats in both cost and value."""
    points = [(cost, value) for curve in curves for cost, value, _ in curve.points]
    return tuple(points[i] for i in pareto_front(points))
