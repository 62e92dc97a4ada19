"""Bits per dimension of several models as JSON, CSV and a Markdown table."""

import dataclasses
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from midway.gen.core.errors import UsageError
from midway.gen.core.files import read_json, write_atomically
from midway.gen.core.locks import check_replaceable
from midway.gen.core.text import markdown
from midway.gen.evaluation.likelihood import LikelihoodRow
from midway.gen.report.table import Column, ReportContext, Table, columns_table, number
from midway.gen.report.text import csv_text, markdown_table, markdown_warnings

FILES = ("results.json", "results.csv", "report.md")


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


def likelihood_table(rows: Sequence[LikelihoodRow]) -> Table:
    """Best bits first, those without bits last."""
    ordered = sorted(rows, key=lambda row: math.inf if row.bits is None else row.bits)
    return columns_table("", "", "model", [row.name for row in ordered], ordered, _COLUMNS)


def report_md(rows: Sequence[LikelihoodRow], context: ReportContext) -> str:
    """The whole report."""
    floors = {number(row.floor) for row in rows if row.floor is not None}
    features = ", ".join(sorted({row.features for row in rows if row.features}))
    measured = [f"Distances: {features}; held-out images score {', '.join(floors)}."] if features else []
    facts = {
        "data": context.data,
        **{row.name: f"{row.kind}@{row.model}, weights {row.weights}" for row in rows if row.model},
        "seeds": context.seeds,
        "hardware": context.hardware,
        "versions": context.version_text,
        "command": context.command,
    }
    notes = "\n".join(f"- {markdown(note)}" for note in (*context.notes, *measured))
    listed = "\n".join(f"- {markdown(name)}: {markdown(fact)}" for name, fact in facts.items())
    warned = markdown_warnings(context.warnings)
    table = markdown_table(likelihood_table(rows))
    return f"# {markdown(context.title)}\n\n{warned}{table}\n\n{notes}\n\n## Provenance\n\n{listed}\n"


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


def write_likelihood_report(out: Path, rows: Sequence[LikelihoodRow], context: ReportContext) -> None:
    """results.json, results.csv and report.md, each whole or not at all. DiskError; UsageError as `check_out`."""
    check_out(out)
    records = [dataclasses.asdict(row) for row in rows]
    result = {"rows": records, "context": dataclasses.asdict(context)}
    texts = (json.dumps(result, indent=2) + "\n", csv_text(records), report_md(rows, context))
    for name, text in zip(FILES, texts, strict=True):
        write_atomically(out / name, text.encode())
