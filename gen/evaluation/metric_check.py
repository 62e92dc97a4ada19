"""How metrics answer to known damage of real images, in every feature space.

Fréchet and sliced distances have a bias that is never 0: their answer is the ratio to the floor, the distance of as many held-out
images without damage. KID is unbiased, and near 0 or below it at the floor, where a ratio has no meaning: its answer is the
difference from the floor in standard errors of the floor, by the jackknife over 10 groups of held-out images. KID is taken once,
over whole sets and at most 1000 training images.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.evaluation.damages import DAMAGES, Damage, undamaged
from midway.gen.features.reference import FeatureReference, Subject
from midway.gen.metrics.kid import kid
from midway.gen.progress.bar import Progress

GROUPS = 10
"""Of the jackknife."""
MOST = 1000
"""Training images of KID."""
Measure = Callable[[Tensor], float]


@dataclass(frozen=True)
class DamageRow:
    """The answer of one feature space to one damage; the floor answers with 1, 0 and 1."""

    features: str
    damage: str
    n: int
    required: float | None
    distance: float
    distance_ratio: float
    kid: float
    kid_errors: float
    """Difference from the floor, in standard errors."""
    sliced: float
    sliced_ratio: float

    @property
    def answers(self) -> bool:
        """Whether the Fréchet distance reaches what is required."""
        return self.required is None or self.distance_ratio >= self.required


@dataclass(frozen=True)
class SpaceCheck:
    """A feature space: its floor, its answer to each damage, and what its reference is like."""

    floor: DamageRow
    rows: tuple[DamageRow, ...]
    between: float | None
    """The share of the reference's variance between classes."""
    kid_error: float
    """The standard error of KID at the floor."""
    warnings: tuple[str, ...] = ()

    @property
    def features(self) -> str:
        """The name of the space."""
        return self.floor.features

    @property
    def failed(self) -> tuple[DamageRow, ...]:
        """Damages to which the Fréchet distance does not answer as required."""
        return tuple(row for row in self.rows if not row.answers)


def check_space(reference: FeatureReference, subject: Subject, damages: Sequence[Damage] = DAMAGES) -> SpaceCheck:
    """Measure held-out images, and each damage of them that their classes allow. ValueError of fewer than 4 images."""
    clean = _features(reference, subject.pixels)
    meters = meters_of(reference)
    error = jackknife_error(meters["kid"], clean)
    floor = _row(reference.features, Damage("floor"), [clean], [clean], meters, error)
    rows = []
    possible = [damage for damage in damages if len(subject.labels.unique()) >= damage.classes]
    with Progress("damage", len(possible)) as progress:
        for damage in possible:
            progress.at(f"{damage.name} under {reference.features}")
            changed, chosen = damage.change(subject), damage.choose(subject.labels)
            features = clean if changed is subject.pixels else _features(reference, changed)
            alike = [clean[places] for places in undamaged(len(clean), chosen)]
            sets = [features[places] for places in chosen]
            rows.append(_row(reference.features, damage, sets, alike, meters, error))
            progress.advance()
    return SpaceCheck(floor, tuple(rows), reference.between, error, reference.warnings)


def meters_of(reference: FeatureReference) -> dict[str, Measure]:
    """Functions of features (n, D), by name."""
    assert reference.sample is not None
    unit = reference.kernel_unit
    sample = reference.sample[:MOST] / unit
    return {
        "distance": reference.distance_of,
        "kid": lambda features: kid(features / unit, sample, size=None).value,
        "sliced": reference.slices.distance,
    }


def jackknife_error(measure: Measure, features: Tensor, groups: int = GROUPS) -> float:
    """Standard error of measure(features): sqrt((G - 1) / G sum_g (t_g - mean t)^2), t_g without group g of consecutive rows.

    ValueError of fewer than 4 rows.
    """
    if len(features) < 4:
        raise ValueError(f"{len(features)} images have no standard error here: use at least 4")
    parts = features.tensor_split(min(groups, len(features) // 2))
    found = torch.tensor(
        [measure(torch.cat([*parts[:g], *parts[g + 1 :]])) for g in range(len(parts))], dtype=torch.float64
    )
    return float(((len(parts) - 1) / len(parts) * (found - found.mean()).square().sum()).sqrt())


def _row(
    features: str,
    damage: Damage,
    sets: Sequence[Tensor],
    alike: Sequence[Tensor],
    meters: Mapping[str, Measure],
    error: float,
) -> DamageRow:
    """Means over the sets of a damage, against those of as many undamaged images."""
    own = {name: _mean(map(measure, sets)) for name, measure in meters.items()}
    floor = {name: _mean(map(measure, alike)) for name, measure in meters.items()}
    return DamageRow(
        features,
        damage.name,
        round(_mean(map(len, sets))),
        damage.required,
        own["distance"],
        own["distance"] / floor["distance"],
        own["kid"],
        (own["kid"] - floor["kid"]) / error,
        own["sliced"],
        own["sliced"] / floor["sliced"],
    )


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _features(reference: FeatureReference, images: Tensor) -> Tensor:
    return reference.activations(images).features.cpu()
