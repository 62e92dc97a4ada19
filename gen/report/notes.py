"""The words of a sweep's report: the answer, the measurement protocol, and how to read the numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from midway.gen.data.images import empty_classes, named_empty
from midway.gen.data.splits import Splits
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.evaluation.comparing import (
    above_exact,
    best_cell,
    by_solver,
    few_step,
    first_as_exact,
    limit_of,
    nearest_to_data,
    own_weights,
    priors,
    question,
    shown,
    tied_with,
)
from midway.gen.evaluation.records import EXACT, FEW_STEP, PRIOR, TO_EXACT, Measurement
from midway.gen.report.table import number
from midway.gen.sweep.choice import Choice
from midway.gen.sweep.jobs import SweepConfig
from midway.gen.sweep.run import Sweep


def answer(ms: Sequence[Measurement]) -> str:
    """The result in some sentences: of the solvers, of the priors, and which row is nearest to the data at every budget."""
    alone = [m for m in ms if m.kind not in (FEW_STEP, PRIOR)]
    subject = "The solver" if len(alone) == len(ms) else "Of the solvers,"
    return " ".join(filter(None, (solver_answer(alone, subject), prior_answer(ms), nearest_text(ms))))


def prior_answer(ms: Sequence[Measurement]) -> str:
    """The prior, rule and budget of least distance to the data, in a sentence; nothing without priors that did not diverge."""
    best = min(priors(ms), key=lambda m: m.rank, default=None)
    if best is None or not math.isfinite(best.distance):
        return ""
    passed = f" ({best.token_evaluations:,} token-evaluations)" if best.token_evaluations else ""
    cell = f"{named_cell((best.solver, best.nfe))}{passed}"
    return f"Of the priors, {cell} has the lowest distance to the data, {figure(best, 'distance')}."


def solver_answer(ms: Sequence[Measurement], subject: str = "The solver") -> str:
    """The result of the solvers in a sentence, in the figures of the tables; nothing where no solver was measured.

    The first cell whose distance to the data is not significantly above that of the exact solution (more evaluations gain nothing
    that these images can show), and the one that is nearest to it; without an exact solution, the lowest distance to the data.
    """
    name, every, exact, best = question(ms), shown(ms), limit_of(ms, EXACT), best_cell(ms)
    if best is None:
        return ""
    near = len(tied_with(ms, best))
    others = f" ({near} other{'s' if near > 1 else ''} at this budget not significantly worse)" if near else ""
    if name != TO_EXACT or exact is None:
        whose = "the exact solution" if name == TO_EXACT else "the data"
        return f"{subject} {named_cell(best)} has the lowest distance to {whose}, {figure(every[best], name)}{others}."
    nearest = (
        f"{named_cell(best)} is nearest to the exact solution, at a distance of {figure(every[best], name)}{others}"
    )
    limit, first = f"the exact solution's {figure(exact, 'distance')}", first_as_exact(ms)
    if first is None:
        compared = any(above_exact(m, exact) for m in every.values())
        missed = f"; every distance to the data is significantly above {limit}" if compared else ""
        return f"{subject} {nearest}{missed}."
    data = figure(every[first], "distance")
    if first == best:
        return f"{subject} {nearest}; its distance to the data, {data}, is not significantly above {limit}."
    enough = f"{first[1]} evaluation{'s are' if first[1] > 1 else ' is'} enough for the solver {first[0]}"
    reached = f"its distance to the data, {data}, is not significantly above {limit}"
    return f"{enough}: {reached}; {nearest}."


def named_cell(key: tuple[str, int]) -> str:
    return f"{key[0]} with {key[1]} evaluation{'s' if key[1] > 1 else ''}"


def figure(m: Measurement, name: str) -> str:
    """As the tables write it."""
    return number(m.metrics[name].mean, m.std(name))


def nearest_text(ms: Sequence[Measurement]) -> str:
    """Which row is nearest to the data at every budget of a few-step model or a prior, in a sentence; nothing without them."""
    every, models, solvers = shown(ms), {m.solver: m.kind for m in own_weights(ms)}, {m.nfe for m in by_solver(ms)}
    parts = list[str]()
    for (name, lonely), some in groupby(
        nearest_to_data(ms).values(), lambda key: (key[0], bool(solvers) and key[1] not in solvers)
    ):
        keys = list(some)
        budgets, figures = (
            " and ".join(map(str, its)) for its in ([nfe for _, nfe in keys], [_near(ms, k) for k in keys])
        )
        paid = next((f" ({m.guided})" for key in keys if (m := every[key]).guided), "")
        unit = "" if parts else " evaluation" if keys == [(name, 1)] else " evaluations"
        kind = {FEW_STEP: "the few-step model", PRIOR: "the prior"}.get(models.get(name, ""), "the solver")
        alone = ", where no solver was measured," if lonely else ""
        parts.append(f"with {budgets}{unit}{alone} {kind} {name}{paid}, {figures}")
    return f"Nearest to the data: {'; '.join(parts)}." if parts else ""


def _near(ms: Sequence[Measurement], key: tuple[str, int]) -> str:
    """The distance of a cell to the data, and how many others are not significantly farther."""
    tied = len(tied_with(ms, key, "distance"))
    others = f" ({tied} other{'s' if tied > 1 else ''} not significantly farther)" if tied else ""
    return f"{figure(shown(ms)[key], 'distance')}{others}"


# ---- notes ----


def floor_text(sweep: Sweep) -> str:
    """The floor in a line, for a table without solvers."""
    floor = sweep.measurements[0]
    return f"Floor, real images against real images (n = {floor.n}): {number(floor.distance)}"


def exact_notes(config: SweepConfig, sweep: Sweep, exact: tuple[str, str] | None) -> Iterator[str]:
    """What the exact solution is, of which solver and grid; its own error, and the solvers nearer to it than that can resolve."""
    choice, ours = sweep.choice, by_solver(sweep.measurements)
    if not isinstance(choice, Choice) or sweep.fine is None or exact is None:
        return
    error = choice.exact_error
    yield (
        f"The exact solution is {' on '.join(exact)} with {config.exact_nfe} evaluations from the same noise; its RMSE "
        f"to twice the evaluations is {number(error) if math.isfinite(error) else 'infinite'} (seeds {choice.seeds})."
    )
    errors = [(m.solver, m.value("rmse")) for m in ours]
    near = dict.fromkeys(solver for solver, rmse in errors if rmse is not None and rmse < RESOLVED * error)
    if near:
        yield (
            f"RMSE below {number(RESOLVED * error)} is within {RESOLVED} times the exact solution's own error and ranks nothing "
            f"({', '.join(near)}): pass a larger --exact-nfe."
        )
    if any(m.value("rmse") is None and not m.nonfinite for m in ours):
        yield "The exact solution diverged for some seeds, so there is no RMSE: use less guidance or more --exact-nfe."
    if choice.figures:
        yield (
            "The grid of each solver and budget is that of least RMSE on seeds that are not scored; it alone was scored."
        )


def few_step_notes(descriptions: Mapping[str, str], sweep: Sweep) -> Iterator[str]:
    """How few-step models were sampled, and what may be concluded of them."""
    rows = {m.solver: m for m in few_step(sweep.measurements)}
    if not rows:
        return
    yield (
        "Few-step models have weights of their own: they compare with solvers of another model by the distance to data alone, "
        "at their own cost of training. One below the exact row is nearer to the data than the exact solution of that other "
        "model, and no solution of it. RMSE and distance to the exact solution are of the solvers alone. Few-step models have "
        "the same seeds, and guidance only if they were trained with it."
    )
    for name, m in rows.items():
        paid = f"; {m.guided}" if m.guided else ""
        yield f"Few-step model {name}, {m.sampler} on {m.grid}: {descriptions[name]}{paid}."


def prior_notes(
    descriptions: Mapping[str, str], ceilings: Sequence[tuple[Sequence[str], Measurement]]
) -> Iterator[str]:
    """How priors over codes were drawn, and what may be concluded of them. ceilings: of tokenizers that are not the sweep's."""
    if not descriptions:
        return
    yield (
        "Priors over codes have weights of their own, and draw: they compare with solvers by the distance to data alone, and "
        "there is no exact solution of their samples. Their NFE are passes of an image through the trunk; guidance doubles them. "
        "The rules random, halton and certain choose places and then draw: at one evaluation a token from the model's own law, "
        "at fewer from another. maskgit keeps the most probable of its draws, and draws from another law at any number (arXiv "
        "2510.04525). A token of a continuous prior takes evaluations of its small head besides, which NFE does not count."
    )
    for name, description in descriptions.items():
        yield f"Prior {name}: {description}."
    for names, its in ceilings:
        value = number(its.distance, its.std("distance"))
        whose = "is its limit" if len(names) == 1 else "is their limit"
        yield f"{', '.join(names)}: of another tokenizer than the ceiling row; its own ceiling, {value}, {whose}."


