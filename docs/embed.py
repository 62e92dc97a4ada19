"""Put a report's own table and picture into a page: no figure in README or docs is typed by hand.

    python docs/embed.py README.md demo runs/demo

replaces what stands between `<!-- begin demo -->` and `<!-- end demo -->` in the page by the tables of runs/demo/results.csv
and draws docs/images/demo.png, the distance to the exact solution; of more than 12 solvers it shows those that are among the
two nearest at some budget, and of fewer than 3 budgets there is no picture. Of a comparison of models (midway evaluate-
likelihood) it is the table of results.json, with the facts that a reader needs beside it; of a check of metrics (midway check-
metric) one table of all feature spaces. Of a proving ground (midway prove) a block `prove` has the RMSE of the solvers of its
plot at a few budgets, `prove-all` all tables, and the picture is rmse_vs_nfe.png; any other block has all tables without a
picture. Of a file in benchmarks/results it is the table of its rows.
"""

import csv
import json
import math
import os
import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from midway.gen.core.text import markdown
from midway.gen.evaluation.comparing import by_solver, few_step, question
from midway.gen.evaluation.likelihood import LikelihoodRow
from midway.gen.evaluation.records import FLOOR, LIMITS, TO_EXACT, Measurement, from_record
from midway.gen.proving.report import FIGURES, SHOWN, Result, figure_table, order_table, read_result, summary
from midway.gen.report.drawing import PNG_DPI, WIDE, dress, legend_below, look, new_figure, place
from midway.gen.report.likelihood import likelihood_table
from midway.gen.report.plots import distance_png
from midway.gen.report.sweep import captioned, headline_tables
from midway.gen.report.sweep_tables import further_tables
from midway.gen.report.table import Entry, Line, Table, number
from midway.gen.report.text import markdown_table

READABLE = 12
"""More lines than this cannot be distinguished in a plot."""
BUDGETS = (3, 4, 6, 8, 10)
"""Of the short table of a proving ground."""
LINES = 3
"""Fewer budgets than this make no line worth a plot."""


def leaders(measurements: list[Measurement]) -> list[Measurement]:
    """The measurements of those solvers that are among the two best at some budget, and the limits."""
    name, named = question(measurements), set[str]()
    for nfe in {m.nfe for m in by_solver(measurements)}:
        least = {m.solver: m.metrics[name].mean for m in by_solver(measurements) if m.nfe == nfe and name in m.metrics}
        named |= set(sorted(least, key=lambda solver: least[solver])[:2])
    return [m for m in measurements if m.solver in LIMITS or m.baseline or m.solver in named]


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
    if report.is_file():
        found = json.loads(report.read_text())
        drawn = f"\n{rates_picture(page, name, found['rows'])}\n" if "best" in found else ""
        return _replace(page, name, benchmark_block(found) + drawn)
    if (report / "results.json").exists():
        return _replace(page, name, models_block(report))
    if (report / "rmse_vs_nfe.png").exists():
        return embed_proof(page, name, report)
    if "damage" in (report / "results.csv").read_text().partition("\n")[0].split(","):
        return _replace(page, name, damages_block(report))
    measurements = read_results(report / "results.csv")
    sampled = by_solver(measurements)[0]
    further = f" and `{sampled.further}`" if sampled.further else ""
    facts = (
        f"n = {sampled.n} images per block, {sampled.blocks} block(s), seeds {sampled.seeds}; "
        f"features `{sampled.features}`{further}, reference `{sampled.reference}`."
    )
    tables = headline_tables(measurements)
    if few_step(measurements):  # one space alone would support another order
        tables += [(table, f"{table.title}, lower is better") for table in further_tables(measurements)]
    block = f"{captioned(tables)}\n{facts}\n"
    if len({m.nfe for m in by_solver(measurements)}) >= LINES:
        block += f"\n{sweep_picture(page, name, measurements)}\n"
    return _replace(page, name, block)


def sweep_picture(page: Path, name: str, measurements: list[Measurement]) -> str:
    """Draw docs/images/<name>.png; the link to it from the page."""
    picture = Path(__file__).parent / "images" / f"{name}.png"
    picture.parent.mkdir(exist_ok=True)
    drawn = leaders(measurements) if len({m.solver for m in by_solver(measurements)}) > READABLE else measurements
    ranked = question(measurements) == TO_EXACT and not few_step(measurements)
    picture.write_bytes(distance_png(drawn, "nfe", "to_exact" if ranked else "distance"))
    shown = "Distance to the exact solution" if ranked else "Fréchet distance"
    return f"![{shown} against NFE]({os.path.relpath(picture, page.parent)})"


