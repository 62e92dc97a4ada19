"""What measurements of a sweep are compared with: the limits, the best of a budget, the exact solution."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from midway.gen.evaluation.records import (
    BASELINE,
    EXACT,
    FEW_STEP,
    FLOOR,
    LIMITS,
    PRIOR,
    SOLVER,
    TO_EXACT,
    Measurement,
)
from midway.samplers.solvers import SOLVERS

FID = "inception-v3-2015-12-05@6726825d"
"""Prefix of the feature name under which a distance is FID."""


def limit_of(measurements: Iterable[Measurement], name: str) -> Measurement | None:
    """The row of this name in `LIMITS`, if it was measured."""
    return next((m for m in measurements if m.solver == name), None)


def limits_of(measurements: Sequence[Measurement]) -> dict[str, Measurement]:
    """The rows of `LIMITS` that there are, in that order, by the names that `limit_name` gives."""
    found = [m for name in LIMITS if (m := limit_of(measurements, name)) is not None]
    return {limit_name(m, measurements): m for m in found}


def limit_name(limit: Measurement, measurements: Sequence[Measurement]) -> str:
    """`floor`, with its image count where that is not the others'."""
    others = {m.n for m in measurements if m.solver not in LIMITS}
    return limit.solver if not others - {limit.n} else f"{limit.solver} (n = {limit.n})"


def baselines_of(measurements: Iterable[Measurement]) -> list[Measurement]:
    """The baselines, lowest distance first."""
    return sorted((m for m in measurements if m.baseline), key=lambda m: m.rank)


