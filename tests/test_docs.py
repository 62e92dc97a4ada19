"""The pages: their tables come from reports and from the registry, their code runs, their links lead somewhere."""

import importlib.util
import json
import math
import re
import textwrap
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import mutate_tables
import pytest
import torch
from measurements import measurement

from midway.gen.commands.metric_report import records
from midway.gen.diffusion.load import LEARNED
from midway.gen.evaluation.metric_check import DamageRow, SpaceCheck
from midway.gen.evaluation.records import Measurement, to_records
from midway.gen.proving import report as prove_report
from midway.gen.proving.contest import EXACT_ROW, Cell
from midway.gen.report.table import ReportContext
from midway.gen.report.text import csv_text
from midway.samplers.gits import GITS
from midway.samplers.grids import NAMED, logsnr
from midway.samplers.plugin import BASES
from midway.samplers.runge_kutta import HEUN, runge_kutta
from midway.samplers.schedule import VP, Linear
from midway.samplers.solvers import ALIASES, SOLVERS, Solver
from midway.tokenizers.quantizers import QUANTIZERS

ROOT = Path(__file__).resolve().parent.parent


def _tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _cells() -> list[Measurement]:
    floor = measurement("floor", "", 0, 0.5, None, None, 64, 1, 0.0, "cnn-x@1", "ref@2", "")
    return [floor, *(_ddim(nfe) for nfe in (4, 6, 8))]


def _ddim(nfe: int) -> Measurement:
    return measurement("ddim", "karras", nfe, 1.25, 0.1, 0.2, 64, 2, 0.5, "cnn-x@1", "ref@2", "0-127", training_nfe=10)


def test_a_report_becomes_a_block_of_a_page(tmp_path: Path) -> None:
    module = _tool("embed")
    module.__file__ = str(tmp_path / "docs" / "embed.py")
    (tmp_path / "docs").mkdir()
    report = tmp_path / "report"
    report.mkdir()
    (report / "results.csv").write_text(csv_text(to_records(_cells())))
    assert module.read_results(report / "results.csv") == _cells()
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
    assert (tmp_path / "docs" / "images" / "demo.png").read_bytes().startswith(b"\x89PNG")


def test_two_budgets_make_no_picture(tmp_path: Path) -> None:
    (tmp_path / "results.csv").write_text(csv_text(to_records(_cells()[:3])))
    page = tmp_path / "page.md"
    page.write_text("<!-- begin x --><!-- end x -->")
    module = _tool("embed")
    module.__file__ = str(tmp_path / "docs" / "embed.py")
    module.embed(page, "x", tmp_path)
    assert "1.25 ± 0.10" in page.read_text() and ".png" not in page.read_text()
    assert not (tmp_path / "docs").exists()


def test_an_ablation_becomes_a_table(tmp_path: Path) -> None:
    def row(solver: str, mode: str, nfe: int, rmse: float, spent: int) -> dict[str, object]:
        return {
            "solver": solver,
            "mode": mode,
            "grid": "vp",
            "teacher": "t",
            "nfe": nfe,
            "rmse": rmse,
            "training_nfe": spent,
        }

    found = [row("a", "", 5, 0.2, 0), row("b", "per_step", 5, 0.1, 700), row("b", "per_step", 6, 0.3, 1800)]
    (tmp_path / "x.json").write_text(json.dumps({"results": found}))
    page = tmp_path / "page.md"
    page.write_text("<!-- begin x --><!-- end x -->")
    _tool("embed").embed(page, "x", tmp_path / "x.json")
    assert page.read_text().splitlines()[1:5] == [
        "| solver | learned | grid | teacher | NFE 5 | NFE 6 | learned with |",
        "| --- | --- | --- | --- | ---: | ---: | ---: |",
        "| `a` |  | vp | t | 0.200 | – |  |",
        "| `b` | per step | vp | t | **0.100** | **0.300** | 1,800 |",
    ]


