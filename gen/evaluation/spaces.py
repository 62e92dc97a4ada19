"""Feature spaces of a sweep: the first ranks, further ones are columns beside it.

One feature network alone can give a wrong conclusion, so a sweep looks at its images through several. A metric of the first
space has its own name, one of another space has the name of that space in front: `pixels_distance`.
"""

import warnings
from collections.abc import Mapping, Sequence

from torch import Tensor

from midway.gen.evaluation.metrics import Features, measure_metrics, possible
from midway.gen.evaluation.records import space_names
from midway.gen.features.reference import FeatureReference
from midway.gen.metrics.jackknife import GROUPS, jackknife

Spaces = Mapping[str, FeatureReference]
"""By name, the first under ``."""
Values = dict[str, float]


def spaces_of(references: Sequence[FeatureReference]) -> Spaces:
    """By their names."""
    return dict(zip(space_names([reference.features for reference in references]), references, strict=True))


def further(spaces: Spaces) -> str:
    """Names of the further networks, as a measurement holds them."""
    return "; ".join(reference.features for space, reference in spaces.items() if space)


def column(space: str, metric: str) -> str:
    """The name of a metric in a space."""
    return f"{space}_{metric}" if space else metric


def key(space: str) -> str:
    """The name of a part's tensor of features."""
    return column(space, "features")


def extract(spaces: Spaces, images: Tensor) -> dict[str, Features]:
    """Features of uint8 images (n, C, H, W) in every space, and the class probabilities of the first, on the CPU."""
    found = {space: reference.activations(images) for space, reference in spaces.items()}
    return {
        space: Features(its.features.cpu(), None if its.logits is None else its.logits.cpu())
        for space, its in found.items()
    }


def distances_and_metrics(names: Sequence[str], features: Mapping[str, Features], spaces: Spaces) -> Values:
    """Of n images: the Fréchet distance to the data and the metrics of every space; in further ones, those possible."""
    found: Values = {}
    for space, its in features.items():
        reference, chosen = spaces[space], tuple(names)
        if space:
            there = possible(chosen, len(its.features), reference.statistics.dim)
            chosen = tuple(name for name in there if name != "is" or its.logits is not None)
        found[column(space, "distance")] = reference.distance_of(its.features)
        found |= {column(space, name): value for name, value in measure_metrics(chosen, its, reference).items()}
    return found


def distance_errors(features: Mapping[str, Features], spaces: Spaces) -> Values:
    """Standard error of the Fréchet distance to the data of one set of images in every space; none of fewer than 20 images."""
    if any(len(its.features) < 2 * GROUPS for its in features.values()):
        return {}
    with warnings.catch_warnings():  # of few images, as of all of them
        warnings.simplefilter("ignore", UserWarning)
        return {
            column(space, "distance"): jackknife(spaces[space].distance_of, its.features)
            for space, its in features.items()
        }
