"""The report of midway check-metric: results.csv, results.jsonl, report.md, and report.html with a table per space."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from midway.gen.core.errors import DiskError, UsageError, remedy
from midway.gen.core.files import replacing, write_atomically
from midway.gen.core.locks import check_no_link
from midway.gen.data.pictures import grid_png
from midway.gen.evaluation.metric_check import DamageRow, SpaceCheck
from midway.gen.evaluation.records import FLOOR
from midway.gen.report.html import Block, Page, Picture, facts_block, html_page, notes_block, table_block
from midway.gen.report.table import Column, Entry, ReportContext, Table, columns_table, number, with_floor
from midway.gen.report.text import csv_text, jsonl_text, markdown_page, markdown_section, text_table

FILES = ("results.csv", "results.jsonl", "report.md", "report.html")
NOTE = (
    "Held-out images, damaged; n of them. Distances: times the floor, the distance of as many undamaged held-out images. KID: "
    "difference from the floor in standard errors of the floor."
)


def _times(ratio: float) -> str:
    return f"{number(ratio)} x"


def _errors(difference: float) -> str:
    return f"{difference:+.1f} s.e."


COLUMNS: tuple[Column[DamageRow], ...] = (
    Column("n", lambda row: row.n, str),
    Column("Fréchet distance", lambda row: row.distance_ratio, _times, small=lambda r: not r.answers and "too little"),
    Column("required", lambda row: row.required, lambda least: f"{least:g} x"),
    Column("KID", lambda row: row.kid_errors, _errors),
    Column("sliced", lambda row: row.sliced_ratio, _times),
)


def share_text(check: SpaceCheck) -> str:
    """How much of the variance of the reference lies between classes."""
    return "" if check.between is None else f"Between classes: {check.between:.0%} of the training images' variance."


def space_table(check: SpaceCheck) -> Table:
    """A line per damage, and the floor in the metrics' own units."""
    names, note = [row.damage for row in check.rows], f"{NOTE} {share_text(check)}".strip()
    table = columns_table(check.features, note, "damage", names, check.rows, COLUMNS)
    floor = {
        "n": str(check.floor.n),
        "Fréchet distance": number(check.floor.distance),
        "KID": f"{number(check.floor.kid)} ± {number(check.kid_error)}",
        "sliced": number(check.floor.sliced),
    }
    return with_floor(table, FLOOR, (Entry(floor[head]) if head in floor else None for head in table.heads[1:]))


def verdict(check: SpaceCheck) -> str:
    """Which damages the Fréchet distance of a space does not answer to."""
    few = ", ".join(f"{row.damage} {_times(row.distance_ratio)} (required {row.required:g} x)" for row in check.failed)
    return f"{check.features}: " + (f"does not answer to {few}" if few else "answers to every damage as required")


def terminal_text(checks: Sequence[SpaceCheck]) -> str:
    """All tables, warnings and verdicts."""
    tables = [f"{check.features}\n{share_text(check)}\n\n{text_table(space_table(check))}" for check in checks]
    return "\n\n".join([*tables, "\n".join(lines(checks))]) + "\n"


def lines(checks: Sequence[SpaceCheck]) -> list[str]:
    """A verdict per space, and the warnings of their references."""
    return [text for check in checks for text in (verdict(check), *check.warnings)]


def report_md(checks: Sequence[SpaceCheck], context: ReportContext) -> str:
    """Tables, notes and provenance."""
    return markdown_page(context, [markdown_section(space_table(check)) for check in checks], provenance(context))


def report_html(checks: Sequence[SpaceCheck], pictures: dict[str, Tensor], context: ReportContext) -> str:
    """One page: verdict of the first space, tables, and the same images under every damage."""
    strips = tuple(
        Picture(grid_png(images, columns=len(images)), name, name, columns=len(images))
        for name, images in pictures.items()
    )
    blocks = [
        *(table_block(space_table(check)) for check in checks),
        Block("The same images, damaged", strips=strips),
        *([notes_block(context.notes)] if context.notes else []),
        facts_block(provenance(context)),
    ]
    return html_page(Page(context, f"{verdict(checks[0])}.", blocks=blocks))


def provenance(context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of what is needed to repeat the check."""
    return [
        ("data", context.data),
        ("hardware", context.hardware),
        ("versions", context.version_text),
        ("command", context.command),
    ]


def records(checks: Sequence[SpaceCheck]) -> list[dict[str, object]]:
    """A record per space and damage, the floor first."""
    return [
        {**dataclasses.asdict(row), "answers": row.answers, "kid_error": check.kid_error, "between": check.between}
        for check in checks
        for row in (check.floor, *check.rows)
    ]


def check_out(directory: Path) -> None:
    """UsageError if the directory holds anything but an earlier report, which is replaced, or is a link."""
    check_no_link(directory)
    if directory.exists() and not (directory.is_dir() and {path.name for path in directory.iterdir()} <= {*FILES}):
        raise UsageError(f"{directory} holds other files", "a report replaces its directory", "choose another --out")


def write_report(
    directory: Path, checks: Sequence[SpaceCheck], pictures: dict[str, Tensor], context: ReportContext
) -> None:
    """All four files, replacing an earlier report; `pictures` uint8 are shown by name. DiskError, UsageError."""
    check_out(directory)
    texts = (
        csv_text(records(checks)),
        jsonl_text(records(checks)),
        report_md(checks, context),
        report_html(checks, pictures, context),
    )
    try:
        with replacing(directory) as new:
            for name, text in zip(FILES, texts, strict=True):
                write_atomically(new / name, text.encode())
    except OSError as error:
        raise DiskError(f"{directory} cannot be written", str(error), remedy(error, "choose another --out")) from error
