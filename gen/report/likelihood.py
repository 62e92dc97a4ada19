"""Bits per dimension of several models: results.json, results.csv, report.md and one self-contained report.html."""

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from midway.gen.core.errors import UsageError
from midway.gen.core.files import read_json, write_atomically
from midway.gen.core.locks import check_replaceable
from midway.gen.core.text import markdown, plot_label, printable
from midway.gen.evaluation.likelihood import LikelihoodRow
from midway.gen.report.drawing import NARROW, QUIET, WIDE, Drawing, colour, dress, new_figure, place
from midway.gen.report.html import Page, facts_block, html_page, notes_block, table_block
from midway.gen.report.table import Column, ReportContext, Table, columns_table, number
from midway.gen.report.text import csv_text, markdown_page, markdown_table, text_table, under_warnings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("results.json", "results.csv", "report.md", "report.html")
Rows = Sequence[LikelihoodRow]


def _bits(row: LikelihoodRow) -> str | None:
    if row.bits is None:
        return None
    return f"{row.bits:.4f} ± {row.error:.4f}" if row.error else f"{row.bits:.4f}"


_COLUMNS: tuple[Column[LikelihoodRow], ...] = (
    Column("bits/dim", _bits, str),
    Column("estimator", lambda row: row.bound or None, str),
    Column("IWAE", lambda row: row.iwae_bits and f"{row.iwae_bits:.4f} (K = {row.iwae_draws})", str),
    Column("parameters", lambda row: row.parameters, lambda v: f"{v:,}"),
    Column("classes", lambda row: row.conditional, lambda v: "given" if v else "not given"),
    Column("distance", lambda row: row.distance),
    Column("NFE", lambda row: row.sample_nfe and f"{row.sample_nfe} {row.sampler and f'({row.sampler})'}".strip(), str),
    Column("s / 1000 samples", lambda row: row.sample_seconds),
    Column("s of bits", lambda row: row.seconds),
)


def likelihood_table(rows: Rows) -> Table:
    """Best bits first, those without bits last."""
    ordered = _ordered(rows)
    return columns_table("", "", "model", [row.name for row in ordered], ordered, _COLUMNS)


def _ordered(rows: Rows) -> list[LikelihoodRow]:
    return sorted(rows, key=lambda row: math.inf if row.bits is None else row.bits)


def _code_bits(row: LikelihoodRow) -> str:
    return f"{row.code_bits or 0.0:.2f} ± {row.code_error or 0.0:.2f}"


_CODE_COLUMNS: tuple[Column[LikelihoodRow], ...] = (
    Column("bits per image", _code_bits, str),
    Column("estimator", lambda row: row.code_bound, str),
    Column("fixed length", lambda row: row.code_fixed, lambda v: f"{v:.2f}"),
    Column("independent positions", lambda row: row.code_independent, lambda v: f"{v:.2f}"),
    Column("tokens", lambda row: row.code_tokens, str),
    Column("classes", lambda row: row.conditional, lambda v: "given" if v else "not given"),
    Column("tokenizer", lambda row: row.tokenizer, str),
    Column("s of bits", lambda row: row.seconds),
)


def code_table(rows: Rows) -> Table:
    """Bits of the codes under priors, those of one tokenizer together, the fewest first; no lines without priors."""
    found = sorted((row for row in rows if row.code_bits is not None), key=lambda row: (row.tokenizer, row.code_bits))
    note = (
        "Bits per image of the codes, lower is better: not of pixels, and so in no column with bits per dimension. They compare "
        "between priors of one tokenizer. Fixed length: what the codes take without a prior. Independent positions: by the "
        "frequencies of every digit of every position in the training codes."
    )
    return columns_table("Bits of the codes", note, "prior", [row.name for row in found], found, _CODE_COLUMNS)


def code_answer(rows: Rows) -> str:
    """Of every tokenizer the prior of fewest bits, in a sentence."""
    found = list[str]()
    for row in sorted((r for r in rows if r.code_bits is not None), key=lambda row: (row.tokenizer, row.code_bits)):
        if row.tokenizer not in {r.tokenizer for r in rows if r.name in found}:
            found.append(row.name)
    by_name = {row.name: row for row in rows}
    parts = [
        f"{name} needs the fewest bits per image for the codes of tokenizer {by_name[name].tokenizer}, "
        f"{_code_bits(by_name[name])} ({by_name[name].code_bound}) of {by_name[name].code_fixed or 0.0:.2f} at a fixed length"
        for name in found
    ]
    return f"Of the priors, {'; '.join(parts)}." if parts else ""


def answer(rows: Rows) -> str:
    """The model of fewest bits, the next, and the nearest samples, as the table has them."""
    models = [row for row in _ordered(rows) if row.model]
    scored = [row for row in models if row.bits is not None]
    parts = []
    if scored:
        best, *others = scored
        conditional = ", given classes," if best.conditional else ""
        follows = f", before {others[0].name} ({_bits(others[0])})" if others else ""
        parts.append(f"{best.name}{conditional} needs the fewest bits per dimension, {_bits(best)}{follows}")
    near = min((row for row in models if row.distance is not None), key=lambda row: row.distance or 0.0, default=None)
    if near is not None and near.distance is not None:
        parts.append(f"the samples of {near.name} are nearest to the data (distance {number(near.distance)})")
    first = f"{'; '.join(parts)}." if parts else ""
    return " ".join(filter(None, (first, code_answer(rows))))