def by_solver(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Solvers of the sweep's model, without the limits."""
    return [m for m in measurements if m.solver not in LIMITS and m.kind == SOLVER]


def few_step(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Few-step models, each at every budget."""
    return [m for m in measurements if m.kind == FEW_STEP]


def priors(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Priors over codes, each by its rules at every budget."""
    return [m for m in measurements if m.kind == PRIOR]


def own_weights(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Few-step models and priors: rows that budgets compare with solvers, on weights of their own."""
    return [m for m in measurements if m.kind in (FEW_STEP, PRIOR)]


def check_comparable(measurements: Sequence[Measurement]) -> None:
    """ValueError for measurements of different image counts, features or references; limits may have fewer images."""
    kinds = {(m.n, m.features, m.reference) for m in measurements if m.solver not in LIMITS}
    if len(kinds) > 1:
        listed = "; ".join(f"n = {n}, {features}, against {reference}" for n, features, reference in sorted(kinds))
        raise ValueError(
            f"these distances do not compare: {listed}. A distance depends on the number of images, the features and the "
            "reference: measure all with the same"
        )


def shown(measurements: Iterable[Measurement]) -> dict[tuple[str, int], Measurement]:
    """Solvers, few-step models and priors by (name, NFE); the first of several."""
    found: dict[tuple[str, int], Measurement] = {}
    for m in (m for m in measurements if m.solver not in LIMITS and m.kind != BASELINE):
        found.setdefault((m.solver, m.nfe), m)
    return found


def question(measurements: Iterable[Measurement]) -> str:
    """The metric that ranks solvers: the distance to the exact solution where there is one, else the distance to the data.

    The latter contains the errors of tokenizer and model, which a solver's error may happen to cancel.
    """
    return TO_EXACT if any(TO_EXACT in m.metrics for m in by_solver(measurements)) else "distance"


def feature_names(measurements: Iterable[Measurement]) -> str:
    """The feature networks of the measurements; normally one."""
    return ", ".join(dict.fromkeys(m.features for m in measurements))


def distance_name(measurements: Iterable[Measurement], features: str = "") -> str:
    """FID for the published Inception network alone, else Fréchet distance; also of `features` of a further space."""
    names = {features} if features else {m.features for m in measurements}
    return "FID" if names and all(name.startswith(FID) for name in names) else "Fréchet distance"


def training_costs(measurements: Iterable[Measurement]) -> dict[str, int]:
    """Network evaluations spent to train each learned solver: the largest over its shown measurements."""
    costs: dict[str, int] = {}
    for (solver, _), m in shown(measurements).items():
        if m.training_nfe and solver not in SOLVERS:  # of those the grid was fitted, not the solver
            costs[solver] = max(costs.get(solver, 0), m.training_nfe)
    return costs


def above_floor(ms: Sequence[Measurement]) -> list[Measurement]:
    """The measurements with every KID less that of the floor; as they are without one.

    The estimate is unbiased, so that images of the reference's own distribution have a mean of 0; but held-out images that have
    every class equally often are nearer than that, and the floor a little below 0.
    """
    floor = limit_of(ms, FLOOR)
    if floor is None:
        return list(ms)
    less = {name: one.mean for name, one in floor.metrics.items() if is_kid(name)}
    return [
        replace(m, metrics={k: replace(v, mean=v.mean - less.get(k, 0.0)) for k, v in m.metrics.items()}) for m in ms
    ]


def is_kid(name: str) -> bool:
    """Whether a metric is KID, of the first or of a further feature space."""
    return name == "kid" or name.endswith("_kid")


# ---- paired differences ----


@dataclass(frozen=True)
class Difference:
    """Of a measurement's metric from another's of the same seeds: mean over blocks, its standard error."""

    mean: float
    error: float
    blocks: int
    grid: str
    best: bool = False

    @property
    def significant(self) -> bool:
        """Whether the mean exceeds what chance explains: Student's t, two-sided 95 %."""
        return self.mean > critical_t(self.blocks) * self.error


def critical_t(blocks: int) -> float:
    """Student's t of so many blocks, two-sided 95 %, in standard errors."""
    from scipy.special import stdtrit

    return float(stdtrit(blocks - 1, 0.975))


def differences(measurements: Iterable[Measurement], name: str = "") -> dict[tuple[str, int], Difference]:
    """By (solver, NFE): the paired difference to the best of that NFE, by a metric (default: the one that ranks solvers).

    Blocks share their seeds; none below two blocks, and none between means over different numbers of trainings.
    """
    measurements = list(measurements)
    name = name or question(measurements)
    chosen = {key: m for key, m in shown(measurements).items() if len(m.values(name)) > 1}
    chosen = {key: m for key, m in chosen.items() if math.isfinite(m.value(name) or 0.0)}
    best = {nfe: min((m for (_, n), m in chosen.items() if n == nfe), key=lambda m: m.metrics[name].mean)
            for _, nfe in chosen}  # fmt: skip
    alike = {key: m for key, m in chosen.items() if m.trainings == best[key[1]].trainings}
    return {(solver, nfe): _difference(m, best[nfe], name) for (solver, nfe), m in alike.items()}


def above_exact(m: Measurement, exact: Measurement) -> Difference | None:
    """The paired difference of distances to the data from those of the exact solution.

    None below three blocks: at two, hardly any difference is significant (12.7 errors), and its absence means nothing.
    """
    pairs = len(m.distances) == len(exact.distances) > 2 and math.isfinite(m.distance) and math.isfinite(exact.distance)
    return _difference(m, exact, "distance") if pairs else None


def _difference(m: Measurement, best: Measurement, name: str) -> Difference:
    return replace(paired_difference(m.values(name), best.values(name), m.grid), best=m is best)


def paired_difference(values: Sequence[float], others: Sequence[float], grid: str = "") -> Difference:
    """Of the values of two or more blocks from those of the same seeds."""
    found = [a - b for a, b in zip(values, others, strict=True)]
    mean = sum(found) / len(found)
    error = math.sqrt(sum((v - mean) ** 2 for v in found) / (len(found) - 1) / len(found))
    return Difference(mean, error, len(found), grid)


# ---- which cell ----

Key = tuple[str, int]
"""(solver, NFE)."""


def best_cell(measurements: Sequence[Measurement]) -> Key | None:
    """The least by the metric that ranks solvers, over all budgets; None where none is finite."""
    ranks = _ranks(measurements)
    best = min(ranks, key=lambda key: ranks[key], default=None)
    return best if best is not None and math.isfinite(ranks[best]) else None


def first_as_exact(measurements: Sequence[Measurement]) -> Key | None:
    """The best by rank of the smallest budget at which a distance to the data is not significantly above the exact solution's."""
    exact, ranks = limit_of(measurements, EXACT), _ranks(measurements)
    every = {} if exact is None else {key: above_exact(m, exact) for key, m in shown(by_solver(measurements)).items()}
    reached = [key for key, difference in every.items() if difference is not None and not difference.significant]
    return min(reached, key=lambda key: (key[1], ranks[key]), default=None)


def nearest_to_data(measurements: Sequence[Measurement]) -> dict[int, Key]:
    """Of every budget of a few-step model or prior, rising, the row of least distance to the data."""
    finite = {key: m.distance for key, m in shown(measurements).items() if math.isfinite(m.distance)}
    budgets = sorted({m.nfe for m in own_weights(measurements)} & {nfe for _, nfe in finite})
    return {budget: min((key for key in finite if key[1] == budget), key=lambda key: finite[key]) for budget in budgets}


def tied_with(measurements: Sequence[Measurement], cell: Key, name: str = "") -> list[Key]:
    """The other cells of its budget that are not significantly worse than the best of that budget, by `name` as `differences`."""
    found = differences(measurements, name)
    return [key for key, d in found.items() if key[1] == cell[1] and key != cell and not d.significant]


def contrast(measurements: Sequence[Measurement]) -> tuple[Key, Key] | None:
    """The worst and the best cell of the smallest budget at which they differ significantly; one that diverged is the worst.

    Below two blocks, where nothing is significant, any difference counts.
    """
    ranks, found = _ranks(measurements), differences(measurements)
    for budget in sorted({nfe for _, nfe in ranks}):
        keys = [key for key in ranks if key[1] == budget]
        worst, best = max(keys, key=lambda key: ranks[key]), min(keys, key=lambda key: ranks[key])
        difference = found.get(worst)
        if ranks[best] < ranks[worst] and (difference is None or difference.significant):
            return worst, best
    return None


def _ranks(measurements: Sequence[Measurement]) -> dict[Key, float]:
    """What ranks each cell, infinite where it diverged or was not measured; few-step models have no exact solution to rank by."""
    name = question(measurements)
    ranked = by_solver(measurements) if name == TO_EXACT else measurements
    values = {key: m.value(name) for key, m in shown(ranked).items()}
    return {key: math.inf if v is None or not math.isfinite(v) else v for key, v in values.items()}
