"""The result of a sweep: one `Measurement` per (solver, budget), what it is compared with, and its columns in files.

Three rows bound what a solver can reach, and are no solvers:

    floor      held-out real images: the limit of the measure
    ceiling    held-out images through the tokenizer and back: the limit of the tokenizer, where there is one
    exact      the fine solution of every seed: the limit of the model
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

FLOOR, CEILING, EXACT = "floor", "ceiling", "exact"
LIMITS = (FLOOR, CEILING, EXACT)
"""Rows that bound what a solver can reach."""
LIMIT = "limit"
"""Their kind in files."""
Kind = Literal["solver", "few-step", "prior", "baseline"]
SOLVER, FEW_STEP, PRIOR, BASELINE = "solver", "few-step", "prior", "baseline"
"""What a row is: a solver of the sweep's model; a model that was trained for few steps, with weights of its own; a prior over
codes by one of its rules; anything else at its own cost, a baseline or external images."""
TO_EXACT = "to_exact"
"""Fréchet distance to the images of the exact solution from the same seeds: the solver's error alone."""


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
    """`n` images per block by `solver` on `grid` with `nfe` network evaluations each, or one of `LIMITS` (of images, nfe 0).

    metrics: by the names of `RESULT_COLUMNS` and `evaluation.metrics`, those of further feature spaces with the name of the
    space in front. `distance` is always there, infinite if samples diverged.
    """

    solver: str
    """Of few-step models and baselines the name of their run, of masked priors with that of the rule."""
    grid: str
    nfe: int
    metrics: Mapping[str, Estimate]
    n: int
    blocks: int
    seconds: float
    """Of sampling n images, the median over blocks; `decode_seconds` and `feature_seconds` come on top of it."""
    features: str
    """Name of the feature network, that of the first space."""
    reference: str
    """Name of the images that samples are compared with."""
    seeds: str
    training_nfe: int = 0
    """Network evaluations spent to train the solver."""
    flops: int = 0
    """Floating-point operations of a sample before it is decoded, those of products; 0: not counted."""
    kind: Kind = SOLVER
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
    further: str = ""
    """Names of further feature networks, joined by `; `."""
    seconds_blocks: tuple[float, ...] = ()
    """Seconds of sampling each block; empty in results of earlier versions, whose `seconds` are the mean."""
    model: str = ""
    """Name of the run whose model was sampled; empty of images and of models without a run."""
    sampler: str = ""
    """What a few-step model was sampled by; the rule of a prior."""
    training_images: int = 0
    """Images that the model's training took, those of the models that it was made from included; 0: not known."""
    model_nfe: int = 0
    """Passes of images through networks in that training; 0: not known."""
    guided: str = ""
    """Guidance that was paid in training, in words."""
    token_evaluations: int = 0
    """Tokens that went through the network for a sample; 0: not known."""
    guidance: str = ""
    """Scale, noise levels and guide where a sweep chose them, in words."""
    head_nfe: float = 0.0
    """Of a continuous prior, evaluations of its diffusion head for a token, which `nfe` does not count; 0 of all others."""

    @property
    def baseline(self) -> bool:
        """Whether it is a model at its own cost, or external images."""
        return self.kind == BASELINE

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

    def values(self, name: str) -> tuple[float, ...]:
        """The metric of each block; measurements of one sweep share their seeds. Empty if it was not measured."""
        found = self.metrics.get(name)
        return () if found is None else found.values

    @property
    def distances(self) -> tuple[float, ...]:
        """Fréchet distance of each block."""
        return self.values("distance")

    @property
    def spaces(self) -> dict[str, str]:
        """Names of further feature networks by the names of their columns."""
        names = [name for name in self.further.split("; ") if name]
        return dict(zip(space_names([self.features, *names])[1:], names, strict=True))

    @property
    def seconds_std(self) -> float | None:
        """Standard deviation of the seconds over blocks; None of one block."""
        return Estimate.of(self.seconds_blocks).std if self.seconds_blocks else None

    @property
    def image_seconds(self) -> float:
        """Seconds to make n images: sampling and decoding."""
        return self.seconds + self.decode_seconds

    @property
    def place(self) -> str:
        """Its grid, and the guidance that was chosen."""
        return ", ".join(filter(None, (self.grid, self.guidance)))

    @property
    def rank(self) -> float:
        """The distance, infinite where it is not a number."""
        return _finite(self.distance)


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.inf


def space_names(features: Sequence[str]) -> list[str]:
    """Short names of the feature spaces of these networks: the first has none, others `pixels-32`; equal ones are numbered."""
    found = [""] if features else []
    for name in features[1:]:
        short = re.split("[@,+]", name)[0].replace("_", "-")
        count = sum(other.partition("#")[0] == short for other in found)
        found.append(f"{short}#{count + 1}" if count else short)
    return found


