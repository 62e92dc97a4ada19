"""Every function of text against a reader of its format."""

import csv
import io
import json
import unicodedata
from html.parser import HTMLParser

import pytest
from hostile_names import NAMES
from markdown_it import MarkdownIt
from matplotlib.text import Text

from midway.gen.core.errors import UsageError
from midway.gen.core.text import csv_field, html, json_text, markdown, plot_label, printable, printable_lines
from midway.gen.report.drawing import Drawing, legend_below, new_figure

EACH = pytest.mark.parametrize("name", NAMES)


@EACH
def test_printable_text_is_one_line_of_letters(name: str) -> None:
    shown = printable(name)
    assert not any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in shown)
    assert "\u202e" not in shown
    shown.encode()
    if name.isprintable():
        assert shown == name
    assert printable_lines(f"{name}\n") == printable_lines(name) + "\n"


def test_a_byte_that_is_no_text_keeps_its_value() -> None:
    assert printable(b"a\xff\x1b\r\n".decode(errors="surrogateescape")) == r"a\xff\x1b\r\n"
    assert printable("\ud800") == r"\ud800"


@EACH
def test_an_error_is_three_lines(name: str) -> None:
    assert len(str(UsageError(name, name, name)).splitlines()) == 3


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


@EACH
def test_html_is_text(name: str) -> None:
    reader = _Reader()
    reader.feed(f'<b title="{html(name)}">{html(name)}</b>')
    reader.close()
    assert (reader.tags, reader.text) == (["b"], printable(name))


@EACH
def test_markdown_is_text_as_a_paragraph_in_a_heading_and_in_a_table(name: str) -> None:
    shown = printable(" ".join(name.split()))
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    for page, kinds in (
        (markdown(name), {"paragraph"}),
        (f"# {markdown(name)}", {"heading"}),
        (f"- {markdown(name)}", {"bullet_list", "list_item", "paragraph"}),
        (f"| {markdown(name)} | b |\n|---|---|\n| 1 | 2 |", {"table", "thead", "tbody", "tr", "th", "td"}),
    ):
        tokens = reader.parse(page)
        first = next(token for token in tokens if token.type == "inline")
        assert {token.type.removesuffix("_open") for token in tokens if token.nesting == 1} == kinds
        assert "".join(part.content for part in first.children or ()) == shown
        assert {part.type for part in first.children or ()} <= {"text", "text_special"}
    assert "$" not in markdown(name).replace(r"\$", ""), "GitHub sets mathematics between two"


@EACH
def test_a_csv_field_is_text_of_one_line(name: str) -> None:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([[csv_field(name), "b"]])
    assert buffer.getvalue().count("\n") == 1 and "\r" not in buffer.getvalue()
    ((field, _),) = csv.reader(io.StringIO(buffer.getvalue()))
    assert field.removeprefix("'") == printable(name)
    assert field[0] not in "=+-@\t\r"


@EACH
def test_json_is_utf_8_and_has_the_name(name: str) -> None:
    assert json.loads(json_text({"a": name}).encode()) == {"a": name}


def test_every_label_is_in_the_legend_as_it_is() -> None:
    figure = new_figure()
    axes = figure.add_subplot()
    axes.set_title(plot_label(NAMES[0]))
    for name in NAMES:
        axes.plot([0, 1], label=plot_label(name))
    legend_below(figure, axes)
    assert Drawing("", "", "", lambda narrow: figure).png().startswith(b"\x89PNG")
    found = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text().strip()]
    drawn = [text._preprocess_math(text.get_text()) for text in found]  # pyright: ignore[reportAttributeAccessIssue]
    assert {mathematics for _, mathematics in drawn} == {False}
    assert {printable(name) for name in NAMES if len(name) < 60} <= {text.strip() for text, _ in drawn}
