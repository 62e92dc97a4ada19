"""What all plots share: colours, axes that recede behind the data, ticks without exponents, and how a figure becomes PNG or SVG.

Lengths are CSS pixels, as a page shows them: 780 across, or 340 for the narrow figure of a phone. Colours are Okabe & Ito's eight
(2008, readable by colour-blind people; yellow left out), markers and dashes differ as well, so that a grey print still tells the
lines apart. In SVG text stays text, and every colour is a custom property of the page (page/page.css), light or dark.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from midway.gen.core.text import html, plot_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#4D4D4D")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
DASHES = ("-", (0, (6, 2)), (0, (2, 1.5)))
INK, QUIET, HAIR, PAPER = "#1f2430", "#5b6270", "#e3e6ea", "#ffffff"
WIDE, NARROW = 780, 340
SIZE = 12.0
"""Of letters."""
REFERENCE: dict[str, Any] = {"color": QUIET, "linestyle": (0, (5, 3)), "linewidth": 1.2}
"""Look of a line that data are compared with."""
PNG_DPI = 130
"""Pixels of a PNG for 72 of a page."""


def colour(index: int) -> str:
    """Of the line or point of this index."""
    return COLOURS[index % len(COLOURS)]


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dashes of the line of this index."""
    dashes = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": colour(index), "marker": MARKERS[index % len(MARKERS)], "linestyle": dashes, "linewidth": 1.8}


MODEL_MARKERS: tuple[Any, ...] = ((4, 1, 0), "d", (6, 1, 0), "p", "8")
MODEL_DASHES: Any = (0, (7, 2, 1.5, 2))


def model_look(index: int) -> dict[str, Any]:
    """As `look`, of a few-step model: other markers, dashes that no solver has, so that both kinds differ without colours, and
    colours in another order."""
    marker = MODEL_MARKERS[index % len(MODEL_MARKERS)]
    return {"color": colour(5 - index), "marker": marker, "linestyle": MODEL_DASHES, "linewidth": 2.4}


PRIOR_MARKERS: tuple[Any, ...] = ((3, 1, 0), (8, 1, 0), "H", (5, 1, 0), (12, 1, 0))
PRIOR_DASHES: Any = (0, (1.2, 1.4))


def prior_look(index: int) -> dict[str, Any]:
    """As `model_look`, of a prior by a rule: dotted, as no solver and no few-step model is."""
    marker = PRIOR_MARKERS[index % len(PRIOR_MARKERS)]
    return {"color": colour(2 + index), "marker": marker, "linestyle": PRIOR_DASHES, "linewidth": 2.4}


# ---- a figure and its axes ----


def new_figure(width: float = WIDE, height: float = 560) -> "Figure":
    """An empty figure of so many pixels; whoever fills it places its axes (`place`)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 72, height / 72), dpi=72, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def place(figure: "Figure", left: float = 62, right: float = 14, top: float = 30, bottom: float = 52) -> "Axes":
    """Axes with these margins in pixels."""
    width, height = figure.get_size_inches() * 72
    return figure.add_axes(
        (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    )


def dress(axes: "Axes", across: str, up: str, title: str = "") -> None:
    """Labels, grid and a frame that recedes behind the data."""
    axes.set_title(plot_label(title), color=QUIET, fontsize=SIZE, loc="left", pad=9)
    axes.set_xlabel(plot_label(across), color=INK, labelpad=7, fontsize=SIZE)
    axes.set_ylabel(plot_label(up), color=INK, labelpad=6, fontsize=SIZE)
    axes.grid(True, color=HAIR, linewidth=0.9)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, colors=QUIET, labelsize=SIZE - 0.5)
    for side in axes.spines.values():
        side.set_visible(False)


def without_data(axes: "Axes", why: str) -> None:
    """A text in place of data."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=QUIET, fontsize=SIZE)


