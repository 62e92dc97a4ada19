"""Put a report's own table and picture into a page: no figure in README or docs is typed by hand.

    python docs/embed.py README.md demo runs/demo

replaces what stands between `<!-- begin demo -->` and `<!-- end demo -->` in the page by the tables of runs/demo/results.csv
and copies distance_vs_nfe.png to docs/images/demo.png. Of more than 12 solvers the picture shows
RMSE instead, of those solvers that have the least at some budget. Of a comparison of models (scripts/evaluate_likelihood.py)
it is the table of results.json, with the facts that a reader needs beside it. Of a proving ground (scripts/prove_solvers.py) a
block `prove` has the RMSE of the solvers of its plot, `prove-all` all tables, and the picture is rmse_vs_nfe.png.
"""

import csv
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from midway.gen.core.text import markdown
from midway.gen.evaluation.likelihood import LikelihoodRow
from midway.gen.evaluation.records import Measurement, from_record
from midway.gen.proving.report import FIGURES, SHOWN, Result, figure_table, order_table, read_result, summary
from midway.gen.report.likelihood import likelihood_table
from midway.gen.report.sweep import markdown_tables
from midway.gen.report.table import number
from midway.gen.report.text import markdown_table

READABLE = 12
"""More lines than this cannot be distinguished in a plot."""


def leaders(measurements: list[Measurement]) -> list[Measurement]:
    """The measurements of those solvers that are among the two with the least RMSE at some budget; the floor."""
    named: set[str] = set()
    for nfe in {m.nfe for m in measurements if m.nfe}:
        least: dict[str, float] = {}
        for m in measurements:
            rmse = m.value("rmse")
            if m.nfe == nfe and rmse is not None:
                least[m.solver] = min(rmse, least.get(m.solver, math.inf))
        named |= set(sorted(least, key=lambda solver: least[solver])[:2])
    return [m for m in measurements if not m.nfe or m.baseline or m.solver in named]


def plot_rmse(path: Path, measurements: list[Measurement]) -> None:
    """Least RMSE over the grids against NFE, both axes logarithmic."""
    figure = Figure(figsize=(7, 5), dpi=160, facecolor="white", layout="constrained")
    axes = figure.subplots()
    for solver in dict.fromkeys(m.solver for m in measurements if m.nfe and not m.baseline):
        least: dict[int, float] = {}
        for m in measurements:
            rmse = m.value("rmse")
            if m.solver == solver and rmse is not None:
                least[m.nfe] = min(rmse, least.get(m.nfe, math.inf))
        axes.plot(list(least), list(least.values()), marker="o", label=solver)
    budgets = sorted({m.nfe for m in measurements if m.nfe and not m.baseline})
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(budgets, [str(nfe) for nfe in budgets])
    axes.minorticks_off()
    axes.set_xlabel("NFE, network evaluations per image")
    axes.set_ylabel("RMSE to the same seeds' reference solution")
    axes.grid(True, alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def read_results(path: Path) -> list[Measurement]:
    """The measurements of a results.csv."""
    with path.open() as file:
        return [from_record(row) for row in csv.DictReader(file)]


def embed(page: Path, name: str, report: Path) -> None:
    """Rewrite the block `name` of `page` from the report directory."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    text = page.read_text()
    if begin not in text or end not in text:
        sys.exit(f"{page} has no block '{begin} ... {end}': add the two lines where the table belongs")
    if (report / "results.json").exists():
        return _replace(page, name, models_block(report))
    if (report / "rmse_vs_nfe.png").exists():
        return embed_proof(page, name, report)
    picture = Path(__file__).parent / "images" / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    measurements = read_results(report / "results.csv")
    if len({m.solver for m in measurements}) > READABLE:
        plot_rmse(picture, leaders(measurements))
    else:
        shutil.copyfile(report / "distance_vs_nfe.png", picture)
    sampled = next(m for m in measurements if m.nfe)
    facts = (
        f"n = {sampled.n} images per block, {sampled.blocks} block(s), seeds {sampled.seeds}; "
        f"features `{sampled.features}`, reference `{sampled.reference}`."
    )
    link = os.path.relpath(picture, page.parent)
    shown = "RMSE" if len({m.solver for m in measurements}) > READABLE else "Fréchet distance"
    block = f"{markdown_tables(measurements)}\n{facts}\n\n![{shown} against NFE]({link})\n"
    return _replace(page, name, block)


def embed_proof(page: Path, name: str, report: Path) -> None:
    """The block of a proving ground, short as `prove` and whole as `prove-all`; both show the same picture."""
    result = read_result(report / "results.jsonl")
    picture = Path(__file__).parent / "images" / "prove.png"
    picture.parent.mkdir(exist_ok=True)
    shutil.copyfile(report / "rmse_vs_nfe.png", picture)
    link = f"![RMSE against NFE]({os.path.relpath(picture, page.parent)})"
    _replace(page, name, f"{proof_tables(result, SHOWN if name == 'prove' else ())}\n{proof_facts(result)}\n\n{link}\n")


def proof_tables(result: Result, solvers: Sequence[str]) -> str:
    """RMSE of the solvers named, or every table of all."""
    if solvers:
        return f"{FIGURES['rmse']}, lower is better\n\n{markdown_table(figure_table(result, 'rmse', solvers))}\n"
    tables = [*(figure_table(result, name) for name in FIGURES), order_table(result)]
    return "\n".join(f"**{markdown(t.title)}.** {markdown(t.note)}\n\n{markdown_table(t)}\n" for t in tables)


def proof_facts(result: Result) -> str:
    """The ground, the samples, the error of the exact solution, and the rows that say what can be reached."""
    return (
        f"Ground `{result.ground}`, blocks of {result.n} seeds, {result.seeds}; error of the exact solution "
        f"{result.exact_error:.1g}. {summary(result)}"
    )


def models_block(report: Path) -> str:
    """The table of a comparison of models, and what it was measured on and with."""
    result = json.loads((report / "results.json").read_text())
    rows = [LikelihoodRow(**row) for row in result["rows"]]
    table = markdown_table(likelihood_table(rows))
    context, models = result["context"], [row for row in rows if row.model]
    measured = next((row for row in models if row.features), None)
    distance = (
        ""
        if measured is None
        else f" Distances: n = {measured.n} samples, features `{measured.features}`, "
        f"held-out images score {number(measured.floor or 0.0)}."
    )
    seeds, hardware = context["seeds"], context["hardware"]
    return f"{table}\n\nn = {rows[0].n} held-out images of {rows[0].levels} levels; seeds: {seeds}; {hardware}.{distance}\n"


def _replace(page: Path, name: str, block: str) -> None:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, rest = page.read_text().split(begin, 1)
    page.write_text(f"{before}{begin}\n{block}{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    embed(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