RESOLVED = 3
"""An error to the exact solution below so many times that solution's own is not resolved."""


def notes(
    config: SweepConfig, splits: Splits, repeats: int, features: str, against: str, left_out: Sequence[str] = ()
) -> Iterator[str]:
    """How to read the numbers of a model against the reference `against`; `left_out` names what not all of its trainings have."""
    yield from common_notes(config, splits, features, against, repeats)
    yield "Blocks are of seeds, and the same seeds serve every cell."
    if config.draw is not None:
        yield config.draw.text
    if config.exact_nfe:
        yield (
            "Distance to the exact solution and RMSE (of standardised latents; of --diffusers, of the model's own states) are "
            "errors of the solver alone and rank solvers. The distance to the data contains the errors of tokenizer and model "
            "which a solver's error may cancel by chance: no solver below the exact row is better than it. Of solvers that draw "
            "noise on the way RMSE is no error: they end elsewhere by design."
        )
    if left_out:
        yield f"Left out, since not all trainings have it: {'; '.join(left_out)}."
    if repeats:
        yield (
            f"Means over {repeats + 1} trainings of the same configuration of different seeds; deviations and differences are "
            "those among trainings, not among blocks. Baselines, few-step models and priors (trained once, and so not tested "
            "against means over trainings) and sample images are of the first."
        )
    if config.overlap:
        yield "Sampling, decoding and features overlapped: their times do, too."


