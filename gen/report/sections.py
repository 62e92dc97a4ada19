"""Parts of a report beside its tables by budget: baselines, priors over codes, and the choice of the grids as tables; how flat
the model's trajectories are, and which codes its samples use."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from midway.gen.core.text import plot_label
from midway.gen.data.images import to_float
from midway.gen.data.pixels import Images
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.sampling import SamplingConfig
from midway.gen.evaluation.comparing import baselines_of, distance_name, priors
from midway.gen.evaluation.records import Measurement
from midway.gen.metrics.code_usage import CodeUse
from midway.gen.report.drawing import (
    COLOURS,
    INK,
    NARROW,
    PAPER,
    REFERENCE,
    SIZE,
    Drawing,
    colour,
    dress,
    new_figure,
    place,
)
from midway.gen.report.html import Block
from midway.gen.report.table import ABSENT, Column, Entry, Line, Table, columns_table, number
from midway.gen.sweep.choice import Choice
from midway.gen.sweep.guidance import GuidanceChoice, in_order
from midway.gen.sweep.trajectories import Spread, TrajectoryGeometry, random_walk, trajectory_geometry
from midway.samplers.grids import GRIDS
from midway.samplers.solvers import SOLVERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SEEDS = 64
STEPS = 32
CODED = 1000
"""Images at most whose codes are counted."""


def trajectory_section(trained: TrainedModel, config: SamplingConfig) -> Block:
    """Principal components of trajectories of Heun's method at 64 evaluations; of a model that jumps, those of its velocity."""
    table = SOLVERS["heun"].build(trained.model.schedule, GRIDS["karras"](trained.model.schedule, STEPS))
    found = trajectory_geometry(trained, table, torch.arange(SEEDS), config)
    rank, off, two = found.effective_rank, found.deviation, found.explained[1]
    walk = random_walk(found.steps, 2).sum().item()
    text = (
        f"{found.count} trajectories of Heun's method in {found.steps} steps: two principal components hold "
        f"{100 * two.mean:.1f} ± {100 * two.std:.1f} % of a trajectory's variance, its effective rank is {rank.mean:.2f} ± "
        f"{rank.std:.2f}, and its deviation from its chord is {off.mean:.2f} ± {off.std:.2f} of the chord's length. Steps at "
        f"right angles to one another, in no plane at all, would have {100 * walk:.0f} % in two. The nearer to a plane, the more "
        "a single learned direction can do, the assumption of AMED; where alpha and sigma trace a curve, as under cosine or "
        "vp, part of the plane is the schedule's own."
    )
    alt = "Variance explained by the first components, and trajectories, each on its own first two components"
    drawing = Drawing("trajectories", alt, "", lambda narrow: trajectory_figure(found, narrow))
    return Block("Shape of the trajectories", text, (drawing,), folded=True)


@torch.no_grad()
def code_section(trained: TrainedModel, held_out: Images, latents: Tensor) -> Block | None:
    """Codes of held-out images uint8 (N, C, H, W) and of samples' standardised latents (N, C, h, w); None without a codebook."""
    tokenizer = trained.tokenizer
    if tokenizer.quantizer.codebook_size is None:
        return None
    images = to_float(held_out[:CODED].to(tokenizer.device))
    mean, std = tokenizer.latent_mean.view(-1, 1, 1), tokenizer.latent_std.view(-1, 1, 1)
    raw = latents[:CODED].to(tokenizer.device) * std + mean
    real, drawn = (
        CodeUse.of(indices.reshape(-1, tokenizer.quantizer.groups).cpu(), tokenizer.quantizer.codebook_size)
        for indices in (tokenizer.encode_indices(images), tokenizer.quantizer.nearest(raw)[1])
    )
    text = (
        f"{tokenizer.tokens} codes an image, each of {tokenizer.quantizer.codebook_size:,}. {_text(real, len(images))} "
        f"held-out images; {_text(drawn, min(CODED, len(latents)))} samples (the fine solution, snapped to codes). "
        "Perplexity is the number of equally used codes of the same entropy; it cannot exceed the number of tokens."
    )
    return Block("Use of the codes", text, folded=True)


def _text(use: CodeUse, images: int) -> str:
    perplexity = sum(use.perplexities) / len(use.perplexities)
    return f"{use.used:,} different ones (perplexity {perplexity:,.0f}) in {use.counted:,} tokens of {images:,}"


