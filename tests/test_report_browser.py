"""The report in a real browser: its controls work, nothing is fetched, nothing overflows, and it prints."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from browser import Outcome, needs_browser, print_pdf, probe, screenshot
from PIL import Image

from midway.gen.report_cells import Cell, ReportContext
from midway.gen.report_html import write_html
from midway.gen.report_script import EXPLORER_SCRIPT
from midway.gen.report_sections import Section

pytestmark = needs_browser
SOLVERS = ("euler", 'a<b>"c', "heun")
BUDGETS = (4, 8, 20)
CONTEXT = ReportContext("A title", "a model", "digits", "python x.py", "2 cores", {"torch": "2"}, "0-9", ("a note",))


def png(shade: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (12, 6), shade).save(buffer, format="PNG")
    return buffer.getvalue()


def cell(solver: str, nfe: int, distance: float) -> Cell:
    made = Cell(solver, "karras", nfe, distance, 0.1, 0.2, 100, 2, nfe / 10, "cnn-digits@1", "digits@1", "0-199")
    return replace(made, distances=(distance - 0.1, distance + 0.1), kid=0.01, kid_std=0.001)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A whole report: three solvers, of which one lacks a budget, a baseline, and a section."""
    floor = replace(cell("floor", 0, 0.5), grid="")
    measured = {(s, n): cell(s, n, 1 + i + 1 / n) for i, s in enumerate(SOLVERS) for n in BUDGETS if (i, n) != (2, 4)}
    baseline = replace(cell("a-vae", 1, 3.0), grid="", baseline=True)
    grids = {key: png(20 + 10 * k) for k, key in enumerate(measured)} | {("a-vae", 1): png(200)}
    path = tmp_path_factory.mktemp("report") / "report.html"
    section = Section("A section", "Its <text>.", png(99), "a picture")
    write_html(path, [floor, *measured.values(), baseline], CONTEXT, grids, [section])
    return path.read_text()


LOOK = """
const panes = [...document.querySelectorAll(".pane")];
const look = () => say(panes.map((pane) => [pane.querySelector("figcaption").textContent,
  pane.querySelector("img").hidden ? null : pane.querySelector("img").alt]));
const slider = document.querySelector("input[type=range]");
const choose = (control, value) => { control.value = value; control.dispatchEvent(new Event("input", { bubbles: true })); };
"""


def looked(page: str, tmp_path: Path, script: str, width: int = 1200) -> Outcome:
    outcome = probe(page, LOOK + script, tmp_path, width)
    assert outcome.errors == [] and outcome.fetched == []
    return outcome


def test_the_slider_moves_through_the_budgets(page: str, tmp_path: Path) -> None:
    script = 'look(); choose(slider, 2); look(); say(slider.getAttribute("aria-valuetext")); slider.stepDown(); '
    found = looked(page, tmp_path, script + 'slider.dispatchEvent(new Event("input", { bubbles: true })); look();').said
    assert [pane[1] for pane in found[0]] == [
        "samples of euler with 4 evaluations",
        'samples of a<b>"c with 4 evaluations',
    ]
    assert [pane[1] for pane in found[1]] == [alt.replace(" 4 ", " 20 ") for alt in (p[1] for p in found[0])]
    assert found[1][0][0] == "1.05 · karras" and found[2] == "20 evaluations"
    assert found[3][0][1] == "samples of euler with 8 evaluations"


def test_the_lists_choose_solvers_and_say_what_is_missing(page: str, tmp_path: Path) -> None:
    script = 'choose(panes[1].querySelector("select"), "2"); look(); choose(slider, 1); look();'
    first, second = looked(page, tmp_path, script).said
    assert first[1] == ["not measured at this budget", None]
    assert second[1][1] == "samples of heun with 8 evaluations"


def test_every_control_can_be_reached_and_named(page: str, tmp_path: Path) -> None:
    script = """
    for (const control of document.querySelectorAll(".chooser input, .chooser select, summary")) {
      control.focus(); say([control === document.activeElement, control.tabIndex,
        control.labels && control.labels.length > 0 || control.hasAttribute("aria-label") || control.tagName === "SUMMARY"]);
    }"""
    found = looked(page, tmp_path, script).said
    assert len(found) >= 4 and all(reached and index == 0 and named for reached, index, named in found)


def test_images_are_in_the_page_once(page: str) -> None:
    pictures = 2 + 8 + 1 + 1  # plots, panels, the baseline's, the section's
    assert page.count("data:image/png;base64,") == pictures


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(width: int, page: str, tmp_path: Path) -> None:
    """A headless window is no narrower than 500 pixels, so the page stands in a frame of that width."""
    script = f"""
    const main = document.querySelector("main");
    document.documentElement.style.width = "{width}px"; document.body.style.width = "{width}px";
    const wide = [...main.querySelectorAll("*")].filter((e) => !e.closest(".scroll") || e.classList.contains("scroll"))
      .filter((e) => e.getBoundingClientRect().right > {width} + 0.5);
    say(wide.map((e) => e.tagName + "." + e.className));"""
    assert looked(page, tmp_path, script, width).said == [[]]


def test_the_page_has_a_dark_form(page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page)
    shades = []
    for dark in (False, True):
        screenshot(path, tmp_path / f"{dark}.png", 800, 600, dark)
        shades.append(Image.open(tmp_path / f"{dark}.png").convert("L").getpixel((5, 590)))
    assert shades[0] > 200 and shades[1] < 60


@pytest.mark.parametrize("javascript", [True, False])
def test_it_prints_with_all_panels(javascript: bool, page: str, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(page if javascript else page.replace(EXPLORER_SCRIPT, ""))
    pdf = print_pdf(path, tmp_path / "page.pdf")
    assert pdf.startswith(b"%PDF") and pdf.count(b"/Subtype /Image") >= 8


def test_without_a_script_the_table_is_open(page: str) -> None:
    assert "<details open><summary>All panels</summary>" in page
    assert '<div class="chooser" hidden>' in page
