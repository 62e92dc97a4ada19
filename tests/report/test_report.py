"""Reports: all cells in the files, the best in bold, the floor everywhere, one page without links."""

import csv
import dataclasses
import io
import json
import math
import os
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from measurements import changed, measurement

from midway.gen.core.errors import DiskError
from midway.gen.evaluation.comparing import training_costs
from midway.gen.evaluation.metrics import METRICS, Features, measure_metrics
from midway.gen.evaluation.records import Estimate, Measurement, from_record, to_records
from midway.gen.features.reference import FeatureReference
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.report import sweep_tables
from midway.gen.report.curves import pareto_front
from midway.gen.report.html import SCRIPT
from midway.gen.report.plots import Cost, distance_figure, distance_png
from midway.gen.report.sweep import markdown_tables, report_md, terminal_text, write_report
from midway.gen.report.sweep_page import Pictures, report_html
from midway.gen.report.sweep_tables import metric
from midway.gen.report.table import ReportContext, number
from midway.gen.report.text import csv_text, jsonl_text

PNG = b"\x89PNG\r\n\x1a\n"
FEATURES = "cnn-digits@3fa2c1ab90de"
COLUMNS = "solver,grid,nfe,distance,distance_std,to_exact,to_exact_std,rmse,rmse_std,n,blocks,seconds,features,reference,seeds"
MORE = "training_nfe,baseline,distance_blocks,to_exact_blocks,decode_seconds,feature_seconds,psnr,kid,kid_std,sliced"
LAST = (
    "sliced_std,precision,recall,density,coverage,inception_score,fd_infinity,nonfinite,trainings,record,timing,further"
)
MODEL = "model,sampler,training_images,model_nfe,guided,token_evaluations,head_nfe,guidance"
CONTEXT = ReportContext(
    title="Budgets",
    model="flow",
    data="digits",
    command="midway evaluate",
    hardware="2 cores",
    versions={"torch": "2.15"},
    seeds="0-1023",
    notes=("the reference has 200 steps",),
)


def cell(solver: str, nfe: int, distance: float, grid: str = "karras", rmse: float | None = 0.25) -> Measurement:
    like = measurement(solver, grid, nfe, distance, 0.12, rmse, 1024, 4, 0.1 * nfe, FEATURES)
    return changed(like, reference="digits-train@9b1e", seeds="0-1023")


FLOOR = changed(cell("floor", 0, 2.61, "", None), distance_std=0.08, seconds=0.0)
LEARNED = changed(cell("amed", 4, 17.3, "learned", 0.125), training_nfe=128000)
CELLS = [FLOOR, cell("euler", 4, 66.0), cell("euler", 8, 5.0), LEARNED, cell("amed", 8, 5.55, "learned")]


def html(cells: list[Measurement], context: ReportContext = CONTEXT) -> str:
    """The page's text, its images and plots cut out."""
    text = report_html(cells, context, Pictures({("euler", 4): PNG, ("amed", 8): PNG}, {"floor": PNG}))
    assert text.count(f"<script>{SCRIPT}</script>") == 1, "our own script, and in the page itself"
    text = re.sub("<svg.*?</svg>", "", text, flags=re.DOTALL)
    text = text.replace(f"<script>{SCRIPT}</script>", "")
    return re.sub(r"base64,[A-Za-z0-9+/=]+", "base64,", text)


def test_csv_holds_every_cell_in_full_precision() -> None:
    odd = changed(cell('a,"b"', 6, 1 / 3), distance_std=None, rmse=None)
    rows = list(csv.DictReader(io.StringIO(csv_text(to_records([*CELLS, odd])), newline="")))
    assert [from_record(row) for row in rows] == [*CELLS, odd]
    assert ",".join(rows[0]) == f"{COLUMNS},{MORE},{LAST},flops,seconds_std,seconds_blocks,kind,{MODEL}"
    assert len(rows) == len(CELLS) + 1
    assert float(rows[-1]["distance"]) == 1 / 3
    assert rows[-1]["solver"] == 'a,"b"'
    assert rows[-1]["distance_std"] == rows[-1]["rmse"] == ""
    assert rows[3]["training_nfe"] == "128000"


