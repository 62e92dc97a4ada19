"""The page of a sweep's report: the answer, who is nearest to the exact solution, samples, what can be reached, all figures."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

from midway.gen.data.splits import Splits
from midway.gen.evaluation.comparing import (
    baselines_of,
    best_cell,
    check_comparable,
    contrast,
    distance_name,
    feature_names,
    few_step,
    first_as_exact,
    limit_of,
    limits_of,
    nearest_to_data,
    own_weights,
    priors,
    question,
    shown,
    training_costs,
)
from midway.gen.evaluation.records import CEILING, EXACT, FLOOR, LIMITS, SOLVER, TO_EXACT, Measurement
from midway.gen.features.reference import balanced
from midway.gen.report.html import Block, Explorer, Page, Picture, facts_block, html_page, notes_block, table_block
from midway.gen.report.notes import answer, figure, named_cell
from midway.gen.report.plots import drawings, guidance_drawing
from midway.gen.report.sections import baseline_table, choice_table, prior_table
from midway.gen.report.sweep_tables import (
    Measurements,
    all_figures,
    difference_table,
    distance_table,
    error_table,
    further_tables,
    rmse_table,
)
from midway.gen.report.table import ReportContext, joined, number
from midway.gen.sweep.choice import Choice
from midway.gen.sweep.guidance import GuidanceChoice
from midway.gen.sweep.jobs import SweepConfig
from midway.gen.sweep.measure import COLUMNS, SHOWN
from midway.gen.sweep.run import Sweep

LIMIT_NAMES = {FLOOR: "real images", CEILING: "through the tokenizer", EXACT: "exact solution"}
LIMIT_TEXTS = {
    FLOOR: "held-out images, the limit of the measure",
    CEILING: "the same through the tokenizer and back, the limit of the tokenizer",
    EXACT: "the fine solution of the first seeds, the limit of the model",
}


@dataclass(frozen=True)
class Pictures:
    """PNG of samples of the same seeds by (solver, NFE), and of the limits by their names; may be empty.

    classes: of the images shown, by FLOOR (held-out images) and EXACT (seeds); without entries where they have none.
    """

    grids: Mapping[tuple[str, int], bytes] = field(default_factory=dict)
    limits: Mapping[str, bytes] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def of(self, png: bytes, alt: str, title: str = "", caption: str = "", limit: str = EXACT) -> Picture:
        """A picture with the classes of its images, which are those of the seeds or of another limit."""
        return Picture(png, alt, title, caption, self.classes.get(FLOOR if limit == CEILING else limit, ()), COLUMNS)

    def of_limit(self, name: str, caption: str) -> Picture | None:
        """One of the limits, None if it was not drawn."""
        if name not in self.limits:
            return None
        return self.of(self.limits[name], f"{LIMIT_NAMES[name]}: {LIMIT_TEXTS[name]}", LIMIT_NAMES[name], caption, name)


def pictures_of(sweep: Sweep, splits: Splits, config: SweepConfig) -> Pictures:
    """All of a sweep, with the classes of what they show."""
    names, held_out = splits.train.classes, splits.held_out
    classes: dict[str, tuple[str, ...]] = {}
    if names:
        classes[FLOOR] = tuple(names[label] for label in held_out.labels[balanced(held_out.labels)[:SHOWN]].tolist())
    if config.draw is not None and len(config.draw.counts) == len(names):
        seeds = torch.arange(config.first_seed, config.first_seed + min(SHOWN, config.n))
        classes[EXACT] = tuple(names[label] for label in config.draw.labels(seeds).tolist())
    return Pictures(sweep.grids, sweep.limits, {} if _older(sweep, splits) else classes)


def _older(sweep: Sweep, splits: Splits) -> bool:
    """Whether pictures are of an earlier version, which stored other numbers of images."""
    from PIL import Image

    height, width = splits.train.images.shape[-2:]
    sizes = (Image.open(io.BytesIO(png)).size for png in [*sweep.grids.values(), *sweep.limits.values()])
    return any(round(COLUMNS * high * width / (wide * height)) * COLUMNS != SHOWN for wide, high in sizes)


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
        ("guidance", "chosen for every row" if any(m.guidance for m in ms) else f"{context.guidance:g}"),
        ("training of models", "; ".join(_training(ms))),
        ("training of solvers", ", ".join(f"{name} {cost:,} evaluations" for name, cost in training_costs(ms).items())),
        ("hardware", context.hardware),
        ("seconds measured on", joined(m.timing for m in sampled)),
        ("versions", context.version_text),
        ("command", context.command),
    ]
    return [(name, value) for name, value in facts if value]


def _training(ms: Sequence[Measurement]) -> list[str]:
    """What the training of each model took: `digits-dit 256,000 images, 256,000 evaluations`."""
    models = {m.model: m for m in ms if m.model and m.training_images}
    return [f"{name} {m.training_images:,} images, {m.model_nfe:,} evaluations" for name, m in models.items()]


def _hero(ms: Measurements, pictures: Pictures) -> tuple[Picture, ...]:
    """Samples of the cells that the answer names, and of the exact solution, else real images."""
    best, models = first_as_exact(ms) or best_cell(ms), {m.solver for m in own_weights(ms)}
    few = next((key for key in nearest_to_data(ms).values() if key[0] in models), None)
    found = tuple(
        _picture(key, shown(ms)[key], question(ms), pictures)
        for key in dict.fromkeys((best, few))
        if key is not None and key in pictures.grids
    )
    if not found:
        return ()
    limit = limit_of(ms, EXACT)
    distance = "" if limit is None else f"; its distance to the data {number(limit.distance, limit.std('distance'))}"
    exact = pictures.of_limit(EXACT, f"of the same seeds{distance}") or pictures.of_limit(FLOOR, LIMIT_TEXTS[FLOOR])
    return found if exact is None else (*found, exact)


def _picture(key: tuple[str, int], m: Measurement, name: str, pictures: Pictures) -> Picture:
    """Samples of a cell over what ranks it, or over the distance to the data."""
    name = name if name in m.metrics else "distance"
    what = "distance to the exact solution" if name == TO_EXACT else "distance to the data"
    text = f"{what} {figure(m, name)}"
    return pictures.of(pictures.grids[key], f"samples of {named_cell(key)}", f"{key[0]}, {key[1]} NFE", text)


def _limits(ms: Measurements, pictures: Pictures) -> Block | None:
    """Pictures of the limits beside one another, each with its distance."""
    text = (
        "The first two are the same images before and after the tokenizer. What lies between floor and ceiling is the "
        "tokenizer's, between ceiling and exact the model's, and above exact the solver's. Below: Fréchet distance to the data."
    )
    shown_limits = (
        pictures.of_limit(m.solver, f"{title} {number(m.distance, m.std('distance'))}: {LIMIT_TEXTS[m.solver]}")
        for title, m in limits_of(ms).items()
    )
    found = tuple(picture for picture in shown_limits if picture is not None)
    return Block("What can be reached", text, pictures=found) if found else None


def _baselines(ms: Measurements, pictures: Pictures) -> Block | None:
    table = baseline_table(ms)
    if not table.lines:
        return None
    pngs = [(m.solver, pictures.grids.get((m.solver, m.nfe))) for m in baselines_of(ms)]
    beside = tuple(None if png is None else Picture(png, f"samples of {name}") for name, png in pngs)
    return replace(table_block(table), beside=beside)


def _samples(ms: Measurements, pictures: Pictures) -> Block | None:
    """All panels of the same seeds, with real images and the exact solution to compare."""
    name, every = question(ms), shown(ms)
    panels = {
        key: pictures.of(
            pictures.grids[key], f"samples of {key[0]} with {key[1]} evaluations", caption=_caption(m, name)
        )
        for key, m in every.items()
        if key in pictures.grids
    }
    if not panels:
        return None
    limits = {LIMIT_NAMES[key]: pictures.of_limit(key, LIMIT_TEXTS[key]) for key in (EXACT, FLOOR, CEILING)}
    fixed = {title: picture for title, picture in limits.items() if picture is not None}
    solvers = list(dict.fromkeys(solver for solver, _ in panels))
    least = min(nfe for _, nfe in panels)
    (worst, nfe), (best, _) = contrast(ms) or ((solvers[0], least), (solvers[-1], least))
    below = "distance to the exact solution" if name == TO_EXACT else "Fréchet distance"
    text = (
        f"Every panel {'of a solver ' * bool(own_weights(ms))}starts from the same noise, so a difference between panels is the "
        f"solver's doing. {'Few-step models have other weights. ' * bool(few_step(ms))}"
        f"{'Priors draw tokens by the same seeds, from weights of their own. ' * bool(priors(ms))}Real images are others. "
        f"Below each: {below} and grid."
    )
    return Block("Samples from the same seeds", text, explorer=Explorer(panels, fixed, (nfe, worst, best)))


def _caption(m: Measurement, name: str) -> str:
    if m.kind != SOLVER and not m.nonfinite:
        return f"{number(m.distance)} to the data · {m.sampler}"
    figure = number(m.metrics[name].mean) if name in m.metrics else "diverged"
    return f"{figure} · {m.place}".removesuffix(" · ")


def _choice_block(choice: Choice | GuidanceChoice) -> Block:
    """The choice as a table; of guidance also as a plot, and unfolded."""
    block = table_block(choice_table(choice), folded=True)
    if not isinstance(choice, GuidanceChoice):
        return block
    return replace(block, drawings=(guidance_drawing(choice),), folded=False)


def blocks(
    ms: Measurements,
    context: ReportContext,
    pictures: Pictures,
    sections: Sequence[Block],
    choice: Choice | GuidanceChoice | None,
) -> list[Block]:
    """Everything below the first screen: first what ranks solvers and what it looks like, then, folded, all else."""
    _, *plots = drawings(ms)
    error, data, what = error_table(ms), distance_table(ms), distance_name(ms)
    small = "the time grid and the scale w of guidance" if any(m.guidance for m in ms) else "the time grid"
    reading = (
        f"{data.note[:1].upper()}{data.note[1:]}. NFE counts network evaluations per image. Small print: {small}, "
        f"{'of solvers ' * bool(own_weights(ms))}chosen on other seeds. Comparable only with numbers of the same feature name, "
        f"{feature_names(ms)}."
    )
    found = [
        Block(f"{what} to the exact solution by step budget", error.note, table=error) if error.lines else None,
        Block(f"{what} to the data by step budget", reading, table=data if data.lines else None),
        Block("Error and time", drawings=tuple(plots)),
        _samples(ms, pictures),
        _limits(ms, pictures),
        *(table_block(table) for table in [prior_table(ms)] if table.lines),
        _baselines(ms, pictures),
        *(table_block(table, folded=True) for table in (rmse_table(ms), difference_table(ms)) if table.lines),
        *(table_block(table, folded=True) for table in further_tables(ms) if table.lines),
        *sections,
        _choice_block(choice) if choice is not None and choice.figures else None,
        table_block(all_figures(ms), folded=True),
        notes_block(context.notes) if context.notes else None,
        facts_block(provenance(ms, context)),
    ]
    return [block for block in found if block is not None]


def report_html(
    ms: Measurements,
    context: ReportContext,
    pictures: Pictures | None = None,
    sections: Sequence[Block] = (),
    choice: Choice | GuidanceChoice | None = None,
) -> str:
    """One self-contained page. ValueError for measurements that do not compare."""
    check_comparable(ms)
    pictures = pictures or Pictures()
    parts = blocks(ms, context, pictures, sections, choice)
    return html_page(Page(context, answer(ms), _hero(ms, pictures), drawings(ms)[0], parts))