COLUMNS: dict[str, dict[str, str]] = {
    "peer_parameters": {"": "{name}", "ours": "{ours:,.0f} ms", "parameters": "{parameters:,}"}
    | {"theirs": "{peer:,.0f} ms", "their parameters": "{peer_parameters:,}", "rate": "{ratio:.2f}"}
    | {"quartiles": "{quartiles[0]:.2f} to {quartiles[1]:.2f}", "aimed at": "{target}"},
    "ratio": {"": "{name}", "beside": "{peer_name}", "ours": "{ours:.3g}", "theirs": "{peer:.3g}"}
    | {"unit": "{unit}", "rate": "{ratio:.2f}", "aimed at": "{target}"},
    "resident": {
        "": "{name}",
        "images/s": "{images_per_second:,.0f}",
        "resident memory grows by": "{resident:.0f} MiB",
    },
    "peak_mb": {"images": "{images:,}", "seconds": "{seconds:.2f}", "peak memory": "{peak_mb:.0f} MB"},
}
"""Tables of benchmarks by a field that only their rows have: heading -> cell. `rate` is theirs / ours, so that more is better."""


def benchmark_block(found: dict[str, Any]) -> str:
    """The rows of a file in benchmarks/results."""
    rows = found.get("rows", found.get("results"))
    if isinstance(rows, dict):
        rows = [{"name": name, **row} for name, row in rows.items()]
    if not rows:
        raise SystemExit("the file has no rows")
    if "model_nfe" in rows[0]:
        return few_step_block(found)
    if "tokenizer" in rows[0]:
        return priors_block(found)
    if "head_nfe" in rows[0]:
        return token_head_block(found)
    if "variant" in rows[0]:
        return variants_block(found)
    if "mup" in rows[0]:
        return rates_block(found)
    if "finetuned" in rows[0]:
        return finetuning_block(found)
    kind = next((kind for kind in COLUMNS if kind in rows[0]), None)
    if kind is None:
        return ablation_block(rows)
    cells = [[cell.format_map(row) for cell in COLUMNS[kind].values()] for row in rows]
    rule = ["---" if heading in ("", "beside", "unit", "aimed at") else "---:" for heading in COLUMNS[kind]]
    return "".join(f"| {' | '.join(row)} |\n" for row in [list(COLUMNS[kind]), rule, *cells])


def token_head_block(found: dict[str, Any]) -> str:
    """Distances of benchmarks/token_head.py by solver and head NFE, one table a feature space, and one of the solvers' errors.

    Of a solver on several grids each budget has the one of least error.
    """
    rows, budgets = found["rows"], sorted({int(row["head_nfe"]) for row in found["rows"]})
    solvers = list(dict.fromkeys(row["head_solver"] for row in rows))
    best = {
        (solver, nfe): min(own, key=lambda row: row["rmse"])
        for solver in solvers
        for nfe in budgets
        if (own := [row for row in rows if (row["head_solver"], row["head_nfe"]) == (solver, nfe)])
    }
    figures: dict[str, Callable[[dict[str, Any]], str]] = {
        f"Fréchet distance, {name}": lambda row, name=name: f"{statistics.mean(row['distances'][name]):.3f}"
        for name in found["features"]
    }
    figures["RMSE of tokens from the fine solution"] = lambda row: f"{row['rmse']:.3f}"
    text = ""
    for title, figure in figures.items():
        text += f"{title}, by head NFE:\n\n| head solver | {' | '.join(map(str, budgets))} |\n|---|{'---:|' * len(budgets)}\n"
        for solver in solvers:
            cells = [figure(best[solver, nfe]) if (solver, nfe) in best else "" for nfe in budgets]
            text += f"| {solver} | {' | '.join(cells)} |\n"
        text += "\n"
    trunk, fine = rows[0]["trunk_nfe"], found["fine"]
    features = ", ".join(f"`{features}`" for features in found["features"].values())
    return (
        f"{text}{found['tokens']}, trunk NFE {trunk:g} by {found['rule']}; n = {found['n']} images per block, {found['blocks']} "
        f"block(s), seeds {found['seeds'][0]}-{found['seeds'][1]}; features {features}; fine solution: {fine[0]} on {fine[1]}, "
        f"head NFE {fine[2]}; prior `{found['model']}`.\n"
    )


