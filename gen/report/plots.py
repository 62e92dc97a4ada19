"""Distance against cost, on two logarithmic axes, as PNG bytes: one line per solver, the floor dashed.

Colours are Okabe & Ito's eight (2008, readable by colour-blind people; yellow left out), markers and dashes differ as
well, so that a grey print still tells the lines apart. Solvers that needed training have hollow markers.
"""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from midway.gen.evaluation.records import (
    Measurement,
    baselines_of,
    distance_name,
    feature_names,
    floor_name,
    floor_of,
    shown,
    training_costs,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = Literal["nfe", "seconds"]
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)))
INK, QUIET, HAIR = "#1f2430", "#5b6270", "#e3e6ea"


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


def _plottable(measurements: Sequence[Measurement], x: Cost) -> list[Measurement]:
    """The shown measurements that a logarithmic plot can hold."""
    points = [*shown(measurements).values(), *baselines_of(measurements)]
    return [m for m in points if math.isfinite(m.distance) and m.distance > 0 and _cost(m, x) > 0]


def _cost(m: Measurement, x: Cost) -> float:
    return float(m.nfe if x == "nfe" else m.image_seconds)


def plain_tick(value: float, _position: object = None) -> str:
    """A tick without an exponent: 0.05, 2, 500."""
    return f"{value:.10f}".rstrip("0").rstrip(".") if value < 1 else f"{value:g}"


def _line(axes: "Axes", measurements: Sequence[Measurement], x: Cost, index: int, label: str, hollow: bool) -> None:
    """One solver's line with error bars; a bar that would reach 0 stops just above it."""
    points = sorted(measurements, key=lambda m: _cost(m, x))
    colour = COLOURS[index % len(COLOURS)]
    spread = [m.std("distance") or 0.0 for m in points]
    below = [min(std, 0.9 * m.distance) for std, m in zip(spread, points, strict=True)]
    costs, distances = [_cost(m, x) for m in points], [m.distance for m in points]
    axes.errorbar(
        costs, distances, yerr=[below, spread], fmt="none", ecolor=colour, elinewidth=1.1, capsize=3, zorder=2.5
    )
    axes.plot(
        costs,
        distances,
        color=colour,
        marker=MARKERS[index % len(MARKERS)],
        linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
        markerfacecolor="white" if hollow else colour,
        markersize=7,
        markeredgewidth=1.6,
        linewidth=1.8,
        label=label,
        zorder=3,
    )


def _star(axes: "Axes", m: Measurement, x: Cost, index: int) -> None:
    """A baseline: one star, in another order of colours than the lines."""
    colour = COLOURS[-1 - index % len(COLOURS)]
    at = {"color": colour, "marker": "*", "markersize": 15, "markeredgecolor": "white", "linestyle": "none"}
    axes.plot([_cost(m, x)], [m.distance], **at, label=f"{m.solver} (baseline)", zorder=4)


def _front(axes: "Axes", points: Sequence[Measurement]) -> None:
    """A grey line through what nothing else beats in both time and distance."""
    front = [points[i] for i in pareto_front([(_cost(m, "seconds"), m.distance) for m in points])]
    costs, distances = [_cost(m, "seconds") for m in front], [m.distance for m in front]
    axes.plot(
        costs, distances, color=QUIET, linewidth=6, alpha=0.25, solid_capstyle="round", label="Pareto front", zorder=2
    )


def _floor(axes: "Axes", distance: float, name: str) -> None:
    """A dashed line, named in the legend: a label on it would lie across the curves that end there."""
    label = f"{name} {distance:.3g} (real images)"
    axes.axhline(distance, color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2, label=label, zorder=2)


def _ticks(axes: "Axes", measurements: Sequence[Measurement], x: Cost) -> None:
    """Plain numbers on both axes; the budgets themselves as ticks of the NFE axis, as far as they fit."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(plain_tick))
        axis.set_minor_locator(NullLocator())
    if x == "nfe":
        axes.xaxis.set_major_locator(FixedLocator(_spaced(sorted({m.nfe for m in measurements}))))


def _spaced(budgets: Sequence[int]) -> list[int]:
    """The budgets that are at least 8 % above the one before: more would print over each other."""
    kept: list[int] = []
    for budget in budgets:
        if not kept or budget >= 1.08 * kept[-1]:
            kept.append(budget)
    return kept


def _dress(axes: "Axes", name: str, x: Cost, counts: Sequence[int]) -> None:
    """Labels, grid and a frame that recedes behind the data."""
    images = f"{counts[0]} images" if len(counts) == 1 else "all images"
    label = "NFE, network evaluations per image" if x == "nfe" else f"seconds to make {images}"
    axes.set_xlabel(label, color=INK, labelpad=8, fontsize=12)
    axes.set_ylabel(name, color=INK, labelpad=8, fontsize=12)
    axes.grid(True, color=HAIR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=QUIET, labelsize=11)
    for side in axes.spines.values():
        side.set_visible(False)


def _limits(axes: "Axes", distances: Sequence[float], costs: Sequence[float]) -> None:
    """A margin around all values: error bars may be cut, points never."""
    axes.set_ylim(min(distances) / 1.35, max(distances) * 1.35)
    axes.set_xlim(min(costs) / 1.15, max(costs) * 1.15)


def _legend(figure: "Figure", axes: "Axes") -> None:
    """The solvers below the plot, in up to three columns, so that the plot keeps its width on a phone."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=3,
        frameon=False,
        labelcolor=INK,
        fontsize=11,
        handlelength=2.4,
        columnspacing=1.6,
    )


def distance_figure(measurements: Sequence[Measurement], x: Cost = "nfe") -> "Figure":
    """Distance against `x` for the best m of each (solver, nfe), 7 x 6 inches. ValueError for another `x`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if x not in ("nfe", "seconds"):
        raise ValueError(f"x is {x!r}: a distance is plotted against 'nfe' or 'seconds'")
    figure = Figure(figsize=(7, 6), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    _draw(figure, figure.add_subplot(), measurements, x)
    return figure


def distance_png(measurements: Sequence[Measurement], x: Cost = "nfe") -> bytes:
    """`distance_figure` as PNG (1400 x 1200), the same bytes for the same measurements."""
    buffer = io.BytesIO()
    distance_figure(measurements, x).savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _draw(figure: "Figure", axes: "Axes", measurements: Sequence[Measurement], x: Cost) -> None:
    points = _plottable(measurements, x)
    floor = floor_of(measurements)
    _dress(axes, f"{distance_name(measurements)} ({feature_names(measurements)})", x, sorted({m.n for m in points}))
    if not points:
        axes.text(0.5, 0.5, "no finite distance to plot", transform=axes.transAxes, ha="center", color=QUIET)
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    learned = training_costs(measurements)
    for index, solver in enumerate(dict.fromkeys(solver for solver, _ in shown(measurements))):
        line = [m for m in points if m.solver == solver and not m.baseline]
        if line:
            _line(axes, line, x, index, f"{solver} (trained)" if solver in learned else solver, solver in learned)
    for index, m in enumerate(m for m in points if m.baseline):
        _star(axes, m, x, index)
    if x == "seconds":
        _front(axes, points)
    floors = [floor.distance] if floor and math.isfinite(floor.distance) and floor.distance > 0 else []
    for distance in floors:
        _floor(axes, distance, floor_name(measurements))
    _limits(axes, [m.distance for m in points] + floors, [_cost(m, x) for m in points])
    _ticks(axes, points, x)
    _legend(figure, axes)