def test_rows_of_a_benchmark_become_a_table(tmp_path: Path) -> None:
    ratio = {"name": "a", "peer_name": "b", "ours": 0.6452, "peer": 0.5711, "unit": "ms", "ratio": 0.885, "target": ""}
    stored = {"records": {"images_per_second": 9213.4, "resident": 47.7, "of_memory_map": 0.1}}
    step = {"images": 20000, "seconds": 3.519, "peak_mb": 859.2}
    page = tmp_path / "page.md"
    for found, line in (
        ({"rows": [ratio]}, "| a | b | 0.645 | 0.571 | ms | 0.89 |  |"),
        ({"rows": stored}, "| records | 9,213 | 48 MiB |"),
        ({"results": [step]}, "| 20,000 | 3.52 | 859 MB |"),
    ):
        (tmp_path / "x.json").write_text(json.dumps(found))
        page.write_text("<!-- begin x --><!-- end x -->")
        _tool("embed").embed(page, "x", tmp_path / "x.json")
        assert page.read_text().splitlines()[3] == line


def test_a_check_of_metrics_becomes_one_table_of_all_spaces(tmp_path: Path) -> None:
    def row(features: str, damage: str, required: float | None, ratio: float) -> DamageRow:
        return DamageRow(features, damage, 40, required, 2 * ratio, ratio, 0.1, 12.34, 3.0, 1.5)

    checks = [
        SpaceCheck(row(name, "floor", None, 1.0), (row(name, "class means", 20, ratio),), share, 0.01)
        for name, ratio, share in (("a, 64 axes", 25.0, 0.4), ("cnn@1", 4.3, 0.97))
    ]
    (tmp_path / "results.csv").write_text(csv_text(records(checks)))
    page = tmp_path / "page.md"
    page.write_text("<!-- begin x --><!-- end x -->")
    _tool("embed").embed(page, "x", tmp_path)
    lines = page.read_text().splitlines()
    assert lines[1] == "| damage | required | a, 64 axes | cnn@1 |"
    assert lines[3] == "| class means | 20 | 25.0 / +12.3 / 1.50 | 4.30 / +12.3 / 1.50 (too little) |"
    assert lines[4] == "| *floor* |  | *2.00 / 0.100 / 3.00* | *2.00 / 0.100 / 3.00* |"
    assert lines[5] == "| variance between classes |  | 40% | 97% |" and lines[-2] == "n = 40 held-out images."


def test_a_page_without_the_block_is_left_alone(tmp_path: Path) -> None:
    module = _tool("embed")
    module.__file__ = str(tmp_path / "docs" / "embed.py")
    (tmp_path / "results.csv").write_text(csv_text(to_records(_cells())))
    page = tmp_path / "page.md"
    page.write_text("nothing here\n")
    with pytest.raises(SystemExit, match="has no block"):
        module.embed(page, "demo", tmp_path)
    assert page.read_text() == "nothing here\n"


@pytest.mark.parametrize(
    ("page", "name"), [("docs/demo.md", "demo"), ("docs/mnist.md", "mnist"), ("docs/cifar10.md", "cifar10")]
)
def test_the_pages_hold_measured_tables(page: str, name: str) -> None:
    text = (ROOT / page).read_text()
    block = text.split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0]
    assert "floor" in block
    assert (ROOT / "docs" / "images" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_proving_ground_becomes_a_short_and_a_whole_block(tmp_path: Path) -> None:
    module = _tool("embed")
    module.__file__ = str(tmp_path / "docs" / "embed.py")
    (tmp_path / "docs").mkdir()
    rmse = {"euler": (0.25, 0.35), "heun": (0.5, 0.75), "rk4": (0.75, 1.0)}
    cells = [Cell(name, 6, "vp", False, 0, {"rmse": found, "to_data": (1.0, 1.5)}) for name, found in rmse.items()]
    exact = Cell(EXACT_ROW, 0, "", False, 0, {"to_data": (0.5, 0.7)})
    result = prove_report.Result((exact, *cells), "patches@1", 64, "0-127", 1e-4)
    prove_report.write_prove_report(tmp_path / "prove", result, ReportContext("t", "m", "d"))
    page = tmp_path / "README.md"
    page.write_text("".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in ("prove", "prove-all")))
    for name in ("prove", "prove-all"):
        module.embed(page, name, tmp_path / "prove")
    short, whole = page.read_text().split("<!-- end prove -->")
    assert "old" not in short + whole
    assert (
        "| euler | **0.300** |" in short and "seeds 0-127 in blocks of 64; standard errors are at most 20.0%." in short
    )
    assert "| euler | **0.300 ± 0.050** (vp) |" in whole and "(docs/images/prove.png)" in whole
    assert "blocks of 64 seeds, 0-127; error of the exact solution 0.0001." in whole
    assert "rk4" not in short  # of all that are measured a few are shown
    assert "*0.600 ± 0.100*" in whole
    assert "Agreement with the published order" in whole
    assert (tmp_path / "docs" / "images" / "prove.png").read_bytes().startswith(b"\x89PNG")


