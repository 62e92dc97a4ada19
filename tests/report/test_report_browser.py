"""The report as Chromium shows it: controls by keyboard, no error, nothing fetched, at any width, light, dark, in print."""

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, needs_browser
from measurements import changed, measurement
from PIL import Image

from midway.gen.report.explorer import explorer
from midway.gen.report.html import SCRIPT, STYLE
from midway.gen.report.sections import Section
from midway.gen.report.sweep_page import Pictures, report_html
from midway.gen.report.table import ReportContext

pytestmark = needs_browser
SOLVERS = ("euler", "heun", "amed-plugin-dpmpp3m-constants")
NFES = (3, 4, 5, 6, 7, 8, 9, 10, 20)
MISSING = "not measured at this budget"


def _png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 4), (shade, 80, 255 - shade)).save(buffer, format="PNG")
    return buffer.getvalue()


GRIDS = {(s, k): _png(30 * i + k) for i, s in enumerate(SOLVERS) for k in NFES if s != "heun" or k % 2 == 0}
CAPTIONS = {(solver, nfe): f"{nfe}.5 of {solver}" for solver, nfe in GRIDS}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The explorer alone."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>t</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{STYLE}</style></head><body><main>{explorer(GRIDS, CAPTIONS)}</main>"
        f"<script>{SCRIPT}</script></body></html>",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole report of made-up cells."""
    like = measurement(
        "euler", "karras", 4, 5.0, 0.1, 0.2, 1024, 2, 1.5, "cnn-digits@3fa2c1ab90de", "digits-train@9b1e", "0-2047"
    )
    like = changed(like, kid=0.01, kid_std=0.002, precision=0.8, recall=0.7, density=0.9, coverage=0.8, psnr=30)
    cells = [changed(like, solver=s, nfe=k, distance=60 / k + i, distance_blocks=(60 / k + i - 0.1, 60 / k + i + 0.1),
                                 training_nfe=99999 * (i == 2)) for i, s in enumerate(SOLVERS) for k in NFES]  # fmt: skip
    floor = changed(like, solver="floor", grid="", nfe=0, distance=1.5, distance_std=None, rmse=None)
    baseline = changed(like, solver="vae", grid="", nfe=1, rmse=None, baseline=True)
    context = ReportContext(
        "Budgets", "flow", "digits", "python evaluate.py " + "x" * 90, "2 cores", {"torch": "2"}, "0-2047"
    )
    path = tmp_path_factory.mktemp("report") / "report.html"
    section = Section("Shape of something", "Its <text>.", _png(99), "a picture")
    page = report_html([floor, *cells, baseline], context, Pictures({**GRIDS, ("vae", 1): _png(200)}), [section])
    path.write_text(page, encoding="utf-8")
    return path


def focus(page: Page, selector: str, index: int = 0) -> None:
    page.evaluate(f"document.querySelectorAll({selector!r})[{index}].focus()")


def shown(page: Page) -> list[tuple[str, str]]:
    """Per pane what its picture is called, nothing if hidden, and the caption."""
    pane = "pane.querySelector('img').checkVisibility() ? pane.querySelector('img').alt : ''"
    text = "pane.querySelector('figcaption').innerText"
    return [
        tuple(pair) for pair in page.evaluate(f"[...document.querySelectorAll('.pane')].map(pane => [{pane}, {text}])")
    ]


def caption(solver: str, nfe: int) -> tuple[str, str]:
    measured = (solver, nfe) in GRIDS
    return (f"samples of {solver} with {nfe} evaluations", CAPTIONS[solver, nfe]) if measured else ("", MISSING)


def test_arrow_keys_move_the_slider_and_with_it_both_pictures_and_captions(browser: Browser, page: Path) -> None:
    tab = browser.page(page)
    assert shown(tab) == [caption("euler", 4), caption("heun", 4)], "the first budget that both have"
    focus(tab, "input")
    for keys, nfe in (
        (["ArrowRight"], 5),
        (["ArrowRight", "ArrowRight"], 7),
        (["ArrowLeft"], 6),
        (["End"], 20),
        (["Home"], 3),
    ):
        tab.press(*keys)
        assert shown(tab) == [caption("euler", nfe), caption("heun", nfe)]
        assert tab.evaluate("document.querySelector('input').getAttribute('aria-valuetext')") == f"{nfe} evaluations"
        assert tab.evaluate("document.querySelector('.budget b').innerText") == f"{nfe} NFE"
        assert tab.evaluate("[...document.querySelectorAll('.ticks .chosen')].map(e => e.innerText)") == [str(nfe)]
    assert tab.complaints == []
    assert tab.requests == []


def test_the_picture_shown_is_the_one_of_the_table(browser: Browser, page: Path) -> None:
    tab = browser.page(page)
    same = "document.querySelector('.pane img').src === document.querySelector('[data-panel=\"0 1\"] img').src"
    assert tab.evaluate(same) is True
    assert tab.evaluate("new Set([...document.querySelectorAll('td img')].map(e => e.src)).size") == len(GRIDS)
    assert tab.evaluate("document.querySelector('.pane img').naturalWidth") == 8


def test_each_list_chooses_its_panes_solver_by_keyboard(browser: Browser, page: Path) -> None:
    tab = browser.page(page)
    focus(tab, "select", 1)
    tab.press("a")
    assert shown(tab) == [caption("euler", 4), caption("amed-plugin-dpmpp3m-constants", 4)]
    focus(tab, "select", 0)
    tab.press("h")
    assert shown(tab) == [caption("heun", 4), caption("amed-plugin-dpmpp3m-constants", 4)]
    focus(tab, "input")
    tab.press("ArrowRight")
    assert shown(tab) == [caption("heun", 5), caption("amed-plugin-dpmpp3m-constants", 5)]
    assert tab.evaluate("document.querySelector('.missing').getBoundingClientRect().toJSON().width > 50") is True
    ratio = "(box => box.width / box.height)(document.querySelector('.missing').getBoundingClientRect())"
    assert tab.evaluate(ratio) == pytest.approx(2, rel=0.03), "as tall as a picture, so that the page does not jump"


def test_every_control_can_be_reached_by_tab_and_has_a_name(browser: Browser, page: Path) -> None:
    tab = browser.page(page)
    reached = []
    for _ in range(4):
        tab.press("Tab")
        reached.append(tab.evaluate("document.activeElement.tagName"))
    assert reached == ["INPUT", "SELECT", "SELECT", "SUMMARY"]
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    names = {(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"] and "name" in node}
    assert {("slider", "evaluations per image"), ("combobox", "solver a"), ("combobox", "solver b")} <= names


def test_the_table_is_folded_by_the_script_and_unfolds(browser: Browser, page: Path) -> None:
    tab = browser.page(page)
    visible = "document.querySelector('td').checkVisibility()"
    assert tab.evaluate("document.querySelector('details').open") is False
    assert tab.evaluate(visible) is False
    focus(tab, "summary")
    tab.press("Enter")
    assert tab.evaluate("document.querySelector('details').open") is True
    assert tab.evaluate(visible) is True


def test_printing_unfolds_the_table_where_style_alone_cannot_and_folds_it_again(browser: Browser, page: Path) -> None:
    tab = browser.page(page)
    for event, is_open in (("beforeprint", True), ("afterprint", False)):
        tab.evaluate(f"dispatchEvent(new Event('{event}'))")
        assert tab.evaluate("document.querySelector('details').open") is is_open


def test_without_scripts_the_whole_table_is_there_and_no_dead_control(browser: Browser, page: Path) -> None:
    tab = browser.page(page, javascript=False)
    visible = "[...document.querySelectorAll('td img')].filter(e => e.checkVisibility() && e.offsetWidth > 20).length"
    assert tab.evaluate(visible) == len(GRIDS)
    assert tab.evaluate("document.querySelector('.chooser').checkVisibility()") is False


@pytest.mark.parametrize("javascript", [True, False])
def test_print_has_every_panel_on_the_paper_and_no_control(browser: Browser, page: Path, javascript: bool) -> None:
    tab = browser.page(page, width=720, javascript=javascript)
    assert tab.pdf().count(b"/Subtype /Image") == len(GRIDS)
    tab.media("print")
    assert tab.evaluate("document.querySelector('.chooser').checkVisibility()") is False
    assert tab.evaluate("document.querySelector('table').getBoundingClientRect().right <= innerWidth") is True
    widths = tab.evaluate("[...document.querySelectorAll('td')].map(e => e.offsetWidth)")
    assert max(widths) - min(widths) <= 1, "a column without pictures is as wide"


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
@pytest.mark.parametrize("name", ["page", "report"])
def test_nothing_overflows_complains_or_is_fetched(
    browser: Browser, request: pytest.FixtureRequest, name: str, width: int, dark: bool
) -> None:
    tab = browser.page(request.getfixturevalue(name), width=width, dark=dark)
    assert tab.evaluate("innerWidth") == width
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth") is True
    assert tab.complaints == []
    assert tab.requests == []
    corner = Image.open(io.BytesIO(tab.screenshot())).convert("L").getpixel((2, 2))
    assert isinstance(corner, int)
    assert (corner < 60) is dark


@pytest.mark.parametrize("javascript", [True, False])
def test_the_report_prints_with_what_is_folded_and_every_picture(
    browser: Browser, report: Path, javascript: bool
) -> None:
    tab = browser.page(report, width=720, javascript=javascript)
    pictures = 2 + len(GRIDS) + 1 + 1  # plots, panels, the baseline's, the section's
    assert tab.pdf().count(b"/Subtype /Image") >= pictures
    tab.media("print")
    heights = "[...document.querySelectorAll('dl, details table')].map(e => e.getBoundingClientRect().height)"
    assert min(tab.evaluate(heights)) > 20, "also of folded parts"


def test_every_part_of_the_report_is_there(browser: Browser, report: Path) -> None:
    tab = browser.page(report)
    heads = tab.evaluate("[...document.querySelectorAll('h2, summary')].map(e => e.innerText)")
    assert heads == [
        "Fréchet distance to the data by step budget",
        "Baselines",
        "Error of the solver, seed by seed (RMSE)",
        "Difference from the best",
        "Samples from the same seeds",
        "All panels",
        "Shape of something",
        "Kernel distance",
        "All figures and where the time went",
        "How these numbers were made",
    ]
    assert tab.evaluate("document.querySelectorAll('img').length") == 2 + 1 + 1 + 2 + len(GRIDS)
    assert tab.evaluate("new Set([...document.images].map(e => e.src)).size") == 2 + 1 + 1 + len(GRIDS)


def test_the_helper_notices_errors_requests_and_overflow(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text(
        '<title>t</title><body style="margin: 0"><div style="width: 500px">x</div>'
        '<img src="http://elsewhere.invalid/a.png"><script>console.log("hello"); missing()</script>'
    )
    tab = browser.page(bad, width=360)
    assert "http://elsewhere.invalid/a.png" in tab.requests
    assert any("hello" in line for line in tab.complaints)
    assert any("missing is not defined" in line for line in tab.complaints)
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth") is False
