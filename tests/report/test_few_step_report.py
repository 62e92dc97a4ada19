"""Few-step models in reports: under a heading of their own, nearest to the data or not, and in plots of another style."""

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hostile_names import NAMES
from matplotlib.axes import Axes
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from measurements import measurement

from midway.gen.core.text import html, markdown, printable
from midway.gen.evaluation.comparing import best_cell, contrast, first_as_exact
from midway.gen.evaluation.records import EXACT, FEW_STEP, FLOOR, Estimate, Measurement
from midway.gen.report.drawing import MODEL_DASHES
from midway.gen.report.notes import answer
from midway.gen.report.plots import distance_figure, drawings
from midway.gen.report.sweep import markdown_tables, terminal_text
from midway.gen.report.sweep_page import Pictures, provenance, report_html
from midway.gen.report.sweep_tables import (
    AS_EXACT,
    distance_table,
    error_table,
    further_tables,
    rmse_table,
)
from midway.gen.report.table import ReportContext, Table

Blocks = tuple[float, ...]
TOOK, MORE = "1,000 images, 1,000 evaluations of training", "2,000 images, 5,000 evaluations of training"
CONTEXT = ReportContext("Budgets", "flow", "digits", "midway evaluate", "2 cores", {})


def cell(solver: str, nfe: int, data: Blocks, exact: Blocks | None = None, **more: object) -> Measurement:
    """Of a flow model that took 1000 images; `exact`: distances to its exact solution."""
    metrics = {"distance": Estimate.of(data), "kid": Estimate.of(data)}
    metrics |= {} if exact is None else {"to_exact": Estimate.of(exact), "rmse": Estimate.of(exact)}
    fields = {"model": "flow", "training_images": 1000, "model_nfe": 1000, "metrics": metrics} | more
    return replace(measurement(solver, nfe=nfe, blocks=len(data)), **fields)  # pyright: ignore[reportArgumentType]


def few(name: str, nfe: int, data: Blocks, **more: object) -> Measurement:
    """Of a few-step model that took 2000 images and 5000 evaluations."""
    facts = {"kind": FEW_STEP, "model": name, "sampler": "jump", "training_images": 2000, "model_nfe": 5000}
    return cell(name, nfe, data, **(facts | more))  # pyright: ignore[reportArgumentType]


NEAR, FAR, NEARER = (1.0, 1.12, 0.9), (2.0, 2.1, 1.9), (0.4, 0.45, 0.5)
MS = [
    cell(FLOOR, 0, (0.5,), model="", training_images=0, model_nfe=0),
    cell(EXACT, 48, (1.0, 1.1, 0.9)),
    cell("euler", 1, FAR, (3.0, 3.1, 3.2)),
    cell("euler", 4, NEAR, (0.2, 0.3, 0.4)),
    cell("table", 4, NEAR, (0.1, 0.2, 0.3), training_nfe=77),
    few("imf", 1, NEARER, guided="guidance 2 in training"),
    few("imf", 4, (1.0, 1.1, 0.91), guided="guidance 2 in training"),
    few("shortcut", 1, (0.41, 0.44, 0.51)),
    few("shortcut", 8, FAR),
]


def marks(table: Table) -> dict[str, list[tuple[str, bool, bool, str] | None]]:
    """Value, best, tied and small print of every entry."""
    return {line.name: [e and (e.value, e.best, e.tied, e.small) for e in line.entries] for line in table.lines}


def test_solvers_few_step_models_and_limits_are_under_headings() -> None:
    """One table, with what training took: of the solvers' model, of learned solvers, and of each few-step model."""
    table = distance_table([*MS[:2], *MS[5:], *MS[2:5]])
    assert [(group, [line.name for line in lines]) for group, lines in table.groups] == [
        (f"solvers, all on the weights of flow: {TOOK}", ["euler", "table"]),
        ("few-step models, each on weights of its own", ["imf", "shortcut"]),
        ("limits", ["floor", "exact"]),
    ]
    assert table.heads == ("solver", "NFE 1", "NFE 4", "NFE 8")
    assert {line.name: line.small for line in table.lines if line.small} == {
        "table": "trained, 77 evaluations",
        "imf": f"jump, {MORE}, guidance 2 in training",
        "shortcut": f"jump, {MORE}",
    }
    facts = dict(provenance(MS, CONTEXT))["training of models"]
    assert facts.startswith("flow 1,000 images, 1,000 evaluations; imf 2,000 images, 5,000 evaluations; shortcut")