# ---- columns of results.csv and results.jsonl ----


def _mean(name: str) -> Callable[[Measurement], float | None]:
    return lambda m: m.value(name)


def _std(name: str) -> Callable[[Measurement], float | None]:
    return lambda m: m.std(name)


def _blocks(name: str) -> Callable[[Measurement], tuple[float, ...]]:
    return lambda m: m.values(name)


_ATTRIBUTES = ("n", "blocks", "seconds", "features", "reference", "seeds", "training_nfe", "baseline")
_TIMES = ("decode_seconds", "feature_seconds")
_MODEL = ("model", "sampler", "training_images", "model_nfe", "guided", "token_evaluations")
_COUNTS = ("nfe", "n", "blocks", "training_nfe", "flops", "nonfinite", "trainings", "training_images", "model_nfe")
_COUNTS += ("token_evaluations",)
_PLAIN = ("precision", "recall", "density", "coverage", "inception_score", "fd_infinity")
RESULT_COLUMNS: dict[str, Callable[[Measurement], Any]] = {
    **{name: attrgetter(name) for name in ("solver", "grid", "nfe")},
    "distance": _mean("distance"),
    "distance_std": _std("distance"),
    TO_EXACT: _mean(TO_EXACT),
    f"{TO_EXACT}_std": _std(TO_EXACT),
    "rmse": _mean("rmse"),
    "rmse_std": _std("rmse"),
    **{name: attrgetter(name) for name in _ATTRIBUTES},
    "distance_blocks": _blocks("distance"),
    f"{TO_EXACT}_blocks": _blocks(TO_EXACT),
    **{name: attrgetter(name) for name in _TIMES},
    "psnr": _mean("psnr"),
    "kid": _mean("kid"),
    "kid_std": _std("kid"),
    "sliced": _mean("sliced"),
    "sliced_std": _std("sliced"),
    **{name: _mean(name) for name in _PLAIN},
    **{name: attrgetter(name) for name in ("nonfinite", "trainings", "record", "timing", "further", "flops")},
    **{name: attrgetter(name) for name in ("seconds_std", "seconds_blocks")},
    "kind": lambda m: LIMIT if m.solver in LIMITS else m.kind,
    **{name: attrgetter(name) for name in _MODEL},
    "head_nfe": lambda m: m.head_nfe or None,
    "guidance": attrgetter("guidance"),
}
"""By name in the order of the files; metrics that are not listed follow, each with its deviation."""


def to_records(measurements: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The rows of results.csv and results.jsonl."""
    more = dict.fromkeys(name for m in measurements for name in m.metrics if name not in RESULT_COLUMNS)
    further = {key: get for name in more for key, get in ((name, _mean(name)), (f"{name}_std", _std(name)))}
    return [{name: value(m) for name, value in (RESULT_COLUMNS | further).items()} for m in measurements]


def from_record(record: Mapping[str, Any]) -> Measurement:
    """A row of results.jsonl, or one of results.csv, as a measurement."""
    given = {name: value for name, value in record.items() if value not in ("", None)}
    plain = {f: given[f] for f in Measurement.__dataclass_fields__ if f in given and f != "metrics"}
    stds = {name.removesuffix("_std"): float(value) for name, value in given.items() if name.endswith("_std")}
    blocks = {name.removesuffix("_blocks"): _floats(v) for name, v in given.items() if name.endswith("_blocks")}
    names = [n for n in given if n not in (*plain, "baseline") and not n.endswith(("_std", "_blocks"))]
    metrics = {name: Estimate(float(given[name]), stds.get(name), blocks.get(name, ())) for name in names}
    metrics.setdefault("distance", Estimate(math.nan, stds.get("distance"), blocks.get("distance", ())))
    kinds: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(_COUNTS, int),
        **dict.fromkeys(("seconds", "head_nfe", *_TIMES), float),
        "seconds_blocks": _floats,
    }
    fields: dict[str, Any] = {"grid": "", "seeds": ""} | {n: kinds.get(n, str)(value) for n, value in plain.items()}
    if given.get("baseline") in (True, "true"):  # results of earlier versions have no kind
        fields["kind"] = BASELINE
    elif fields.get("kind") == LIMIT:
        fields["kind"] = SOLVER
    return Measurement(metrics=metrics, **fields)


def _floats(values: Any) -> tuple[float, ...]:
    return tuple(float(value) for value in (values.split() if isinstance(values, str) else values))
