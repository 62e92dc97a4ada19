"""Tokenizers beside one another, as PNG bytes: use of their codes, rate against distortion, damage by noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from midway.gen.core.text import plot_label
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import TokenizerResult
from midway.gen.report.axes import (
    INK,
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
from midway.tokenizers.base import MAX_COUNTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_POINTS = 200  # of a line over ranks: as many as a plot can tell apart
_PLACES = tuple((14, y) for y in (0, -6, 6, -12, 12, -18, -24, -30, -36, 18, 24, -42, -48))
"""Offsets of a label from its point, in print points, the best first: on the right, where no line is."""


@dataclass(frozen=True)
class Plot:
    """How a plot is drawn, as PNG, what it shows and how to read it."""

    draw: Callable[[Sequence[TokenizerResult]], bytes]
    title: str
    caption: str


def rate_of(row: TokenizerRow) -> tuple[float, float] | None:
    """(bits per image, PSNR): of codes, all equally long; of a posterior, its rate and the PSNR of its draws; else None."""
    if row.bits is not None:
        return row.bits, row.psnr
    return None if row.rate is None or row.psnr_sampled is None else (row.rate, row.psnr_sampled)


def usage_png(results: Sequence[TokenizerResult]) -> bytes:
    """Frequency of every code, times K, against its rank as a share of K; codebooks beyond `MAX_COUNTED` are left out."""
    figure, axes = _figure("codes by frequency, as a share of the codebook", "frequency of a code, even use = 1")
    for index, result in enumerate(results):
        size, frequencies = result.row.codebook or 0, result.frequencies
        if frequencies is not None and size <= MAX_COUNTED:
            ranks = _spread(len(frequencies))
            shares, multiples = ((ranks + 1) / size).tolist(), (frequencies[ranks] * size).tolist()
            style = look(index) | {"markevery": [-1], "markersize": 7}  # the line ends at the last code used
            axes.plot(shares, multiples, **style, label=plot_label(result.row.name), zorder=3)
    if not axes.lines:
        return _empty(figure, axes, "no codebook to plot")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, **REFERENCE, zorder=2)
    axes.annotate(
        "all codes alike",
        xy=(0, 1),
        xycoords=axes.get_yaxis_transform(),
        xytext=(6, 4),
        textcoords="offset points",
        color=QUIET,
        fontsize=10.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        zorder=5,
    )
    _ticks(axes.xaxis)
    _ticks(axes.yaxis)
    _legend(figure, axes)
    return png(figure)


def _spread(count: int) -> Tensor:
    """Up to `_POINTS` of 0, ..., count - 1, evenly on a logarithmic axis, with both ends."""
    ends = torch.logspace(0, torch.tensor(float(count)).log10().item(), _POINTS, dtype=torch.float64)
    return ends.round().long().clamp(1, count).unique() - 1


def rate_png(results: Sequence[TokenizerResult]) -> bytes:
    """PSNR against bits per image, a labelled point a tokenizer; a thin line leads left to the entropy of its codes."""
    figure, axes = _figure("bits per image", "PSNR, dB")
    rows = [result.row for result in results]
    points = [(i, row, rate) for i, row in enumerate(rows) if (rate := rate_of(row)) is not None and rate[0] > 0]
    if not points:
        return _empty(figure, axes, "no tokenizer with a rate")
    axes.set_xscale("log")
    for index, row, (bits, psnr) in points:
        tone = colour(index)
        if row.entropy_bits:
            entropy = {"color": tone, "linewidth": 1.2, "marker": "|", "markersize": 6}
            axes.plot([row.entropy_bits, bits], [psnr, psnr], **entropy, zorder=2)
        face = {"markerfacecolor": "white" if row.bits is None else tone, "markeredgewidth": 1.6, "markersize": 8}
        axes.plot([bits], [psnr], **look(index), **face, zorder=3)
    axes.margins(x=0.08, y=0.14)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.3)  # room for names
    _ticks(axes.xaxis)
    _name_points(figure, axes, points)
    return png(figure)


def _name_points(
    figure: "Figure", axes: "Axes", points: Sequence[tuple[int, TokenizerRow, tuple[float, float]]]
) -> None:
    """Each name, from the top, at the first place beside its point where it hides neither a point, a line nor another name."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    taken = [_box(axes, left, x, y) for _, row, (x, y) in points for left in (x, row.entropy_bits or x)]
    for index, row, at in sorted(points, key=lambda point: -point[2][1]):
        label = _label(axes, row.name, at, colour(index))
        box = frame
        for place in _PLACES:
            label.xyann = place
            label.get_window_extent()  # which puts it in its place
            box = Text.get_window_extent(label)  # without its line
            if (
                frame.contains(*box.min)
                and frame.contains(*box.max)
                and not any(box.overlaps(other) for other in taken)
            ):
                break
        taken.append(box)


