"""Values against cost on two logarithmic axes: a line per solver, named at its end, limits as bands, ratios to the best.

Lines that coincide in the first panel are apart in one of ratios: each value over the least of its cost.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from midway.gen.core.text import plot_label
from midway.gen.report.drawing import (
    COLOURS,
    HAIR,
    INK,
    NARROW,
    PAPER,
    QUIET,
    SIZE,
    WIDE,
    colour,
    dress,
    legend_below,
    legend_groups,
    log_ticks,
    look,
    model_look,
    new_figure,
    place,
    plain_ticks,
    prior_look,
    without_data,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float, float]
"""Cost, value, its error (0: none)."""


@dataclass(frozen=True)
class Curve:
    """A line through points of rising cost; `index` is of its colour and marker. hollow: it needed training. star: one point.

    group: under which title of the legend it is, with all lines of a style of their own; empty for solvers.
    """

    name: str
    index: int
    points: tuple[Point, ...]
    hollow: bool = False
    star: bool = False
    group: str = ""


@dataclass(frozen=True)
class Band:
    """A limit: mean ± error across the whole plot."""

    name: str
    value: float
    error: float = 0.0
    dashes: Any = "-"


@dataclass(frozen=True)
class Panel:
    """What one pair of axes shows. front: a grey line through these (cost, value)."""

    title: str
    curves: tuple[Curve, ...]
    bands: tuple[Band, ...] = ()
    front: tuple[tuple[float, float], ...] = ()
    height: float = 265


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


def ratios(curves: Iterable[Curve]) -> tuple[Curve, ...]:
    """Every value over the least at its cost, of costs at which there are several; none of stars."""
    lines = [curve for curve in curves if not curve.star]
    at: dict[float, list[float]] = {}
    for cost, value, _ in (point for curve in lines for point in curve.points):
        at.setdefault(cost, []).append(value)
    shared = {cost: min(values) for cost, values in at.items() if len(values) > 1}
    found = (
        replace(
            curve, points=tuple((cost, value / shared[cost], 0.0) for cost, value, _ in curve.points if cost in shared)
        )
        for curve in lines
    )
    return tuple(curve for curve in found if curve.points)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Places within [low, high], `gap` apart in the order of the wanted ones, of least squared distance from them.

    A smaller gap where there is no room. Least squares: pool adjacent violators of `wanted - gap * rank`.
    """
    if not wanted:
        return []
    gap = min(gap, (high - low) / max(len(wanted) - 1, 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    blocks: list[list[float]] = []
    for rank, i in enumerate(order):
        blocks.append([wanted[i] - gap * rank])
        while len(blocks) > 1 and _mean(blocks[-2]) >= _mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    level = [min(max(_mean(block), low), high - gap * (len(order) - 1)) for block in blocks for _ in block]
    places = {i: level[rank] + gap * rank for rank, i in enumerate(order)}
    return [places[i] for i in range(len(wanted))]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- the figure ----


def curves_figure(
    panels: Sequence[Panel], across: str, ticks: Sequence[float] | None = None, narrow: bool = False
) -> "Figure":
    """Panels below one another on the same costs; ticks: of the axis of costs (None: plain decades).

    Wide, lines and bands are named in the right margin; narrow, below the plot, so that it keeps its width.
    """
    curves = [curve for panel in panels for curve in panel.curves]
    names = dict.fromkeys(plot_label(curve.name) for curve in curves)
    labels = [*names, *(plot_label(band.name) for panel in panels for band in panel.bands)]
    bold = {plot_label(curve.name) for curve in curves if curve.group}
    longest = max((len(label) * (1.1 if label in bold else 1) for label in labels), default=0)
    columns = 2 if longest < 20 else 1
    right = 14 if narrow else 24 + 0.56 * SIZE * longest
    titles = _titles(curves)
    foot = 50 + (sum(height for *_, height in legend_groups(dict.fromkeys(labels), titles, columns)) if narrow else 0)
    heights = [panel.height * (0.75 if narrow else 1) for panel in panels]
    total = sum(heights) + 38 * (len(panels) - 1) + 30 + foot
    figure = new_figure(NARROW if narrow else WIDE, total)
    top = 30.0
    for number, (panel, height) in enumerate(zip(panels, heights, strict=True)):
        last = number == len(panels) - 1
        axes = place(figure, 46, right, top, total - top - height)
        dress(axes, across if last else "", "")
        axes.set_title(plot_label(panel.title, 46 if narrow else 105), color=INK, fontsize=SIZE, loc="left", pad=9)
        axes.tick_params(labelbottom=last)
        _panel(axes, panel, curves, ticks, narrow)
        top += height + 38
    if narrow and labels:
        legend_below(figure, figure.axes[0], columns, titles)
    elif titles:
        _key(figure.axes[0], titles)
    return figure


PRIORS = "priors over codes"
"""Title of their curves."""
SOLVERS = "solvers"
"""Title of the curves without one, where others have one."""


def _titles(curves: Sequence[Curve]) -> dict[str, str]:
    """The titles of the legend by the labels of curves; none where no curve has one."""
    if not any(curve.group for curve in curves):
        return {}
    return {plot_label(curve.name): plot_label(curve.group or SOLVERS) for curve in curves if not curve.star}


def _key(axes: "Axes", titles: Mapping[str, str]) -> None:
    """What the styles of lines are of, in the plot: names are in its margin."""
    first = {title: next(name for name, its in titles.items() if its == title) for title in titles.values()}
    drawn = {line.get_label(): line for line in axes.lines}
    axes.legend(
        [drawn[name] for name in first.values()],
        [*first],
        loc="upper right",
        facecolor=PAPER,
        edgecolor=HAIR,
        framealpha=0.9,
        labelcolor=INK,
        fontsize=SIZE - 0.5,
        handlelength=3.6,
    ).set_zorder(5)


def _panel(axes: "Axes", panel: Panel, every: Sequence[Curve], ticks: Sequence[float] | None, narrow: bool) -> None:
    """One panel, its costs those of `every` curve of the figure."""
    from matplotlib.ticker import FixedLocator, LogLocator

    if not panel.curves:
        without_data(axes, "no finite distance to plot")
        return
    axes.set_xscale("log")
    axes.set_yscale("log")
    if panel.front:
        axes.plot(
            *zip(*panel.front, strict=True), color=QUIET, linewidth=7, alpha=0.25, solid_capstyle="round", zorder=2
        )
    for band in panel.bands:
        _band(axes, band, narrow)
    for curve in panel.curves:
        _star(axes, curve, narrow) if curve.star else _line(axes, curve)
    values = [value for curve in panel.curves for _, value, _ in curve.points] + [band.value for band in panel.bands]
    costs = [cost for curve in every for cost, _, _ in curve.points]
    axes.set_ylim(min(values) / 1.25, max(values) * 1.25)  # error bars may be cut, points never
    axes.set_xlim(min(costs) / 1.12, max(costs) * 1.12)
    plain_ticks(axes.xaxis, FixedLocator(spaced(ticks)) if ticks else LogLocator(subs=(1, 2, 5)))
    log_ticks(axes.yaxis)
    if not narrow:
        _name_ends(axes, panel)


def spaced(ticks: Sequence[float]) -> list[float]:
    """The ticks that are at least 8 % above the one before: more would print over each other."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or tick >= 1.08 * kept[-1]:
            kept.append(tick)
    return kept


def _line(axes: "Axes", curve: Curve) -> None:
    """One line with error bars; a bar that would reach 0 stops just above it."""
    costs, values, errors = zip(*curve.points, strict=True)
    style = _style(curve)
    below = [min(error, 0.9 * value) for error, value in zip(errors, values, strict=True)]
    if any(errors):
        bars = {"fmt": "none", "ecolor": style["color"], "elinewidth": 1.2, "alpha": 0.55}
        axes.errorbar(costs, values, yerr=[below, errors], **bars, zorder=2.5)
    face = {"markerfacecolor": PAPER if curve.hollow else colour(curve.index), "markeredgewidth": 1.6, "markersize": 7}
    if curve.group:
        face = {"markersize": 11, "markeredgecolor": PAPER, "markeredgewidth": 0.6}
    axes.plot(costs, values, **style, **face, label=plot_label(curve.name), zorder=3.5 if curve.group else 3)


def _style(curve: Curve) -> dict[str, Any]:
    look_of = prior_look if curve.group == PRIORS else model_look if curve.group else look
    return look_of(curve.index)


def _star(axes: "Axes", curve: Curve, narrow: bool) -> None:
    """A model of its own: one star, in another order of colours than the lines, named beside it."""
    tone, (cost, value, _) = COLOURS[-1 - curve.index % len(COLOURS)], curve.points[0]
    at = {"color": tone, "marker": "*", "markersize": 15, "markeredgecolor": PAPER, "linestyle": "none"}
    axes.plot([cost], [value], **at, label=plot_label(curve.name), zorder=4)
    if not narrow:
        beside: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SIZE - 0.5, "color": INK}
        axes.annotate(plot_label(curve.name), (cost, value), (10, 0), **beside, zorder=4)


def _band(axes: "Axes", band: Band, narrow: bool) -> None:
    """Its mean as a line in a strip of its error."""
    if band.error:
        low = max(band.value - band.error, band.value / 10)
        axes.axhspan(low, band.value + band.error, color=QUIET, alpha=0.16, linewidth=0, zorder=1.5)
    label = plot_label(band.name) if narrow else None  # wide, its name is in the margin
    axes.axhline(band.value, color=QUIET, linestyle=band.dashes, linewidth=1.2, zorder=2, label=label)


def _name_ends(axes: "Axes", panel: Panel) -> None:
    """The name of every line and band in the right margin, none over another, led to by a thin line from its end."""
    edge, marked = axes.get_xlim()[1], {curve.name for curve in panel.curves if curve.group}
    ends = [(curve.name, *curve.points[-1][:2], _style(curve)["color"]) for curve in panel.curves if not curve.star]
    ends += [(band.name, edge, band.value, QUIET) for band in panel.bands]
    frame = axes.get_window_extent()
    heights = [axes.transData.transform((cost, value))[1] for _, cost, value, _ in ends]
    places = spread(heights, SIZE * 1.25, frame.y0 + 3, frame.y1 - 3)
    for (name, cost, value, tone), height in zip(ends, places, strict=True):
        leader = {"arrowstyle": "-", "color": tone, "linewidth": 1.0, "alpha": 0.7, "shrinkA": 2, "shrinkB": 5}
        axes.annotate(
            plot_label(name),
            (cost, value),
            (frame.x1 + 16, height),
            textcoords="figure points",
            va="center",
            fontsize=SIZE - 0.5,
            fontweight="bold" if name in marked else "normal",
            color=QUIET if tone == QUIET else INK,
            arrowprops={**leader, "relpos": (0, 0.5)},
            annotation_clip=False,
            zorder=4,
        )