def test_the_nearest_to_the_data_is_marked_and_only_solvers_are_compared_with_their_exact_solution() -> None:
    found = marks(distance_table(MS))
    assert found["imf"][0] == ("0.450 ± 0.050", True, True, "uniform")
    assert found["shortcut"][0] == ("0.453 ± 0.051", False, True, "uniform"), "tied"
    assert found["euler"][0] == ("2.00 ± 0.10", False, False, "uniform")
    assert {name: e[1] and AS_EXACT in e[1][3] for name, e in found.items()} == {
        "euler": True, "table": True, "imf": False, "shortcut": None, "floor": False, "exact": False
    }  # fmt: skip
    for table in (error_table(MS), rmse_table(MS)):
        assert [line.name for line in table.lines] == ["euler", "table"] and not any(line.group for line in table.lines)
    assert best_cell(MS) == ("table", 4) and first_as_exact(MS) == ("table", 4), "of the solvers"
    assert contrast(MS) == (("euler", 4), ("table", 4)), (
        "a few-step model has no distance to that solution, and is not the worst"
    )
    kid = next(table for table in further_tables(MS) if table.title == "Kernel distance")
    assert [line.name for line in kid.lines] == ["euler", "table", "imf", "shortcut", "floor", "exact"]


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (
            MS,
            "Of the solvers, table with 4 evaluations is nearest to the exact solution, at a distance of 0.200 ± 0.100; its "
            "distance to the data, 1.01 ± 0.11, is not significantly above the exact solution's 1.00 ± 0.10. Nearest to the "
            "data: with 1 and 4 evaluations the few-step model imf (guidance 2 in training), 0.450 ± 0.050 (1 other not "
            "significantly farther) and 1.00 ± 0.10 (2 others not significantly farther); with 8, where no solver was measured, "
            "the few-step model shortcut, 2.00 ± 0.10.",
        ),
        (
            [m for m in MS if m.kind == FEW_STEP and m.nfe == 1],
            "Nearest to the data: with 1 evaluation the few-step model imf (guidance 2 in training), 0.450 ± 0.050 (1 other not "
            "significantly farther).",
        ),
        (
            [cell("euler", 4, NEARER), few("imf", 4, FAR), few("imf", 1, (float("inf"),) * 3)],
            "Of the solvers, euler with 4 evaluations has the lowest distance to the data, 0.450 ± 0.050. Nearest to the data: "
            "with 4 evaluations the solver euler, 0.450 ± 0.050.",
        ),
    ],
    ids=["with an exact solution", "few-step models alone", "without an exact solution"],
)
def test_the_answer_names_what_is_nearest_to_the_data(ms: list[Measurement], text: str) -> None:
    assert answer(ms) == text


def test_names_are_text_in_every_output() -> None:
    for name in (name for name in NAMES if name.startswith(("<", "|", "*"))):
        ms = [*MS[:5], few(name, 1, NEARER, guided="<b>")]
        page = report_html(ms, CONTEXT, Pictures({(name, 1): b"x", ("table", 4): b"x"}))
        assert html(name) in page and page.count("<script") == 1 and "&lt;b&gt;" in page
        assert f"the few-step model {printable(name)} (<b>), 0.450" in terminal_text(ms)
        assert f"| {markdown(name)} (jump, {MORE}, {markdown('<b>')}) | **0.450" in markdown_tables(ms)
        assert '<tr class="group"><th scope="rowgroup" colspan="3"><span>few-step models, each' in page


def test_text_and_markdown_have_headings_of_groups() -> None:
    text, heading = terminal_text(MS), "few-step models, each on weights of its own"
    assert re.search(
        rf"^{heading}\n  imf \(jump, {MORE}, guidance 2 in training\)  +uniform 0\.450", text, re.MULTILINE
    )
    assert f"| **{heading}** |  |  |  |\n| imf (jump, {MORE}, guidance" in markdown_tables(MS)


# ---- plots ----


def dashes_of(line: Line2D) -> Any:
    """As they were given."""
    return vars(line)["_unscaled_dash_pattern"]


def styles(axes: Axes) -> dict[str, tuple[Any, str, float]]:
    """Dashes, marker and width of lines, by name."""
    lines = [line for line in axes.lines if not str(line.get_label()).startswith("_")]
    return {str(line.get_label()): (dashes_of(line), str(line.get_marker()), line.get_linewidth()) for line in lines}


def texts(legend: Legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


def test_lines_of_few_step_models_differ_from_solvers_without_colours() -> None:
    """In dashes, markers and width, under a title of the legend; the panel of ratios to the exact solution has solvers alone."""
    figure = distance_figure(MS)
    figure.draw_without_rendering()
    above, below = figure.axes
    found = styles(above)
    models, solvers = ([found[name] for name in names] for names in (("imf", "shortcut"), ("euler", "table")))
    assert all(dashes == MODEL_DASHES and width > 2 for dashes, _, width in models)
    assert not {dashes for dashes, *_ in models} & {dashes for dashes, *_ in solvers}
    assert len({marker for _, marker, _ in (*models, *solvers)}) == 4
    assert {*styles(below)} == {"euler", "table"}
    legend = above.get_legend()
    assert legend is not None and texts(legend) == ["solvers", "few-step models"]
    drawn = [line for line in legend.legend_handles if isinstance(line, Line2D)]
    assert [dashes_of(line) == MODEL_DASHES for line in drawn] == [False, True]
    bold = {text.get_text() for text in above.texts if text.get_fontweight() == "bold"}
    assert bold == {"imf", "shortcut"}
    narrow = distance_figure(MS, narrow=True)
    assert {legend.get_title().get_text(): texts(legend) for legend in narrow.legends} == {
        "": ["floor 0.500", "exact 1.00"],
        "solvers": ["euler", "table"],
        "few-step models": ["imf", "shortcut"],
    }
    narrow.draw_without_rendering()
    boxes = sorted((legend.get_window_extent() for legend in narrow.legends), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 8 for low, high in pairwise(boxes)), "none over another"
    label = narrow.axes[-1].xaxis.label.get_window_extent()
    assert boxes[-1].y1 <= label.y0 + 8, "nor over the axis"
    assert "Dash-dotted: few-step models" in drawings(MS)[0].caption
    assert "Dash-dotted" not in drawings(MS[:5])[0].caption and distance_figure(MS[:5]).axes[0].get_legend() is None