def few_note(n: int, dim: int) -> tuple[str, ...]:
    """A warning where the distance is mostly bias."""
    if n >= 2 * dim:
        return ()
    return (
        f"{n} images for {dim} features: below two images a feature the Fréchet distance is mostly bias. It ranks cells of this "
        "table alone, if that; --metrics kid is unbiased, more images are better.",
    )


UNEQUAL = 1.25
"""The largest class beside the smallest from which on a warning is due."""
MANY = 20
"""Images of a class in a block from which on one more or less does not matter."""


def empty_notes(splits: Splits, conditional: bool) -> tuple[str, ...]:
    """The classes without a training image, which no seed of a conditional model draws."""
    if not empty_classes(splits.train):
        return ()
    drawn = ", so no seed draws them" if conditional else ""
    return (f"Classes without training images{drawn}: {named_empty(splits.train)}.",)


def class_notes(splits: Splits, n: int, draw: ClassDraw | None) -> tuple[str, ...]:
    """Warnings where seeds have other classes than the images that they are compared with; `draw` None: they draw none."""
    counts = splits.train.labels.bincount(minlength=len(splits.train.classes))
    counts, found = counts[counts > 0], list[str]()
    found += empty_notes(splits, draw is not None)
    if draw is None or len(counts) < 2:
        return tuple(found)
    drawn = sum(count > 0 for count in draw.counts)
    if draw.rule == "balanced" and counts.max() > UNEQUAL * counts.min():
        found.append(
            f"Classes are unequal: the training images hold from {int(counts.min())} to {int(counts.max())} of a class, while "
            "seeds have every class equally often and the floor in proportion. That difference is part of every distance."
        )
    if draw.rule != "random" and n % drawn and n < MANY * drawn:
        found.append(
            f"Blocks of {n} seeds hold few of each of {drawn} classes, and not just as the images: part of the error bar is that."
        )
    return tuple(found)


def timing_notes(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """A warning where seconds were not measured alike."""
    kinds = dict.fromkeys(m.timing for m in measurements if m.timing)
    if len(kinds) < 2:
        return ()
    return (f"Seconds compare only where they were measured alike; here they were measured on {' / '.join(kinds)}.",)


def common_notes(config: SweepConfig, splits: Splits, features: str, against: str, repeats: int = 0) -> tuple[str, ...]:
    """How to read any distance to the reference `against`."""
    n, held_out = config.n, min(config.n, len(splits.held_out.images))
    return (
        f"Every distance is measured on {n} images against {against}; "
        + (
            f"mean over {config.blocks} disjoint block(s) of each training."
            if repeats
            else f"mean and standard deviation over {config.blocks} disjoint blocks."
            if config.blocks > 1
            else "of one block, so without an error bar."
        ),
        f"The floor is the distance of {held_out} held-out real images to the same, the ceiling that of the same "
        "images through the tokenizer and back; their errors come from leaving out a tenth of the images at a time."
        + (
            ""
            if held_out == n
            else " It was measured at another image count than the cells, and the distance depends on it."
        ),
        f"NFE is counted at the network. {features}",
    )
