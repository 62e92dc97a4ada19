"""The result in a sentence agrees with the tables; ties are shaded; KID is less its floor; names at line ends never overlap."""

import itertools
import math
import random
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from typing import Any

import pytest
from hostile_names import NAMES
from measurements import changed, measurement

from midway.gen.core.text import printable
from midway.gen.evaluation.comparing import best_cell, first_as_exact
from midway.gen.evaluation.records import EXACT, FLOOR, Estimate, Measurement, to_records
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.proving.contest import Cell
from midway.gen.proving.report import Result, figure_table
from midway.gen.proving.report import answer as prove_answer
from midway.gen.report.curves import Curve, ratios, spread
from midway.gen.report.notes import answer
from midway.gen.report.plots import drawings
from midway.gen.report.rates import answer as rates_answer
from midway.gen.report.rates import front, groups, rate_table
from midway.gen.report.sweep_tables import (
    AS_EXACT,
    all_figures,
    difference_table,
    distance_table,
    error_table,
    further_tables,
)
from midway.gen.report.table import Entry, Table
from midway.gen.report.text import text_table

Blocks = tuple[float, ...]


def cell(solver: str, nfe: int, data: Blocks, exact: Blocks | None = None) -> Measurement:
    """Of these distances of blocks to the data, and to the exact solution."""
    metrics = {"distance": Estimate.of(data)} | ({} if exact is None else {"to_exact": Estimate.of(exact)})
    return replace(measurement(solver, nfe=nfe, blocks=len(data)), metrics=metrics)


LIMIT = cell(EXACT, 48, (1.0, 1.1, 0.9))
FLOOR_ROW = cell(FLOOR, 0, (0.5,))
NEAR, FAR = (1.0, 1.12, 0.9), (2.0, 2.1, 1.9)
"""Not significantly above the exact solution, and significantly."""


def entry(table: Table, solver: str, nfe: int) -> Entry:
    """Of a table by budget."""
    line = next(line for line in table.lines if line.name == solver)
    found = line.entries[table.heads.index(f"NFE {nfe}") - 1]
    assert found is not None
    return found


# ---- the sentence of a sweep ----


@pytest.mark.parametrize(
    ("ms", "text"),
    [
        (
            [
                cell("a", 4, FAR, (0.5, 0.6, 0.7)),
                cell("a", 8, NEAR, (0.1, 0.2, 0.3)),
                cell("b", 8, FAR, (0.1, 0.5, 0.4)),
            ],
            "The solver a with 8 evaluations is nearest to the exact solution, at a distance of 0.200 ± 0.100 (1 other at this "
            "budget not significantly worse); its distance to the data, 1.01 ± 0.11, is not significantly above the exact "
            "solution's 1.00 ± 0.10.",
        ),
        (
            [cell("b", 4, NEAR, (0.5, 0.6, 0.7)), cell("a", 8, NEAR, (0.1, 0.2, 0.3))],
            "4 evaluations are enough for the solver b: its distance to the data, 1.01 ± 0.11, is not significantly above the "
            "exact solution's 1.00 ± 0.10; a with 8 evaluations is nearest to the exact solution, at a distance of 0.200 ± "
            "0.100.",
        ),
        (
            [cell("a", 1, FAR, (0.1, 0.2, 0.3))],
            "The solver a with 1 evaluation is nearest to the exact solution, at a distance of 0.200 ± 0.100; every distance to "
            "the data is significantly above the exact solution's 1.00 ± 0.10.",
        ),
    ],
    ids=["one is both", "first and nearest", "none reaches it"],
)
def test_the_answer_beside_an_exact_solution(ms: list[Measurement], text: str) -> None:
    assert answer([FLOOR_ROW, LIMIT, *ms]) == text


def test_the_answer_without_an_exact_solution() -> None:
    ms = [FLOOR_ROW, cell("a", 4, (1.5, 2.5)), cell("b", 4, (1.0, 1.2)), cell("c", 4, (math.inf, math.inf))]
    assert answer(ms) == (
        "The solver b with 4 evaluations has the lowest distance to the data, 1.10 ± 0.14 (1 other at this budget not "
        "significantly worse)."
    ), "at two blocks hardly anything is significant, which the table of differences has, too"
    assert answer([FLOOR_ROW]) == "" and answer([cell("c", 4, (math.inf, math.inf))]) == ""
    assert answer([LIMIT, cell("a", 4, (2.0, 2.1), (0.1, 0.3))]).endswith("at a distance of 0.200 ± 0.141."), (
        "two blocks: no claim"
    )