def test_the_pages_hold_what_the_proving_ground_measured() -> None:
    """All solvers of the plot stand in README with the figures of the page of solvers, which has every solver once."""
    short, whole = (
        (ROOT / page).read_text().split(f"<!-- begin {name} -->")[1].split(f"<!-- end {name} -->")[0].replace("**", "")
        for page, name in (("README.md", "prove"), ("docs/solvers-measured.md", "prove-all"))
    )
    rows = [line for line in short.splitlines() if line.startswith("| ") and not line.startswith(("| solver", "| ---"))]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*prove_report.SHOWN]
    heads = short.strip().splitlines()[0].strip("| ").split(" | ")
    all_heads = next(line for line in whole.splitlines() if line.startswith("| solver")).strip("| ").split(" | ")
    for row in rows:
        name, *means = row.strip("| ").split(" | ")
        full = next(line for line in whole.splitlines() if line.startswith(f"| {name} |")).strip("| ").split(" | ")
        there = dict(zip(all_heads, full, strict=True))
        assert means == [there[head].split(" ± ")[0] for head in heads[1:]]
    first = whole.split("Distance to exact")[0].replace("\\", "")
    for name, solver in SOLVERS.items():
        assert first.count(f"\n| {name} |") == (name not in ALIASES and not solver.stochastic), name
    assert (ROOT / "docs" / "images" / "prove.png").read_bytes().startswith(b"\x89PNG")


def test_the_proving_ground_keeps_its_promises() -> None:
    """As recorded: floor and exact row agree within two standard errors, and the order at 6 evaluations is the published one."""
    block = (
        (ROOT / "docs" / "solvers-measured.md")
        .read_text()
        .split("<!-- begin prove-all -->")[1]
        .split("<!-- end prove-all -->")[0]
    )
    distances = block.split("**Distance to data.**")[1]
    rows = {line.split(" | ")[0].strip("| *"): line for line in distances.splitlines() if line.startswith("| ")}
    (floor, its_error), (exact, own_error) = (
        map(float, rows[name].split(" | ")[1].strip("*").split(" ± "))
        for name in ("floor (fresh data)", "exact solution")
    )
    assert abs(floor - exact) < 2 * math.hypot(its_error, own_error)
    agreement = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in block.splitlines() if "| " in line}
    column = agreement["figure"].index("NFE 6")
    for figure in prove_report.FIGURES.values():
        assert float(agreement[figure][column].split(" ")[0]) >= 0.9, figure


def test_links_of_the_pages_lead_somewhere() -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            generated = target.startswith("api/")  # by docs/api.py, when the site is built, which checks these links
            assert generated or (page.parent / target).exists(), f"{page.name} links to {target}"


# ---- the page of solvers ----

SOLVERS_PAGE = ROOT / "docs" / "solvers.md"
LEARNED_PAGE = ROOT / "docs" / "solvers-learned.md"


def _code(page: Path) -> list[str]:
    found = re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(block) for block in found]


def test_the_page_of_solvers_holds_the_registry() -> None:
    text = SOLVERS_PAGE.read_text()
    assert _tool("solver_names").filled(text) == text, "run python docs/solver_names.py"


def test_the_table_of_names_agrees_with_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    module = _tool("solver_names")
    plain = Solver(SOLVERS["rk4"].build, evaluations=4, order=3, coordinate="t", pure_noise=False)
    noisy = Solver(SOLVERS["ddpm"].build, evaluations=1, order=2, history_order=5, stochastic=True)
    several = Solver(SOLVERS["ab4"].build, evaluations=1, order=2, history_order=4)
    monkeypatch.setattr(module, "SOLVERS", {"a": plain, "b": noisy, "c": several})
    page = "before\n<!-- begin names -->\nold\n<!-- end names -->\nafter\n"
    before, head, rule, *rows, after = module.filled(page).replace("<!--", "").strip().splitlines()[1:-1]
    assert (before, after) == (" begin names -->", " end names -->")
    assert [len(line.split("|")) for line in (head, rule, *rows)] == [9] * 5
    assert rows == [
        "| `a` | 3 |  | 4 | t | no |  |",
        "| `b` | 2 (weak) |  | 1 | rho | yes | yes |",
        "| `c` | 2 | 4 | 1 | rho | yes |  |",
    ]
    with pytest.raises(SystemExit, match="needs one block"):
        module.filled("no block")