def few_step_block(found: dict[str, Any]) -> str:
    """Distances of benchmarks/few_step.py by model and budget, one table a feature space, and what was to hold."""
    rows = found["rows"]
    budgets = sorted({row["nfe"] for row in rows if row["nfe"]})
    seeds, first = len(found["training_seeds"]), rows[0]
    parts = []
    for metric, features in first["features"].items():
        lines = ["| | " + " | ".join(f"NFE {nfe}" for nfe in budgets) + " | training |"]
        lines.append("| --- |" + " ---: |" * len(budgets) + " --- |")
        for name in dict.fromkeys(row["name"] for row in rows):
            own = {row["nfe"]: row for row in rows if row["name"] == name}
            cells = [_figure(own.get(nfe, own.get(0)), metric) for nfe in budgets]
            lines.append(f"| {name} | {' | '.join(cells)} | {_took(next(iter(own.values())), found['steps'])} |")
        parts.append(f"Fréchet distance (`{features}`)\n\n" + "\n".join(lines) + "\n")
    sampled = next(row for row in rows if row["kind"] == "few-step")

    def held(nfe: int) -> str:
        lines = [line for line in found["verdicts"] if line["nfe"] == nfe]
        return f"{sum(line['held'] for line in lines)} of {len(lines)}"

    images = f"n = {sampled['n']} images per block, {sampled['blocks']} blocks, seeds {sampled['seeds']}"
    after, more = found["seconds"], found["few_step_seconds"]
    spent = f"{after:g} s of process time each on one thread"
    if found["start"] == "flow":
        spent = f"{after:g} s of process time of the flow model on one thread, then {more:.0f} s of tables or a few-step model"
    facts = (
        f"Means and standard deviations over {seeds} trainings, {spent}; "
        f"{images}, reference `{first['reference']}`. Over both feature spaces, few-step models are below every solver "
        f"{held(1)} times with 1 evaluation and {held(2)} times with 2; with 8 they are below 1.2 times exact {held(8)} times."
    )
    return "\n".join([*parts, f"{facts}\n"])


def priors_block(found: dict[str, Any]) -> str:
    """Bits and distances of benchmarks/priors.py, by tokenizer, prior and budget."""
    rows, bits, seconds = found["rows"], found["bits"], found["seconds"]
    tokenizers, codes = (list(dict.fromkeys(one[name] for one in bits)) for name in ("tokenizer", "code"))
    by = {(one["tokenizer"], one["code"]): f"{one['bits']:.1f}" + _spread(one["deviation"], ".1f") for one in bits}
    lines = ["| bits per image of the codes | " + " | ".join(codes) + " |", "| --- |" + " ---: |" * len(codes)]
    lines += [f"| {name} | " + " | ".join(by[name, code] for code in codes) + " |" for name in tokenizers]
    parts = ["\n".join(lines) + "\n"]
    budgets = sorted({row["nfe"] for row in rows if row["nfe"]})
    for metric, features in rows[0]["features"].items():
        lines = ["| | " + " | ".join(f"NFE {nfe}" for nfe in budgets) + " | seconds of training |"]
        lines.append("| --- |" + " ---: |" * (len(budgets) + 1))
        for tokenizer in tokenizers:
            own = [row for row in rows if row["tokenizer"] == tokenizer and row["name"] != "exact"]
            for name in dict.fromkeys(row["name"] for row in own):
                cells = {row["nfe"]: row for row in own if row["name"] == name}
                shown = [_figure(cells.get(nfe, cells.get(0)), metric) for nfe in budgets]
                took = seconds[next(iter(cells.values()))["prior"] or tokenizer]
                label = name if name.startswith(tokenizer) else f"{tokenizer}: {name}"
                lines.append(f"| {label} | {' | '.join(shown)} | {took:.0f} |")
        parts.append(f"Fréchet distance (`{features}`)\n\n" + "\n".join(lines) + "\n")
    sampled = next(row for row in rows if row["nfe"])
    held = [sum(line["held"] for line in group) for group in _by_figure(found["verdicts"])]
    of = [len(group) for group in _by_figure(found["verdicts"])]
    images = f"n = {sampled['n']} images per block, {sampled['blocks']} block(s), seeds {sampled['seeds']}"
    facts = (
        f"Means and standard deviations over {len(found['training_seeds'])} trainings of tokenizer and prior, seconds on one "
        f"thread; {images}, reference `{sampled['reference']}`. At its largest budget a prior is within twice its ceiling "
        f"{held[0]} of {of[0]} times; its bits are below those of independent positions {held[1]} of {of[1]} times."
    )
    return "\n".join([*parts, f"{facts}\n"])


