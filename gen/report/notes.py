"""Notes of a report: the measurement protocol, and how to read the numbers."""

import math
from collections.abc import Iterator, Sequence

from midway.gen.data.images import empty_classes, named_empty
from midway.gen.data.splits import Splits
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.evaluation.comparing import by_solver
from midway.gen.evaluation.records import Measurement
from midway.gen.report.table import number
from midway.gen.sweep.jobs import EXACT_GRID, EXACT_SOLVER, SweepConfig
from midway.gen.sweep.run import Sweep


def floor_text(sweep: Sweep) -> str:
    """The floor in a line, for a table without solvers."""
    floor = sweep.measurements[0]
    return f"Floor, real images against real images (n = {floor.n}): {number(floor.distance)}"


def exact_notes(config: SweepConfig, sweep: Sweep) -> Iterator[str]:
    """What the exact solution is, its own error, and which solvers are nearer to it than that error can resolve."""
    choice, ours = sweep.choice, by_solver(sweep.measurements)
    if choice is None or sweep.fine is None:
        return
    error = choice.exact_error
    yield (
        f"The exact solution is {EXACT_SOLVER} on {EXACT_GRID} with {config.exact_nfe} evaluations from the same noise; its RMSE "
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
            "which a solver's error may cancel by chance: nothing below the exact row is better than it. Of solvers that draw "
            "noise on the way RMSE is no error: they end elsewhere by design."
        )
    if left_out:
        yield f"Left out, since not all trainings have it: {'; '.join(left_out)}."
    if repeats:
        yield (
            f"Means over {repeats + 1} trainings of the same configuration of different seeds; deviations and differences are "
            "those among trainings, not among blocks. Baselines and sample images are of the first."
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
