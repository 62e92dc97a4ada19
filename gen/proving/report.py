"""The report of a proving ground: results.csv, results.jsonl, report.md, report.html and rmse_vs_nfe.png."""

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from midway.gen.core.files import read_text, write_atomically
from midway.gen.core.locks import check_replaceable
from midway.gen.core.text import markdown
from midway.gen.evaluation.comparing import paired_difference
from midway.gen.proving.contest import EXACT_ROW, FLOOR, Cell
from midway.gen.proving.published import PUBLISHED, RATIO, correlations, overall, ratio
from midway.gen.report.curves import Curve, Panel, curves_figure, ratios
from midway.gen.report.drawing import Drawing
from midway.gen.report.html import Block, Page, facts_block, html_page, table_block
from midway.gen.report.table import Entry, Line, ReportContext, Table, joined, number
from midway.gen.report.text import csv_text, jsonl_text, markdown_page, markdown_section, text_table

FILES = ("results.csv", "results.jsonl", "report.md", "report.html", "rmse_vs_nfe.png")
SHOWN = (
    *("euler", "ddim", "heun", "dpm2", "dpmpp3m", "unipc3", "ipndm3"),
    *("amed", "amed-plugin-ipndm3", "table"),
)
"""Solvers of the plot, where more lines could not be distinguished."""
FIGURES = {"rmse": "RMSE to the exact solution", "to_exact": "Distance to exact", "to_data": "Distance to data"}
NOTES = {
    "rmse": "Root-mean-square difference from the exact solution of the same seeds, mean ± standard error over blocks of seeds; "
    "a number of the data has standard deviation 0.5. The solver's error alone. Small print: the grid, chosen by RMSE on "
    "other seeds; '+' marks an analytic first step, taken only at budgets that cannot be reached without.",
    "to_exact": "Fréchet distance of the samples to the exact solution's samples of the same seeds: 0 at convergence. Fresh data "
    "in place of samples have the floor. Solvers that draw noise on the way end elsewhere, so theirs cannot fall below it.",
    "to_data": "Fréchet distance of the samples to the mean and covariance of the mixture. Its bias at this number of samples "
    "is in every row: compare with the exact row, below which no solver is better.",
}
LIMITS = (
    "A mixture has no network error: solvers that correct such errors, as those that draw noise on the way, gain nothing "
    "here, and nothing here tells whether a model's own error hides the difference of two solvers.",
    "Learned solvers learn from the same field, from noise that no scored seed has, for one budget each; what that costs is in "
    "results.csv. AMED is learned on the grid where its start has the least RMSE, a table on one that it learns.",
    "Euler and DDIM are the same step on this schedule (variance exploding), as are ab and ipndm_v.",
)


@dataclass(frozen=True)
class Result:
    """The cells of one ground, and what they were measured on."""

    cells: tuple[Cell, ...]
    ground: str
    n: int
    seeds: str
    exact_error: float
    """RMSE of the exact solution to one of twice the steps."""


# ---- records ----

_OWN = ("solver", "nfe", "grid", "analytic_first", "training_nfe")


def records(result: Result) -> list[dict[str, Any]]:
    """One per cell: means, standard errors and the figures of every block."""
    shared = {"n": result.n, "seeds": result.seeds, "ground": result.ground, "exact_error": result.exact_error}
    return [_record(cell) | shared for cell in result.cells]


def _record(cell: Cell) -> dict[str, Any]:
    found: dict[str, Any] = {name: getattr(cell, name) for name in _OWN}
    for name in FIGURES:
        found |= {name: cell.mean(name), f"{name}_error": cell.error(name), f"{name}_blocks": cell.blocks.get(name)}
    return found


def read_result(path: Path) -> Result:
    """What `write_prove_report` wrote to results.jsonl; ValueError, KeyError, OSError for any other file."""
    found = [json.loads(line) for line in read_text(path).splitlines()]
    cells = tuple(_cell(record) for record in found)
    return Result(cells, *(found[0][name] for name in ("ground", "n", "seeds", "exact_error")))


def _cell(record: Mapping[str, Any]) -> Cell:
    given = {name: record[f"{name}_blocks"] for name in FIGURES}
    blocks = {name: tuple(math.inf if v is None else v for v in values) for name, values in given.items() if values}
    return Cell(**{name: record[name] for name in _OWN}, blocks=blocks)


# ---- tables ----


