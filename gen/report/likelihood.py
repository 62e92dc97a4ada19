"""Bits per dimension of several models as JSON, CSV and a Markdown table."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from midway.gen.core.errors import UsageError
from midway.gen.core.files import write_atomically
from midway.gen.evaluation.likelihood import LikelihoodRow
from midway.gen.evaluation.records import ReportContext, number

FILES = ("results.json", "results.csv", "report.md")


def _optional(write: Callable[[float], str]) -> Callable[[float | None], str]:
    return lambda value: "" if value is None else write(value)


def _bits(row: LikelihoodRow) -> str:
    if row.bits is None:
        return ""
    return f"{row.bits:.4f} ± {row.error:.4f}" if row.error else f"{row.bits:.4f}"


_COLUMNS: dict[str, Callable[[LikelihoodRow], str]] = {
    "model": lambda row: row.name,
    "bits/dim": lambda row: _bits(row),
    "what it is": lambda row: row.bound,
    "IWAE": lambda row: "" if row.iwae_bits is None else f"{row.iwae_bits:.4f} (K = {row.iwae_draws})",
    "parameters": lambda row: _optional(lambda v: f"{v:,}")(row.parameters),
    "classes": lambda row: "" if row.conditional is None else "told" if row.conditional else "not told",
    "distance": lambda row: _optional(number)(row.distance),
    "NFE": lambda row: _optional(str)(row.sample_nfe) + (f" ({row.sampler})" if row.sampler else ""),
    "s / 1000 samples": lambda row: _optional(number)(row.sample_seconds),
    "s of bits": lambda row: _optional(number)(row.seconds),
}


def cells(rows: Sequence[LikelihoodRow]) -> list[list[str]]:
    """Headings and rows of the table, best bits first, those without bits last; columns without a value are left out."""
    ordered = sorted(rows, key=lambda row: math.inf if row.bits is None else row.bits)
    table = {head: [write(row) for row in ordered] for head, write in _COLUMNS.items()}
    used = {head: column for head, column in table.items() if any(column)}
    return [list(used), *(list(line) for line in zip(*used.values(), strict=True))]


def text_table(rows: Sequence[LikelihoodRow]) -> str:
    """For a terminal."""
    lines = cells(rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def markdown(rows: Sequence[LikelihoodRow], context: ReportContext) -> str:
    """The whole report."""
    heads, *body = cells(rows)
    marks = ["---", *["---:"] * (len(heads) - 1)]
    table = "\n".join(f"| {' | '.join(line)} |" for line in (heads, marks, *body))
    floors = {number(row.floor) for row in rows if row.floor is not None}
    features = ", ".join(sorted({row.features for row in rows if row.features}))
    measured = [f"Distances: {features}; held-out images score {', '.join(floors)}."] if features else []
    facts = {
        "data": context.data,
        **{row.name: f"{row.kind}@{row.model}, weights {row.weights}" for row in rows if row.model},
        "seeds": context.seeds,
        "hardware": context.hardware,
        "versions": ", ".join(f"{name} {version}" for name, version in context.versions.items()),
        "command": f"`{context.command}`",
    }
    notes = "\n".join(f"- {note}" for note in (*context.notes, *measured))
    listed = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
    return f"# {context.title}\n\n{table}\n\n{notes}\n\n## Provenance\n\n{listed}\n"


def csv_text(rows: Sequence[LikelihoodRow]) -> str:
    """One line a row, every field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([field.name for field in dataclasses.fields(LikelihoodRow)])
    writer.writerows(["" if v is None else v for v in dataclasses.astuple(row)] for row in rows)
    return buffer.getvalue()


def check_out(out: Path) -> None:
    """UsageError unless a report can be written to this directory; one that is there is replaced."""
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file", "the report needs a directory", "choose another --out")
    if (out / "config.yaml").exists():
        raise UsageError(f"{out} is a run directory", "the report would mix with it", "choose another --out")


def write_likelihood_report(out: Path, rows: Sequence[LikelihoodRow], context: ReportContext) -> None:
    """results.json, results.csv and report.md, each whole or not at all."""
    result = {"rows": [dataclasses.asdict(row) for row in rows], "context": dataclasses.asdict(context)}
    texts = (json.dumps(result, indent=2) + "\n", csv_text(rows), markdown(rows, context))
    for name, text in zip(FILES, texts, strict=True):
        write_atomically(out / name, text.encode())
