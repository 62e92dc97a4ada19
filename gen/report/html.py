"""A report as one self-contained HTML page: what it is made of, and page/page.html, the one template that all reports share.

Style and script are inline (page/page.css, page/page.js), plots are SVG, images base64; the page is light or dark by the reader's
preference, and works at the width of a phone and in print. The template escapes every text, which has no control characters.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import jinja2
from markupsafe import Markup

from midway.gen.core.text import printable
from midway.gen.report.drawing import Drawing
from midway.gen.report.table import ReportContext, Table

FOLDER = Path(__file__).with_name("page")
STYLE = (FOLDER / "page.css").read_text(encoding="utf-8")
SCRIPT = (FOLDER / "page.js").read_text(encoding="utf-8")
SMALL, LARGE, SIDE = 1000, 40_000, 640
"""Bytes of a PNG up to which a page holds it as it is, up to which its copy loses nothing, and the width of a larger one's."""


@dataclass(frozen=True)
class Picture:
    """A PNG of samples with its description, a title, a caption, and the classes of its images, row by row, if they have any."""

    png: bytes
    alt: str
    title: str = ""
    caption: str = ""
    classes: tuple[str, ...] = ()
    columns: int = 4

    @property
    def rows(self) -> list[str]:
        """Classes of the images of each row."""
        rows = range(0, len(self.classes), self.columns)
        return [", ".join(self.classes[i : i + self.columns]) for i in rows]

    @property
    def text(self) -> str:
        """The description with the classes."""
        return f"{self.alt}; classes row by row: {'; '.join(self.rows)}" if self.classes else self.alt

    @property
    def source(self) -> str:
        """The image in the page."""
        kind, data = ("png", self.png) if len(self.png) <= SMALL else smaller(self.png)
        return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def smaller(png: bytes) -> tuple[str, bytes]:
    """A copy as WebP without loss, of one above `LARGE` bytes at most `SIDE` pixels across and of quality 90; or the PNG."""
    from PIL import Image

    image, large = Image.open(io.BytesIO(png)), len(png) > LARGE
    if large and image.width > SIDE:
        image = image.resize((SIDE, round(image.height * SIDE / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", lossless=not large, quality=90)
    return ("webp", buffer.getvalue()) if len(buffer.getvalue()) < len(png) else ("png", png)


@dataclass(frozen=True)
class Explorer:
    """Samples of the same seeds to look through: a slider over budgets, two panes with a list of solvers each.

    All panels are in one table, for readers without JavaScript and for paper; page.js folds it up and shows two of its images.
    panels: by (solver, NFE). fixed: what does not depend on the budget, real images and the exact solution. start: the budget and
    the two names that are shown first.
    """

    panels: Mapping[tuple[str, int], Picture]
    fixed: Mapping[str, Picture]
    start: tuple[int, str, str]

    @property
    def solvers(self) -> list[str]:
        """In the order of the panels."""
        return list(dict.fromkeys(solver for solver, _ in self.panels))

    @property
    def names(self) -> list[str]:
        """Everything that a pane can show."""
        return [*self.fixed, *self.solvers]

    @property
    def budgets(self) -> list[int]:
        """Rising."""
        return sorted({nfe for _, nfe in self.panels})


@dataclass(frozen=True)
class Block:
    """A part of a page: heading and text, then what it has of each kind, in this order; unfolded by a click if `folded`."""

    title: str
    text: str = ""
    drawings: tuple[Drawing, ...] = ()
    table: Table | None = None
    beside: tuple[Picture | None, ...] = ()
    """In a last column of the table."""
    pictures: tuple[Picture, ...] = ()
    strips: tuple[Picture, ...] = ()
    """Below one another, their titles on the left."""
    explorer: Explorer | None = None
    items: tuple[str, ...] = ()
    facts: tuple[tuple[str, str], ...] = ()
    """Names and values."""
    folded: bool = False


def table_block(table: Table, folded: bool = False) -> Block:
    """The table under its title and note."""
    return Block(table.title, table.note, table=table, folded=folded)


def notes_block(notes: Sequence[str]) -> Block:
    """Notes, folded."""
    return Block("Notes", items=tuple(notes), folded=True)


def facts_block(facts: Sequence[tuple[str, str]]) -> Block:
    """Provenance, folded."""
    return Block("How these numbers were made", facts=tuple(facts), folded=True)


@dataclass(frozen=True)
class Page:
    """A whole report. answer: the result in a sentence. pictures and drawing: what the first screen shows below it."""

    context: ReportContext
    answer: str = ""
    pictures: tuple[Picture, ...] = ()
    drawing: Drawing | None = None
    blocks: Sequence[Block] = field(default_factory=tuple)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    return environment.get_template("page.html")


def _visible(value: object) -> object:
    """Text without control characters, before it is escaped."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else printable(value)


def html_page(page: Page) -> str:
    """The page as text."""
    return _template().render(page=page, style=Markup(STYLE), script=Markup(SCRIPT), svg=_svg)


def _svg(drawing: Drawing, narrow: bool) -> Markup:
    """An element that its own words cannot leave: `Drawing.svg` escapes them."""
    return Markup(drawing.svg(narrow))
