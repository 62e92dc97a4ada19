"""The plots of a sweep: distance against evaluations with the limits as bands, against the exact solution, and against time;
where guidance was chosen, against its scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, product
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
from midway.gen.report.drawing import (
    DASHES,
    INK,
    MARKERS,
    NARROW,
    PAPER,
    WIDE,
    Drawing,
    colour,
    dress,
    legend_below,
    legend_rows,
    log_ticks,
    new_figure,
    place,
    without_data,
)
from midway.gen.report.table import number
from midway.gen.sweep.guidance import UNGUIDED, GuidanceChoice, Key, parts_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cost = Literal["nfe", "seconds"]
Metric = Literal["distance", "to_exact"]
Measurements = Sequence[Measurement]
GROUP_TITLES = {FEW_STEP: "few-step models", PRIOR: PRIORS}
"""Titles of their lines in legends."""
LIMIT_DASHES: dict[str, Any] = {FLOOR: (0, (1, 2)), CEILING: (0, (5, 3)), EXACT: (0, (8, 2, 1, 2))}
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
        Band(f"{name} {number(m.distance)}", m.distance, m.std("distance") or 0.0, LIMIT_DASHES[m.solver])
        for name, m in limits_of(ms).items()
        if 0 < m.distance < math.inf
    )


def _front(curves: Sequence[Curve]) -> tuple[tuple[float, float], ...]:
    """What nothing else beats in both cost and value."""
    points = [(cost, value) for curve in curves for cost, value, _ in curve.points]
    return tuple(points[i] for i in pareto_front(points))


# ---- guidance ----

RING: dict[str, Any] = {"marker": "o", "linestyle": "none", "markersize": 14, "markerfacecolor": "none", "color": INK}
STAR: dict[str, Any] = {"marker": "*", "linestyle": "none", "markersize": 15, "markeredgecolor": PAPER, "color": INK}
"""Marks of what was scored, and of the least distance of all."""


@dataclass(frozen=True)
class GuidanceLine:
    """Candidates of a solver and a budget that differ in the scale alone, by rising scale; `rest` is what else guidance is."""

    budget: int
    rest: str
    keys: tuple[Key, ...]


def guidance_drawing(choice: GuidanceChoice) -> Drawing:
    """`guidance_figure` of a choice."""
    strips = " Strips: standard error, by a jackknife." * any(its.error for its in choice.figures.values())
    caption = (
        f"Fréchet distance on seeds {choice.seeds}, none of which is scored; each candidate on its best grid.{strips} Rings: "
        "what was scored, the best of the solver at its cost. Star: the least distance of all."
    )
    title = "Distance to the data against the scale of guidance"
    return Drawing("distance_vs_guidance", title, caption, lambda narrow: guidance_figure(choice, narrow))


def guidance_lines(choice: GuidanceChoice, solver: str) -> list[GuidanceLine]:
    """All lines of a solver. No guidance, scale 1, is on each; what diverged on none."""
    own = [key for key in choice.figures if key[0] == solver and choice.figures[key].figure]
    rests = dict.fromkeys(parts_of(words)[1] for _, _, words, _ in own if words != UNGUIDED) or {"": None}
    found = list[GuidanceLine]()
    for budget, rest in product(dict.fromkeys(nfe for _, nfe, _, _ in own), rests):
        best: dict[float, Key] = {}
        for key in own:
            scale, its = parts_of(key[2])
            if key[1] == budget and (its == rest or key[2] == UNGUIDED):
                best[scale] = min(best.get(scale, key), key, key=lambda key: choice.figures[key].rank)
        found.append(GuidanceLine(budget, rest, tuple(best[scale] for scale in sorted(best))))
    return found


def guidance_figure(choice: GuidanceChoice, narrow: bool = False) -> "Figure":
    """A panel per solver, on one scale of distances: colours are budgets, dashes and markers what else the guidance is."""
    lines = {
        solver: guidance_lines(choice, solver) for solver in dict.fromkeys(solver for solver, *_ in choice.figures)
    }
    every = [line for its in lines.values() for line in its]
    budgets, rests = (
        list(dict.fromkeys(line.budget for line in every)),
        list(dict.fromkeys(line.rest for line in every)),
    )
    columns = 1 if narrow else min(2, len(lines))
    rows, wide = -(-len(lines) // columns), ((NARROW if narrow else WIDE) - 60) / columns
    high, foot = 250 if narrow else 290, legend_rows(len(budgets) + len(rests) + 2, 1 if narrow else 2)
    figure = new_figure(NARROW if narrow else WIDE, rows * high + foot + 10)
    for index, (solver, own) in enumerate(lines.items()):
        row, column = divmod(index, columns)
        left, top = 46 + column * (wide + 8), row * high + 30
        right = figure.get_size_inches()[0] * 72 - left - wide + 16
        axes = place(figure, left, right, top, figure.get_size_inches()[1] * 72 - row * high - high + 50)
        dress(axes, "scale w", "", solver)
        _guidance_panel(axes, choice, own, budgets, rests)
        _same_distances(axes, every, choice)
        axes.tick_params(labelleft=column == 0)
    _guidance_key(figure.axes[0], budgets, rests)
    legend_below(figure, figure.axes[0], 1 if narrow else 2)
    return figure


def _guidance_panel(
    axes: "Axes",
    choice: GuidanceChoice,
    lines: Sequence[GuidanceLine],
    budgets: Sequence[int],
    rests: Sequence[str],
) -> None:
    """Lines in strips of their errors, with the marks."""
    least = min(choice.figures, key=lambda key: choice.figures[key].rank)
    axes.set_yscale("log")
    if not lines:
        without_data(axes, "no finite distance to plot")
    for line in lines:
        scales = [parts_of(words)[0] for _, _, words, _ in line.keys]
        its = [choice.figures[key] for key in line.keys]
        style = _guidance_look(budgets.index(line.budget), rests.index(line.rest))
        low = [max(one.rank - one.error, one.rank / 10) for one in its]
        axes.fill_between(
            scales, low, [one.rank + one.error for one in its], color=style["color"], alpha=0.13, linewidth=0
        )
        axes.plot(scales, [one.rank for one in its], **style, zorder=3)
        for scale, key, one in zip(scales, line.keys, its, strict=True):
            if key in choice.chosen:
                axes.plot([scale], [one.rank], **RING, zorder=4)
            if key == least:
                axes.plot([scale], [one.rank], **STAR, zorder=5)


def _same_distances(axes: "Axes", lines: Sequence[GuidanceLine], choice: GuidanceChoice) -> None:
    """The axes of all panels; strips may be cut, points never."""
    keys = [key for line in lines for key in line.keys]
    if not keys:
        return
    values, scales = [choice.figures[key].rank for key in keys], [parts_of(key[2])[0] for key in keys]
    margin = 0.06 * (max(scales) - min(scales) or 1)
    axes.set_xlim(min(scales) - margin, max(scales) + margin)
    axes.set_ylim(min(values) / 1.2, max(values) * 1.2)
    log_ticks(axes.yaxis)


def _guidance_look(budget: int, rest: int) -> dict[str, Any]:
    look = {"marker": MARKERS[rest % len(MARKERS)], "linestyle": DASHES[rest % len(DASHES)], "markersize": 6}
    return {"color": colour(budget), "linewidth": 1.8, **look}


def _guidance_key(axes: "Axes", budgets: Sequence[int], rests: Sequence[str]) -> None:
    """Names of colours, dashes and marks, for the legend."""
    for i, nfe in enumerate(budgets):
        axes.plot([], [], **{**_guidance_look(i, 0), "marker": "", "linestyle": "-"}, label=f"budget {nfe}")
    for i, rest in enumerate(rests):
        axes.plot([], [], **{**_guidance_look(0, i), "color": INK}, label=_guide(rest))
    axes.plot([], [], **RING, label="scored")
    axes.plot([], [], **STAR, label="least of all")


def _guide(rest: str) -> str:
    return f"noise levels {rest[3:]}" if rest.startswith("at ") else rest or "all noise levels, by the missing class"