def variants_block(found: dict[str, Any]) -> str:
    """Distances of benchmarks/model_ablation.py by variant, at equal steps and at equal seconds, one table a feature space."""
    rows, axes = found["rows"], {"steps": "steps", "seconds": "seconds of training"}
    first = next(row for row in rows if not row["beside"])
    base = first["step_seconds"]
    parts = []
    for metric, features in found["features"].items():
        lines = ["| | beside | a step | " + " | ".join(f"equal {name}" for name in axes.values()) + " |"]
        lines.append("| --- | --- | ---: |" + " --- |" * len(axes))
        for row in rows:
            cells = [_variant(row["cells"][f"{axis} {metric}"]) for axis in axes]
            label, beside = f"`{row['variant']}`: {row['text']}", f"`{row['beside']}`" if row["beside"] else ""
            lines.append(f"| {label} | {beside} | {row['step_seconds'] / base:.2f} | {' | '.join(cells)} |")
        limits = ", ".join(f"{name} {values[metric]:.3g}" for name, values in found["limits"].items())
        parts.append(f"Fréchet distance (`{features}`), {limits}\n\n" + "\n".join(lines) + "\n")
    seeds, steps = len(found["training_seeds"]), first["stops"]["steps"]
    facts = (
        f"{found['data']}, {found['tokens']} tokens; {steps:,} steps of `{first['variant']}`, a step of which takes "
        f"{1000 * base:.3g} ms on a thread; means over {seeds} trainings, in brackets the change that it makes, with "
        f'its 95 % interval, "=" where it has 0; n = {found["n"]} images, seeds {found["seeds"]}, NFE {found["nfe"]}, reference '
        f"`{found['reference']}`."
    )
    return "\n".join([*parts, f"{facts}\n"])


def _variant(cell: dict[str, Any]) -> str:
    """Mean, and the change beside what the variant was added to, bold where it is better beyond its interval."""
    if "change" not in cell:
        return f"{cell['mean']:.3g}"
    interval = "" if cell["interval"] is None else ": {:+.0%} to {:+.0%}".format(*cell["interval"])
    shown = f"{cell['mean']:.3g} ({cell['change']:+.0%}{interval})"
    if cell["verdict"] == "better":
        return f"**{shown}**"
    return f"{shown} {cell['verdict']}"


def finetuning_block(found: dict[str, Any]) -> str:
    """Distances of benchmarks/finetuning.py in two feature spaces, and what each training took."""
    first, least = found["rows"][0], {}
    other = next(name for name in first if name.endswith("_distance") and not name.startswith("floor_"))
    for name in ("distance", other):
        least[name] = min(row[name] for row in found["rows"])
    lines = [
        f"| | rate | parameters that train | stored | seconds | distance | {other.removesuffix('_distance')} |",
        "| --- " + "| ---: " * 6 + "|",
    ]
    for row in found["rows"]:
        cells = [f"{row[name]:.3g} ± {row[f'{name}_error']:.2g}" for name in least]
        cells = [f"**{cell}**" if row[name] == least[name] else cell for name, cell in zip(least, cells, strict=True)]
        took = [f"{row['rate']:g}", f"{row['parameters']:,}", f"{row['bytes'] / 1000:,.0f} kB", f"{row['seconds']:.0f}"]
        lines.append(
            f"| {row['finetuned']} | {' | '.join(took if row['steps'] else ['', '', '', ''])} | {' | '.join(cells)} |"
        )
    floor = " | ".join(f"{first[f'floor_{name}']:.3g}" for name in least)
    lines.append(f"| floor | | | | | {floor} |")
    facts = (
        f"{found['rows'][-1]['steps']} steps, one training each; n = {first['n']} images per block, {first['blocks']} blocks; "
        f"features `{first['features']}` and `{first['further']}`, reference `{first['reference']}`; {found['hardware']}."
    )
    return "\n".join(lines) + f"\n\n{facts}\n"


