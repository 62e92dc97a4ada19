"""The explorer's HTML: every panel once, in the table; all text escaped; nothing that runs but the script."""

import base64
import re
from html.parser import HTMLParser

from midway.gen.report.explorer import explorer
from midway.gen.report.html import SCRIPT, STYLE, image_tag

GRIDS = {("heun", 8): b"h8", ("heun", 4): b"h4", ("<b>euler", 4): b"e4", ("ddim", 20): b"d20"}
CAPTIONS = {("heun", 8): "3.2 & <i>", ("<b>euler", 4): "66 · karras"}


class Reader(HTMLParser):
    """Tags with their attributes, and text, in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open += tag not in ("img", "input")

    def handle_endtag(self, tag: str) -> None:
        self.open -= 1

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_no_grids_no_section() -> None:
    assert explorer({}, {}) == ""


def test_every_image_is_in_the_page_once() -> None:
    page = explorer(GRIDS, CAPTIONS)
    for png in GRIDS.values():
        assert page.count(f"base64,{base64.b64encode(png).decode()}") == 1
    assert len([image for image in Reader(page).attributes("img") if "src" in image]) == len(GRIDS)


def test_the_table_has_every_place_with_its_picture_and_caption() -> None:
    """Rows in the order of the solvers, columns by budget; `data-panel` counts both from 0."""
    page = explorer(GRIDS, CAPTIONS)
    cells = dict(re.findall(r'<td data-panel="(\d \d)">(.*?)</td>', page))
    assert list(cells) == [f"{i} {j}" for i in range(3) for j in range(3)]
    assert cells["0 1"] == f"{image_tag(b'h8', 'samples of heun with 8 evaluations')}<small>3.2 &amp; &lt;i&gt;</small>"
    assert cells["1 0"].endswith("<small>66 · karras</small>")
    assert cells["0 0"].endswith("<small></small>")
    assert [place for place, cell in cells.items() if cell == "<small>not measured at this budget</small>"] == [
        "0 2", "1 1", "1 2", "2 0", "2 1"
    ]  # fmt: skip
    assert re.findall(r'<th scope="col">(.*?)</th>', page) == ["solver", "4 NFE", "8 NFE", "20 NFE"]


def test_all_text_is_escaped() -> None:
    reader = Reader(explorer(GRIDS, CAPTIONS))
    assert reader.open == 0, "every tag that opens closes"
    assert not {"i", "script"} & {tag for tag, _ in reader.tags}
    assert reader.text.count("<b>euler") == 3, "both lists and the table's row"
    quotes = Reader(explorer({('"><script>', 4): b""}, {}))
    assert [tag for tag, _ in quotes.tags].count("script") == 0
    assert image_tag(b"", '"') == '<img src="data:image/png;base64," alt="&quot;">'


def test_the_controls_are_native_and_hidden_until_the_script_shows_them() -> None:
    reader = Reader(explorer(GRIDS, CAPTIONS))
    (slider,) = reader.attributes("input")
    assert {name: slider[name] for name in ("type", "min", "max", "step", "data-values")} == {
        "type": "range", "min": "0", "max": "2", "step": "1", "data-values": "4 8 20"
    }  # fmt: skip
    assert [
        ("hidden" in attributes) for attributes in reader.attributes("div") if attributes.get("class") == "chooser"
    ] == [True]
    assert reader.attributes("details") == [{"open": None}]
    assert [option["value"] for option in reader.attributes("option") if "selected" in option] == ["0", "1"]


def test_it_starts_where_both_panes_have_a_picture() -> None:
    start = lambda grids: Reader(explorer(dict.fromkeys(grids, b""), {})).attributes("input")[0]["value"]  # noqa: E731
    assert start([("a", 3), ("a", 4), ("b", 4), ("b", 5)]) == "1"
    assert start([("a", 3), ("b", 5)]) == "0"
    assert start([("a", 3), ("a", 5)]) == "0"


def test_script_and_style_stay_in_their_elements_and_fetch_nothing() -> None:
    for text in (SCRIPT, STYLE):
        assert "</" not in text
        assert not re.search(r"https?:|url\(|@import|\beval\b|HTML|document\.write|fetch|Function|import\(", text)
