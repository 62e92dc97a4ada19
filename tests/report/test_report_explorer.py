"""The explorer's HTML: every panel in the table, with real images and the exact solution; all text is escaped."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from measurements import changed, measurement
from PIL import Image

from midway.gen.evaluation.records import EXACT, FLOOR, Measurement
from midway.gen.report.html import LARGE, SCRIPT, SIDE, STYLE, Block, Explorer, Page, Picture, html_page
from midway.gen.report.sweep_page import Pictures, blocks
from midway.gen.report.table import ReportContext

CONTEXT = ReportContext("Budgets", "flow", "digits", "python x.py", "2 cores", {"torch": "2"})
GRIDS = {("heun", 8): b"h8", ("heun", 4): b"h4", ("<b>euler", 4): b"e4", ("ddim", 20): b"d20"}
CAPTIONS = {("heun", 8): "3.2 & <i>", ("<b>euler", 4): "66 · karras"}
CLASSES = ("<i>cat", "dog", "cat", "eel", "dog")


def explorer(grids: dict[tuple[str, int], bytes] = GRIDS) -> str:
    """The page of an explorer alone, between its section's tags."""
    panels = {
        key: Picture(png, f"samples of {key[0]} with {key[1]} evaluations", caption=CAPTIONS.get(key, ""))
        for key, png in grids.items()
    }
    fixed = {"exact solution": Picture(b"ex", "exact", caption="fine", classes=CLASSES)}
    nfe = min(k for _, k in grids)
    found = Explorer(panels, fixed, (nfe, next(iter(grids))[0], "exact solution"))
    page = html_page(Page(CONTEXT, blocks=[Block("Samples from the same seeds", explorer=found)]))
    return page[page.index('<section class="explorer">') : page.index("</section>")] + "</section>"


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


def test_the_table_has_every_place_with_its_picture_and_caption() -> None:
    """Rows in the order of the solvers below what does not depend on the budget; `data-panel` counts rows and budgets from 0."""
    page = explorer()
    for png in (*GRIDS.values(), b"ex"):
        assert page.count(f"base64,{base64.b64encode(png).decode()}") == 1
    cells = dict(re.findall(r'<td data-panel="(\d [\d*])"[^>]*>(.*?)</td>', page))
    assert list(cells) == ["0 *", *(f"{i} {j}" for i in range(1, 4) for j in range(3))]
    alt = 'alt="samples of heun with 8 evaluations"'
    assert cells["1 1"] == f'<img src="data:image/png;base64,aDg=" {alt}><small>3.2 &amp; &lt;i&gt;</small>'
    assert cells["2 0"].endswith("<small>66 · karras</small>") and cells["1 0"].endswith("<small></small>")
    missing = [place for place, cell in cells.items() if cell == "<small>not measured at this budget</small>"]
    assert missing == ["1 2", "2 1", "2 2", "3 0", "3 1"]
    assert re.findall(r'<th scope="col">(.*?)</th>', page) == ["images", "4 NFE", "8 NFE", "20 NFE"]


def test_classes_are_in_the_description_and_below_row_by_row() -> None:
    (exact,) = (image for image in Reader(explorer()).attributes("img") if (image["alt"] or "").startswith("exact"))
    assert exact["alt"] == "exact; classes row by row: <i>cat, dog, cat, eel; dog"
    assert "&lt;i&gt;cat, dog, cat, eel / dog</small>" in explorer()


def test_all_text_is_escaped() -> None:
    reader = Reader(explorer())
    assert reader.open == 0, "every tag that opens closes"
    assert not {"i", "script"} & {tag for tag, _ in reader.tags}
    assert reader.text.count("<b>euler") == 3, "both lists and the table's row"
    quotes = Reader(explorer({('"><script>', 4): b""}))
    assert [tag for tag, _ in quotes.tags].count("script") == 0


def test_the_controls_are_native_and_hidden_until_the_script_shows_them() -> None:
    reader = Reader(explorer())
    (slider,) = reader.attributes("input")
    assert {name: slider[name] for name in ("type", "min", "max", "step", "value", "data-values")} == {
        "type": "range", "min": "0", "max": "2", "step": "1", "value": "0", "data-values": "4 8 20"
    }  # fmt: skip
    assert [
        ("hidden" in attributes) for attributes in reader.attributes("div") if attributes.get("class") == "chooser"
    ] == [True]
    assert reader.attributes("details") == [{"class": "panels", "open": None}]
    assert [option["value"] for option in reader.attributes("option") if "selected" in option] == ["1", "0"]