@pytest.mark.parametrize("seed", range(25))
def test_the_answer_contradicts_no_table(seed: int) -> None:
    """Random sweeps: the cells that it names have its figures and marks in the tables, and none before or below them has."""
    draw = random.Random(seed)
    budgets, solvers = (2, 4, 8)[: draw.randint(1, 3)], "abc"[: draw.randint(1, 3)]

    def blocks(mean: float) -> Blocks:
        return tuple(abs(draw.gauss(mean, 0.1)) for _ in range(4))

    ms = [FLOOR_ROW, cell(EXACT, 48, blocks(1.0))]
    ms += [cell(s, k, blocks(1 + draw.random() / k), blocks(draw.random() / k)) for s in solvers for k in budgets]
    text, best, first = answer(ms), best_cell(ms), first_as_exact(ms)
    error, data = error_table(ms), distance_table(ms)
    assert best is not None
    assert entry(error, *best).best and entry(error, *best).value in text
    means = {key: m.metrics["to_exact"].mean for key, m in {(m.solver, m.nfe): m for m in ms[2:]}.items()}
    assert means[best] == min(means.values())
    marked = [(s, k) for k in budgets for s in solvers if AS_EXACT in entry(data, s, k).small]
    assert (first is None) == (not marked) == ("is not significantly above" not in text)
    if first is not None:
        assert first in marked and first[1] == min(k for _, k in marked) and entry(data, *first).value in text
        assert means[first] == min(means[key] for key in marked if key[1] == first[1])
    tied = sum(entry(error, s, best[1]).tied for s in solvers) - 1
    assert (f"({tied} other" in text) == (tied > 0)


# ---- ties ----


def test_what_is_tied_with_the_best_is_shaded_in_every_table_that_ranks() -> None:
    ms = [
        cell("best", 4, NEAR, (0.10, 0.20, 0.30)),
        cell("close", 4, NEAR, (0.11, 0.19, 0.31)),
        cell("worse", 4, NEAR, (0.20, 0.30, 0.40)),
    ]
    for table in (error_table(ms), difference_table(ms)):
        marks = {line.name: (e.best, e.tied) for line in table.lines for e in line.entries if e is not None}
        assert marks == {"best": (True, True), "close": (False, True), "worse": (False, False)}
        assert table.has_ties
    assert not any(e.tied for line in distance_table(ms).lines for e in line.entries if e is not None), "ranks nothing"
    text = text_table(error_table(ms))
    assert (
        re.findall(r"\d([*≈ ])$", text, re.MULTILINE) == ["*", "≈"]
        and "* best" in text
        and "≈ not significantly worse" in text
    )


# ---- KID ----


def test_kid_is_less_its_floor_in_tables_and_as_measured_in_files() -> None:
    kid = {"kid": 0.05, "kid_std": 0.01, "pixels_kid": 0.02, "further": "pixels"}
    ms = [changed(FLOOR_ROW, kid=-0.01, pixels_kid=0.005, further="pixels"), changed(cell("a", 4, NEAR), **kid)]
    tables = {table.title: table for table in further_tables(ms)}
    assert [e and e.value for e in (tables["Kernel distance"].lines[i].entries[0] for i in (0, 1))] == [
        "0.0600 ± 0.0100", "0.00"
    ]  # fmt: skip
    figures = all_figures(ms)
    shown = {head: e and e.value for head, e in zip(figures.heads[1:], figures.lines[0].entries, strict=True)}
    assert (shown["KID"], shown["pixels kid"]) == ("0.0600", "0.0150") and "less that of the floor" in figures.note
    assert [record["kid"] for record in to_records(ms)] == [-0.01, 0.05]
    alone = further_tables([changed(cell("a", 4, NEAR), kid=0.05)])[0]
    assert alone.lines[0].entries[0] == Entry("0.0500", "uniform") and "floor" not in alone.note


# ---- plots ----


@pytest.mark.parametrize("seed", range(20))
def test_names_at_line_ends_keep_their_order_and_distance(seed: int) -> None:
    draw = random.Random(seed)
    wanted = [draw.choice([10.0, 50.0, draw.uniform(0, 100)]) for _ in range(draw.randint(1, 12))]
    places = spread(wanted, 7.0, 0.0, 100.0)
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    gaps = [places[b] - places[a] for a, b in itertools.pairwise(order)]
    assert all(gap >= 7 - 1e-9 for gap in gaps) and min(places) >= -1e-9 and max(places) <= 100 + 1e-9
    if all(wanted[b] - wanted[a] >= 7 for a, b in itertools.pairwise(order)):
        assert places == pytest.approx(wanted), "what is apart stays where it is"


def test_places_are_the_nearest_that_do_not_overlap() -> None:
    assert spread([5.0, 5.0, 50.0], 4.0, 0.0, 60.0) == [3.0, 7.0, 50.0]
    assert spread([0.0, 0.0, 0.0], 10.0, 0.0, 10.0) == [0.0, 5.0, 10.0], "no room: closer together"
    assert spread([], 1.0, 0.0, 1.0) == []


def test_ratios_are_to_the_least_of_a_cost_that_several_share() -> None:
    a, b = Curve("a", 0, ((4, 2.0, 0.1), (8, 1.0, 0.1))), Curve("b", 1, ((4, 1.0, 0.1),))
    star = Curve("s", 0, ((4, 0.1, 0.0),), star=True)
    assert [curve.points for curve in ratios([a, b, star])] == [((4, 2.0, 0.0),), ((4, 1.0, 0.0),)]
    assert ratios([a]) == ()