# ---- tables ----

Measurements = Sequence[Measurement]
_DISTANCE = Column[Measurement]("distance", lambda m: number(m.distance, m.std("distance")), str)


def baseline_table(ms: Measurements) -> Table:
    """Baselines, lowest distance first, each at its own NFE; that of external images is unknown."""
    rows = baselines_of(ms)
    columns = (
        Column[Measurement]("NFE", lambda m: str(m.nfe) if m.nfe else ABSENT, str),
        _DISTANCE,
        Column[Measurement](
            "s / 1000 images", lambda m: number(1000 * m.image_seconds / m.n) if m.nfe else ABSENT, str
        ),
    )
    note = (
        "Other models, and external images, measured alike: the same image count, features and reference. Each costs its own "
        "number of network evaluations."
    )
    return columns_table("Baselines", note, "baseline", [m.solver for m in rows], rows, columns)


def prior_table(ms: Measurements) -> Table:
    """Every rule of every prior at every budget, in the order of measurement; no lines without priors."""
    rows = priors(ms)
    columns = (
        Column[Measurement]("rule", lambda m: f"{m.sampler}, {m.grid}".removesuffix(", "), str),
        Column[Measurement]("NFE", lambda m: m.nfe, str),
        Column[Measurement]("token-evaluations", lambda m: m.token_evaluations, lambda v: f"{v:,}"),
        Column[Measurement]("head NFE a token", lambda m: m.head_nfe or None, lambda v: f"{v:g}"),
        _DISTANCE,
        Column[Measurement]("s / 1000 images", lambda m: 1000 * m.image_seconds / m.n),
    )
    note = (
        f"{distance_name(ms)} to the data. NFE: passes of an image through the trunk, twice with guidance. Token-evaluations: "
        "the tokens of all these passes, one each for a causal prior with its cache, all for a masked one. maskgit draws from "
        "another law than the model's at every NFE; random, halton and certain from the model's own at one evaluation a token."
    )
    return columns_table("Priors over codes", note, "prior", [m.model or m.solver for m in rows], rows, columns)


def choice_table(choice: Choice | GuidanceChoice) -> Table:
    """What the grid, or the guidance, of each solver and budget was chosen by; no lines where there was nothing to choose."""
    if isinstance(choice, GuidanceChoice):
        return guidance_table(choice)
    columns = sorted({(grid, nfe) for _, grid, nfe in choice.figures}, key=lambda place: (place[1], place[0]))
    lines = (
        Line(
            solver,
            tuple(
                None if (figure := choice.figures.get((solver, grid, nfe))) is None
                else Entry(number(figure), "", (solver, grid, nfe) in choice.chosen)
                for grid, nfe in columns
            ),
        )
        for solver in dict.fromkeys(solver for solver, _, _ in choice.figures)
    )  # fmt: skip
    note = (
        f"RMSE to the exact solution on seeds {choice.seeds}, none of which is scored (of solvers that draw noise, the distance "
        "to the exact solution). Bold: the chosen grid, the only one that was scored."
    )
    return Table("Choice of the grids", note, ("solver", *(f"{nfe} {grid}" for grid, nfe in columns)), tuple(lines))


# ---- guidance ----


def guidance_table(choice: GuidanceChoice) -> Table:
    """A line per solver and budget and a column per guidance, each on its best grid; bold: the chosen ones."""
    columns = dict.fromkeys(words for _, _, words, _ in choice.figures)
    lines = (
        Line(f"{solver}, {nfe}", tuple(_entry(choice, solver, nfe, words) for words in columns))
        for solver, nfe in in_order([*choice.figures])
    )
    note = (
        f"Fréchet distance to the data on seeds {choice.seeds}, none of which is scored, on the best grid; below it what an "
        "image costs. w: the scale, the noise levels sigma / alpha that are guided, and the model that guides, if it is another. "
        "Bold: what was scored, the best of the solver at its cost, and better than all that is cheaper. Distances of so few "
        "images compare within this table alone."
    )
    return Table("Choice of the guidance", note, ("solver, budget", *columns), tuple(lines))


def _entry(choice: GuidanceChoice, solver: str, nfe: int, words: str) -> Entry | None:
    keys = [key for key in choice.figures if key[:3] == (solver, nfe, words)]
    if not keys:
        return None
    best = min(keys, key=lambda key: choice.figures[key].rank)
    its = choice.figures[best]
    return Entry(number(its.rank), f"NFE {its.nfe:g}", best in choice.chosen)


