"""The result of a sweep: one `Measurement` per (solver, grid, budget), what it is compared with, and its columns in files."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from midway.samplers.gits import GITS

FLOOR = "floor"
FID = "inception-v3-2015-12-05@6726825d"
"""Prefix of the feature name under which a distance is FID."""


@dataclass(frozen=True)
class Estimate:
    """A metric's mean over blocks of seeds (or over trainings), their standard deviation, and the value of each."""

    mean: float
    std: float | None = None
    """None for one block."""
    values: tuple[float, ...] = ()

    @staticmethod
    def of(values: Sequence[float]) -> "Estimate":
        """Of these blocks or trainings; without a deviation that is not finite."""
        mean, count = sum(values) / len(values), len(values)
        std = (sum((value - mean) ** 2 for value in values) / (count - 1)) ** 0.5 if count > 1 else math.nan
        return Estimate(mean, std if math.isfinite(std) else None, tuple(values))


@dataclass(frozen=True)
class Measurement:
    """`n` images per block by `solver` on `grid` with `nfe` network evaluations each, or the floor: real images, nfe 0.

    metrics: by the names of `RESULT_COLUMNS` and `evaluation.metrics`. `distance` is always there, infinite if samples diverged.
    """

    solver: str
    grid: str
    nfe: int
    metrics: Mapping[str, Estimate]
    n: int
    blocks: int
    seconds: float
    """Of sampling n images; `decode_seconds` and `feature_seconds` come on top of it."""
    features: str
    """Name of the feature network."""
    reference: str
    """Name of the images that samples are compared with."""
    seeds: str
    training_nfe: int = 0
    """Network evaluations spent to train the solver."""
    best: bool = True
    """Whether its grid has the least distance of (solver, nfe)."""
    baseline: bool = False
    """A model of its own at its own cost, or external images."""
    decode_seconds: float = 0.0
    feature_seconds: float = 0.0
    nonfinite: int = 0
    """Samples with NaN or infinity."""
    trainings: int = 1
    """If several, estimates are over trainings instead of blocks."""
    record: str = ""
    """cells/<record>.json holds everything that the measurement depends on; one name per training."""
    timing: str = ""
    """What its seconds depend on: machine, processes, batches."""

    def value(self, name: str) -> float | None:
        """The metric's mean, None if it was not measured."""
        found = self.metrics.get(name)
        return None if found is None else found.mean

    def std(self, name: str) -> float | None:
        """The metric's standard deviation over blocks."""
        found = self.metrics.get(name)
        return None if found is None else found.std

    @property
    def distance(self) -> float:
        """Fréchet distance."""
        return self.metrics["distance"].mean

    @property
    def distances(self) -> tuple[float, ...]:
        """Fréchet distance of each block; measurements of one sweep share their seeds."""
        return self.metrics["distance"].values

    @property
    def image_seconds(self) -> float:
        """Seconds to make n images: sampling and decoding."""
        return self.seconds + self.decode_seconds

    @property
    def rank(self) -> float:
        """The distance, infinite where it is not a number."""
        return _finite(self.distance)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


# ---- columns of results.csv and results.jsonl ----


def _mean(name: str) -> Callable[[Measurement], float | None]:
    return lambda m: m.value(name)


def _std(name: str) -> Callable[[Measurement], float | None]:
    return lambda m: m.std(name)


_ATTRIBUTES = ("n", "blocks", "seconds", "features", "reference", "seeds", "training_nfe", "best", "baseline", "distances",
               "decode_seconds", "feature_seconds")  # fmt: skip
RESULT_COLUMNS: dict[str, Callable[[Measurement], Any]] = {
    **{name: attrgetter(name) for name in ("solver", "grid", "nfe")},
    "distance": _mean("distance"),
    "distance_std": _std("distance"),
    "rmse": _mean("rmse"),
    **{name: attrgetter(name) for name in _ATTRIBUTES},
    "psnr": _mean("psnr"),
    "kid": _mean("kid"),
    "kid_std": _std("kid"),
    **{name: _mean(name) for name in ("precision", "recall", "density", "coverage", "inception_score", "fd_infinity")},
    **{name: attrgetter(name) for name in ("nonfinite", "trainings", "record", "timing")},
}
"""By name in the order of the files; metrics that are not listed follow."""