@pytest.mark.parametrize("narrow", [False, True])
def test_names_are_text_in_svg(narrow: bool) -> None:
    """Of solvers and features: each in one <text>, as it is, and nothing but drawing elements beside them."""
    ms = [
        changed(cell(name, nfe, NEAR), features=NAMES[0]) for name in NAMES if printable(name).strip() for nfe in (4, 8)
    ]
    (svg, *_) = (drawing.svg(narrow) for drawing in drawings(ms))
    root = ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
    assert {element.tag for element in root.iter()} <= {
        *("svg", "title", "desc", "g", "path", "text", "use", "defs", "clipPath", "rect")
    }
    words = {"".join(element.itertext()).strip() for element in root.iter("text")}
    cut = {shown if len(shown) <= 60 else f"{shown[:59]}…" for shown in (printable(m.solver).strip() for m in ms)}
    assert {name.replace("  ", " ") for name in cut} <= {word.replace("  ", " ") for word in words}
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and set(re.findall(r"#([\w-]+)", svg)) <= set(ids)
    assert not re.search(r"#[0-9a-fA-F]{6}\b", svg.replace("&#x27;", "")), "every colour is the page's"
    assert root.get("role") == "img" and root.find("title") is not None and root.find("desc") is not None


# ---- tokenizers ----


def row(name: str, bits: float | None, psnr: float, **more: Any) -> TokenizerRow:
    fields = dict.fromkeys(TokenizerRow.__dataclass_fields__, None) | {"name": name, "bits": bits, "psnr": psnr}
    return TokenizerRow(**(fields | more))  # pyright: ignore[reportArgumentType]


ROWS = [
    row("fsq", 99.7, 26.0),
    row("vq", 100.0, 25.0),
    row("large", 201.0, 29.0),
    row("larger", 204.0, 28.0),
    row("kl", None, 31.0, rate=150.0, psnr_sampled=25.5),
    row("identity", None, 99.0),
]


def test_tokenizers_are_ranked_among_those_of_equal_rate() -> None:
    assert [[one[0].name for one in group] for group in groups(ROWS)] == [["fsq", "vq"], ["kl"], ["large", "larger"]]
    assert [one[0].name for one in front(ROWS)] == ["fsq", "large"], (
        "more bits and fewer decibels than fsq: not on the front"
    )
    found = {line.name: [e and (e.value, e.best) for e in line.entries[1:]] for line in rate_table(ROWS).lines}
    assert found == {
        "fsq": [("26.00", True), ("1 of 2", False), ("yes", False)],
        "vq": [("25.00", False), ("2 of 2", False), ("no", False)],
        "kl": [("25.50", False), ("alone", False), ("no", False)],
        "large": [("29.00", True), ("1 of 2", False), ("yes", False)],
        "larger": [("28.00", False), ("2 of 2", False), ("no", False)],
    }


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        (
            ROWS,
            "At equal rate, 201 bits per image, large reconstructs best of 2: 29.00 dB, 1.00 dB above larger; on the Pareto "
            "front of bits and PSNR: fsq (99.7 bits, 26.00 dB), large (201 bits, 29.00 dB).",
        ),
        (ROWS[:2], "At equal rate, 99.7 bits per image, fsq reconstructs best of 2: 26.00 dB, 1.00 dB above vq."),
        (
            ROWS[1:3],
            "No two of these tokenizers have the same rate; on the Pareto front of bits and PSNR: vq (100 bits, 25.00 dB), large "
            "(201 bits, 29.00 dB).",
        ),
        (ROWS[:1], "fsq reconstructs held-out images at 26.00 dB with 99.7 bits per image."),
        (ROWS[5:], "identity reconstructs held-out images at 99.00 dB."),
    ],
)
def test_the_answer_of_tokenizers(rows: list[TokenizerRow], text: str) -> None:
    assert rates_answer(rows) == text


# ---- the proving ground ----


def test_the_answer_of_the_proving_ground_and_its_ties() -> None:
    def at(solver: str, nfe: int, rmse: Blocks) -> Cell:
        return Cell(solver, nfe, "karras", False, 0, {"rmse": rmse})

    cells = (
        at("heun", 4, (3.0, 3.1, 2.9)),
        at("ddim", 4, (1.0, 1.1, 0.9)),
        at("heun", 8, (0.50, 0.60, 0.40)),
        at("ddim", 8, (0.51, 0.60, 0.41)),
    )
    result = Result(cells, "toy", 8, "0-23", 0.01)
    table = figure_table(result, "rmse")
    assert [[(e.best, e.tied) for e in line.entries if e] for line in table.lines] == [
        [(False, False), (True, True)],
        [(True, True), (False, True)],
    ]
    assert prove_answer(result) == (
        "Least RMSE to the exact solution: ddim at 4 evaluations (1.00 ± 0.06), heun at 8 evaluations (0.500 ± 0.058; 1 other "
        "not significantly worse)."
    )