def test_jsonl_gives_the_cells_back() -> None:
    lines = jsonl_text(to_records(CELLS)).splitlines()
    assert [from_record(json.loads(line)) for line in lines] == CELLS


def test_jsonl_stays_json_when_a_solver_diverged() -> None:
    text = jsonl_text(to_records([cell("heun", 4, math.nan)]))
    assert json.loads(text)["distance"] is None
    assert "NaN" not in text


@pytest.mark.parametrize(
    ("value", "std", "expected"),
    [
        (17.249, None, "17.2"),
        (319.4, 6.2, "319 ± 6"),
        (2.614, 0.04, "2.61 ± 0.04"),
        (12.34, 0.04, "12.34 ± 0.04"),
        (0.012345, 0.0004, "0.0123 ± 0.0004"),
        (12345.6, None, "12346"),
        (0.0, None, "0.00"),
        (5.0, 0.0, "5.00 ± 0.00"),
        (math.inf, 1.0, "diverged"),
    ],
)
def test_numbers_have_three_digits(value: float, std: float | None, expected: str) -> None:
    assert number(value, std) == expected


def test_markdown_bolds_the_best_of_each_column() -> None:
    rmse, distance = markdown_tables(CELLS).split(f"Fréchet distance ({FEATURES})")
    assert re.findall(r"\*\*(.*?)\*\*", distance) == ["5.00 ± 0.12", "17.3 ± 0.1"]
    assert "| euler | 66.0 ± 0.1 (karras) | **5.00 ± 0.12** (karras) |" in distance
    assert "| amed | **17.3 ± 0.1** (learned) | 5.55 ± 0.12 (learned) |" in distance
    assert "| *floor* | *2.61 ± 0.08* | *2.61 ± 0.08* |" in distance
    assert re.findall(r"\*\*(.*?)\*\*", rmse) == ["0.250", "0.125", "0.250"]
    assert "floor" not in rmse


def test_a_diverged_solver_is_named_and_never_best() -> None:
    cells = [cell("heun", 4, math.nan, rmse=math.inf), cell("euler", 4, 66.0)]
    assert "| heun | diverged (karras) |" in markdown_tables(cells)
    assert "**66.0 ± 0.1**" in markdown_tables(cells)
    assert distance_png(cells).startswith(PNG)
    assert "diverged" in html(cells)


def test_no_rmse_no_second_table() -> None:
    cells = [FLOOR, cell("euler", 4, 66.0, rmse=None)]
    assert "RMSE" not in markdown_tables(cells)
    assert "Root-mean-square" not in html(cells)


def test_text_table_is_aligned() -> None:
    lines = terminal_text(CELLS).splitlines()
    rows = [line for line in lines[:-1] if "±" in line]
    assert lines[-1] == "The solver euler with 8 evaluations has the lowest distance to the data, 5.00 ± 0.12."
    assert [row.split()[0] for row in rows] == ["euler", "amed", "floor"]
    assert len({row.rindex("±") for row in rows}) == 1
    assert "17.3 ± 0.1*" in rows[1]
    assert "2.61 ± 0.08" in rows[2]


def test_markdown_text_cannot_break_the_table() -> None:
    assert r"| a\|b\_c |" in markdown_tables([cell("a|b_c", 4, 1.0)])


def test_page_bolds_the_best_and_shows_the_floor() -> None:
    page = html(CELLS)
    assert re.findall(r'class="best"><b>([\d.]+)</b>', page) == ["5.00", "17.3", "0.250", "0.125", "0.250"]
    assert page.count('<tr class="floor">') == 1
    assert "trained, 128,000 evaluations" in page