def plain_ticks(axis: "Axis", locator: "Locator") -> None:
    """Numbers without exponents on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _plain(value: float, _position: object) -> str:
    """A tick without an exponent: 0.05, 2, 500."""
    return f"{value:.10f}".rstrip("0").rstrip(".") if value < 1 else f"{value:g}"


def log_ticks(axis: "Axis") -> None:
    """The more ticks the fewer decades are shown."""
    from matplotlib.ticker import LogLocator, MaxNLocator

    low, high = axis.get_view_interval()
    subs = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8) if high / low < 10 else (1, 2, 5) if high / low < 1e3 else (1,)
    plain_ticks(axis, MaxNLocator(5) if high / low < 2.5 else LogLocator(subs=subs))


def legend_rows(count: int, columns: int) -> float:
    """Pixels that a legend of so many names takes below the plot."""
    return 17.2 * -(-count // columns) + 4 if count else 0


def legend_below(figure: "Figure", axes: "Axes", columns: int = 3, titles: Mapping[str, str] = {}) -> None:
    """Names at the foot of the figure, so that the plot keeps its width on a phone.

    titles: by name; the names of each title are a legend of their own.
    """
    every, below = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True)), 0.0
    for title, names, height in reversed(legend_groups(every, titles, columns)):
        legend = figure.legend(
            [every[name] for name in names],
            names,
            title=title or None,
            title_fontproperties={"size": SIZE - 0.5, "weight": "bold"},
            loc="lower center",
            bbox_to_anchor=(0.5, below / (72 * figure.get_size_inches()[1])),
            ncols=columns,
            frameon=False,
            labelcolor=INK,
            fontsize=SIZE - 0.5,
            handlelength=3.2 if titles else 2.2,
            columnspacing=1.4,
            borderaxespad=0.2,
        )
        legend.get_title().set_color(INK)
        below += height


def legend_groups(names: Iterable[str], titles: Mapping[str, str], columns: int) -> list[tuple[str, list[str], float]]:
    """Title, names and pixels of each part of a legend; first what has no title."""
    groups = {title: [name for name in names if titles.get(name, "") == title] for title in ("", *titles.values())}
    found = [(title, its) for title, its in groups.items() if its]
    return [(title, its, legend_rows(len(its) + columns * bool(title), columns)) for title, its in found]


# ---- PNG and SVG ----


@dataclass(frozen=True)
class Drawing:
    """A plot for pages and files: what it is (one line, also for those who cannot see it), how to read it, and how it is drawn.

    make: the figure, narrow (`NARROW` pixels across) or wide. name: unique in a page; `<name>.png` as a file.
    """

    name: str
    title: str
    caption: str
    make: "Callable[[bool], Figure]"

    def png(self) -> bytes:
        """The wide figure."""
        return _png(self.make(False))

    def svg(self, narrow: bool) -> str:
        """An element of a page."""
        return _svg(self.make(narrow), f"{self.name}-{'narrow' if narrow else 'wide'}", self.title, self.caption)


def _png(figure: "Figure") -> bytes:
    """The same bytes for the same figure."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # letters that the font lacks are boxes; all other outputs have them
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


_PROPERTIES = {INK: "ink", QUIET: "quiet", HAIR: "hair", PAPER: "card"} | {c: f"line{i}" for i, c in enumerate(COLOURS)}
_COLOUR = re.compile("|".join(_PROPERTIES), re.IGNORECASE)
_LOWER = {colour.lower(): f"var(--{name})" for colour, name in _PROPERTIES.items()}
_FONT = re.compile(r"font: (?:(bold|\d+) )?([\d.]+px)[^;\"]*|font-family: [^;\"]*;? ?")


def _svg(figure: "Figure", name: str, title: str, description: str) -> str:
    """The figure as an <svg> element: text as text in the page's font, the page's colours, ids that depend on `name`."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    head, _, body = buffer.getvalue().partition("</metadata>")
    box = re.search(r'viewBox="([^"]*)"', head)
    assert box is not None
    texts = re.split(r"(<text.*?</text>)", body.partition("</defs>")[2].rpartition("</svg>")[0], flags=re.DOTALL)
    shapes = "".join(_text(part) if place % 2 else _shape(part) for place, part in enumerate(texts))
    return (
        f'<svg viewBox="{box[1]}" role="img" aria-labelledby="{name}-title" aria-describedby="{name}-desc">'
        f'<title id="{name}-title">{html(title)}</title><desc id="{name}-desc">{html(description)}</desc>{shapes}</svg>'
    )


def _shape(text: str) -> str:
    """Everything but letters: numbers to a hundredth, colours as properties, neither white space nor ids of groups."""
    text = re.sub(r' id="(?![A-Za-z]+[0-9a-f]{10}")[^"]*"', "", text)  # of groups, to which nothing refers
    text = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), text)
    text = _COLOUR.sub(lambda found: _LOWER[found[0].lower()], text)
    text = text.replace("xlink:href", "href").replace("\n", " ")
    return re.sub(r"> +<", "><", re.sub(r" {2,}", " ", text))


def _font(found: re.Match[str]) -> str:
    """Size and weight of a letter, which a page's own family has too."""
    weight = f"font-weight: {found[1]}; " if found[1] else ""
    return f"{weight}font-size: {found[2]}" if found[2] else ""


def _text(element: str) -> str:
    """A <text> without its font's family, its own words as they are."""
    tag, _, words = element.partition(">")
    tag = _FONT.sub(_font, tag)
    tag = re.sub(r"-?\d+\.\d+", lambda found: f"{float(found[0]):.2f}".rstrip("0").rstrip("."), tag)
    return f"{_COLOUR.sub(lambda found: _LOWER[found[0].lower()], tag)}>{words}"
