"""One HTML file that holds a whole report: tables, plots and same-seed samples, and no link to anywhere.

Images are base64 PNG, the style is inline, light or dark by the reader's preference (plots stay on white), and the page
works at the width of a phone and in print. Every text from outside goes through `html.escape`.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path

from midway.gen.core.files import write_atomically
from midway.gen.evaluation.records import (
    BASELINE_HEADS,
    Cell,
    Entry,
    Measure,
    ReportContext,
    baseline_rows,
    baselines_of,
    check_comparable,
    deviation,
    difference_note,
    distance_name,
    feature_names,
    floor_name,
    floor_of,
    measure_rows,
    measured,
    number,
    paired,
    pivot,
    rivals,
    shown,
    training_costs,
)
from midway.gen.report.explorer import EXPLORER_STYLE, explorer, image_tag
from midway.gen.report.plots import distance_png
from midway.gen.report.script import EXPLORER_SCRIPT
from midway.gen.report.sections import Section
from midway.gen.report.style import STYLE


def _value(value: str) -> str:
    """`3.21 ± 0.12` with the deviation set back."""
    mean, sign, std = value.partition(" ± ")
    return f'{mean}<span class="std"> ± {std}</span>' if sign else mean


def entry_cell(entry: Entry | None) -> str:
    if entry is None:
        return '<td class="quiet">–</td>'
    grid = f"<small>{escape(entry.grid)}</small>" if entry.grid else ""
    mean, sign, std = _value(entry.value).partition("<span")
    return (
        f'<td class="best"><b>{mean}</b>{sign}{std}{grid}</td>' if entry.best else f"<td>{mean}{sign}{std}{grid}</td>"
    )


def _head(nfes: Sequence[int]) -> str:
    columns = "".join(f'<th scope="col">{nfe} NFE</th>' for nfe in nfes)
    return f'<thead><tr><th scope="col">solver</th>{columns}</tr></thead>'


def _solver(solver: str, costs: Mapping[str, int]) -> str:
    cost = f"<small>trained, {costs[solver]:,} evaluations</small>" if solver in costs else ""
    return f'<th scope="row">{escape(solver)}{cost}</th>'


def _floor_row(cells: Sequence[Cell], measure: Measure, columns: int) -> str:
    floor = floor_of(cells)
    score = None if floor is None else measured(floor, measure)
    if floor is None or score is None:
        return ""
    value = _value(number(score, deviation(floor, measure)))
    return f'<tr class="floor"><th scope="row">{floor_name(cells)}</th>{f"<td>{value}</td>" * columns}</tr>'


def _table(cells: Sequence[Cell], measure: Measure) -> str:
    """Solver x NFE, or nothing if no cell has the measure."""
    table = pivot(cells, measure)
    costs = training_costs(cells)
    rows = [f"<tr>{_solver(solver, costs)}{''.join(map(entry_cell, row))}</tr>" for solver, row in table.rows]
    rows.append(_floor_row(cells, measure, len(table.nfes)))
    if not table.nfes:
        return ""
    return f'<div class="scroll"><table>{_head(table.nfes)}<tbody>{"".join(rows)}</tbody></table></div>'


def _baselines(cells: Sequence[Cell], grids: Mapping[tuple[str, int], bytes]) -> str:
    """Baselines with their samples, or nothing without any."""
    if not baselines_of(cells):
        return ""
    rows = []
    for cell, (name, nfe, distance, seconds) in zip(baselines_of(cells), baseline_rows(cells), strict=True):
        png = grids.get((cell.solver, cell.nfe))
        picture = "" if png is None else image_tag(png, f"samples of {name}")
        values = f"<td>{nfe}</td><td>{_value(distance)}</td><td>{seconds}</td><td>{picture}</td>"
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{values}</tr>')
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in (*BASELINE_HEADS, "samples"))
    return (
        "<h2>Baselines</h2><p>Other models, and images that somebody else made, measured alike: the same image count, "
        "features and reference. Each costs its own number of network evaluations.</p>"
        f'<div class="scroll"><table class="baselines"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _differences(cells: Sequence[Cell]) -> str:
    """How far each solver is from the best of its column, by blocks of the same seeds; nothing below two blocks."""
    table = paired(cells)
    if not table.rows:
        return ""
    rows = [
        f'<tr><th scope="row">{escape(solver)}</th>{"".join(map(entry_cell, row))}</tr>' for solver, row in table.rows
    ]
    return (
        f"<h2>Difference from the best</h2><p>{difference_note(cells)}</p>"
        f'<div class="scroll"><table>{_head(table.nfes)}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _too_near(others: int) -> str:
    return f"; {others} other{'s' if others > 1 else ''} too near to tell" if others else ""


def _lead(cells: Sequence[Cell]) -> str:
    """The result in a sentence: who is best at the smallest and at the largest budget."""
    table, near = pivot(cells, "distance"), rivals(cells)
    winners = [
        f"<b>{escape(solver)}</b> at {nfe} evaluations ({entry.value}{_too_near(near.get(nfe, 0))})"
        for column, nfe in enumerate(table.nfes)
        for solver, row in table.rows
        if (entry := row[column]) is not None and entry.best and nfe in (table.nfes[0], table.nfes[-1])
    ]
    floor = floor_of(cells)
    ground = (
        "" if floor is None else f" Real images against real images ({floor_name(cells)}): {number(floor.distance)}."
    )
    return f'<p class="lead">Lowest distance: {", ".join(winners)}.{ground}</p>' if winners else ""


def _measures(cells: Sequence[Cell]) -> str:
    """All figures of the shown cells and where their time went, folded."""
    heads, *rows = measure_rows(cells)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{value}</td>" for value in rest)}</tr>'
        for name, *rest in rows
    )
    return (
        "<details><summary>All figures and where the time went</summary><p>Of the grids above; seconds are for 1000 "
        "images. Precision, recall, density, coverage, PSNR and the inception score are better when larger, the others when "
        "smaller.</p>"
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>'
    )


def _plot(cells: Sequence[Cell], kind: str) -> str:
    by_time, spread = kind == "seconds", "trainings" if any(cell.trainings > 1 for cell in cells) else "seed blocks"
    caption = (
        "The same measurements against the time to make the images, sampling and decoding, on what is named below. Grey: "
        "what nothing else beats in both."
        if by_time
        else f"Both axes are logarithmic. Bars: standard deviation over {spread}. Hollow markers: trained solvers."
    )
    png = distance_png(cells, "seconds" if by_time else "nfe")
    image = image_tag(png, f"{distance_name(cells)} against {'seconds' if by_time else 'NFE'}, one line per solver")
    return f'<figure><div class="plot">{image}</div><figcaption>{caption}</figcaption></figure>'


def _samples(cells: Sequence[Cell], grids: Mapping[tuple[str, int], bytes]) -> str:
    """Sample images of solvers, to be looked through; nothing without images."""
    others = {(cell.solver, cell.nfe) for cell in baselines_of(cells)}
    captions = {key: _sample_caption(cell) for key, cell in shown(cells).items()}
    return explorer({key: png for key, png in grids.items() if key not in others}, captions)


def _sample_caption(cell: Cell) -> str:
    return f"{number(cell.distance)} · {cell.grid}" if cell.grid else number(cell.distance)


def _joined(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value != ""))


def provenance(cells: Sequence[Cell], context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of all that is needed to repeat the sweep."""
    floor = floor_of(cells)
    sampled = [cell for cell in cells if cell is not floor]
    costs = training_costs(cells)
    facts = [
        ("model", context.model),
        ("data", context.data),
        ("features", feature_names(cells)),
        ("reference", _joined(cell.reference for cell in cells)),
        ("images per cell", _joined(cell.n for cell in sampled)),
        ("images for the floor", "" if floor is None else str(floor.n)),
        ("seed blocks", _joined(cell.blocks for cell in sampled)),
        ("seeds", context.seeds),
        ("guidance", f"{context.guidance:g}"),
        ("training of solvers", ", ".join(f"{name} {cost:,} evaluations" for name, cost in costs.items())),
        ("hardware", context.hardware),
        ("seconds measured on", _joined(cell.timing for cell in sampled)),
        ("versions", ", ".join(f"{name} {version}" for name, version in context.versions.items())),
        ("command", context.command),
    ]
    return [(name, value) for name, value in facts if value]


