"""A feature network and the statistics of the training images under it.

Statistics are cached in a file named by the images' fingerprint and the network's hash; a file of another pair raises DataError.
Moments are those of all training images; features are stored for at most 10,000 of them, with classes interleaved, for KID,
precision and recall.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, raising
from midway.gen.core.files import DAMAGE, state_hash, write_atomically
from midway.gen.core.processes import best_device
from midway.gen.core.randomness import permutation
from midway.gen.data.images import ImageData
from midway.gen.features.extractor import ImageFeatures
from midway.gen.metrics.frechet import Root, frechet_distance, frechet_distance_of_features, frechet_distance_to
from midway.gen.metrics.moments import FeatureStatistics

FORMAT = "midway-reference-3"
EARLIER = ("midway-reference-2",)
"""Formats whose files are replaced: sums about the origin."""
KEPT = 10_000
"""Reference features that are kept."""


@dataclass(frozen=True)
class FeatureReference:
    """Turns images into a distance to the training images."""

    network: ImageFeatures
    features: str
    statistics: FeatureStatistics
    name: str
    sample: Tensor | None = None
    """Features float32 (<= 10,000, D) of training images, in an order in which the classes take turns."""
    root: Root = "eigen"
    """How the trace of the Fréchet distance is found where there are more images than features."""
    fingerprint: str = ""
    """Of the reference's images."""

    @property
    def id(self) -> str:
        """The reference's images with their whole fingerprint."""
        return f"{self.name} {self.fingerprint} n={self.statistics.count}"

    @property
    def has_logits(self) -> bool:
        """Whether the network names class probabilities."""
        return bool(getattr(self.network, "has_logits", False))

    def distance(self, images: Tensor) -> float:
        """Fréchet distance of uint8 images (N, C, H, W) to the reference."""
        return self.distance_of(self.network.features(images))

    def distance_of(self, features: Tensor) -> float:
        """Fréchet distance of features (N, D) to the reference.

        Of no more images than features without their covariance, and without any where the whole reference's features are
        kept. UsageError where `root` is "newton-schulz", which does not converge for every pair.
        """
        if len(features) <= self.statistics.dim:
            if self.sample is not None and len(self.sample) == self.statistics.count:
                return frechet_distance_of_features(features.cpu(), self.sample)
            return frechet_distance_to(features, self.statistics)
        statistics = FeatureStatistics.of(features)
        if self.root == "eigen":
            return frechet_distance(statistics, self.statistics)
        with raising(UsageError, f"--root {self.root}", "drop it: the default always works"):
            return frechet_distance(statistics, self.statistics, self.root, best_device())


def make_reference(
    network: ImageFeatures, features: str, train: ImageData, cache: Path | None = None, root: Root = "eigen"
) -> FeatureReference:
    """Statistics of all training images under this feature network, from the folder `cache` if they are there.

    DataError for a cached file of other images or another network, or a damaged one.
    """
    name = f"{train.name}@{train.fingerprint[:12]}"
    path = None if cache is None else cache / f"{train.fingerprint[:8]}-{_short(features)}.safetensors"
    header = {"format": FORMAT, "data": train.fingerprint, "features": features, "n": str(len(train.images))}
    cached = _read(path, header) if path is not None and path.exists() else None
    if cached is not None:
        statistics, sample = cached
    else:
        seen = network.features(train.images).cpu()
        statistics, sample = FeatureStatistics.of(seen), seen[balanced(train.labels)[:KEPT]].contiguous()
        if path is not None:
            tensors = {**statistics.to_tensors(), "sample": sample}
            write_atomically(path, save(tensors, {**header, "hash": state_hash("reference", tensors)}))
    return FeatureReference(network, features, statistics, name, sample, root, train.fingerprint)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read(path: Path, expected: dict[str, str]) -> tuple[FeatureStatistics, Tensor] | None:
    """None of an earlier format."""
    remedy = "delete the file; the statistics are computed again"
    with raising(DataError, f"the reference statistics {path} cannot be read", remedy, *DAMAGE):
        with safe_open(path, framework="pt") as file:
            found = file.metadata() or {}
            if found.get("format") in EARLIER:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        if found.pop("hash", None) != state_hash("reference", tensors):
            raise ValueError("its contents do not match their hash")
        statistics = FeatureStatistics.from_tensors(tensors)
        sample = tensors["sample"]
    if found != expected:
        differing = [key for key in expected if found.get(key) != expected[key]]
        what = ", ".join(f"{key} {found.get(key)!r} instead of {expected[key]!r}" for key in differing)
        raise DataError(f"the reference statistics {path} are of something else", what or json.dumps(found), remedy)
    return statistics, sample


def balanced(labels: Tensor) -> Tensor:
    """int64 (N,): items in an order in which every class comes in turn, so that the first n are balanced like the seeds.

    A plain random subset has too many of some classes, which alone would raise the floor.
    """
    order = permutation(0, "floor", 0, len(labels))
    mine = labels[order]
    turn = torch.nn.functional.one_hot(mine).cumsum(0).gather(1, mine[:, None])[:, 0]  # this item is its class's k-th
    return order[torch.argsort(turn, stable=True)]


@dataclass(frozen=True)
class Subject:
    """Held-out images uint8 (N, C, H, W) with their labels and places in the split, int64 (N,), and their name."""

    images: Tensor
    labels: Tensor
    places: Tensor
    name: str


def balanced_subject(held_out: ImageData, n: int | None = None) -> Subject:
    """The first n held-out images, or all if there are fewer, in an order in which the classes take turns."""
    chosen = balanced(held_out.labels)[:n]
    name = f"{held_out.name}@{held_out.fingerprint[:12]}"
    return Subject(held_out.images[chosen], held_out.labels[chosen], chosen, name)