def test_the_page_of_solvers_names_every_solver_base_and_grid() -> None:
    before, _, rest = SOLVERS_PAGE.read_text().partition("<!-- begin names -->")
    prose = before + rest.partition("<!-- end names -->")[2] + LEARNED_PAGE.read_text()
    plain = [name for name in SOLVERS if not re.match(r"(ab|ipndm|ipndm_v|deis)\d$", name)]
    learned = [name for name in LEARNED if not name.startswith("amed-plugin-")]
    for name in [*plain, *NAMED, GITS, *learned, *(base for base in BASES if base != "none")]:
        assert f"`{name}`" in prose, name
    for family in ("ab", "ipndm", "ipndm_v", "deis"):
        members = [name for name in SOLVERS if re.fullmatch(rf"{family}\d", name)]
        assert f"`{members[0]}`-`{members[-1]}`" in prose


def test_the_code_of_the_pages_of_solvers_runs_as_printed() -> None:
    """All blocks in order; their own assertions, and the results that the prose states."""
    scope: dict[str, Any] = {}
    for block in [*_code(SOLVERS_PAGE), *_code(LEARNED_PAGE)]:
        exec(block, scope)
    errors = scope["errors"]
    assert set(errors) == {name for name, solver in SOLVERS.items() if not solver.stochastic}
    assert max(errors.values()) < 0.1
    assert errors["dpmpp3m"] < errors["dpmpp2m"] < errors["dpmpp1m"]
    assert "ipndm4" in sorted(errors, key=errors.__getitem__)[:3]
    assert len(scope["fitted"]) == 7
    assert all(end.isfinite().all() for end in (*scope["ends"], scope["x"]))
    guided, limited, _ = scope["ends"]
    assert not torch.equal(guided, limited)
    same = SOLVERS["dpm2"].build(scope["schedule"], scope["solver"].grid)
    for ours, row in zip(scope["unlearned"].rows, same.rows, strict=True):
        assert (*ours.states, *ours.predictions) == pytest.approx((*row.states, *row.predictions), rel=1e-9)
    assert scope["amed_errors"][1] < scope["amed_errors"][0] / 3
    assert scope["learned"].nfe == 5
    assert scope["after"] < scope["before"] / 4


def test_the_solver_of_the_contributing_page_can_be_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the page states: Heun's method in rho, with every property that a table must have."""
    scope: dict[str, Any] = {}
    exec(_code(ROOT / "CONTRIBUTING.md")[0], scope)
    entry = Solver(scope["heun_in_rho"], evaluations=2, order=2, pure_noise=False)
    line = '"heun_in_rho": Solver(heun_in_rho, evaluations=2, order=2, pure_noise=False)'
    assert line in (ROOT / "CONTRIBUTING.md").read_text()
    monkeypatch.setitem(mutate_tables.SOLVERS, "heun_in_rho", entry)
    for schedule in (Linear(), VP()):
        count, escaped = mutate_tables.check("heun_in_rho", schedule)
        assert count > 15
        assert not escaped
        grid = logsnr(schedule, 5)
        ours, same = entry.build(schedule, grid), runge_kutta(schedule, grid, tableau=HEUN, variable="rho")
        for a, b in zip(ours.rows, same.rows, strict=True):
            assert a.time == b.time
            assert (*a.states, *a.predictions) == pytest.approx((*b.states, *b.predictions), rel=1e-9, abs=1e-12)
        assert all(s < t for t, s in pairwise(ours.grid))


# ---- the page of tokenizers ----

TOKENIZERS_PAGE = ROOT / "docs" / "tokenizers.md"


def test_the_page_of_tokenizers_names_every_quantizer_and_its_code_runs() -> None:
    text = TOKENIZERS_PAGE.read_text()
    for name in QUANTIZERS:
        assert f"| `{name}`" in text, name
    scope: dict[str, Any] = {}
    for block in _code(TOKENIZERS_PAGE):
        exec(block, scope)


