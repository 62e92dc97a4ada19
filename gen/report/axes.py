"""What all plots share: colours, axes that recede behind the data, ticks without exponents, legends, PNG bytes.

Colours are Okabe & Ito's eight (2008, readable by colour-blind people; yellow left out), markers and dashes differ as
well, so that a grey print still tells the lines apart.
"""

import io
import warnings
from typing import TYPE_CHECKING, Any

from midway.gen.core.text import plot_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)))
INK, QUIET, HAIR = "#1f2430", "#5b6270", "#e3e6ea"
REFERENCE: dict[str, Any] = {"color": QUIET, "linestyle": (0, (5, 3)), "linewidth": 1.2}
"""Look of a line that data are compared with."""


def colour(index: int) -> str:
    """Of the line or point of this index."""
    return COLOURS[index % len(COLOURS)]


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line of this index."""
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": colour(index), "marker": MARKERS[index % len(MARKERS)], "linestyle": dashes, "linewidth": 1.8}


def new_figure(width: float = 7, height: float = 6, dpi: int = 200, gap: float = 0.02) -> "Figure":
    """An empty figure in inches; `gap` between columns as a share of their width."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), dpi=dpi, facecolor="white", layout=ConstrainedLayoutEngine(wspace=gap))
    FigureCanvasAgg(figure)
    return figure


def dress(axes: "Axes", across: str, up: str, title: str = "") -> None:
    """Labels, grid and a frame that recedes behind the data."""
    axes.set_title(plot_label(title), color=INK, fontsize=12.5, loc="left", pad=10)
    axes.set_xlabel(plot_label(across), color=INK, labelpad=8, fontsize=12)
    axes.set_ylabel(plot_label(up), color=INK, labelpad=8, fontsize=12)
    axes.grid(True, color=HAIR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=QUIET, labelsize=11)
    for side in axes.spines.values():
        side.set_visible(False)


def without_data(axes: "Axes", why: str) -> None:
    """A text in place of data."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=QUIET)


def plain_ticks(axis: "Axis", locator: "Locator") -> None:
    """Numbers without exponents on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _plain(value: float, _position: object) -> str:
    """A tick without an exponent: 0.05, 2, 500."""
    return f"{value:.10f}".rstrip("0").rstrip(".") if value < 1 else f"{value:g}"


def legend_below(figure: "Figure", axes: "Axes", columns: int = 3) -> None:
    """Names below the plot, so that it keeps its width on a phone."""
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        labelcolor=INK,
        fontsize=11,
        handlelength=2.4,
        columnspacing=1.6,
    )


def png(figure: "Figure") -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks are boxes; all other outputs have them
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
