"""The report of a sweep: results.csv, results.jsonl, report.md, three plots and one self-contained report.html."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from midway.gen.core.files import write_atomically
from midway.gen.core.locks import check_replaceable
from midway.gen.core.text import markdown, printable
from midway.gen.evaluation.comparing import check_comparable, training_costs
from midway.gen.evaluation.records import to_records
from midway.gen.report.drawing import Drawing
from midway.gen.report.html import Block
from midway.gen.report.notes import answer
from midway.gen.report.plots import PNGS, distance_png, drawings, guidance_drawing
from midway.gen.report.sections import baseline_table, choice_table, prior_table
from midway.gen.report.sweep_page import Pictures, provenance, report_html
from midway.gen.report.sweep_tables import (
    Measurements,
    all_figures,
    difference_table,
    distance_table,
    error_table,
    further_tables,
    rmse_table,
)
from midway.gen.report.table import ReportContext, Table
from midway.gen.report.text import (
    csv_text,
    jsonl_text,
    markdown_page,
    markdown_section,
    markdown_table,
    text_table,
    under_warnings,
)
from midway.gen.sweep.choice import Choice
from midway.gen.sweep.guidance import GuidanceChoice

FILES = (
    "results.csv",
    "results.jsonl",
    "report.md",
    "report.html",
    "distance_vs_nfe.png",
    "distance_vs_seconds.png",
    "exact_vs_nfe.png",
    "distance_vs_guidance.png",
)


# ---- text ----


def terminal_text(ms: Measurements, warnings: Sequence[str] = ()) -> str:
    """The tables of what ranks solvers and of the distance to the data for a terminal, then priors, baselines and the answer.

    ValueError for measurements that do not compare.
    """
    check_comparable(ms)
    tables = [error_table(ms), distance_table(ms)]
    parts = [f"{table.title}; lower is better\n\n{text_table(table)}\n" for table in tables if table.lines]
    baselines = baseline_table(ms)
    name = f"{tables[1].title}, lower is better\n"
    parts += [] if tables[1].lines else [name]
    parts += [f"{text_table(table)}\n" for table in (prior_table(ms), baselines) if table.lines]
    return under_warnings("\n".join([*parts, *filter(None, [printable(answer(ms))])]), warnings)


def headline_tables(ms: Measurements) -> list[tuple[Table, str]]:
    """With a caption each: distance to the exact solution, RMSE, and distance to the data above its limits."""
    error, data = error_table(ms), distance_table(ms)
    found = [
        (error, f"{error.title}, same seeds; lower is better"),
        (rmse_table(ms), "RMSE to the same seeds' exact solution, lower is better"),
        (data, f"{data.title} to the data; {data.note}"),
    ]
    return [(table, caption) for table, caption in found if table.lines]


def captioned(tables: Sequence[tuple[Table, str]]) -> str:
    """The tables as Markdown under their captions."""
    return "\n".join(f"{markdown(text)}\n\n{markdown_table(table)}\n" for table, text in tables if table.lines)


def markdown_tables(ms: Measurements) -> str:
    """The headline's, priors, baselines, further distances and differences. ValueError for measurements that do not compare."""
    check_comparable(ms)
    difference = difference_table(ms)
    others = [
        (prior_table(ms), f"Priors over codes, lower is better. {prior_table(ms).note}"),
        (baseline_table(ms), "Baselines, measured alike, each at its own number of evaluations"),
        *((table, f"{table.title}, lower is better. {table.note}") for table in further_tables(ms)),
        (difference, f"{difference.title}. {difference.note}"),
    ]
    return captioned([*headline_tables(ms), *others])


def report_md(
    ms: Measurements,
    context: ReportContext,
    sections: Sequence[Block] = (),
    choice: Choice | GuidanceChoice | None = None,
) -> str:
    """The answer, the tables, the plots by relative name, notes and provenance."""
    figures = all_figures(ms)
    costs = [f"{solver}: {cost:,} evaluations of training" for solver, cost in training_costs(ms).items()]
    parts = [
        *(f"{markdown(text)}\n" for text in [answer(ms)] if text),
        markdown_tables(ms),
        *(f"![{markdown(drawing.title)}]({drawing.name}.png)\n" for drawing in drawings(ms)),
        markdown_section(figures),
        *([] if choice is None or not choice.figures else [markdown_section(choice_table(choice))]),
        *(
            f"![{markdown(drawing.title)}]({drawing.name}.png)\n\n{drawing.caption}\n"
            for drawing in _of_guidance(choice)
        ),
        *(f"## {markdown(section.title)}\n\n{markdown(section.text)}\n" for section in sections),
    ]
    return markdown_page(replace(context, notes=(*context.notes, *costs)), parts, provenance(ms, context))


def _of_guidance(choice: Choice | GuidanceChoice | None) -> list[Drawing]:
    return [guidance_drawing(choice)] if isinstance(choice, GuidanceChoice) and choice.figures else []


def check_out(directory: Path) -> None:
    """UsageError if the directory has a report that is not of an earlier sweep, whose cells/ would be beside it."""
    check_replaceable(directory, FILES, (directory / "cells").is_dir() and not (directory / "results.json").exists())


def write_report(
    directory: Path,
    ms: Measurements,
    context: ReportContext,
    pictures: Pictures | None = None,
    sections: Sequence[Block] = (),
    choice: Choice | GuidanceChoice | None = None,
) -> None:
    """Write all files into `directory`. DiskError; UsageError as `check_out`; ValueError if measurements do not compare."""
    check_out(directory)
    check_comparable(ms)
    records, plots = to_records(ms), {f"{name}.png": distance_png(ms, *kind) for name, kind in PNGS.items()}
    plots |= {f"{drawing.name}.png": drawing.png() for drawing in _of_guidance(choice)}
    write_atomically(directory / "results.csv", csv_text(records).encode())
    write_atomically(directory / "results.jsonl", jsonl_text(records).encode())
    for name, png in plots.items():
        write_atomically(directory / name, png)
    write_atomically(directory / "report.md", report_md(ms, context, sections, choice).encode())
    write_atomically(directory / "report.html", report_html(ms, context, pictures, sections, choice).encode())
