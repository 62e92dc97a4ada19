"""The report of a sweep: results.csv, results.jsonl, report.md, two plots and one self-contained report.html."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from midway.gen.core.files import write_atomically
from midway.gen.core.locks import check_replaceable
from midway.gen.core.text import html, markdown
from midway.gen.evaluation.records import (
    baselines_of,
    check_comparable,
    differences,
    distance_name,
    feature_names,
    floor_name,
    floor_of,
    shown,
    to_records,
    training_costs,
)
from midway.gen.report.explorer import explorer
from midway.gen.report.html import (
    SCRIPT,
    facts_list,
    figure,
    html_table,
    image_tag,
    notes_list,
    page,
    titled_table,
)
from midway.gen.report.plots import Cost, distance_png
from midway.gen.report.sections import Section, section_html
from midway.gen.report.sweep_tables import (
    Measurements,
    all_figures,
    baseline_table,
    difference_table,
    distance_table,
    kid_table,
    rmse_table,
)
from midway.gen.report.table import ReportContext, joined, number
from midway.gen.report.text import (
    csv_text,
    jsonl_text,
    markdown_page,
    markdown_table,
    text_table,
)

Grids = Mapping[tuple[str, int], bytes]
"""PNG of samples by (solver, NFE)."""
FILES = (
    "results.csv",
    "results.jsonl",
    "report.md",
    "report.html",
    "distance_vs_nfe.png",
    "distance_vs_seconds.png",
)

# ---- text ----


def terminal_text(ms: Measurements) -> str:
    """The distance table for a terminal, baselines below. ValueError for measurements that do not compare."""
    check_comparable(ms)
    table, baselines = distance_table(ms), baseline_table(ms)
    parts = [f"{table.title}, {table.note}\n", *(text_table(one) for one in (table, baselines) if one.lines)]
    return "\n".join([parts[0], "\n\n".join(parts[1:])]) + "\n"


def markdown_tables(ms: Measurements) -> str:
    """Distance, baselines, RMSE, KID and differences. ValueError for measurements that do not compare."""
    check_comparable(ms)
    distance, difference = distance_table(ms), difference_table(ms)
    captioned = [
        (distance, f"{distance.title}, {distance.note}"),
        (baseline_table(ms), "Baselines, measured alike, each at its own number of evaluations"),
        (
            rmse_table(ms),
            "RMSE to the same seeds' reference solution, lower is better; best grid of each solver and NFE",
        ),
        (kid_table(ms), f"Kernel distance, KID ({feature_names(ms)}), lower is better; the grids of the first table"),
        (difference, f"{difference.title}. {difference.note}"),
    ]
    return "\n".join(
        f"{markdown(text)}\n" + (f"\n{markdown_table(table)}\n" if table.lines else "")
        for table, text in captioned
        if table.lines or table is distance
    )


def provenance(ms: Measurements, context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of everything that is needed to repeat the sweep."""
    floor = floor_of(ms)
    sampled = [m for m in ms if m is not floor]
    facts = [
        ("model", context.model),
        ("data", context.data),
        ("features", feature_names(ms)),
        ("reference", joined(m.reference for m in ms)),
        ("images per cell", joined(m.n for m in sampled)),
        ("images for the floor", "" if floor is None else str(floor.n)),
        ("seed blocks", joined(m.blocks for m in sampled)),
        ("seeds", context.seeds),
        ("guidance", f"{context.guidance:g}"),
        ("training of solvers", ", ".join(f"{name} {cost:,} evaluations" for name, cost in training_costs(ms).items())),
        ("hardware", context.hardware),
        ("seconds measured on", joined(m.timing for m in sampled)),
        ("versions", context.version_text),
        ("command", context.command),
    ]
    return [(name, value) for name, value in facts if value]


def report_md(ms: Measurements, context: ReportContext, sections: Sequence[Section] = ()) -> str:
    """The tables, both plots by relative name, notes and provenance."""
    figures = all_figures(ms)
    costs = [f"{solver}: {cost:,} evaluations of training" for solver, cost in training_costs(ms).items()]
    parts = [
        markdown_tables(ms),
        "![distance against NFE](distance_vs_nfe.png)\n",
        "![distance against time](distance_vs_seconds.png)\n",
        f"## {figures.title}\n\nSeconds are for 1000 images.\n\n{markdown_table(figures)}\n",
        *(f"## {markdown(section.title)}\n\n{markdown(section.text)}\n" for section in sections),
    ]
    return markdown_page(replace(context, notes=(*context.notes, *costs)), parts, provenance(ms, context))


# ---- page ----


