"""Notes of a report: the measurement protocol, and how to read the numbers."""

from collections.abc import Iterator, Sequence

from midway.gen.data.images import empty_classes, named_empty
from midway.gen.data.splits import Splits
from midway.gen.evaluation.records import Measurement, by_solver
from midway.gen.report.table import number
from midway.gen.sweep.jobs import SweepConfig
from midway.gen.sweep.run import Sweep


def floor_text(sweep: Sweep) -> str:
    """The floor in a line, for a table without solvers."""
    floor = sweep.measurements[0]
    return f"Floor, real images against real images (n = {floor.n}): {number(floor.distance)}"


def notes(
    config: SweepConfig, splits: Splits, repeats: int, features: str, left_out: Sequence[str] = ()
) -> Iterator[str]:
    """How to read the numbers of a model; `left_out` names what not all of its trainings have."""
    yield from common_notes(config, splits, features, repeats)
    yield "Blocks are of seeds, and the same seeds serve every cell."
    yield "Each solver is shown on its best grid of those offered, chosen by the distance itself; results.csv has all grids."
    if config.reference_nfe:
        yield (
            "RMSE compares what was solved for (standardised latents; of --diffusers, the model's own states) with Heun's method "
            f"at {config.reference_nfe} evaluations from the same noise. Of solvers that draw noise on the way it is no error: "
            "they end elsewhere by design."
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


def class_notes(splits: Splits, n: int, classes: int) -> tuple[str, ...]:
    """Warnings where seeds, which take turns through the classes, have other classes than the images they are compared with.

    `classes` are those that seeds draw, 0 without.
    """
    counts = splits.train.labels.bincount(minlength=len(splits.train.classes))
    counts, found = counts[counts > 0], list[str]()
    found += empty_notes(splits, 0 < classes == len(counts))
    if len(counts) > 1 and counts.max() > UNEQUAL * counts.min():
        found.append(
            f"Classes are unequal: the training images hold from {int(counts.min())} to {int(counts.max())} of a class, while "
            "seeds and the floor have every class equally often. That difference is part of every distance, and of the floor "
            "unless all held-out images are measured."
        )
    if classes and n % classes and n < MANY * classes:
        found.append(
            f"Blocks of {n} seeds do not hold each of {classes} classes equally often: part of the error bar is that."
        )
    return tuple(found)


def reference_notes(sweep: Sweep) -> tuple[str, ...]:
    """A warning where the fine solution is none."""
    if sweep.fine is None or not any(
        m.value("rmse") is None and not m.nonfinite for m in by_solver(sweep.measurements)
    ):
        return ()
    return (
        "The fine solution diverged for some seeds, so there is no RMSE: use less guidance or more --reference-nfe.",
    )


def timing_notes(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """A warning where seconds were not measured alike."""
    kinds = dict.fromkeys(m.timing for m in measurements if m.timing)
    if len(kinds) < 2:
        return ()
    return (f"Seconds compare only where they were measured alike; here they were measured on {' / '.join(kinds)}.",)


def common_notes(config: SweepConfig, splits: Splits, features: str, repeats: int = 0) -> tuple[str, ...]:
    """How to read any distance."""
    n, held_out = config.n, min(config.n, len(splits.held_out.images))
    return (
        f"Every distance is measured on {n} images against all {len(splits.train.images)} training images; "
        + (
            f"mean over {config.blocks} disjoint block(s) of each training."
            if repeats
            else f"mean and standard deviation over {config.blocks} disjoint blocks."
            if config.blocks > 1
            else "of one block, so without an error bar."
        ),
        f"The floor is the distance of {held_out} held-out real images to all training images."
        + (
            ""
            if held_out == n
            else " It was measured at another image count than the cells, and the distance depends on it."
        ),
        f"NFE is counted at the network. {features}",
    )
