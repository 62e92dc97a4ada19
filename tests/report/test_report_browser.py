"""Reports as Chromium shows them: by keyboard, without faults, nothing fetched, at any width, light, dark, in print."""

import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Page, needs_axe, needs_browser
from PIL import Image
from report_pages import CLASSES, GRIDS, PAGES, PICTURES, SOLVERS

pytestmark = needs_browser
MISSING = "not measured at this budget"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    started = Browser(tmp_path_factory.mktemp("profile"))
    yield started
    started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of report, by its name."""
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in PAGES.items()}


@pytest.fixture(scope="module")
def report(pages: dict[str, Path]) -> Path:
    """That of a sweep."""
    return pages["sweep"]


def focus(page: Page, selector: str, index: int = 0) -> None:
    page.evaluate(f"document.querySelectorAll({selector!r})[{index}].focus()")


def shown(page: Page) -> list[str]:
    """Per pane what its picture is called, the caption if it is hidden."""
    pane = (
        "pane.querySelector('img').checkVisibility() ? pane.querySelector('img').alt : "
        "pane.querySelector('figcaption').innerText"
    )
    found = page.evaluate(f"[...document.querySelectorAll('.pane')].map(pane => {pane})")
    return [text.partition(";")[0] for text in found]


def samples(solver: str, nfe: int) -> str:
    return f"samples of {solver} with {nfe} evaluations" if (solver, nfe) in GRIDS else MISSING


WORST, OTHER, BEST = SOLVERS  # by their distance to the exact solution
"""heun is absent at 3."""


def test_arrow_keys_move_the_slider_and_with_it_both_pictures_and_captions(browser: Browser, report: Path) -> None:
    tab = browser.page(report)
    assert shown(tab) == [samples(WORST, 3), samples(BEST, 3)], "the worst beside the best"
    focus(tab, "input")
    for keys, nfe in (
        (["ArrowRight"], 4),
        (["ArrowRight", "ArrowRight"], 6),
        (["ArrowLeft"], 5),
        (["End"], 20),
        (["Home"], 3),
    ):
        tab.press(*keys)
        assert shown(tab) == [samples(WORST, nfe), samples(BEST, nfe)]
        assert tab.evaluate("document.querySelector('input').getAttribute('aria-valuetext')") == f"{nfe} evaluations"
        assert tab.evaluate("document.querySelector('.budget b').innerText") == f"{nfe} NFE"
        assert tab.evaluate("[...document.querySelectorAll('.ticks .chosen')].map(e => e.innerText)") == [str(nfe)]
    assert tab.complaints == []
    assert tab.requests == []


def test_lists_choose_solvers_real_images_and_the_exact_solution_by_keyboard(browser: Browser, report: Path) -> None:
    tab = browser.page(report)
    classes = "[...document.querySelectorAll('.pane .classes')].map(e => e.innerText)"
    focus(tab, "select", 1)
    tab.press("h")
    assert shown(tab) == [samples(WORST, 3), MISSING]
    ratio = "(box => box.width / box.height)(document.querySelectorAll('.missing')[1].getBoundingClientRect())"
    assert tab.evaluate(ratio) == pytest.approx(2, rel=0.03), "as tall as a picture, so that the page does not jump"
    assert tab.evaluate("document.querySelectorAll('.missing')[0].checkVisibility()") is False
    focus(tab, "select", 0)
    tab.press("r")
    focus(tab, "input")
    tab.press("ArrowRight")
    assert shown(tab) == ["real images: held-out images, the limit of the measure", samples(OTHER, 4)]
    rows = [" / ".join(", ".join(names[i : i + 4]) for i in range(0, 16, 4)) for names in (CLASSES, CLASSES[::-1])]
    assert tab.evaluate(classes) == [f"classes, row by row: {row}" for row in rows]
    focus(tab, "select", 0)
    tab.press("e", "x")
    assert shown(tab)[0].startswith("exact solution: ")
    same = "document.querySelector('.pane img').src === document.querySelector('[data-panel=\"0 *\"] img').src"
    assert tab.evaluate(same) is True


def test_every_control_can_be_reached_by_tab_and_has_a_name(browser: Browser, report: Path) -> None:
    tab = browser.page(report)
    tab.evaluate("document.querySelector('.explorer h2').scrollIntoView()")
    focus(tab, "input")
    reached = []
    for _ in range(3):
        tab.press("Tab")
        reached.append(tab.evaluate("document.activeElement.tagName"))
    assert reached == ["SELECT", "SELECT", "SUMMARY"]
    tab.press("Enter")
    assert tab.evaluate("document.querySelector('.panels').open") is True
    nodes = tab.send("Accessibility.getFullAXTree")["nodes"]
    names = {(node["role"]["value"], node["name"]["value"]) for node in nodes if not node["ignored"] and "name" in node}
    assert {("slider", "evaluations per image"), ("combobox", "left"), ("combobox", "right")} <= names
    assert ("image", "Fréchet distance to the data against NFE") in names


def test_without_scripts_the_whole_table_is_there_and_no_dead_control(browser: Browser, report: Path) -> None:
    tab = browser.page(report, javascript=False)
    visible = (
        "[...document.querySelectorAll('.samples img')].filter(e => e.checkVisibility() && e.offsetWidth > 20).length"
    )
    assert tab.evaluate(visible) == len(GRIDS) + len(PICTURES.limits)
    assert tab.evaluate("document.querySelector('.chooser').checkVisibility()") is False


# ---- all pages ----

EACH = pytest.mark.parametrize("name", PAGES)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1400])
@EACH
def test_nothing_overflows_complains_or_is_fetched(
    browser: Browser, pages: dict[str, Path], name: str, width: int, dark: bool
) -> None:
    tab = browser.page(pages[name], width=width, height=900, dark=dark)
    assert tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })") is None
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth") is True, "also where all is unfolded"
    assert tab.complaints == []
    assert tab.requests == []
    corner = Image.open(io.BytesIO(tab.screenshot())).convert("L").getpixel((2, 2))
    assert isinstance(corner, int)
    assert (corner < 60) is dark
    letters = (
        "[...document.querySelectorAll('.plot text')].filter(e => e.checkVisibility())"
        ".map(e => parseFloat(getComputedStyle(e).fontSize) * Math.hypot(e.getScreenCTM().a, e.getScreenCTM().b))"
    )
    assert min(tab.evaluate(letters)) > 10, "letters of plots, in pixels of the screen"
    grid = tab.evaluate("getComputedStyle(document.querySelector('.plot text')).fill").strip("rgb()").split(", ")
    assert (int(grid[0]) > 128) is dark, "plots take the page's colours"
    ids = tab.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids)), "also of what plots cut and repeat"


@needs_axe
@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@EACH
def test_axe_finds_no_serious_fault(browser: Browser, pages: dict[str, Path], name: str, dark: bool) -> None:
    for width in (390, 1400):
        tab = browser.page(pages[name], width=width, height=900, dark=dark)
        tab.evaluate("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        assert tab.faults() == []


@needs_axe
@pytest.mark.slow
def test_axe_sees_faults(browser: Browser, tmp_path: Path) -> None:
    bad = tmp_path / "bad.html"
    bad.write_text('<!doctype html><html lang="en"><title>t</title><main><h1>t</h1><img src="data:,"><select></select>')
    assert [fault.partition(":")[0] for fault in browser.page(bad).faults()] == ["image-alt", "select-name"]


def test_the_first_screen_has_answer_samples_and_plot(browser: Browser, report: Path) -> None:
    tab = browser.page(report, width=1400, height=900)
    bottom = "document.querySelector('{}').getBoundingClientRect().bottom"
    for part in ("h1", ".warning", ".lead", ".hero .pictures figure:nth-child(2)", ".hero svg"):
        assert 0 < tab.evaluate(bottom.format(part)) <= 900, part
    assert tab.evaluate("[...document.querySelectorAll('.hero img')].map(e => e.alt.split(';')[0])") == [
        samples(BEST, 20),
        "exact solution: the fine solution of the first seeds, the limit of the model",
    ]


def test_a_wide_table_scrolls_under_its_names_with_a_cue(browser: Browser, report: Path) -> None:
    tab = browser.page(report, width=390)
    cue = "getComputedStyle(document.querySelector('.table'), '::after').opacity"
    left = "document.querySelector('tbody th').getBoundingClientRect().left"
    first = tab.evaluate(left)
    assert tab.evaluate(cue) == "1"
    assert "scroll" in tab.evaluate("getComputedStyle(document.querySelector('.table'), '::before').content")
    scrolled = (
        "new Promise(done => { const box = document.querySelector('.scroll'); box.addEventListener('scroll', () => "
    )
    tab.evaluate(f"{scrolled}setTimeout(done), {{once: true}}); box.scrollLeft = 9999; }})")
    assert tab.evaluate("document.querySelector('.scroll').scrollLeft") > 50
    assert tab.evaluate(left) == pytest.approx(first, abs=1.5), "the names stay"
    assert tab.evaluate(cue) == "0", "nothing more to the right"
    wide = browser.page(report, width=1400)
    assert wide.evaluate("document.querySelector('[aria-label^=\"Baselines\"]').parentElement.className") == "table"


# ---- print ----


@pytest.mark.parametrize("javascript", [True, False])
def test_the_report_prints_with_what_is_folded_and_every_picture(
    browser: Browser, report: Path, javascript: bool
) -> None:
    tab = browser.page(report, width=720, javascript=javascript, dark=True)
    pictures = 2 + len(GRIDS) + 3 + 3 + 1  # the first screen's, panels and limits, limits, the baseline's
    assert tab.pdf().count(b"/Subtype /Image") >= pictures - 5, "equal ones are stored once"
    tab.media("print")
    for hidden in (".chooser", ".plot .narrow"):
        assert tab.evaluate(f"document.querySelector('{hidden}').checkVisibility()") is False
    heights = "[...document.querySelectorAll('dl, details table')].map(e => e.getBoundingClientRect().height)"
    assert min(tab.evaluate(heights)) > 20, "also of folded parts"
    heads = "[...new Set([...document.querySelectorAll('thead')].map(e => getComputedStyle(e).display))]"
    assert tab.evaluate(heads) == ["table-header-group"], "repeated on every sheet"
    assert tab.evaluate("getComputedStyle(document.querySelector('.scroll')).overflow") == "visible"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@EACH
def test_every_page_fits_the_paper(browser: Browser, pages: dict[str, Path], name: str) -> None:
    tab = browser.page(pages[name], width=720)
    tab.media("print")
    assert tab.evaluate("document.scrollingElement.scrollWidth <= innerWidth") is True


def test_printing_unfolds_what_style_alone_cannot_and_folds_it_again(browser: Browser, report: Path) -> None:
    tab = browser.page(report)
    folded = "[...document.querySelectorAll('details')].filter(e => !e.open).length"
    before = tab.evaluate(folded)
    for event, left in (("beforeprint", 0), ("afterprint", before)):
        tab.evaluate(f"dispatchEvent(new Event('{event}'))")
        assert tab.evaluate(folded) == left
    assert before > 5


# ---- what is there ----


def test_every_part_of_the_report_is_there(browser: Browser, report: Path) -> None:
    tab = browser.page(report)
    heads = tab.evaluate("[...document.querySelectorAll('h2, summary')].map(e => e.innerText)")
    assert heads == [
        "Fréchet distance to the exact solution by step budget",
        "Fréchet distance to the data by step budget",
        "Error and time",
        "Samples from the same seeds",
        "All panels",
        "What can be reached",
        "Baselines",
        "Error of the solver, seed by seed (RMSE)",
        "Difference from the best",
        "Kernel distance",
        "Shape of something",
        "All figures and where the time went",
        "Notes",
        "How these numbers were made",
    ]
    assert tab.evaluate("document.querySelectorAll('svg').length") == 2 * 4
    assert tab.evaluate("new Set([...document.images].map(e => e.src)).size") == len(GRIDS) + 3 + 1
    assert not re.search("Traceback|StrictUndefined|None", report.read_text(encoding="utf-8"))


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