def rates_block(found: dict[str, Any]) -> str:
    """Losses of benchmarks/mup.py by width and learning rate, with muP and without, the least of each line bold."""
    rates = sorted({row["rate"] for row in found["rows"]})
    lines = ["| | width | " + " | ".join(f"2^{math.log2(rate):.0f}" for rate in rates) + " |"]
    lines.append("| --- | ---: |" + " ---: |" * len(rates))
    for line in found["best"]:
        own = {
            row["rate"]: row["loss"]
            for row in found["rows"]
            if (row["mup"], row["width"]) == (line["mup"], line["width"])
        }
        cells = [f"**{own[rate]:.3f}**" if rate == line["rate"] else f"{own[rate]:.3f}" for rate in rates]
        lines.append(f"| {'muP' if line['mup'] else 'without'} | {line['width']} | {' | '.join(cells)} |")
    facts = f"Loss by learning rate; {found['data']}, {found['steps']} steps, training seed {found['seed']}, {found['hardware']}."
    return "\n".join(lines) + f"\n\n{facts}\n"


def rates_picture(page: Path, name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Draw docs/images/<name>.png, loss against learning rate by width; the link to it from the page."""
    figure = new_figure(height=360)
    for index, mup in enumerate((True, False)):
        half = WIDE / 2 - 10
        axes = place(figure, left=62 + index * half, right=14 + (1 - index) * half, bottom=88)
        for i, width in enumerate(sorted({row["width"] for row in rows})):
            line = sorted((row["rate"], row["loss"]) for row in rows if (row["mup"], row["width"]) == (mup, width))
            axes.plot(*zip(*line), label=f"width {width}", markersize=6, **look(i))
        axes.set_xscale("log", base=2)
        axes.set_ylim(min(row["loss"] for row in rows) - 0.02, 1.02)
        dress(axes, "learning rate", "loss" if mup else "", "muP" if mup else "without")
    legend_below(figure, figure.axes[0], columns=4)
    picture = Path(__file__).parent / "images" / f"{name}.png"
    figure.savefig(picture, dpi=PNG_DPI)
    return f"![Loss against learning rate by width]({os.path.relpath(picture, page.parent)})"


def _by_figure(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """What was to hold of distances, and of bits."""
    return [[line for line in lines if (line["figure"] == "bits") is bits] for bits in (False, True)]


def _spread(deviation: float | None, form: str) -> str:
    return "" if not deviation else f" ± {deviation:{form}}"


def _figure(row: dict[str, Any] | None, metric: str) -> str:
    if row is None:
        return "–"
    deviation = row["deviations"][metric]
    return f"{row['distances'][metric]:.3g}" + _spread(deviation, ".2g")


def _took(row: dict[str, Any], steps: dict[str, int]) -> str:
    """Images and evaluations of a row's training."""
    if not row["training_images"]:
        return ""
    shown = f"{row['training_images']:,} images, {row['model_nfe']:,} evaluations"
    more = f", and {row['training_nfe']:,} to learn it" if row["training_nfe"] else ""
    return shown + more + (f", {steps[row['name']]:,} steps" if row["name"] in steps else "")


def ablation_block(results: Sequence[dict[str, Any]]) -> str:
    """RMSE of every variant by budget, the least bold, and what learning it at the largest one cost."""
    budgets = sorted({one["nfe"] for one in results})
    least = {nfe: min(one["rmse"] for one in results if one["nfe"] == nfe) for nfe in budgets}
    rows: dict[tuple[str, ...], dict[int, dict[str, Any]]] = {}
    for one in results:
        key = tuple(one[name] for name in ("solver", "mode", "grid", "teacher"))
        rows.setdefault(key, {})[one["nfe"]] = one

    def cell(row: dict[int, dict[str, Any]], nfe: int) -> str:
        text = f"{row[nfe]['rmse']:.3f}" if nfe in row else "–"
        return f"**{text}**" if nfe in row and row[nfe]["rmse"] == least[nfe] else text

    lines = [
        "| solver | learned | grid | teacher | " + " | ".join(f"NFE {nfe}" for nfe in budgets) + " | learned with |"
    ]
    lines.append("| --- | --- | --- | --- |" + " ---: |" * (len(budgets) + 1))
    for (solver, mode, grid, teacher), row in rows.items():
        spent = row[max(row)]["training_nfe"]
        found = (f"`{solver}`", mode.replace("_", " "), grid, teacher, *(cell(row, nfe) for nfe in budgets))
        lines.append(f"| {' | '.join(found)} | {f'{spent:,}' if spent else ''} |")
    return "\n".join(lines) + "\n"


def embed_proof(page: Path, name: str, report: Path) -> None:
    """The block of a proving ground, short as `prove` and whole as `prove-all`; both show the same picture. Any other name: the
    tables of its figures, without a picture."""
    result = read_result(report / "results.jsonl")
    if name not in ("prove", "prove-all"):
        tables = (figure_table(result, figure) for figure in FIGURES)
        text = "\n".join(f"**{markdown(t.title)}**\n\n{markdown_table(t)}\n" for t in tables)
        _replace(page, name, f"{text}\n{proof_facts(result)}\n")
        return
    picture = Path(__file__).parent / "images" / "prove.png"
    picture.parent.mkdir(exist_ok=True)
    shutil.copyfile(report / "rmse_vs_nfe.png", picture)
    link = f"![RMSE against NFE]({os.path.relpath(picture, page.parent)})"
    if name == "prove":
        _replace(page, name, f"{proof_tables(result, SHOWN)}\n\n{short_facts(result)}\n")
        return
    _replace(page, name, f"{proof_tables(result, ())}\n{proof_facts(result)}\n\n{link}\n")


def proof_tables(result: Result, solvers: Sequence[str]) -> str:
    """RMSE of the solvers named at `BUDGETS`, or every table of all."""
    if solvers:
        return markdown_table(short(figure_table(result, "rmse", solvers)))
    tables = [*(figure_table(result, name) for name in FIGURES), order_table(result)]
    return "\n".join(f"**{markdown(t.title)}.** {markdown(t.note)}\n\n{markdown_table(t)}\n" for t in tables)


def short(table: Table) -> Table:
    """The columns of `BUDGETS`, means alone."""
    kept = [i for i, head in enumerate(table.heads[1:]) if head in {f"NFE {nfe}" for nfe in BUDGETS}]

    def entry(found: Entry | None) -> Entry | None:
        return None if found is None else replace(found, value=found.value.split(" ± ")[0], small="")

    lines = tuple(replace(line, entries=tuple(entry(line.entries[i]) for i in kept)) for line in table.lines)
    return replace(table, heads=(table.heads[0], *(table.heads[1 + i] for i in kept)), lines=lines)


def short_facts(result: Result) -> str:
    """What the short table is of, with its greatest standard error."""
    cells = [cell for cell in result.cells if cell.solver in SHOWN and cell.nfe in BUDGETS]
    measured = [(cell.error("rmse"), cell.mean("rmse")) for cell in cells]
    errors = [error / mean for error, mean in measured if error is not None and mean is not None]
    return (
        f"RMSE to the exact solution on `{result.ground}`, seeds {result.seeds} in blocks of {result.n}; standard errors are at "
        f"most {max(errors):.1%}."
    )


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


def damages_block(report: Path) -> str:
    """A line per damage, a column per feature space: Fréchet distance times its floor, KID, sliced distance times its floor."""
    with (report / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    spaces = [[row for row in found if row["features"] == name] for name in dict.fromkeys(r["features"] for r in found)]
    lines = [
        Line(
            same[0]["damage"],
            (Entry(f"{float(same[0]['required']):g}" if same[0]["required"] else "–"), *map(_answer, same)),
        )
        for same in list(zip(*spaces, strict=True))[1:]
    ]
    floors = [" / ".join(number(float(its[0][key])) for key in ("distance", "kid", "sliced")) for its in spaces]
    shares = [f"{float(its[0]['between']):.0%}" for its in spaces]
    lines.append(Line(FLOOR, (None, *map(Entry, floors)), floor=True))
    lines.append(Line("variance between classes", (Entry(""), *map(Entry, shares))))
    heads = ("damage", "required", *(its[0]["features"] for its in spaces))
    return f"{markdown_table(Table('', '', heads, tuple(lines)))}\n\nn = {spaces[0][0]['n']} held-out images.\n"


def _answer(row: dict[str, str]) -> Entry:
    ratio, sliced = (number(float(row[key])) for key in ("distance_ratio", "sliced_ratio"))
    small = "" if row["answers"] == "true" else "too little"
    return Entry(f"{ratio} / {float(row['kid_errors']):+.1f} / {sliced}", small)


def _replace(page: Path, name: str, block: str) -> None:
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    before, rest = page.read_text().split(begin, 1)
    page.write_text(f"{before}{begin}\n{block}{end}{rest.split(end, 1)[1]}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    embed(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
