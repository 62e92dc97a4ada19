"""The page of a sweep's report: what can be reached, who is nearest to the exact solution, and every figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from midway.gen.core.text import html
from midway.gen.evaluation.comparing import (
    baselines_of,
    check_comparable,
    differences,
    distance_name,
    feature_names,
    limits_of,
    question,
    shown,
    training_costs,
)
from midway.gen.evaluation.records import LIMITS, TO_EXACT
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
from midway.gen.report.plots import distance_png
from midway.gen.report.sections import Section, section_html
from midway.gen.report.sweep_tables import (
    Measurements,
    all_figures,
    baseline_table,
    choice_table,
    difference_table,
    distance_table,
    error_table,
    further_tables,
    rmse_table,
)
from midway.gen.report.table import ReportContext, joined, number
from midway.gen.sweep.choice import Choice
from midway.gen.sweep.run import Sweep

Grids = Mapping[tuple[str, int], bytes]
"""PNG of samples by (solver, NFE)."""
PLOTS = (
    ("exact_vs_nfe.png", "distance to the exact solution against NFE"),
    ("distance_vs_nfe.png", "distance against NFE"),
    ("distance_vs_seconds.png", "distance against time"),
)


@dataclass(frozen=True)
class Pictures:
    """PNG of samples of the same seeds by (solver, NFE), and of the limits by their names; may be empty."""

    grids: Grids = field(default_factory=dict)
    limits: Mapping[str, bytes] = field(default_factory=dict)


def pictures_of(sweep: Sweep) -> Pictures:
    """All of a sweep."""
    return Pictures(sweep.grids, sweep.limits)


def provenance(ms: Measurements, context: ReportContext) -> list[tuple[str, str]]:
    """(name, value) of everything that is needed to repeat the sweep."""
    limits, sampled = limits_of(ms), [m for m in ms if m.solver not in LIMITS]
    facts = [
        ("model", context.model),
        ("data", context.data),
        ("features", feature_names(ms)),
        ("further features", joined(m.further for m in ms)),
        ("reference", joined(m.reference for m in ms)),
        ("images per cell", joined(m.n for m in sampled)),
        ("images of the limits", ", ".join(f"{m.solver} {m.n}" for m in limits.values())),
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


def _lead(ms: Measurements) -> str:
    """The best solver at the smallest and at the largest budget, and the limits."""
    name, limits = question(ms), limits_of(ms)
    table = error_table(ms) if name == TO_EXACT else distance_table(ms)
    found = differences(ms)
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
    ground = ", ".join(f"{title} {number(m.distance)}" for title, m in limits.items())
    ground = f" Distances to the data of the limits: {ground}." if ground else ""
    what = "Nearest to the exact solution" if name == TO_EXACT else "Lowest distance"
    return f'<p class="lead">{what}: {", ".join(winners)}.{ground}</p>' if winners else ""


LIMIT_TEXTS = {
    "floor": "floor: held-out real images, the limit of the measure",
    "ceiling": "ceiling: held-out images through the tokenizer and back, the limit of the tokenizer",
    "exact": "exact: the fine solution from the first seeds, the limit of the model",
}


def _limits(ms: Measurements, pictures: Pictures) -> str:
    """Pictures of the limits beside one another, each with its distance."""
    figures = [
        figure(pictures.limits[m.solver], f"images of the {m.solver}", f"{LIMIT_TEXTS[m.solver]}; {number(m.distance)}")
        for m in limits_of(ms).values()
        if m.solver in pictures.limits
    ]
    if not figures:
        return ""
    text = (
        "The first two are the same images before and after the tokenizer. What lies between floor and ceiling is the "
        "tokenizer's, between ceiling and exact the model's, and above exact the solver's. Below: Fréchet distance to the data."
    )
    return f'<h2>What can be reached</h2><p>{text}</p><div class="limits">{"".join(figures)}</div>'


def all_plots(ms: Measurements) -> dict[str, bytes]:
    """PNG by file name."""
    return {
        "exact_vs_nfe.png": distance_png(ms, "nfe", "to_exact"),
        "distance_vs_nfe.png": distance_png(ms, "nfe"),
        "distance_vs_seconds.png": distance_png(ms, "seconds"),
    }


def _plot(ms: Measurements, name: str, png: bytes) -> str:
    spread = "trainings" if any(m.trainings > 1 for m in ms) else "seed blocks"
    bars = f"Both axes are logarithmic. Bars: standard deviation over {spread}. Hollow markers: trained solvers."
    caption = {
        "exact_vs_nfe.png": f"The solver's own error. {bars}",
        "distance_vs_nfe.png": f"Distance to the data, which contains the errors of tokenizer and model. {bars}",
        "distance_vs_seconds.png": "The same measurements against the time to make the images, sampling and decoding, on the "
        "hardware below. Grey: the Pareto front, better than all others in distance or time.",
    }[name]
    return figure(png, dict(PLOTS)[name], caption)


def _baselines(ms: Measurements, grids: Grids) -> str:
    table = baseline_table(ms)
    if not table.lines:
        return ""
    pngs = [(m.solver, grids.get((m.solver, m.nfe))) for m in baselines_of(ms)]
    pictures = ["" if png is None else image_tag(png, f"samples of {name}") for name, png in pngs]
    return f"<h2>{table.title}</h2><p>{table.note}</p>{html_table(table, pictures, 'baselines')}"


def _samples(ms: Measurements, grids: Grids) -> str:
    others = {(m.solver, m.nfe) for m in baselines_of(ms)}
    name = question(ms)
    captions = {
        key: f"{number(m.metrics[name].mean) if name in m.metrics else 'diverged'} · {m.grid}".removesuffix(" · ")
        for key, m in shown(ms).items()
    }
    below = "distance to the exact solution" if name == TO_EXACT else "Fréchet distance"
    return explorer({key: png for key, png in grids.items() if key not in others}, captions, below)


def report_html(
    ms: Measurements,
    context: ReportContext,
    pictures: Pictures | None = None,
    sections: Sequence[Section] = (),
    plots: Mapping[str, bytes] | None = None,
    choice: Choice | None = None,
) -> str:
    """One self-contained page. ValueError for measurements that do not compare."""
    check_comparable(ms)
    plots, pictures = plots or all_plots(ms), pictures or Pictures()
    plots = {name: png for name, png in plots.items() if name != "exact_vs_nfe.png" or question(ms) == TO_EXACT}
    data, features = distance_table(ms), html(feature_names(ms))
    return page(
        context,
        _lead(ms),
        [
            _limits(ms, pictures),
            titled_table(error_table(ms)),
            f"<h2>{distance_name(ms)} to the data by step budget</h2><p>{html(data.note.capitalize())}. NFE counts network "
            "evaluations per image. Small print: the time grid, chosen on other seeds. Comparable only with numbers of the same "
            f"feature name, <code>{features}</code>.</p>",
            html_table(data) if shown(ms) else "",
            f'<div class="plots">{"".join(_plot(ms, name, png) for name, png in plots.items())}</div>',
            _baselines(ms, pictures.grids),
            *map(titled_table, (rmse_table(ms), difference_table(ms))),
            _samples(ms, pictures.grids),
            *map(section_html, sections),
            notes_list(context.notes),
            *(titled_table(table, folded=True) for table in further_tables(ms)),
            "" if choice is None else titled_table(choice_table(choice), folded=True),
            titled_table(all_figures(ms), folded=True),
            facts_list(provenance(ms, context)),
        ],
        SCRIPT,
    )