def _details(cells: Sequence[Cell], context: ReportContext) -> str:
    items = "".join(
        f"<dt>{name}</dt><dd>{f'<code>{escape(value)}</code>' if name == 'command' else escape(value)}</dd>"
        for name, value in provenance(cells, context)
    )
    return f"<details><summary>How these numbers were made</summary><dl>{items}</dl></details>"


def notes_list(notes: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<h2>Notes</h2><ul>{items}</ul>" if items else ""


def _section(section: Section) -> str:
    picture = "" if section.png is None else f'<div class="plot">{image_tag(section.png, section.alt)}</div>'
    return f"<h2>{escape(section.title)}</h2><p>{escape(section.text)}</p>{picture}"


def _page(
    cells: Sequence[Cell],
    context: ReportContext,
    grids: Mapping[tuple[str, int], bytes],
    sections: Sequence[Section],
) -> str:
    title, name = escape(context.title), distance_name(cells)
    kid = (
        "<h2>Kernel distance</h2><p>KID of the same features, on the grids above: unbiased in the number of images, where "
        "the Fréchet distance is not. Seeds and floor have every class equally often, which puts both a little below 0: compare "
        "with the floor.</p>" + _table(cells, "kid")
        if pivot(cells, "kid").rows
        else ""
    )
    rmse = (
        "<h2>Error of the solver itself</h2><p>Root-mean-square difference from the same seeds' reference solution: it "
        "measures the solver alone, whatever the model. Solvers that draw noise on the way end elsewhere by design.</p>"
        + _table(cells, "rmse")
        if pivot(cells, "rmse").rows
        else ""
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>{title}</title><style>{STYLE}{EXPLORER_STYLE}</style></head><body><main>
<header><h1>{title}</h1><p class="quiet">{escape(context.model)} · {escape(context.data)}</p>{_lead(cells)}</header>
<h2>{name} by step budget</h2>
<p>Lower is better; the best of each column is bold. NFE counts network evaluations per image. Small print: the time
grid that did best. Comparable only with numbers of the same feature name,
<code>{escape(feature_names(cells))}</code>.</p>
{_table(cells, "distance")}
<div class="plots">{_plot(cells, "nfe")}{_plot(cells, "seconds")}</div>
{_baselines(cells, grids)}
{kid}
{_differences(cells)}
{rmse}
{_samples(cells, grids)}
{"".join(map(_section, sections))}
{notes_list(context.notes)}
{_measures(cells)}
{_details(cells, context)}
</main><script>{EXPLORER_SCRIPT}</script></body></html>
"""


def write_html(
    path: Path,
    cells: Sequence[Cell],
    context: ReportContext,
    grids: Mapping[tuple[str, int], bytes],
    sections: Sequence[Section] = (),
) -> None:
    """One self-contained page; `grids` maps (solver, nfe) to a PNG of samples and may be empty. DiskError.

    ValueError for cells that do not compare.
    """
    check_comparable(cells)
    write_atomically(path, _page(cells, context, grids, sections).encode())