def guidance_notes(choice: object) -> Iterator[str]:
    """How guidance was chosen, and at what cost; nothing of any other choice."""
    if not isinstance(choice, GuidanceChoice):
        return
    yield (
        f"Guidance, grid and steps at every NFE were chosen among {len(choice.figures):,} candidates by the distance to the "
        f"data on seeds {choice.seeds}, which took {choice.evaluations:,} network evaluations; none of these seeds is scored. "
        "NFE counts both passes where a step is guided, and one elsewhere. Of each solver the best at every NFE was scored, "
        "unless a cheaper one was as good."
    )


# ---- the picture of trajectories ----


def trajectory_figure(geometry: TrajectoryGeometry, narrow: bool = False) -> "Figure":
    """Two panels: variance explained by the first components, and the first trajectories.

    On the left, or above if narrow, the mean over trajectories with the standard deviation as bars, and for comparison a random
    walk of as many steps; in the other each trajectory is in its own plane, since two samples move in nearly orthogonal
    directions where there are many.
    """
    if narrow:
        figure = new_figure(NARROW, 620)
        _explained(place(figure, 46, bottom=360), geometry)
        _paths(place(figure, 46, top=350), geometry)
    else:
        figure = new_figure(height=380)
        _explained(place(figure, right=415), geometry)
        _paths(place(figure, left=455), geometry)
    return figure


def _explained(axes: "Axes", geometry: TrajectoryGeometry) -> None:
    """Cumulative shares in per cent, cut at 100; the random walk dashed."""
    components = range(1, len(geometry.explained) + 1)
    walk = (100 * random_walk(geometry.steps, len(components)).cumsum(0)).tolist()
    axes.plot(components, walk, **REFERENCE, label="random walk of as many steps")
    axes.errorbar(
        components,
        [100 * spread.mean for spread in geometry.explained],
        yerr=_bars(geometry.explained),
        color=COLOURS[0],
        marker="o",
        markersize=7,
        linewidth=1.8,
        elinewidth=1.1,
        capsize=3,
        label=plot_label(f"{geometry.solver}, {geometry.steps} steps, {geometry.count} trajectories"),
        zorder=3,
    )
    low = min(walk[0], *(100 * (spread.mean - spread.std) for spread in geometry.explained))
    axes.set_ylim(max(low - 5, 0), 101.5)
    axes.set_xlim(0.75, len(components) + 0.25)
    axes.set_xticks(components)
    title = f"rank {_pair(geometry.effective_rank)}, deviation {_pair(geometry.deviation)}"
    dress(axes, "principal components of each trajectory", "variance explained, %", title)
    axes.legend(loc="lower right", frameon=False, labelcolor=INK, fontsize=SIZE - 1)


def _bars(explained: Sequence[Spread]) -> list[list[float]]:
    """Lengths below and above in per cent; none reaches over 100."""
    below = [100 * spread.std for spread in explained]
    above = [100 * min(spread.std, 1 - spread.mean) for spread in explained]
    return [below, above]


def _pair(spread: Spread) -> str:
    return f"{spread.mean:.2f} ± {spread.std:.2f}"


def _paths(axes: "Axes", geometry: TrajectoryGeometry) -> None:
    """Lines from noise (hollow) to image (filled), on axes of one scale."""
    noise: dict[str, Any] = {"marker": "o", "markersize": 8, "markerfacecolor": PAPER}
    image: dict[str, Any] = {"marker": "o", "markersize": 8}
    for index, path in enumerate(geometry.paths.tolist()):
        across, up = zip(*path, strict=True)
        axes.plot(across, up, color=colour(index), linewidth=1.6, zorder=3)
        axes.plot(*path[0], **noise, markeredgecolor=colour(index), zorder=4)
        axes.plot(*path[-1], **image, color=colour(index), zorder=5)
    axes.plot([], [], **noise, linestyle="none", markeredgecolor=INK, label="noise")
    axes.plot([], [], **image, linestyle="none", color=INK, label="image")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)
    title = f"{len(geometry.paths)} trajectories, each on its own plane"
    dress(axes, "first component", "second component", title)
    axes.legend(loc="best", frameon=False, labelcolor=INK, fontsize=SIZE - 1, handletextpad=0.2)
