"""Tokenizers beside one another: rate against distortion with its Pareto front, damage by noise, use of their codes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from midway.gen.core.text import plot_label
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import TokenizerResult
from midway.gen.report.drawing import (
    INK,
    NARROW,
    PAPER,
    QUIET,
    REFERENCE,
    SIZE,
    WIDE,
    Drawing,
    colour,
    dress,
    legend_below,
    legend_rows,
    log_ticks,
    look,
    new_figure,
    place,
    without_data,
)
from midway.gen.report.rates import front, rate_of
from midway.tokenizers.base import MAX_COUNTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_POINTS = 200  # of a line over ranks: as many as a plot can tell apart
_PLACES = tuple((14, y) for y in (0, -7, 7, -14, 14, -21, -28, -35, -42, 21, 28, -49, -56))
"""Offsets of a label from its point, in pixels, the best first: on the right, where no line is."""
Results = Sequence[TokenizerResult]


def drawings(results: Results) -> list[Drawing]:
    """Rate and distortion, noise, and use of codes, by the names of their files."""
    return [
        Drawing(
            "rate_distortion",
            "PSNR against bits per image",
            "Upper left is better. Grey: the Pareto front; no tokenizer on it is beaten at its rate or below. Filled: tokens of "
            "equal length, the thin line leads to what an entropy coder would spend. Hollow: a posterior's rate and the PSNR of "
            "its draws.",
            lambda narrow: rate_figure(results, narrow),
        ),
        Drawing(
            "noise",
            "PSNR against noise on the latents",
            "Filled markers: snapped to the nearest code before decoding, as samples are; the thin dashed line of the same "
            "colour is without snapping. Hollow: never snapped.",
            lambda narrow: noise_figure(results, narrow),
        ),
        Drawing(
            "codebook_usage",
            "Frequency of codes by rank",
            "A codebook used evenly is the dashed line up to 1. Where a line ends, the codes beyond were never used. Codebooks "
            "of more than a million codes are left out.",
            lambda narrow: usage_figure(results, narrow),
        ),
    ]


def usage_figure(results: Results, narrow: bool = False) -> "Figure":
    """Frequency of every code, times K, against its rank as a share of K; codebooks beyond `MAX_COUNTED` are left out."""
    names = [m.row.name for m in results if m.frequencies is not None and (m.row.codebook or 0) <= MAX_COUNTED]
    figure, axes = _figure(
        names, narrow, "codes by frequency, as a share of the codebook", "frequency of a code, even use = 1"
    )
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
        fontsize=SIZE - 1,
        bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 1},
        zorder=5,
    )
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    _legend(figure, axes, narrow)
    return figure


def _spread(count: int) -> Tensor:
    """Up to `_POINTS` of 0, ..., count - 1, evenly on a logarithmic axis, with both ends."""
    ends = torch.logspace(0, torch.tensor(float(count)).log10().item(), _POINTS, dtype=torch.float64)
    return ends.round().long().clamp(1, count).unique() - 1


def rate_figure(results: Results, narrow: bool = False) -> "Figure":
    """PSNR against bits per image, the Pareto front in grey; a thin line leads from a point left to the entropy of its codes.

    Wide, names stand beside their points; narrow, below the plot.
    """
    rows = [result.row for result in results]
    points = [(i, row, rate) for i, row in enumerate(rows) if (rate := rate_of(row)) is not None and rate[0] > 0]
    names = [row.name for _, row, _ in points] if narrow else []
    figure, axes = _figure(names, narrow, "bits per image", "PSNR, dB")
    if not points:
        return _empty(figure, axes, "no tokenizer with a rate")
    axes.set_xscale("log")
    axes.plot(
        *zip(*((bits, psnr) for _, bits, psnr in front(rows)), strict=True),
        color=QUIET,
        linewidth=7,
        alpha=0.25,
        solid_capstyle="round",
        zorder=1.5,
    )
    for index, row, (bits, psnr) in points:
        tone = colour(index)
        if row.entropy_bits:
            entropy = {"color": tone, "linewidth": 1.2, "marker": "|", "markersize": 6}
            axes.plot([row.entropy_bits, bits], [psnr, psnr], **entropy, zorder=2)
        face = {"markerfacecolor": PAPER if row.bits is None else tone, "markeredgewidth": 1.6, "markersize": 8}
        axes.plot([bits], [psnr], **look(index) | {"linestyle": "none"}, **face, label=plot_label(row.name), zorder=3)
    axes.margins(x=0.08, y=0.14)
    low, high = axes.get_xlim()
    if not narrow:
        axes.set_xlim(low, high * (high / low) ** 0.3)  # room for names
    log_ticks(axes.xaxis)
    _legend(figure, axes, narrow) if narrow else _name_points(figure, axes, points)
    return figure


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
        for offset in _PLACES:
            label.xyann = offset
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
    style: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": SIZE - 0.5, "color": INK}
    return axes.annotate(plot_label(name), point, _PLACES[0], **style, arrowprops=line, zorder=4)


def _box(axes: "Axes", left: float, right: float, height: float) -> "Bbox":
    """What a point covers, or with another left end its line, in pixels."""
    from matplotlib.transforms import Bbox

    (x0, y), (x1, _) = axes.transData.transform([(left, height), (right, height)])
    radius = (5 if left == right else 1) * axes.get_figure(root=True).dpi / 72  # pyright: ignore[reportOptionalMemberAccess]
    return Bbox.from_extents(x0 - radius, y - radius, x1 + radius, y + radius)


def noise_figure(results: Results, narrow: bool = False) -> "Figure":
    """PSNR against sigma: as samples are decoded, and, thin, without snapping where that differs."""
    names = [result.row.name for result in results if result.row.noise]
    figure, axes = _figure(names, narrow, "noise on the latents, in standard deviations", "PSNR, dB")
    for index, row in enumerate(result.row for result in results):
        if not row.noise:
            continue
        if row.psnr_snapped is not None:
            thin = {"color": colour(index), "linewidth": 1, "linestyle": (0, (3, 2))}
            axes.plot(*_curve(row.noise, row.psnr_noisy), **thin, zorder=2)
        style = look(index) | {"linestyle": "-", "markersize": 6}
        style["markerfacecolor"] = style["color"] if row.psnr_snapped else PAPER
        axes.plot(*_curve(row.noise, row.psnr_snapped or row.psnr_noisy), **style, label=plot_label(row.name), zorder=3)
    if not axes.lines:
        return _empty(figure, axes, "no noise measured")
    _legend(figure, axes, narrow)
    return figure


def _curve(noise: Sequence[float], psnr: Sequence[float]) -> tuple[list[float], list[float]]:
    """Both by increasing sigma."""
    order = sorted(range(len(noise)), key=lambda i: noise[i])
    return [noise[i] for i in order], [psnr[i] for i in order]


def _figure(names: Sequence[str], narrow: bool, across: str, up: str) -> "tuple[Figure, Axes]":
    """Axes with room below for these names."""
    rows = legend_rows(len(names), _columns(names, narrow))
    figure = new_figure(NARROW if narrow else WIDE, (330 if narrow else 440) + rows)
    axes = place(figure, bottom=56 + rows)
    dress(axes, across, up)
    return figure, axes


def _columns(names: Sequence[str], narrow: bool) -> int:
    longest = max((len(plot_label(name)) for name in names), default=0)
    return max(1, int((NARROW if narrow else WIDE) / (48 + 6.6 * longest)))


def _legend(figure: "Figure", axes: "Axes", narrow: bool) -> None:
    """Names below the plot, which keeps its height however many there are."""
    legend_below(figure, axes, _columns(axes.get_legend_handles_labels()[1], narrow))


def _empty(figure: "Figure", axes: "Axes", why: str) -> "Figure":
    without_data(axes, why)
    return figure