def test_page_is_self_contained() -> None:
    page = html(CELLS)
    assert not re.search(r"https?:|//|<script|<link|@import|url\(|href=", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert sources == ["data:image/png;base64,"] * 4, "two panels, the floor to compare them with, and among the limits"
    assert "prefers-color-scheme: dark" in page
    assert '<details class="panels" open>' in page


def test_the_name_of_another_metric_is_never_used() -> None:
    for text in (html(CELLS), report_md(CELLS, CONTEXT), terminal_text(CELLS)):
        assert "FID" not in text.upper()
        assert FEATURES in text.replace("\\", "")


def test_page_escapes_all_text() -> None:
    evil = "<script>alert('1')</script>\"&"
    context = ReportContext(evil, evil, evil, evil, evil, {evil: evil}, evil, (evil,))
    nasty = changed(cell(evil, 4, 1.0, evil), features=evil, reference=evil)
    page = report_html([nasty], context, Pictures({(evil, 4): PNG}))
    assert page.count("<script") == 1, "our own"
    assert page.count("&lt;script&gt;") > 10
    assert page.count("<svg") == page.count("</svg>") == 4


def names(axes: Axes) -> list[str]:
    """What is written beside the ends of lines."""
    return [text.get_text() for text in axes.texts]


@pytest.mark.parametrize("x", ["nfe", "seconds"])
def test_plots_are_png_and_reproducible(x: Cost) -> None:
    image = distance_png(CELLS, x)
    assert image.startswith(PNG)
    assert image == distance_png(CELLS, x)
    assert image != distance_png(CELLS[1:], x)


def test_plot_says_what_it_shows() -> None:
    """The floor is a labelled line, budgets are plain ticks, and the axis carries the features' name."""
    figure = distance_figure(CELLS)
    figure.draw_without_rendering()
    axes, below = figure.axes
    assert axes.get_xscale() == axes.get_yscale() == below.get_yscale() == "log"
    assert axes.get_title(loc="left") == f"Fréchet distance to the data ({FEATURES})"
    assert below.get_title(loc="left") == "Ratio to the best"
    (error,) = distance_figure([changed(m, to_exact=0.1) for m in CELLS], "nfe", "to_exact").axes
    assert error.get_title(loc="left") == f"Fréchet distance to the exact solution ({FEATURES})"
    assert names(error) == ["euler", "amed"], "limits are of the distance to the data"
    assert [tick.get_text() for tick in below.get_xticklabels()] == ["4", "8"]
    assert names(axes) == ["euler", "amed", "floor 2.61"] and names(below) == ["euler", "amed"]
    assert any(set(np.asarray(line.get_ydata())) == {2.61} for line in axes.lines)
    strip = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert (strip.y0, strip.y1) == pytest.approx((2.61 - 0.08, 2.61 + 0.08)), "the floor with its error"
    ratios = {line.get_label(): np.asarray(line.get_ydata()).tolist() for line in below.lines}
    assert ratios["euler"] == pytest.approx([66.0 / 17.3, 1.0]) and ratios["amed"] == pytest.approx([1.0, 5.55 / 5.0])
    narrow = distance_figure(CELLS, narrow=True)
    assert [text.get_text() for text in narrow.legends[0].get_texts()] == ["floor 2.61", "euler", "amed"]
    assert not narrow.axes[0].texts


def test_many_solvers_differ_in_colour_and_marker() -> None:
    figure = distance_figure([cell(f"solver-{i}", 4, 1.0 + i) for i in range(30)])
    looks = {(line.get_color(), str(line.get_marker())) for line in figure.axes[0].lines if line.get_marker() != "None"}
    assert sum(1 for _, marker in looks if marker in "os^DvPX<>h") == 30


def test_another_axis_raises() -> None:
    with pytest.raises(ValueError, match="'steps'"):
        distance_png(CELLS, "steps")  # pyright: ignore[reportArgumentType]


def test_nothing_to_plot_is_still_a_report(tmp_path: Path) -> None:
    write_report(tmp_path, [FLOOR], CONTEXT)
    assert (tmp_path / "report.html").stat().st_size > 0


def test_report_directory(tmp_path: Path) -> None:
    write_report(tmp_path / "new", CELLS, CONTEXT, Pictures({("euler", 4): PNG}))
    names = {file.name for file in (tmp_path / "new").iterdir()}
    plots = {"distance_vs_nfe.png", "distance_vs_seconds.png"}
    assert names == plots | {"exact_vs_nfe.png", "results.csv", "results.jsonl", "report.md", "report.html"}
    page = (tmp_path / "new" / "report.html").read_text(encoding="utf-8")
    for plot in plots:
        assert (tmp_path / "new" / plot).read_bytes().startswith(PNG)
        assert page.count(f'id="{plot.removesuffix(".png")}-wide-title"') == 1
        assert f"({plot})" in (tmp_path / "new" / "report.md").read_text(encoding="utf-8")


def test_a_failed_write_keeps_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cells").mkdir()  # of the sweep, else the report is another's
    write_report(tmp_path, CELLS, CONTEXT)
    old = {file.name: file.read_bytes() for file in tmp_path.glob("*.*")}

    def fail(_source: Path, _target: Path) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(DiskError, match="Read-only"):
        write_report(tmp_path, CELLS[:2], CONTEXT)
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.*")} == old


def test_a_fitted_grid_makes_no_learned_solver() -> None:
    fitted = changed(cell("euler", 4, 1.9, "gits"), training_nfe=3840)
    assert training_costs([*CELLS, fitted]) == {"amed": 128000}


# ---- Pareto front ----


def dominated(p: tuple[float, float], points: list[tuple[float, float]]) -> bool:
    return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_point_dominates(seed: int) -> None:
    draw = random.Random(seed)
    points = [(float(draw.randint(0, 6)), float(draw.randint(0, 6))) for _ in range(12)]
    front = pareto_front(points)
    assert sorted(front) == [i for i, p in enumerate(points) if not dominated(p, points)]
    assert front == sorted(front, key=lambda i: points[i])


def test_equal_points_are_on_it_together_in_their_order() -> None:
    assert pareto_front([(2, 1), (1, 3), (2, 1), (2, 2), (1, 4)]) == [1, 0, 2]


def test_what_is_not_finite_is_neither_on_it_nor_beats_others() -> None:
    points = [(1, math.nan), (math.nan, 0), (-math.inf, 5), (0, -math.inf), (2, 3), (1, math.inf)]
    assert pareto_front(points) == [4]
    assert pareto_front([]) == []


# ---- another metric ----


def test_a_metric_is_one_function_and_one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    def brightness(features: Features, _reference: FeatureReference) -> dict[str, float]:
        return {"brightness": features.features.mean().item()}

    monkeypatch.setitem(METRICS, "brightness", brightness)
    monkeypatch.setattr(sweep_tables, "METRIC_COLUMNS", [*sweep_tables.METRIC_COLUMNS, metric("brightness", "light")])
    network: Any = None
    samples = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    reference = FeatureReference(network, "a", FeatureStatistics.of(samples), "r")
    found = measure_metrics(("brightness",), Features(samples, None), reference)
    cells = [changed(cell("euler", 4, 1.0), **{name: Estimate.of([value, 3.5]).mean for name, value in found.items()})]
    assert (
        csv_text(to_records(cells))
        .splitlines()[0]
        .endswith(",token_evaluations,head_nfe,guidance,brightness,brightness_std")
    )
    assert csv_text(to_records(cells)).splitlines()[1].endswith(",3.0,")
    assert json.loads(jsonl_text(to_records(cells)))["brightness"] == 3.0
    assert "| light |" in report_md(cells, CONTEXT) and "| 3.00 |" in report_md(cells, CONTEXT)
    assert '<th scope="col">light</th>' in html(cells) and "<td>3.00</td>" in html(cells)
    assert "brightness" not in csv_text(to_records(CELLS))


# ---- warnings ----


def test_warnings_stand_under_the_title_of_every_output() -> None:
    context = dataclasses.replace(CONTEXT, warnings=("my|run: step 129 of 4000", "<b>"))
    page, text = html(CELLS, context), report_md(CELLS, context)
    assert re.findall(r'class="warning">(.*?)</p>', page) == ["my|run: step 129 of 4000", "&lt;b&gt;"]
    assert text.startswith("# Budgets\n\n> **my\\|run: step 129 of 4000**\n\n> **\\<b\\>**\n\n")
    assert terminal_text(CELLS, context.warnings).startswith("warning: my|run: step 129 of 4000\nwarning: <b>\n\n")
    for other in (html(CELLS), report_md(CELLS, CONTEXT), terminal_text(CELLS)):
        assert "warning:" not in other and "> **" not in other and 'class="warning"' not in other