def figure_table(result: Result, name: str, solvers: Sequence[str] = ()) -> Table:
    """A line per solver (all, or those named), a column per budget, floor and exact row last; the best of a budget marked."""
    cells = [cell for cell in result.cells if cell.nfe and (not solvers or cell.solver in solvers)]
    budgets = sorted({cell.nfe for cell in cells})
    limits = {nfe: _best(result, name, nfe, cells) for nfe in budgets}
    tied = {id(cell) for nfe in budgets for cell in _tied([cell for cell in cells if cell.nfe == nfe], name)}
    lines = []
    for solver in dict.fromkeys(cell.solver for cell in cells):
        own = {cell.nfe: cell for cell in cells if cell.solver == solver}
        if any(name in cell.blocks for cell in own.values()):
            lines.append(Line(solver, tuple(_entry(own.get(nfe), name, limits[nfe], tied) for nfe in budgets)))
    lines += [
        Line(label, (_entry(cell, name, None),) * len(budgets), floor=True)
        for label, cell in (("floor (fresh data)", _row(result, FLOOR)), ("exact solution", _row(result, EXACT_ROW)))
        if cell is not None and name in cell.blocks
    ]
    return Table(FIGURES[name], NOTES[name], ("solver", *(f"NFE {nfe}" for nfe in budgets)), tuple(lines))


def _row(result: Result, name: str) -> Cell | None:
    return next((cell for cell in result.cells if cell.solver == name), None)


def _best(result: Result, name: str, nfe: int, cells: Sequence[Cell]) -> str | None:
    """The figure that is best, as it is written: the least, but of the distance to data none below the exact row's."""
    values = [value for cell in cells if cell.nfe == nfe and (value := cell.mean(name)) is not None]
    finite = [value for value in values if math.isfinite(value)]
    exact = _row(result, EXACT_ROW)
    least = exact.mean(name) if exact is not None and name == "to_data" else None
    return number(max(min(finite), least or 0.0)) if len(finite) > 1 else None


def _tied(cells: Sequence[Cell], name: str) -> list[Cell]:
    """Those of one budget whose difference from the least, over blocks of the same seeds, is not significant."""
    found = [cell for cell in cells if len(cell.blocks.get(name, ())) > 1 and math.isfinite(cell.mean(name) or 0.0)]
    best = min(found, key=lambda cell: cell.mean(name) or 0.0, default=None)
    if best is None:
        return []
    return [c for c in found if not paired_difference(c.blocks[name], best.blocks[name]).significant]


def _entry(cell: Cell | None, name: str, best: str | None, tied: Container[int] = ()) -> Entry | None:
    value = None if cell is None else cell.mean(name)
    if cell is None or value is None:
        return None
    small = f"{cell.grid}{' +' if cell.analytic_first else ''}"
    is_best = best is not None and math.isfinite(value) and value <= float(best) + _half_digit(best)
    return Entry(number(value, cell.error(name)), small, is_best, id(cell) in tied)


def _half_digit(text: str) -> float:
    """Half of the last decimal: what is written alike is best alike."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def order_table(result: Result) -> Table:
    """Rank correlation with the published order, a line per figure."""
    budgets = sorted({cell.nfe for cell in result.cells if cell.nfe})
    lines = [Line(title, tuple(_agreement(result, name, budgets))) for name, title in FIGURES.items()]
    first, second, nfe = RATIO
    note = (
        "Spearman's rank correlation of each figure with published FIDs of CIFAR-10 (EDM's network, unconditional), over the "
        f"solvers that both have: {', '.join(PUBLISHED)}. The last column is the quotient of {first} and {second} at {nfe} "
        "evaluations; published 0.30."
    )
    heads = ("figure", *(f"NFE {nfe}" for nfe in budgets), "together", f"{first} / {second} at {nfe}")
    return Table("Agreement with the published order", note, heads, tuple(lines))


def _agreement(result: Result, name: str, budgets: Sequence[int]) -> Iterator[Entry | None]:
    """At every budget, over all together, and the quotient."""
    found = correlations(result.cells, name)
    for one in (*(found.get(nfe) for nfe in budgets), overall(result.cells, name)):
        yield None if one is None else Entry(f"{one[0]:.2f}", f"of {one[1]}")
    quotient = ratio(result.cells, name)
    yield None if quotient is None else Entry(f"{quotient:.2f}")


def tables(result: Result) -> list[Table]:
    """All of a report."""
    return [*(figure_table(result, name) for name in FIGURES), order_table(result)]


def terminal_text(result: Result) -> str:
    """RMSE, distance to data, the agreement with the published order, answer and summary."""
    shown = (figure_table(result, "rmse"), figure_table(result, "to_data"), order_table(result))
    return "\n\n".join([*(f"{table.title}\n\n{text_table(table)}" for table in shown), answer(result), summary(result)])


# ---- files ----


def drawing(result: Result) -> Drawing:
    """RMSE of the `SHOWN` solvers against NFE, both axes logarithmic, and as a ratio to the best of them."""
    budgets = sorted({cell.nfe for cell in result.cells if cell.nfe})
    names = [name for name in SHOWN if any(cell.solver == name for cell in result.cells)]
    curves = [curve for index, name in enumerate(names) if (curve := _curve(result, name, index)).points]
    panels = [Panel(FIGURES["rmse"], tuple(curves)), Panel("Ratio to the best of these", ratios(curves), height=165)]
    caption = "Both axes are logarithmic. Bars: standard error over blocks. Hollow: learned solvers."
    return Drawing(
        "rmse_vs_nfe",
        "RMSE against NFE",
        caption,
        lambda narrow: curves_figure(
            [panel for panel in panels if panel.curves] or panels[:1], "NFE, evaluations per sample", budgets, narrow
        ),
    )


def _curve(result: Result, solver: str, index: int) -> Curve:
    own = [cell for cell in result.cells if cell.solver == solver]
    found = [(float(c.nfe), v, c.error("rmse") or 0.0) for c in own if (v := c.mean("rmse")) and math.isfinite(v)]
    return Curve(solver, index, tuple(sorted(found)), hollow=any(cell.training_nfe for cell in own))


def facts(result: Result, context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of what is needed to repeat it."""
    blocks = max(len(values) for cell in result.cells for values in cell.blocks.values())
    return [
        ("ground", f"{result.ground}: {context.data}"),
        ("model", context.model),
        ("samples", f"{blocks} block(s) of {result.n}, seeds {result.seeds}"),
        ("grids", f"chosen on other seeds: {context.seeds}"),
        ("error of the exact solution", f"{result.exact_error:.2g}, RMSE to one of twice the steps"),
        ("training", joined(training(result))),
        ("hardware", context.hardware),
        ("versions", context.version_text),
        ("command", context.command),
    ]