def to_records(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The rows of results.csv and results.jsonl."""
    more = dict.fromkeys(name for m in measurements for name in m.metrics if name not in RESULT_COLUMNS)
    columns = RESULT_COLUMNS | {name: _mean(name) for name in more}
    return [{name: value(m) for name, value in columns.items()} for m in measurements]


def from_record(record: Mapping[str, Any]) -> Measurement:
    """A row of results.jsonl, or one of results.csv, as a measurement."""
    given = {name: value for name, value in record.items() if value not in ("", None)}
    plain = {f: given[f] for f in Measurement.__dataclass_fields__ if f in given and f != "metrics"}
    stds = {name.removesuffix("_std"): float(value) for name, value in given.items() if name.endswith("_std")}
    names = [n for n in given if n not in plain and n != "distances" and not n.endswith("_std")]
    metrics = {name: Estimate(float(given[name]), stds.get(name)) for name in names}
    blocks = given.get("distances", ())
    blocks = tuple(float(value) for value in (blocks.split() if isinstance(blocks, str) else blocks))
    metrics["distance"] = replace(metrics.get("distance", Estimate(math.nan, stds.get("distance"))), values=blocks)
    kinds: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(("nfe", "n", "blocks", "training_nfe", "nonfinite", "trainings"), int),
        **dict.fromkeys(("seconds", "decode_seconds", "feature_seconds"), float),
        **dict.fromkeys(("best", "baseline"), lambda value: value in (True, "true")),
    }
    fields: dict[str, Any] = {"grid": "", "seeds": ""} | {n: kinds.get(n, str)(value) for n, value in plain.items()}
    return Measurement(metrics=metrics, **fields)


# ---- choices ----


def floor_of(measurements: Iterable[Measurement]) -> Measurement | None:
    """The floor, if it was measured."""
    return next((m for m in measurements if m.solver == FLOOR), None)


def floor_name(measurements: Sequence[Measurement]) -> str:
    """`floor`, with its image count where that is not the others'."""
    floor = floor_of(measurements)
    others = {m.n for m in measurements if m is not floor}
    return FLOOR if floor is None or not others - {floor.n} else f"{FLOOR} (n = {floor.n})"


def _least(
    measurements: Iterable[Measurement], value: Callable[[Measurement], float]
) -> dict[tuple[str, int], Measurement]:
    """The first measurement of the least value of each (solver, NFE)."""
    chosen: dict[tuple[str, int], Measurement] = {}
    for m in measurements:
        key = (m.solver, m.nfe)
        if key not in chosen or value(m) < value(chosen[key]):
            chosen[key] = m
    return chosen


def mark_best(measurements: Sequence[Measurement]) -> list[Measurement]:
    """The measurements with `best` where the grid has the least distance of its (solver, NFE)."""
    best = _least(measurements, lambda m: m.distance)
    return [replace(m, best=m is best[m.solver, m.nfe]) for m in measurements]


def baselines_of(measurements: Iterable[Measurement]) -> list[Measurement]:
    """The baselines, lowest distance first."""
    return sorted((m for m in measurements if m.baseline), key=lambda m: m.rank)


def by_solver(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Without the floor and baselines."""
    return [m for m in measurements if m.solver != FLOOR and not m.baseline]


def check_comparable(measurements: Sequence[Measurement]) -> None:
    """ValueError for measurements of different image counts, features or references; the floor may have fewer images."""
    kinds = {(m.n, m.features, m.reference) for m in measurements if m.solver != FLOOR}
    if len(kinds) > 1:
        listed = "; ".join(f"n = {n}, {features}, against {reference}" for n, features, reference in sorted(kinds))
        raise ValueError(
            f"these distances do not compare: {listed}. A distance depends on the number of images, the features and the "
            "reference: measure all with the same"
        )


def shown(measurements: Iterable[Measurement]) -> dict[tuple[str, int], Measurement]:
    """The best grid of each (solver, NFE) without the floor; of several so marked, the one of least distance."""
    return _least((m for m in by_solver(measurements) if m.best), lambda m: m.rank)


def least_rmse(measurements: Iterable[Measurement]) -> dict[tuple[str, int], Measurement]:
    """The measurement of least RMSE of each (solver, NFE): the solver's error has its own best grid."""
    return _least(
        (m for m in by_solver(measurements) if "rmse" in m.metrics), lambda m: _finite(m.metrics["rmse"].mean)
    )


def feature_names(measurements: Iterable[Measurement]) -> str:
    """The feature networks of the measurements; normally one."""
    return ", ".join(dict.fromkeys(m.features for m in measurements))


def distance_name(measurements: Iterable[Measurement]) -> str:
    """FID for the published Inception network alone, else Fréchet distance."""
    names = {m.features for m in measurements}
    return "FID" if names and all(name.startswith(FID) for name in names) else "Fréchet distance"


def training_costs(measurements: Iterable[Measurement]) -> dict[str, int]:
    """Network evaluations spent to train each learned solver: the largest over its shown measurements."""
    costs: dict[str, int] = {}
    for (solver, _), m in shown(measurements).items():
        if m.training_nfe and m.grid != GITS:  # there the grid was fitted, not the solver
            costs[solver] = max(costs.get(solver, 0), m.training_nfe)
    return costs


# ---- paired differences ----


@dataclass(frozen=True)
class Difference:
    """Of a measurement's distance from the best of its NFE: mean over blocks, its standard error."""

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


def differences(measurements: Iterable[Measurement]) -> dict[tuple[str, int], Difference]:
    """By (solver, NFE): the paired difference to the best of that NFE; blocks share their seeds. None below two blocks."""
    chosen = {key: m for key, m in shown(measurements).items() if len(m.distances) > 1 and m.rank < math.inf}
    best = {nfe: min((m for (_, n), m in chosen.items() if n == nfe), key=lambda m: m.rank) for _, nfe in chosen}
    return {(solver, nfe): _difference(m, best[nfe]) for (solver, nfe), m in chosen.items()}


def _difference(m: Measurement, best: Measurement) -> Difference:
    values = [a - b for a, b in zip(m.distances, best.distances, strict=True)]
    mean = sum(values) / len(values)
    error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
    return Difference(mean, error, len(values), m.grid, m is best)
