"""Tables as terminal text and Markdown, and records as CSV and JSON lines."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from midway.gen.core.text import csv_field, json_text, markdown, printable
from midway.gen.report.table import ABSENT, Entry, Line, ReportContext, Table

# ---- terminal ----


def text_table(table: Table) -> str:
    """Aligned, names flush left and figures flush right, small print before a figure, a mark after it.

    `*`: the best of a column, `≈`: tied with it.
    """
    marked = table.has_best
    rows = [[_title(line), *(_plain(entry, marked, line.floor) for entry in line.entries)] for line in table.lines]
    first, *others = map(printable, table.heads)
    heads = [first, *(f"{head} " if marked else head for head in others)]
    header, *lines = _aligned([heads, *rows])
    left = iter(lines)
    body = [
        line
        for group, under in table.groups
        for line in ([printable(group)] * bool(group) + [next(left) for _ in under])
    ]
    key = ", ".join(["* best"] * marked + ["≈ not significantly worse"] * table.has_ties)
    return "\n".join([header, "-" * max(map(len, [header, *body])), *body, *filter(None, [key])])


def _title(line: Line) -> str:
    """The name, below a heading with its small print, and set in."""
    small = f" ({line.small})" if line.group and line.small else ""
    return printable(f"{'  ' * bool(line.group)}{line.name}{small}")


def _plain(entry: Entry | None, marked: bool, floor: bool) -> str:
    if entry is None:
        return "" if floor else ABSENT
    mark = "*" if entry.best else "≈" if entry.tied else " "
    return f"{printable(entry.small)} {entry.value}{mark if marked else ''}".removeprefix(" ")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def under_warnings(text: str, warnings: Sequence[str]) -> str:
    """The text below a line for each of `ReportContext.warnings`."""
    return "\n".join([*(f"warning: {printable(warning)}" for warning in warnings), *([""] if warnings else []), text])


# ---- Markdown ----


def markdown_table(table: Table) -> str:
    """The best of each column in bold, the floor in italics, small print in brackets, headings as lines of their own."""
    heads = [markdown(head) for head in table.heads]
    rule, rows = ["---", *("---:" for _ in heads[1:])], list[list[str]]()
    for group, lines in table.groups:
        rows += [[f"**{markdown(group)}**", *("" for _ in heads[1:])]] if group else []
        rows += [[_name(line), *(_markdown(entry, line.floor) for entry in line.entries)] for line in lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))


def _name(line: Line) -> str:
    small = f" ({markdown(line.small)})" if line.group and line.small else ""
    return (f"*{line.name}*" if line.floor else markdown(line.name)) + small


def _markdown(entry: Entry | None, floor: bool) -> str:
    if entry is None:
        return "" if floor else ABSENT
    mark = "**" if entry.best else "*" if floor else ""
    small = f" ({markdown(entry.small)})" if entry.small else ""
    return f"{mark}{entry.value}{mark}{small}"


def markdown_section(table: Table) -> str:
    """The table under its title and note."""
    return f"## {markdown(table.title)}\n\n{markdown(table.note)}\n\n{markdown_table(table)}\n"


def markdown_page(context: ReportContext, parts: Sequence[str], facts: Sequence[tuple[str, str]]) -> str:
    """A whole report: its title, warnings, `parts` (Markdown, each ending a line), notes if there are any, and provenance."""
    notes = ["## Notes", "", *(f"- {markdown(note)}" for note in context.notes), ""] if context.notes else []
    listed = [f"- **{markdown(name)}**: {markdown(value)}" for name, value in facts]
    head = f"# {markdown(context.title)}\n\n{markdown_warnings(context.warnings)}".rstrip("\n")
    return "\n".join([head, "", *parts, *notes, "## Provenance", "", *listed]) + "\n"


def markdown_warnings(warnings: Sequence[str]) -> str:
    """A quoted line for each of `ReportContext.warnings`; nothing without any."""
    return "\n".join(f"> **{markdown(warning)}**\n" for warning in warnings) + ("\n" if warnings else "")


# ---- files for programs ----


def csv_text(records: Sequence[Mapping[str, Any]]) -> str:
    """One line per record, floats in full precision; None is empty, booleans are true or false, tuples have spaces."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(records[0] if records else [])
    writer.writerows([_csv_value(value) for value in record.values()] for record in records)
    return buffer.getvalue()


def _csv_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(_csv_value(one) for one in value)
    return csv_field(value) if isinstance(value, str) else "" if value is None else str(value)


def jsonl_text(records: Sequence[Mapping[str, Any]]) -> str:
    """One JSON object per line; a number that is not finite becomes null, as JSON requires."""
    clean = ({key: _json_value(value) for key, value in record.items()} for record in records)
    return "".join(json_text(record, allow_nan=False) + "\n" for record in clean)


def _json_value(value: object) -> object:
    if isinstance(value, tuple):
        return [_json_value(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
