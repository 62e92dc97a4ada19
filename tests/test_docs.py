"""The pages' tables come from reports: the embedding tool, and that every block it fills is there."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from midway.gen.report import write_csv
from midway.gen.report_cells import Cell

ROOT = Path(__file__).resolve().parent.parent


def _embed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("embed", ROOT / "docs" / "embed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cells() -> list[Cell]:
    floor = Cell("floor", "", 0, 0.5, None, None, 64, 1, 0.0, "cnn-x@1", "ref@2", "")
    one = Cell("ddim", "karras", 4, 1.25, 0.1, 0.2, 64, 2, 0.5, "cnn-x@1", "ref@2", "0-127", 10, True)
    return [floor, one]


def test_a_report_becomes_a_block_of_a_page(tmp_path: Path) -> None:
    module = _embed()
    module.__file__ = str(tmp_path / "docs" / "embed.py")
    (tmp_path / "docs").mkdir()
    report = tmp_path / "report"
    report.mkdir()
    write_csv(report / "results.csv", _cells())
    (report / "distance_vs_nfe.png").write_bytes(b"png")
    assert module.read_cells(report / "results.csv") == _cells()
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- begin demo -->\nold\n<!-- end demo -->\nafter\n")
    module.embed(page, "demo", report)
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "1.25 ± 0.10" in text
    assert "seeds 0-127" in text
    assert "(docs/images/demo.png)" in text
    assert (tmp_path / "docs" / "images" / "demo.png").read_bytes() == b"png"


def test_a_page_without_the_block_is_left_alone(tmp_path: Path) -> None:
    module = _embed()
    module.__file__ = str(tmp_path / "docs" / "embed.py")
    write_csv(tmp_path / "results.csv", _cells())
    (tmp_path / "distance_vs_nfe.png").write_bytes(b"png")
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="has no block"):
        module.embed(page, "demo", tmp_path)
    assert page.read_text() == "nothing here\n"


@pytest.mark.parametrize(("page", "name"), [("README.md", "demo"), ("docs/cifar10.md", "cifar10")])
def test_the_pages_hold_measured_tables(page: str, name: str) -> None:
    text = (ROOT / page).read_text()
    block = text.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
    assert "floor" in block
    assert (ROOT / "docs" / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_links_of_the_pages_lead_somewhere() -> None:
    import re

    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
