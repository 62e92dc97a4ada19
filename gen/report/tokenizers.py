"""From measured tokenizers to files: results.csv, results.jsonl, report.md, three plots and one self-contained report.html.

Four tables, a row a tokenizer: reconstruction, codes and latents, noise on the latents, cost. The best of a column is bold where
one direction is better; a codebook, a rate or a rank is neither good nor bad by itself. The directory is written whole or not at
all.
"""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from midway.gen.core.errors import DiskError, UsageError
from midway.gen.core.files import replacing, write_atomically
from midway.gen.evaluation.records import Entry, ReportContext
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.evaluation.tokenizers import Measurement
from midway.gen.report.tokenizer_plots import noise_png, rate_png, usage_png
from midway.gen.report.tokenizer_tables import TERSE, Table, provenance, tables
from midway.gen.report.tokenizers_html import PLOTS, page
from midway.gen.report.write import ABSENT, aligned, escape_markdown

FILES = (
    "results.csv",
    "results.jsonl",
    "report.md",
    "report.html",
    "codebook_usage.png",
    "rate_distortion.png",
    "noise.png",
)


def text_table(rows: Sequence[TokenizerRow]) -> str:
    """Reconstruction and codes for a terminal: aligned, `*` at each column's best."""
    first, second = tables(rows)[:2]
    terse = [second.heads.index(head) for head in TERSE if head in second.heads]
    return f"{_text(first, range(len(first.heads)))}\n\n{_text(second, terse)}\n\n* best\n"


def _text(table: Table, columns: Sequence[int]) -> str:
    """Some columns of a table."""
    body = [[row.name, *(_text_entry(entries[i]) for i in columns)] for row, entries in table.rows]
    if table.floor:
        body.append(["floor", *(f"{table.floor[i]} " for i in columns)])
    header, *lines = aligned([["tokenizer", *(f"{table.heads[i]} " for i in columns)], *body])
    return "\n".join([table.title, "", header, "-" * max(map(len, [header, *lines])), *lines])


def _text_entry(entry: Entry | None) -> str:
    return f"{ABSENT} " if entry is None else f"{entry.value}{'*' if entry.best else ' '}"


def markdown_tables(rows: Sequence[TokenizerRow]) -> str:
    """All tables under their headings."""
    return "\n".join(line for table in tables(rows) for line in _markdown(table)) + "\n"


def _markdown(table: Table) -> list[str]:
    body = [[escape_markdown(row.name), *map(_markdown_entry, entries)] for row, entries in table.rows]
    if table.floor:
        body.append(["*floor*", *(f"*{text}*" if text else "" for text in table.floor)])
    rule = ["---", *("---:" for _ in table.heads)]
    lines = [f"| {' | '.join(row)} |" for row in (["tokenizer", *table.heads], rule, *body)]
    return [f"## {table.title}", "", escape_markdown(table.note), "", *lines, ""]


def _markdown_entry(entry: Entry | None) -> str:
    if entry is None:
        return ABSENT
    value = f"**{entry.value}**" if entry.best else entry.value
    return f"{value} ({escape_markdown(entry.grid)})" if entry.grid else value


def _report_md(rows: Sequence[TokenizerRow], context: ReportContext) -> str:
    plots = [f"![{words}]({name})\n" for name, (words, _) in PLOTS.items()]
    notes = ["## Notes", "", *(f"- {escape_markdown(note)}" for note in context.notes), ""] if context.notes else []
    facts = [f"- **{escape_markdown(name)}**: {escape_markdown(value)}" for name, value in provenance(rows, context)]
    return "\n".join(
        [
            f"# {escape_markdown(context.title)}",
            "",
            markdown_tables(rows),
            *plots,
            *notes,
            "## Provenance",
            "",
            *facts,
            "",
        ]
    )


# ---- files ----


def flat(row: TokenizerRow) -> dict[str, object]:
    """A row of the CSV: a column for each sigma instead of the curves; None is empty."""
    values = dataclasses.asdict(row)
    for name in ("noise", "psnr_noisy", "psnr_snapped"):
        del values[name]
    snapped = row.psnr_snapped or (None,) * len(row.noise)
    for sigma, noisy, after in zip(row.noise, row.psnr_noisy, snapped, strict=True):
        values |= {f"psnr_noisy_{sigma:g}": noisy, f"psnr_snapped_{sigma:g}": after}
    return {name: "" if value is None else value for name, value in values.items()}


def csv_text(rows: Sequence[TokenizerRow]) -> str:
    """Every figure, one line a tokenizer, floats in full precision."""
    buffer = io.StringIO()
    records = [flat(row) for row in rows]
    writer = csv.DictWriter(buffer, list(records[0]) if records else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def jsonl_text(rows: Sequence[TokenizerRow]) -> str:
    """Every figure, one JSON object a tokenizer; a number that is not finite becomes null."""
    records = [{key: _finite(value) for key, value in dataclasses.asdict(row).items()} for row in rows]
    return "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_out(directory: Path) -> None:
    """UsageError if the directory holds anything but an earlier report, which `write_tokenizer_report` replaces."""
    if directory.exists() and (not directory.is_dir() or any(p.name not in FILES for p in directory.iterdir())):
        raise UsageError(f"{directory} holds other files", "a report replaces its directory", "choose another --out")


def write_tokenizer_report(
    directory: Path, measurements: Sequence[Measurement], originals: Tensor, context: ReportContext
) -> None:
    """All seven files, replacing an earlier report; `originals` uint8 are the images shown. DiskError, UsageError."""
    check_out(directory)
    rows = [m.row for m in measurements]
    plots = {
        "rate_distortion.png": rate_png(rows),
        "codebook_usage.png": usage_png(measurements),
        "noise.png": noise_png(rows),
    }
    texts = {
        "results.csv": csv_text(rows),
        "results.jsonl": jsonl_text(rows),
        "report.md": _report_md(rows, context),
        "report.html": page(measurements, originals, context, plots),
    }
    _replace_directory(directory, plots | {name: text.encode() for name, text in texts.items()})


def _replace_directory(directory: Path, files: Mapping[str, bytes]) -> None:
    """Put these files, and no others, at `directory`: written beside it, then moved there."""
    try:
        with replacing(directory) as new:
            for name, content in files.items():
                write_atomically(new / name, content)
    except OSError as error:
        raise DiskError(f"{directory} cannot be written", str(error), "free space, or choose another --out") from error
