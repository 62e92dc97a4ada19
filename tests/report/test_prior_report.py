"""Priors over codes in reports: told apart in tables and plots, and in the answer with what goes through their network."""

import csv
import math
from typing import Any

from measurements import changed, measurement

from midway.gen.evaluation.comparing import by_solver, few_step, nearest_to_data, own_weights, priors
from midway.gen.evaluation.records import EXACT, FEW_STEP, PRIOR, Measurement, from_record, to_records
from midway.gen.report.drawing import DASHES, MODEL_DASHES, PRIOR_DASHES
from midway.gen.report.notes import answer, prior_notes
from midway.gen.report.plots import distance_figure, drawings
from midway.gen.report.sections import prior_table
from midway.gen.report.sweep_tables import all_figures, distance_table
from midway.gen.report.text import csv_text


def row(name: str, nfe: int, distances: tuple[float, ...], kind: str = "solver", **more: Any) -> Measurement:
    found = measurement(name, nfe=nfe, distance=sum(distances) / len(distances), distance_blocks=distances)
    return changed(found, kind=kind, model=name.split()[0], training_images=10, model_nfe=20, **more)


MS = [
    row(EXACT, 48, (1.0, 1.1)),
    changed(row("ddim", 4, (2.0, 2.1)), to_exact=0.5),
    row("few", 4, (1.9, 1.95), FEW_STEP, sampler="jump"),
    row("ar", 16, (0.9, 0.95), PRIOR, sampler="causal", grid="", token_evaluations=16),
    row("mask halton", 4, (1.5, 1.55), PRIOR, sampler="halton", grid="cosine", token_evaluations=68),
    row("mask halton", 16, (1.2, 1.25), PRIOR, sampler="halton", grid="cosine", token_evaluations=272),
]


def test_they_are_a_kind_of_their_own() -> None:
    assert [m.solver for m in by_solver(MS)] == ["ddim"] and [m.solver for m in few_step(MS)] == ["few"]
    assert priors(MS) == MS[3:] and own_weights(MS) == MS[2:]
    assert nearest_to_data(MS) == {4: ("mask halton", 4), 16: ("ar", 16)}
    again = [from_record(record) for record in to_records(MS)]
    assert [(m.kind, m.token_evaluations) for m in again] == [(m.kind, m.token_evaluations) for m in MS]


def test_tables_have_them_under_a_heading_and_what_goes_through_their_network() -> None:
    groups = [group for group, _ in distance_table(MS).groups]
    assert [group.partition(",")[0] for group in groups] == [
        "solvers",
        "few-step models",
        "priors over codes",
        "limits",
    ]
    table = prior_table(MS)
    assert table.heads == ("prior", "rule", "NFE", "token-evaluations", "distance", "s / 1000 images")
    values = [[entry and entry.value for entry in line.entries][:3] for line in table.lines]
    assert [line.name for line in table.lines] == ["ar", "mask", "mask"]
    assert values == [["causal", "16", "16"], ["halton, cosine", "4", "68"], ["halton, cosine", "16", "272"]]
    assert not prior_table(MS[:3]).lines and "token-evaluations" in all_figures(MS).heads
    assert "token-evaluations" not in all_figures(MS[:3]).heads


def test_head_evaluations_are_a_column_where_there_is_a_head() -> None:
    """Empty elsewhere, in files and tables; files of earlier versions have no such column, and load."""
    ms = [*MS, row("mar halton", 4, (1.4, 1.45), PRIOR, sampler="halton, head table", head_nfe=2.5)]
    records = to_records(ms)
    assert [record["head_nfe"] for record in records] == [None] * 6 + [2.5]
    text = csv_text(records).splitlines()
    assert [record["head_nfe"] for record in csv.DictReader(text)] == [""] * 6 + ["2.5"]
    assert [from_record(record).head_nfe for record in csv.DictReader(text)] == [m.head_nfe for m in ms]
    earlier = [{name: value for name, value in record.items() if name != "head_nfe"} for record in records]
    assert [from_record(record).head_nfe for record in earlier] == [0.0] * 7
    for table in (prior_table(ms), all_figures(ms)):
        column = table.heads.index("head NFE a token") - 1
        values = {line.name: entry and entry.value for line in table.lines for entry in [line.entries[column]]}
        assert {name for name, value in values.items() if value} in (
            {"mar"},
            {"mar halton"},
        ) and "2.5" in values.values()
    assert "head NFE a token" not in (*prior_table(MS).heads, *all_figures(MS).heads)


def test_the_answer_has_them() -> None:
    text = answer(MS)
    assert (
        "Of the priors, ar with 16 evaluations (16 token-evaluations) has the lowest distance to the data, 0.925"
        in text
    )
    assert (
        "with 4 evaluations the prior mask halton" in text
        and "with 16, where no solver was measured, the prior ar" in text
    )
    assert answer([MS[0]]) == "" and answer([changed(MS[3], distance=math.inf)]) == ""
    both = [*prior_notes({"ar": "a prior"}, [(["ar", "mask"], measurement("ceiling", nfe=0))])]
    assert both[1] == "Prior ar: a prior." and both[2].startswith("ar, mask: of another tokenizer than the ceiling row")
    assert not [*prior_notes({}, [])]


def test_their_lines_are_dotted_in_plots() -> None:
    figure = distance_figure(MS)
    lines = {str(line.get_label()): line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}
    dashes = {name: vars(line)["_unscaled_dash_pattern"] for name, line in lines.items()}
    assert dashes["mask halton"] == dashes["ar"] == PRIOR_DASHES and dashes["few"] == MODEL_DASHES
    assert PRIOR_DASHES not in (*DASHES, MODEL_DASHES)
    assert len({(str(line.get_marker()), str(line.get_color())) for line in lines.values()}) == len(lines)
    assert "Dotted: priors over codes" in drawings(MS)[0].caption and "Dotted" not in drawings(MS[:3])[0].caption