# ---- what a sweep opens it on ----


def cells(**values: tuple[float, ...]) -> list[Measurement]:
    """Solvers at 4 and 8 evaluations, by the values of their blocks; "a_4": of solver a at 4."""
    made = ((name.split("_"), blocks) for name, blocks in values.items())
    return [
        changed(measurement(s, nfe=int(k)), distance=sum(v) / len(v), distance_blocks=v, blocks=len(v))
        for (s, k), v in made
    ]


def found_explorer(ms: list[Measurement], pictures: Pictures) -> Explorer:
    """That of the page of these measurements."""
    (block,) = (block for block in blocks(ms, CONTEXT, pictures, (), None) if block.explorer)
    assert block.explorer is not None
    return block.explorer


@pytest.mark.parametrize(
    ("ms", "start"),
    [
        (cells(a_4=(3.0, 3.1, 2.9), b_4=(1.0, 1.2, 0.8), c_4=(2.0, 2.1, 1.9)), (4, "a", "b")),
        (cells(a_4=(1.0, 1.2, 0.8), b_4=(1.3, 0.8, 1.1), a_8=(2.0, 2.1, 1.9), b_8=(1.0, 1.2, 0.8)), (8, "a", "b")),
        (cells(a_4=(1.0,), b_4=(2.0,)), (4, "b", "a")),
        (cells(a_4=(1.0, 1.1), b_4=(float("inf"), float("inf"))), (4, "b", "a")),
        (cells(a_4=(1.0, 1.1), b_4=(1.0, 1.1)), (4, "a", "b")),
    ],
    ids=["worst and best", "first budget with a significant difference", "one block", "one diverged", "no difference"],
)
def test_it_opens_on_the_worst_beside_the_best(ms: list[Measurement], start: tuple[int, str, str]) -> None:
    pictures = Pictures({(m.solver, m.nfe): b"" for m in ms})
    assert found_explorer(ms, pictures).start == start


def test_real_images_and_the_exact_solution_can_be_chosen() -> None:
    classes = {FLOOR: ("a", "b"), EXACT: ("c", "d")}
    pictures = Pictures({("a", 4): b"a4"}, {FLOOR: b"real", EXACT: b"fine", "ceiling": b"through"}, classes)
    found = found_explorer(cells(a_4=(1.0,)), pictures)
    assert found.names == ["exact solution", "real images", "through the tokenizer", "a"]
    shown = {name: picture.classes for name, picture in found.fixed.items()}
    assert list(shown.values()) == [("c", "d"), ("a", "b"), ("a", "b")] and found.panels["a", 4].classes == ("c", "d")


def test_a_large_picture_is_smaller_in_the_page() -> None:
    """Noise of 700 x 350 would be a megabyte as base64; copies of others lose nothing, and a few bytes stay as they are."""
    buffer = io.BytesIO()
    Image.effect_noise((700, 350), 90).convert("RGB").save(buffer, "PNG")
    assert len(buffer.getvalue()) > LARGE
    kind, _, data = Picture(buffer.getvalue(), "").source.partition(";base64,")
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    assert kind == "data:image/webp" and image.size == (SIDE, SIDE // 2)
    whole = Image.effect_noise((60, 30), 90).convert("RGB").resize((240, 120), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    whole.save(buffer, "PNG")
    kind, _, data = Picture(buffer.getvalue(), "").source.partition(";base64,")
    copy = base64.b64decode(data)
    assert kind == "data:image/webp" and len(copy) < len(buffer.getvalue()) < LARGE
    assert Image.open(io.BytesIO(copy)).convert("RGB").tobytes() == whole.tobytes()
    assert Picture(b"few", "").source == "data:image/png;base64,ZmV3"


def test_script_and_style_stay_in_their_elements_and_fetch_nothing() -> None:
    for text in (SCRIPT, STYLE):
        assert "</" not in text
        assert not re.search(r"https?:|url\(|@import|\beval\b|HTML|document\.write|fetch|Function|import\(", text)
