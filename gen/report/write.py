"""From cells to files: results.csv, results.jsonl, report.md, two plots and one self-contained report.html.

This module writes text tables and Markdown, and gathers the whole directory; the cells are in `report_cells`, the plots
in `plots`, the page in `report_html`. All files are written completely or not at all.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from midway.gen.core.files import write_atomically
from midway.gen.evaluation.records import (
    ABSENT,
    BASELINE_HEADS,
    FLOOR,
    Cell,
    Entry,
    Measure,
    Pivot,
    ReportContext,
    baseline_rows,
    check_comparable,
    deviation,
    difference_note,
    feature_names,
    floor_name,
    floor_of,
    measure_name,
    measure_rows,
    measured,
    number,
    paired,
    pivot,
    training_costs,
    write_csv,
    write_jsonl,
)
from midway.gen.report.html import provenance, write_html
from midway.gen.report.plots import distance_png, plot_distance
from midway.gen.report.sections import Section

__all__ = [
    "Cell",
    "ReportContext",
    "distance_png",
    "markdown_table",
    "plot_distance",
    "text_table",
    "write_csv",
    "write_html",
    "write_jsonl",
    "write_markdown",
    "write_report",
]

MORE: tuple[Measure, ...] = ("rmse", "kid")


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is, also inside a table."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in " ".join(text.split()))


def _markdown_entry(entry: Entry | None) -> str:
    if entry is None:
        return ABSENT
    value = f"**{entry.value}**" if entry.best else entry.value
    return f"{value} ({escape_markdown(entry.grid)})" if entry.grid else value


def _markdown_lines(table: Pivot, floor: str | None = None, name: str = FLOOR) -> list[str]:
    header = ["solver", *(f"NFE {nfe}" for nfe in table.nfes)]
    rows = [[escape_markdown(solver), *map(_markdown_entry, entries)] for solver, entries in table.rows]
    if floor is not None:
        rows.append([f"*{name}*", *(f"*{floor}*" for _ in table.nfes)])
    rule = ["---", *("---:" for _ in table.nfes)]
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def _floor_text(cells: Sequence[Cell], measure: Measure = "distance") -> str | None:
    floor = floor_of(cells)
    score = None if floor is None else measured(floor, measure)
    return None if floor is None or score is None else number(score, deviation(floor, measure))


def _baseline_lines(cells: Sequence[Cell]) -> list[str]:
    rows = [[escape_markdown(name), *rest] for name, *rest in baseline_rows(cells)]
    marks = ["---", *("---:" for _ in BASELINE_HEADS[1:])]
    return [f"| {' | '.join(row)} |" for row in (BASELINE_HEADS, marks, *rows)] if rows else []


def _caption(cells: Sequence[Cell], measure: Measure) -> str:
    if measure == "kid":
        return f"Kernel distance, KID ({feature_names(cells)}), lower is better; the grids of the first table"
    if measure == "rmse":
        return "RMSE to the same seeds' reference solution, lower is better; best grid of each solver and NFE"
    return f"{measure_name(cells)}, lower is better; best grid of each solver and NFE"


def markdown_table(cells: Sequence[Cell]) -> str:
    """Tables, solver x NFE: distance ± std with the floor, RMSE and KID where measured, differences; a column's best is bold.

    Baselines have a table of their own. ValueError for cells that do not compare.
    """
    check_comparable(cells)
    table = pivot(cells, "distance")
    parts = [f"{escape_markdown(_caption(cells, 'distance'))}\n"]
    parts += _markdown_lines(table, _floor_text(cells), floor_name(cells)) if table.nfes else []
    baselines = _baseline_lines(cells)
    if baselines:
        parts += ["\nBaselines, measured alike, each at its own number of evaluations\n", *baselines]
    for measure in MORE:
        table = pivot(cells, measure)
        if table.rows:
            parts += [
                f"\n{escape_markdown(_caption(cells, measure))}\n",
                *_markdown_lines(table, _floor_text(cells, measure), floor_name(cells)),
            ]
    differences = paired(cells)
    if differences.rows:
        parts += [f"\nDifference from the best. {difference_note(cells)}\n", *_markdown_lines(differences)]
    return "\n".join(parts) + "\n"


def _text_entry(entry: Entry | None) -> str:
    if entry is None:
        return ABSENT
    return f"{entry.grid} {entry.value}{'*' if entry.best else ' '}".lstrip()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as lines; the first column flush left, the others flush right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:]))]).rstrip()
        for row in rows
    ]


def text_table(cells: Sequence[Cell]) -> str:
    """The distance table for a terminal: aligned, `*` at each column's best, the floor last; baselines below.

    ValueError for cells that do not compare.
    """
    check_comparable(cells)
    table = pivot(cells, "distance")
    rows = [["solver", *(f"NFE {nfe} " for nfe in table.nfes)]]
    rows += [[solver, *map(_text_entry, entries)] for solver, entries in table.rows]
    floor = _floor_text(cells)
    if floor is not None:
        rows.append([floor_name(cells), *(f"{floor} " for _ in table.nfes)])
    header, *body = aligned(rows)
    solvers = [header, "-" * max(map(len, [header, *body])), *body, "* best"] if table.nfes else []
    lines = [_caption(cells, "distance"), "", *solvers]
    baselines = baseline_rows(cells)
    return "\n".join([*lines, *(["", *aligned([BASELINE_HEADS, *baselines])] if baselines else [])]) + "\n"


def _markdown_list(items: Sequence[str]) -> list[str]:
    return [f"- {escape_markdown(item)}" for item in items]


def write_markdown(path: Path, cells: Sequence[Cell], context: ReportContext, sections: Sequence[Section] = ()) -> None:
    """report.md: the tables, both plots (by relative name), notes and provenance. DiskError."""
    costs = [f"{solver}: {cost:,} evaluations of training" for solver, cost in training_costs(cells).items()]
    facts = [f"- **{name}**: {escape_markdown(value)}" for name, value in provenance(cells, context)]
    lines = [f"# {escape_markdown(context.title)}", "", markdown_table(cells)]
    lines += [
        "![distance against NFE](distance_vs_nfe.png)",
        "",
        "![distance against time](distance_vs_seconds.png)",
        "",
    ]
    heads, *rows = measure_rows(cells)
    lines += ["## All figures and where the time went", "", "Seconds are for 1000 images.", ""]
    lines += [f"| {' | '.join(map(escape_markdown, row))} |" for row in (heads, *rows)]
    lines.insert(len(lines) - len(rows), f"| {' | '.join(['---', *('---:' for _ in heads[1:])])} |")
    lines += [""]
    for section in sections:
        lines += [f"## {escape_markdown(section.title)}", "", escape_markdown(section.text), ""]
    if context.notes or costs:
        lines += ["## Notes", "", *_markdown_list([*context.notes, *costs]), ""]
    write_atomically(path, ("\n".join([*lines, "## Provenance", "", *facts]) + "\n").encode())


def write_report(
    directory: Path,
    cells: Sequence[Cell],
    context: ReportContext,
    grids: Mapping[tuple[str, int], bytes],
    sections: Sequence[Section] = (),
) -> None:
    """Write all six files into `directory` (made if missing); `grids` maps (solver, nfe) to a sample PNG. DiskError.

    ValueError, and no file, for cells that do not compare.
    """
    check_comparable(cells)
    write_csv(directory / "results.csv", cells)
    write_jsonl(directory / "results.jsonl", cells)
    plot_distance(directory / "distance_vs_nfe.png", cells, "nfe")
    plot_distance(directory / "distance_vs_seconds.png", cells, "seconds")
    write_markdown(directory / "report.md", cells, context, sections)
    write_html(directory / "report.html", cells, context, grids, sections)