def _lead(ms: Measurements) -> str:
    """The best solver at the smallest and at the largest budget, and the floor."""
    table, found, floor = distance_table(ms), differences(ms), floor_of(ms)
    rivals = {nfe: sum(not d.best and not d.significant for (_, n), d in found.items() if n == nfe) for _, nfe in found}
    winners = []
    for column in dict.fromkeys((0, len(table.heads) - 2)) if table.lines else ():
        nfe = int(table.heads[column + 1].removeprefix("NFE "))
        others = rivals.get(nfe, 0)
        near = f"; {others} other{'s' if others > 1 else ''} not significantly worse" if others else ""
        winners += [
            f"<b>{html(line.name)}</b> at {nfe} evaluations ({entry.value}{near})"
            for line in table.lines
            if (entry := line.entries[column]) is not None and entry.best
        ]
    ground = f" Real images against real images ({floor_name(ms)}): {number(floor.distance)}." if floor else ""
    return f'<p class="lead">Lowest distance: {", ".join(winners)}.{ground}</p>' if winners else ""


def _plots(ms: Measurements) -> dict[Cost, bytes]:
    return {"nfe": distance_png(ms, "nfe"), "seconds": distance_png(ms, "seconds")}


def _plot(ms: Measurements, kind: Cost, png: bytes) -> str:
    spread = "trainings" if any(m.trainings > 1 for m in ms) else "seed blocks"
    caption = {
        "seconds": "The same measurements against the time to make the images, sampling and decoding, on the hardware below. "
        "Grey: the Pareto front, better than all others in distance or time.",
        "nfe": f"Both axes are logarithmic. Bars: standard deviation over {spread}. Hollow markers: trained solvers.",
    }[kind]
    return figure(png, f"distance against {'time' if kind == 'seconds' else 'NFE'}", caption)


def _baselines(ms: Measurements, grids: Grids) -> str:
    table = baseline_table(ms)
    if not table.lines:
        return ""
    pngs = [(m.solver, grids.get((m.solver, m.nfe))) for m in baselines_of(ms)]
    pictures = ["" if png is None else image_tag(png, f"samples of {name}") for name, png in pngs]
    return f"<h2>{table.title}</h2><p>{table.note}</p>{html_table(table, pictures, 'baselines')}"


def _samples(ms: Measurements, grids: Grids) -> str:
    others = {(m.solver, m.nfe) for m in baselines_of(ms)}
    captions = {key: f"{number(m.distance)} · {m.grid}".removesuffix(" · ") for key, m in shown(ms).items()}
    return explorer({key: png for key, png in grids.items() if key not in others}, captions)


def report_html(
    ms: Measurements,
    context: ReportContext,
    grids: Grids,
    sections: Sequence[Section] = (),
    plots: Mapping[Cost, bytes] | None = None,
) -> str:
    """One self-contained page; `grids` may be empty. ValueError for measurements that do not compare."""
    check_comparable(ms)
    plots = plots or _plots(ms)
    name, features = distance_name(ms), html(feature_names(ms))
    return page(
        context,
        _lead(ms),
        [
            f"<h2>{name} by step budget</h2><p>Lower is better; the best of each column is bold. NFE counts network evaluations "
            "per image. Small print: the time grid of least distance. Comparable only with numbers of the same feature name, "
            f"<code>{features}</code>.</p>",
            html_table(distance_table(ms)) if shown(ms) else "",
            f'<div class="plots">{"".join(_plot(ms, kind, png) for kind, png in plots.items())}</div>',
            _baselines(ms, grids),
            *map(titled_table, (kid_table(ms), difference_table(ms), rmse_table(ms))),
            _samples(ms, grids),
            *map(section_html, sections),
            notes_list(context.notes),
            titled_table(all_figures(ms), folded=True),
            facts_list(provenance(ms, context)),
        ],
        SCRIPT,
    )


def check_out(directory: Path) -> None:
    """UsageError if the directory has a report that is not of an earlier sweep, whose cells/ would be beside it."""
    check_replaceable(directory, FILES, (directory / "cells").is_dir() and not (directory / "results.json").exists())


def write_report(
    directory: Path, ms: Measurements, context: ReportContext, grids: Grids, sections: Sequence[Section] = ()
) -> None:
    """Write all six files into `directory`. DiskError; UsageError as `check_out`; ValueError if measurements do not compare."""
    check_out(directory)
    check_comparable(ms)
    records, plots = to_records(ms), _plots(ms)
    write_atomically(directory / "results.csv", csv_text(records).encode())
    write_atomically(directory / "results.jsonl", jsonl_text(records).encode())
    for kind, png in plots.items():
        write_atomically(directory / f"distance_vs_{kind}.png", png)
    write_atomically(directory / "report.md", report_md(ms, context, sections).encode())
    write_atomically(directory / "report.html", report_html(ms, context, grids, sections, plots).encode())
