"""Distance against cost, on two logarithmic axes, as PNG bytes: one line per solver, the limits dashed.

Solvers that needed training have hollow markers.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from midway.gen.core.text import plot_label
from midway.gen.evaluation.comparing import (
    baselines_of,
    distance_name,
    feature_names,
    limits_of,
    shown,
    training_costs,
)
from midway.gen.evaluation.records import CEILING, EXACT, FLOOR, TO_EXACT, Measurement
from midway.gen.report.axes import (
    COLOURS,
    QUIET,
    REFERENCE,
    colour,
    dress,
    legend_below,
    look,
    new_figure,
    plain_ticks,
    png,
    without_data,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = Literal["nfe", "seconds"]
Metric = Literal["distance", "to_exact"]
LIMIT_LOOKS: dict[str, tuple[str, Any]] = {
    FLOOR: ("real images", (0, (1, 2))),
    CEILING: ("tokenizer", (0, (5, 3))),
    EXACT: ("model", (0, (8, 2, 1, 2))),
}
"""What each limit is the limit of, and the dashes of its line."""


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the non-dominated (cost, value), both lower is better, by rising cost; ties keep their order.

    Points of equal cost and value are on the front together. Those with an infinite or undefined number are left out.
    """
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    for i in sorted(finite, key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def _plottable(measurements: Sequence[Measurement], x: Cost, metric: Metric) -> list[Measurement]:
    """The shown measurements that a logarithmic plot can hold."""
    points = [*shown(measurements).values(), *(baselines_of(measurements) if metric == "distance" else [])]
    return [m for m in points if 0 < (m.value(metric) or 0.0) < math.inf and _cost(m, x) > 0]


def _cost(m: Measurement, x: Cost) -> float:
    return float(m.nfe if x == "nfe" else m.image_seconds)


def _line(
    axes: "Axes", measurements: Sequence[Measurement], x: Cost, metric: Metric, index: int, label: str, hollow: bool
) -> None:
    """One solver's line with error bars; a bar that would reach 0 stops just above it."""
    points = sorted(measurements, key=lambda m: _cost(m, x))
    costs, values = [_cost(m, x) for m in points], [m.metrics[metric].mean for m in points]
    spread = [m.std(metric) or 0.0 for m in points]
    below = [min(std, 0.9 * value) for std, value in zip(spread, values, strict=True)]
    bars = {"fmt": "none", "ecolor": colour(index), "elinewidth": 1.1, "capsize": 3}
    axes.errorbar(costs, values, yerr=[below, spread], **bars, zorder=2.5)
    face = {"markerfacecolor": "white" if hollow else colour(index), "markeredgewidth": 1.6, "markersize": 7}
    axes.plot(costs, values, **look(index), **face, label=plot_label(label), zorder=3)


def _star(axes: "Axes", m: Measurement, x: Cost, index: int) -> None:
    """A baseline: one star, in another order of colours than the lines."""
    tone = COLOURS[-1 - index % len(COLOURS)]
    at = {"color": tone, "marker": "*", "markersize": 15, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot([_cost(m, x)], [m.distance], **at, label=plot_label(f"{m.solver} (baseline)"), zorder=4)


def _front(axes: "Axes", points: Sequence[Measurement]) -> None:
    """A grey line through what nothing else beats in both time and distance."""
    front = [points[i] for i in pareto_front([(_cost(m, "seconds"), m.distance) for m in points])]
    costs, distances = [_cost(m, "seconds") for m in front], [m.distance for m in front]
    axes.plot(
        costs, distances, color=QUIET, linewidth=6, alpha=0.25, solid_capstyle="round", label="Pareto front", zorder=2
    )


def _ticks(axes: "Axes", measurements: Sequence[Measurement], x: Cost) -> None:
    """Plain numbers on both axes; the budgets themselves as ticks of the NFE axis, as far as they fit."""
    from matplotlib.ticker import FixedLocator, LogLocator

    budgets = _spaced(sorted({m.nfe for m in measurements}))
    plain_ticks(axes.xaxis, FixedLocator(budgets) if x == "nfe" else LogLocator(subs=(1, 2, 5)))
    plain_ticks(axes.yaxis, LogLocator(subs=(1, 2, 5)))


def _spaced(budgets: Sequence[int]) -> list[int]:
    """The budgets that are at least 8 % above the one before: more would print over each other."""
    kept: list[int] = []
    for budget in budgets:
        if not kept or budget >= 1.08 * kept[-1]:
            kept.append(budget)
    return kept


def distance_figure(measurements: Sequence[Measurement], x: Cost = "nfe", metric: Metric = "distance") -> "Figure":
    """Distance to the data, or to the exact solution, against `x`, 7 x 6 inches. ValueError for another `x`."""
    if x not in ("nfe", "seconds"):
        raise ValueError(f"x is {x!r}: a distance is plotted against 'nfe' or 'seconds'")
    figure = new_figure()
    _draw(figure, figure.add_subplot(), measurements, x, metric)
    return figure


def distance_png(measurements: Sequence[Measurement], x: Cost = "nfe", metric: Metric = "distance") -> bytes:
    """`distance_figure` as PNG (1400 x 1200), the same bytes for the same measurements."""
    return png(distance_figure(measurements, x, metric))


def _draw(figure: "Figure", axes: "Axes", measurements: Sequence[Measurement], x: Cost, metric: Metric) -> None:
    points = _plottable(measurements, x, metric)
    counts = {m.n for m in points}
    images = f"{counts.pop()} images" if len(counts) == 1 else "all images"
    across = "NFE, network evaluations per image" if x == "nfe" else f"seconds to make {images}"
    whose = "the exact solution" if metric == TO_EXACT else "the data"
    what = f"{distance_name(measurements)} to {whose}"
    dress(axes, across, what, feature_names(measurements))
    if not points:
        without_data(axes, "no finite distance to plot")
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    learned = training_costs(measurements)
    for index, solver in enumerate(dict.fromkeys(solver for solver, _ in shown(measurements))):
        line = [m for m in points if m.solver == solver and not m.baseline]
        if line:
            label = f"{solver} (trained)" if solver in learned else solver
            _line(axes, line, x, metric, index, label, solver in learned)
    for index, m in enumerate(m for m in points if m.baseline):
        _star(axes, m, x, index)
    if x == "seconds":
        _front(axes, points)
    limits = _limits(axes, measurements) if metric == "distance" else []
    values, costs = [m.metrics[metric].mean for m in points] + limits, [_cost(m, x) for m in points]
    axes.set_ylim(min(values) / 1.35, max(values) * 1.35)  # error bars may be cut, points never
    axes.set_xlim(min(costs) / 1.15, max(costs) * 1.15)
    _ticks(axes, points, x)
    legend_below(figure, axes)


def _limits(axes: "Axes", measurements: Sequence[Measurement]) -> list[float]:
    """Dashed lines, named in the legend (a label on a line would lie across the curves that end there); their distances."""
    found: list[float] = []
    for name, m in limits_of(measurements).items():
        if 0 < m.distance < math.inf:
            of, dashes = LIMIT_LOOKS[m.solver]
            label = plot_label(f"{name} {m.distance:.3g} ({of})")
            axes.axhline(m.distance, **(REFERENCE | {"linestyle": dashes}), label=label, zorder=2)
            found.append(m.distance)
    return found