def test_the_table_of_tokenizers_is_the_one_that_was_measured() -> None:
    """Every cell of the result file stands on the page."""
    block = TOKENIZERS_PAGE.read_text().split("<!-- begin tokenizers -->")[1].split("<!-- end tokenizers -->")[0]
    facts = json.loads((ROOT / "benchmarks" / "results" / "compare_tokenizers.json").read_text())
    first = [cell for cell in facts["cells"] if cell["seed"] == 0]
    assert len(first) == 28
    for cell in first:
        (row,) = [line for line in block.splitlines() if line.startswith(f"| `{cell['quantizer']}` |")]
        assert f"{cell['bits']:.1f} bits" in row
        assert f"{cell['psnr']:.2f} dB" in row
    assert facts["protocol"]["images"] in block
    assert (ROOT / "docs" / "images" / "tokenizers.png").read_bytes().startswith(b"\x89PNG")


def test_a_figure_of_a_token_head_becomes_tables() -> None:
    """Of each solver and budget the grid of least error; one table a feature space, one of errors."""

    def row(solver: str, grid: str, nfe: int, distance: float, rmse: float) -> dict[str, Any]:
        counts = {"head_solver": solver, "grid": grid, "head_nfe": nfe, "trunk_nfe": 4}
        return {**counts, "distances": {"pixels": [distance, distance]}, "rmse": rmse}

    rows = [
        row("euler", "uniform", 2, 0.5, 0.3),
        row("euler", "karras", 2, 0.9, 0.2),
        row("table", "best", 1, 0.4, 0.1),
    ]
    facts = {"features": {"pixels": "pixels-1"}, "n": 8, "blocks": 2, "seeds": [0, 15], "rule": "halton"}
    found = {**facts, "rows": rows, "tokens": "latents (6, 2, 2)", "fine": ["dpmpp3m", "logsnr", 200], "model": "abc"}
    block = _tool("embed").benchmark_block(found)
    assert "| head solver | 1 | 2 |" in block and "| euler |  | 0.900 |" in block and "| table | 0.400 |  |" in block
    assert "| euler |  | 0.200 |" in block and "trunk NFE 4 by halton" in block and "`pixels-1`" in block


def test_an_ablation_becomes_a_table_of_each_feature_space() -> None:
    """Means and differences; bold where a part is better, = within the interval."""

    def cell(mean: float, *compared: object) -> dict[str, Any]:
        return {"mean": mean, **dict(zip(("change", "interval", "verdict"), compared, strict=False))}

    def row(name: str, step: float, **cells: dict[str, Any]) -> dict[str, Any]:
        named = {key.replace("_", " "): value for key, value in cells.items()}
        beside = {"variant": name, "text": name.upper(), "beside": "" if name == "base" else "base"}
        return {**beside, "step_seconds": step, "stops": {"steps": 2000, "seconds": 1000}, "cells": named}

    better, same = cell(1.5, -0.25, [-0.3, -0.2], "better"), cell(2.1, 0.05, [-0.05, 0.15], "=")
    rows = [
        row("base", 0.02, steps_distance=cell(2.0), seconds_distance=cell(2.0)),
        row("part", 0.03, steps_distance=better, seconds_distance=same),
        row(
            "other",
            0.03,
            steps_distance=cell(2.6, 0.3, [0.2, 0.4], "worse"),
            seconds_distance=cell(1.0, -0.5, None, "one seed"),
        ),
    ]
    facts = {"data": "digits", "tokens": 4, "training_seeds": [0, 1, 2], "n": 8, "nfe": 24, "seeds": "0-7"}
    limits = {"floor": {"distance": 0.5}}
    found = {**facts, "rows": rows, "features": {"distance": "x@1"}, "limits": limits, "reference": "r@2"}
    block = _tool("embed").benchmark_block(found)
    assert "Fréchet distance (`x@1`), floor 0.5" in block
    assert "| `base`: BASE |  | 1.00 | 2 | 2 |" in block
    assert "| `part`: PART | `base` | 1.50 | **1.5 (-25%: -30% to -20%)** | 2.1 (+5%: -5% to +15%) = |" in block
    assert "| 2.6 (+30%: +20% to +40%) worse | 1 (-50%) one seed |" in block
    assert "digits, 4 tokens; 2,000 steps of `base`, a step of which takes 20 ms" in block