def training(result: Result) -> list[str]:
    """The evaluations that each learned solver cost, over its budgets."""
    names = dict.fromkeys(cell.solver for cell in result.cells if cell.training_nfe)
    spent = {name: [cell.training_nfe for cell in result.cells if cell.solver == name] for name in names}
    return [f"{name} {min(costs):,} to {max(costs):,} evaluations a budget" for name, costs in spent.items()]


def check_out(directory: Path) -> None:
    """UsageError if the directory has files of another report."""
    own = False
    with suppress(OSError, ValueError, LookupError, TypeError):
        own = bool(read_result(directory / FILES[1]).cells)
    check_replaceable(directory, FILES, own)


def write_prove_report(directory: Path, result: Result, context: ReportContext) -> None:
    """Write all five files, each whole or not at all. DiskError; UsageError as `check_out`."""
    check_out(directory)
    plot, found, known = drawing(result), tables(result), facts(result, context)
    texts = [text for text in (answer(result), summary(result)) if text]
    parts = [
        *(f"{markdown(text)}\n" for text in texts),
        *map(markdown_section, found),
        f"![{markdown(plot.title)}]({FILES[4]})\n",
    ]
    order = replace(table_block(found[-1]), text=f"{summary(result)} {found[-1].note}")
    blocks = [
        *map(table_block, found[:-1]),
        order,
        Block("Limits of this measurement", items=context.notes),
        facts_block(known),
    ]
    files = {
        FILES[0]: csv_text(records(result)),
        FILES[2]: markdown_page(context, parts, known),
        FILES[3]: html_page(Page(context, answer(result), (), plot, blocks)),
        FILES[1]: jsonl_text(records(result)),
    }
    write_atomically(directory / FILES[4], plot.png())
    for name, text in files.items():
        write_atomically(directory / name, text.encode())


def answer(result: Result) -> str:
    """The solver of least RMSE at the smallest and at the largest budget, as the table has them."""
    table, parts = figure_table(result, "rmse"), list[str]()
    for column in dict.fromkeys((0, len(table.heads) - 2)) if table.lines else ():
        found = [(line.name, entry) for line in table.lines if (entry := line.entries[column]) is not None]
        tied = sum(entry.tied and not entry.best for _, entry in found)
        others = f"; {tied} other{'s' if tied > 1 else ''} not significantly worse" if tied else ""
        nfe = table.heads[column + 1].removeprefix("NFE ")
        parts += [f"{name} at {nfe} evaluations ({entry.value}{others})" for name, entry in found if entry.best]
    return f"Least RMSE to the exact solution: {', '.join(parts)}." if parts else ""


def summary(result: Result) -> str:
    """Floor, exact row and agreement in a sentence or two."""
    floor, exact = (_row(result, name) for name in (FLOOR, EXACT_ROW))
    parts = []
    if floor is not None and exact is not None:
        floor_text, exact_text = (number(c.mean("to_data") or 0.0, c.error("to_data")) for c in (floor, exact))
        parts.append(f"Distance to data: fresh data {floor_text}, exact solution {exact_text}.")
    found = {FIGURES[name]: correlations(result.cells, name).get(6) for name in FIGURES}
    texts = [f"{title} {one[0]:.2f}" for title, one in found.items() if one is not None]
    if texts:
        parts.append(f"Rank correlation with the published order at 6 evaluations: {', '.join(texts)}.")
    return " ".join(parts)