def _label(axes: "Axes", name: str, point: tuple[float, float], colour: str) -> "Annotation":
    """The name with a thin line to its point."""
    line = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "shrinkA": 1, "shrinkB": 4, "relpos": (0, 0.5)}
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 10, "color": INK}
    return axes.annotate(plot_label(name), point, _PLACES[0], **style, arrowprops=line, zorder=4)


def _box(axes: "Axes", left: float, right: float, height: float) -> "Bbox":
    """What a point covers, or with another left end its line, in pixels."""
    from matplotlib.transforms import Bbox

    (x0, y), (x1, _) = axes.transData.transform([(left, height), (right, height)])
    radius = (5 if left == right else 1) * axes.get_figure(root=True).dpi / 72  # pyright: ignore[reportOptionalMemberAccess]
    return Bbox.from_extents(x0 - radius, y - radius, x1 + radius, y + radius)


def noise_png(results: Sequence[TokenizerResult]) -> bytes:
    """PSNR against sigma: as samples are decoded, and, thin, without snapping where that differs."""
    figure, axes = _figure("noise on the latents, in standard deviations", "PSNR, dB")
    for index, row in enumerate(result.row for result in results):
        if not row.noise:
            continue
        if row.psnr_snapped is not None:
            thin = {"color": colour(index), "linewidth": 1, "linestyle": (0, (3, 2))}
            axes.plot(*_curve(row.noise, row.psnr_noisy), **thin, zorder=2)
        style = look(index) | {"linestyle": "-", "markersize": 6}
        style["markerfacecolor"] = style["color"] if row.psnr_snapped else "white"
        axes.plot(*_curve(row.noise, row.psnr_snapped or row.psnr_noisy), **style, label=plot_label(row.name), zorder=3)
    if not axes.lines:
        return _empty(figure, axes, "no noise measured")
    _legend(figure, axes)
    return png(figure)


def _curve(noise: Sequence[float], psnr: Sequence[float]) -> tuple[list[float], list[float]]:
    """Both by increasing sigma."""
    order = sorted(range(len(noise)), key=lambda i: noise[i])
    return [noise[i] for i in order], [psnr[i] for i in order]


def _figure(across: str, up: str) -> "tuple[Figure, Axes]":
    figure = new_figure()
    axes = figure.add_subplot()
    dress(axes, across, up)
    return figure, axes


def _ticks(axis: "Axis") -> None:
    """The more ticks the fewer decades are shown."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high / low < 10 else (1, 2, 5) if high / low < 1e3 else (1,)
    plain_ticks(axis, MaxNLocator(5) if high / low < 2.5 else LogLocator(subs=subs))


def _legend(figure: "Figure", axes: "Axes") -> None:
    """Names below the plot, which keeps its height however many there are."""
    labels = axes.get_legend_handles_labels()[1]
    columns = 3 if max(map(len, labels)) < 22 else 2
    figure.set_figheight(6 + 0.24 * max(0, -(-len(labels) // columns) - 2))
    legend_below(figure, axes, columns)


def _empty(figure: "Figure", axes: "Axes", why: str) -> bytes:
    without_data(axes, why)
    return png(figure)


PLOTS: dict[str, Plot] = {
    "rate_distortion.png": Plot(
        rate_png,
        "PSNR against bits per image",
        "Upper left is better. Filled: tokens of equal length; the thin line leads to what an entropy coder would spend. "
        "Hollow: a posterior's rate and the PSNR of its draws.",
    ),
    "codebook_usage.png": Plot(
        usage_png,
        "Frequency of codes by rank",
        "A codebook used evenly is the dashed line up to 1. Where a line ends, the codes beyond were never used. Codebooks of "
        "more than a million codes are left out.",
    ),
    "noise.png": Plot(
        noise_png,
        "PSNR against noise on the latents",
        "Filled markers: snapped to the nearest code before decoding, as samples are; the thin dashed line of the same colour is "
        "without snapping. Hollow: never snapped.",
    ),
}
