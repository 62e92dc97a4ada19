"""Metrics beside the Fréchet distance, of the same features, by name in `METRICS`.

    kid         kernel distance, unbiased; subsets of at most 1000                    (metrics/kid.py)
    sliced      sliced squared Wasserstein distance, 1000 directions                  (metrics/sliced.py)
    precision   precision and recall, k = 3                                           (metrics/precision_recall.py)
    density     density and coverage, k = 5                                           (metrics/precision_recall.py)
    is          inception score of the feature network's own class probabilities      (metrics/inception_score.py)
    infinity    Fréchet distance extrapolated to infinitely many images               (metrics/frechet_infinity.py)

Each is measured on every block of seeds. The reference of kid, sliced, precision and density are training images whose classes
take turns: at most 10,000 for kid and sliced, and for the others, which depend on both counts, as many as a block has images; of
a larger block the first 10,000 count.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.core.errors import UsageError, nearest
from midway.gen.core.randomness import permutation
from midway.gen.features.reference import FeatureReference
from midway.gen.metrics.frechet_infinity import frechet_distance_at_infinity
from midway.gen.metrics.inception_score import inception_score
from midway.gen.metrics.kid import kid
from midway.gen.metrics.precision_recall import density_coverage, precision_recall
from midway.gen.names.nearest import normal

Values = dict[str, float]


@dataclass(frozen=True)
class Features:
    """Of a block of samples: features float32 (n, D), and class logits (n, K) if the network has any."""

    features: Tensor
    logits: Tensor | None


def joined_features(parts: Sequence[Features]) -> Features:
    """Those of all images of several parts, in their order."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Features(torch.cat([part.features for part in parts]), torch.cat(logits) if logits else None)


def _kid(features: Features, reference: FeatureReference) -> Values:
    unit = reference.kernel_unit
    return {"kid": kid(features.features / unit, _sample(reference) / unit).value}


def _sliced(features: Features, reference: FeatureReference) -> Values:
    return {"sliced": reference.slices.distance(features.features)}


def _precision(features: Features, reference: FeatureReference) -> Values:
    found = precision_recall(*_as_many(reference, features))
    return {"precision": found.precision, "recall": found.recall}


def _density(features: Features, reference: FeatureReference) -> Values:
    found = density_coverage(*_as_many(reference, features))
    return {"density": found.density, "coverage": found.coverage}


def _inception(features: Features, reference: FeatureReference) -> Values:
    if features.logits is None:
        raise UsageError(
            f"--metrics is with {reference.features}",
            "its features have no class probabilities",
            "drop it, or use other --features",
        )
    mixed = features.logits[
        permutation(0, "inception score", 0, len(features.logits))
    ]  # samples may be sorted by class
    return {"inception_score": inception_score(mixed, min(10, len(mixed))).value}


def _infinity(features: Features, reference: FeatureReference) -> Values:
    return {"fd_infinity": frechet_distance_at_infinity(features.features, reference.statistics).value}


METRICS: dict[str, Callable[[Features, FeatureReference], Values]] = {
    "kid": _kid,
    "sliced": _sliced,
    "precision": _precision,
    "density": _density,
    "is": _inception,
    "infinity": _infinity,
}


def possible(names: tuple[str, ...], n: int, dim: int) -> tuple[str, ...]:
    """Those metrics that n images of `dim` features can have."""
    return tuple(name for name in names if n >= _least(name, dim))


def _least(name: str, dim: int) -> int:
    return {"precision": 4, "density": 6, "infinity": 4 * dim}.get(name, 2)


DISTANCE = ("fid", "fd", "frechet", "frechetdistance", "frechetinceptiondistance")


def check_names(names: Iterable[str]) -> None:
    """UsageError for unknown metrics, and for the one that is always measured."""
    for name in names:
        if normal(name) in DISTANCE:
            why = "the Fréchet distance is always measured, in every space of --features"
            raise UsageError(f"--metrics {name}", why, "drop it; it is FID with --features inception")
        if name not in METRICS:
            raise UsageError(f"unknown metric '{name}'", "it is not in the registry", nearest(name, METRICS))


def check_metrics(names: tuple[str, ...], n: int, dim: int, logits: bool) -> None:
    """UsageError for unknown names, and for metrics that blocks of n images of `dim` features cannot have."""
    check_names(names)
    for name in names:
        if n < _least(name, dim):
            raise UsageError(
                f"--metrics {name} of {n} images a block",
                f"it needs at least {_least(name, dim)}",
                "raise --n, or drop it",
            )
    if "is" in names and not logits:
        raise UsageError(
            "--metrics is", "these features have no class probabilities", "drop it, or use other --features"
        )


def measure_metrics(names: tuple[str, ...], features: Features, reference: FeatureReference) -> Values:
    """Every value of every metric of one block."""
    return {key: value for name in names for key, value in METRICS[name](features, reference).items()}


def _sample(reference: FeatureReference) -> Tensor:
    assert reference.sample is not None
    return reference.sample


def _as_many(reference: FeatureReference, features: Features) -> tuple[Tensor, Tensor]:
    """Features of as many training images as samples, and of the samples: both counts matter to these metrics."""
    real = _sample(reference)[: len(features.features)]
    return real, features.features[: len(real)]
