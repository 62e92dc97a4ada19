"""Tokenizers beside one another, as PNG bytes: use of their codes, rate against distortion, damage by noise.

Colours, markers and dashes are those of plots.py: a grey print still tells the lines apart.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import TokenizerResult
from midway.gen.report.plots import COLOURS, DASHES, HAIR, INK, MARKERS, QUIET, plain_tick
from midway.tokenizers.base import MAX_COUNTED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

_POINTS = 200  # of a line over ranks: as many as a plot can tell apart
_PLACES = tuple((14, y) for y in (0, -6, 6, -12, 12, -18, -24, -30, -36, 18, 24, -42, -48))
"""Offsets of a label from its point, in print points, the best first: on the right, where no line is."""


def rate_of(row: TokenizerRow) -> tuple[float, float] | None:
    """(bits per image, PSNR): of codes, all equally long; of a posterior, its rate and the PSNR of its draws; else None."""
    if row.bits is not None:
        return row.bits, row.psnr
    return None if row.rate is None or row.psnr_sampled is None else (row.rate, row.psnr_sampled)


def usage_png(results: Sequence[TokenizerResult]) -> bytes:
    """Frequency of every code, times K, against its rank as a share of K; codebooks beyond `MAX_COUNTED` are left out."""
    figure, axes = _figure("codes by frequency, as a share of the codebook", "frequency of a code, even use = 1")
    drawn = [(i, m) for i, m in enumerate(results) if m.frequencies is not None and _size(m.row) <= MAX_COUNTED]
    if not drawn:
        return _empty(figure, axes, "no codebook to plot")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.axhline(1, color=QUIET, linestyle=(0, (5, 3)), linewidth=1.2, zorder=2)
    for index, result in drawn:
        _ranked(axes, result, index)
    _name_line(axes, 1, "all codes alike")
    _plain_ticks(axes, "both")
    _legend(figure, axes)
    return _png(figure)


def _size(row: TokenizerRow) -> int:
    return row.codebook or 0


def _ranked(axes: "Axes", result: TokenizerResult, index: int) -> None:
    """One tokenizer's line, ending at the last code used."""
    frequencies = result.frequencies
    assert frequencies is not None
    size = _size(result.row)
    ranks = _spread(len(frequencies))
    axes.plot(
        ((ranks + 1) / size).tolist(),
        (frequencies[ranks] * size).tolist(),
        color=COLOURS[index % len(COLOURS)],
        linestyle=DASHES[index // len(COLOURS) % len(DASHES)],
        marker=MARKERS[index % len(MARKERS)],
        markevery=[-1],
        markersize=7,
        linewidth=1.8,
        label=result.row.name,
        zorder=3,
    )


def _spread(count: int) -> Tensor:
    """Up to `_POINTS` of 0, ..., count - 1, evenly on a logarithmic axis, with both ends."""
    ends = torch.logspace(0, torch.tensor(float(count)).log10().item(), _POINTS, dtype=torch.float64)
    return ends.round().long().clamp(1, count).unique() - 1


def rate_png(rows: Sequence[TokenizerRow]) -> bytes:
    """PSNR against bits per image, a labelled point a tokenizer; a thin line leads left to the entropy of its codes."""
    figure, axes = _figure("bits per image", "PSNR, dB")
    points = [(i, row, rate) for i, row in enumerate(rows) if (rate := rate_of(row)) is not None and rate[0] > 0]
    if not points:
        return _empty(figure, axes, "no tokenizer with a rate")
    axes.set_xscale("log")
    for index, row, (bits, psnr) in points:
        colour = COLOURS[index % len(COLOURS)]
        if row.entropy_bits:
            axes.plot(
                [row.entropy_bits, bits], [psnr, psnr], color=colour, linewidth=1.2, marker="|", markersize=6, zorder=2
            )
        axes.plot(
            [bits],
            [psnr],
            color=colour,
            marker=MARKERS[index % len(MARKERS)],
            markerfacecolor="white" if row.bits is None else colour,
            markeredgewidth=1.6,
            markersize=8,
            zorder=3,
        )
    axes.margins(x=0.08, y=0.14)
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.3)  # room for names
    _plain_ticks(axes, "x")
    _label_points(figure, axes, points)
    return _png(figure)


def _label_points(
    figure: "Figure", axes: "Axes", points: Sequence[tuple[int, TokenizerRow, tuple[float, float]]]
) -> None:
    """Each name, from the top, at the first place beside its point where it hides neither a point, a line nor another name."""
    figure.draw_without_rendering()
    taken = [_box(axes, left, x, y) for _, row, (x, y) in points for left in (x, row.entropy_bits or x)]
    for index, row, (x, y) in sorted(points, key=lambda point: -point[2][1]):
        for place in _PLACES:
            text = _label(axes, row.name, (x, y), place, COLOURS[index % len(COLOURS)])
            box = _of_text(text)
            if place == _PLACES[-1] or (_inside(axes, box) and not any(box.overlaps(other) for other in taken)):
                taken.append(box)
                break
            text.remove()


