"""One sweep of several trainings of the same configuration: their seeds are part of the error bar.

Training again changes a Fréchet distance more than drawing samples again, so an error bar over blocks of samples describes this
one model, not its method. Of T trainings every figure is the mean over trainings of the mean over blocks, and its deviation that
among the trainings.
"""

from collections.abc import Sequence
from dataclasses import replace

from midway.gen.core.config import to_dict
from midway.gen.core.errors import DataError
from midway.gen.data.places import trained_alike
from midway.gen.diffusion.load import TrainedModel
from midway.gen.evaluation.comparing import by_solver
from midway.gen.evaluation.records import EXACT, LIMITS, SOLVER, Estimate, Measurement
from midway.gen.tokenizer.stored import tokenizer_hash
from midway.gen.training.config import flat, is_bookkeeping

TIMES = ("seconds", "decode_seconds", "feature_seconds")


def check_repeats(first: TrainedModel, others: Sequence[TrainedModel]) -> None:
    """DataError unless all are trainings of one configuration, on the same images and tokenizer, with different weights."""
    known = {first.hash: first}
    for other in others:
        differing = _differences(first, other)
        if differing:
            raise DataError(
                f"{other.run.path} is no repeat of {first.run.path}",
                f"these differ: {', '.join(differing)}",
                "give runs that differ in --seed alone",
            )
        if other.hash in known:
            raise DataError(
                f"{other.run.path} holds the weights of {known[other.hash].run.path}",
                "a repeat with the same weights is no repeat",
                "train it with another --seed",
            )
        known[other.hash] = other


def _differences(first: TrainedModel, other: TrainedModel) -> list[str]:
    """What makes another training of it than another seed does."""
    before, now = flat(first.run.config), flat(other.run.config)
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    found = [key for key in keys if key != "train.seed" and not key.startswith("data.") and not is_bookkeeping(key)]
    found += ["its model's configuration"] * (to_dict(first.model.config) != to_dict(other.model.config))
    found += ["its images"] * (not trained_alike(other.run, first.run))
    return found + ["its tokenizer"] * (tokenizer_hash(first.tokenizer) != tokenizer_hash(other.tokenizer))


def left_out(sweeps: Sequence[Sequence[Measurement]]) -> list[str]:
    """Solvers, grids and budgets that not all trainings have, which have no mean over them."""
    keys = [dict.fromkeys(_key(m) for m in by_solver(measurements)) for measurements in sweeps]
    every, common = dict.fromkeys(key for one in keys for key in one), set.intersection(*map(set, keys))
    return [f"{solver} on {grid} at NFE {nfe}" for solver, grid, nfe in every if (solver, grid, nfe) not in common]


def merge_trainings(sweeps: Sequence[Sequence[Measurement]]) -> list[Measurement]:
    """Several trainings as one list, without what only some have; only solvers and the exact solution are not the first's."""
    first, *rest = sweeps
    found = [{_key(m): m for m in measurements} for measurements in rest]
    merged = []
    for m in first:
        others = [measurements[_key(m)] for measurements in found if _key(m) in measurements]
        if (m.solver in LIMITS and m.solver != EXACT) or m.kind != SOLVER:
            merged.append(m)
        elif len(others) == len(rest):
            merged.append(_merged([m, *others]))
    return merged


def _key(m: Measurement) -> tuple[str, str, int]:
    return (m.solver, m.grid, m.nfe)


def _merged(trainings: Sequence[Measurement]) -> Measurement:
    """Means over trainings, and the deviation among them, of every metric that all have."""
    first = trainings[0]
    common = [name for name in first.metrics if all(name in m.metrics for m in trainings)]
    times = {name: round(sum(getattr(m, name) for m in trainings) / len(trainings), 3) for name in TIMES}
    return replace(
        first,
        metrics={name: Estimate.of([m.metrics[name].mean for m in trainings]) for name in common},
        trainings=len(trainings),
        record=" ".join(m.record for m in trainings if m.record),
        nonfinite=sum(m.nonfinite for m in trainings),
        seconds_blocks=tuple(m.seconds for m in trainings),
        **times,
    )