def drawing(rows: Rows) -> Drawing:
    """Bits per dimension of everything that has some, the fewest at the top."""
    caption = (
        "Further left is better. Bars: standard error over held-out images. Grey: what needs no network. Bounds of different "
        "kinds do not quite compare; the table names each estimator."
    )
    return Drawing("bits", "Bits per dimension of held-out images", caption, lambda narrow: bits_figure(rows, narrow))


def bits_figure(rows: Rows, narrow: bool = False) -> "Figure":
    """A point with its error a row, the fewest bits at the top."""
    shown = [row for row in _ordered(rows) if row.bits is not None]
    names = [plot_label(row.name, 22 if narrow else 60) for row in shown]
    figure = new_figure(NARROW if narrow else WIDE, 34 * max(len(shown), 1) + 82)
    axes = place(figure, 18 + 6.9 * max(map(len, names), default=0), 24, 18, 54)
    dress(axes, "bits per dimension", "")
    for place_, row in enumerate(shown):
        tone = colour(0) if row.model else QUIET
        axes.errorbar(
            [row.bits or 0.0], [place_], xerr=[row.error or 0.0], fmt="o", color=tone, markersize=8, elinewidth=2
        )
    axes.set_yticks(range(len(shown)), names)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.margins(x=0.08)
    return figure


def terminal_text(rows: Rows, warnings: Sequence[str] = ()) -> str:
    """The table and the answer, below the warnings."""
    codes = code_table(rows)
    more = [f"{codes.title}, which are no bits of pixels", "", text_table(codes), ""] if codes.lines else []
    return under_warnings("\n".join([text_table(likelihood_table(rows)), "", *more, printable(answer(rows))]), warnings)


def provenance(rows: Rows, context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of what is needed to repeat the measurement."""
    models = [(row.name, f"{row.kind}@{row.model}, weights {row.weights}") for row in rows if row.model]
    return [
        ("data", context.data),
        *models,
        ("seeds", context.seeds),
        ("hardware", context.hardware),
        ("versions", context.version_text),
        ("command", context.command),
    ]


def _noted(rows: Rows, context: ReportContext) -> ReportContext:
    """With a note on what distances are of."""
    floors = {number(row.floor) for row in rows if row.floor is not None}
    features = ", ".join(sorted({row.features for row in rows if row.features}))
    measured = [f"Distances: {features}; held-out images score {', '.join(floors)}."] if features else []
    return dataclasses.replace(context, notes=(*context.notes, *measured))


def report_md(rows: Rows, context: ReportContext) -> str:
    """The answer, the table, notes and provenance."""
    parts, codes = [f"{markdown(answer(rows))}\n", f"{markdown_table(likelihood_table(rows))}\n"], code_table(rows)
    if codes.lines:
        parts.append(f"## {codes.title}\n\n{markdown(codes.note)}\n\n{markdown_table(codes)}\n")
    return markdown_page(_noted(rows, context), parts, provenance(rows, context))


def report_html(rows: Rows, context: ReportContext) -> str:
    """One self-contained page."""
    table = dataclasses.replace(likelihood_table(rows), title="All figures")
    notes = notes_block(_noted(rows, context).notes)
    codes = code_table(rows)
    blocks = [
        table_block(table),
        *([table_block(codes)] if codes.lines else []),
        notes,
        facts_block(provenance(rows, context)),
    ]
    return html_page(Page(context, answer(rows), (), drawing(rows), blocks))


def check_out(out: Path) -> None:
    """UsageError unless a report can be written to this directory; one that is there is replaced."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "the report needs a directory", "choose another --out")
    if (out / "config.yaml").exists():
        raise UsageError(f"{out} is a run directory", "the report would mix with it", "choose another --out")
    if (out / "cells").exists():
        raise UsageError(f"{out} is of a sweep", "the report would replace files of its report", "choose another --out")
    check_replaceable(out, FILES, _is_report(out / FILES[0]))


def _is_report(path: Path) -> bool:
    """Whether this is the first file of a report, which is written before the others."""
    with suppress(OSError, ValueError):
        found = read_json(path)
        return isinstance(found, dict) and {"rows", "context"} <= found.keys()
    return False


def write_likelihood_report(out: Path, rows: Rows, context: ReportContext) -> None:
    """All four files, each whole or not at all. DiskError; UsageError as `check_out`."""
    check_out(out)
    records = [dataclasses.asdict(row) for row in rows]
    result = json.dumps({"rows": records, "context": dataclasses.asdict(context)}, indent=2) + "\n"
    texts = (result, csv_text(records), report_md(rows, context), report_html(rows, context))
    for name, text in zip(FILES, texts, strict=True):
        write_atomically(out / name, text.encode())