def _label(axes: "Axes", name: str, point: tuple[float, float], place: tuple[int, int], colour: str) -> "Annotation":
    """The name with a thin line to its point."""
    return axes.annotate(
        name,
        point,
        place,
        textcoords="offset points",
        va="center",
        fontsize=10,
        color=INK,
        arrowprops={
            "arrowstyle": "-",
            "color": colour,
            "linewidth": 0.8,
            "shrinkA": 1,
            "shrinkB": 4,
            "relpos": (0, 0.5),
        },
        zorder=4,
    )


def _box(axes: "Axes", left: float, right: float, height: float) -> "Bbox":
    """What a point covers, or with another left end its line, in pixels."""
    from matplotlib.transforms import Bbox

    (x0, y), (x1, _) = axes.transData.transform([(left, height), (right, height)])
    radius = (5 if left == right else 1) * axes.get_figure(root=True).dpi / 72  # pyright: ignore[reportOptionalMemberAccess]
    return Bbox.from_extents(x0 - radius, y - radius, x1 + radius, y + radius)


def _of_text(text: "Annotation") -> "Bbox":
    """What a label covers without its line, in pixels."""
    from matplotlib.text import Text

    text.get_window_extent()  # which puts it in its place
    return Text.get_window_extent(text)


def _inside(axes: "Axes", box: "Bbox") -> bool:
    frame = axes.get_window_extent()
    return frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1


def noise_png(rows: Sequence[TokenizerRow]) -> bytes:
    """PSNR against sigma: as samples are decoded, and, thin, without snapping where that differs."""
    figure, axes = _figure("noise on the latents, in standard deviations", "PSNR, dB")
    drawn = [(i, row) for i, row in enumerate(rows) if row.noise]
    if not drawn:
        return _empty(figure, axes, "no noise measured")
    for index, row in drawn:
        colour, marker = COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
        if row.psnr_snapped is not None:
            _curve(axes, row.noise, row.psnr_noisy, color=colour, linewidth=1, linestyle=(0, (3, 2)), zorder=2)
        _curve(
            axes,
            row.noise,
            row.psnr_snapped or row.psnr_noisy,
            color=colour,
            linewidth=1.8,
            marker=marker,
            markersize=6,
            markerfacecolor=colour if row.psnr_snapped else "white",
            label=row.name,
            zorder=3,
        )
    _legend(figure, axes)
    return _png(figure)


def _curve(axes: "Axes", noise: Sequence[float], psnr: Sequence[float], **look: object) -> None:
    """One line, by increasing sigma."""
    order = sorted(range(len(noise)), key=lambda i: noise[i])
    axes.plot([noise[i] for i in order], [psnr[i] for i in order], **look)  # pyright: ignore[reportArgumentType]


def _figure(across: str, up: str) -> "tuple[Figure, Axes]":
    """7 x 6 inches, with labels, grid and a frame that recedes behind the data."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), dpi=200, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel(across, color=INK, labelpad=8, fontsize=12)
    axes.set_ylabel(up, color=INK, labelpad=8, fontsize=12)
    axes.grid(True, color=HAIR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=QUIET, labelsize=11)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def _plain_ticks(axes: "Axes", which: str) -> None:
    """Numbers without exponents on a logarithmic axis, the more the fewer decades are shown."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    for axis, name in ((axes.xaxis, "x"), (axes.yaxis, "y")):
        if which in (name, "both"):
            low, high = axis.get_view_interval()
            subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high / low < 10 else (1, 2, 5) if high / low < 1e3 else (1,)
            axis.set_major_locator(MaxNLocator(5) if high / low < 2.5 else LogLocator(subs=subs))
            axis.set_major_formatter(FuncFormatter(plain_tick))
            axis.set_minor_locator(NullLocator())


def _name_line(axes: "Axes", height: float, name: str) -> None:
    axes.annotate(
        name,
        xy=(0, height),
        xycoords=axes.get_yaxis_transform(),
        xytext=(6, 4),
        textcoords="offset points",
        color=QUIET,
        fontsize=10.5,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
        zorder=5,
    )


def _legend(figure: "Figure", axes: "Axes") -> None:
    """Names below the plot, which keeps its height however many there are."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels)) < 22 else 2
    figure.set_figheight(6 + 0.24 * max(0, -(-len(labels) // columns) - 2))
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=11,
        handlelength=2.4,
        columnspacing=1.6,
    )


def _empty(figure: "Figure", axes: "Axes", why: str) -> bytes:
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=QUIET)
    return _png(figure)


def _png(figure: "Figure") -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
