"""A feature network and the statistics of the training images under it.

Statistics are cached in a file named by the images' fingerprint and the network's hash; a file of another pair raises DataError.
Moments are those of all training images; features are stored for at most 10,000 of them, classes in proportion, for KID,
precision and recall.

A network that names a number of `axes` is measured on as many principal axes of the training images (metrics/principal_axes.py):
what is called features here are then the coordinates on them, (n, k). The axes are stored with the statistics, their number is
part of the name of the features, and their hash of the reference's `id`.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, raising
from midway.gen.core.files import DAMAGE, read_tensors, state_hash, write_atomically
from midway.gen.core.processes import best_device
from midway.gen.data.images import ImageData
from midway.gen.data.pixels import Images, part_of
from midway.gen.data.splits import in_proportion
from midway.gen.features.extractor import Activations, Extractor, ImageFeatures
from midway.gen.features.streaming import AT_ONCE, FeatureStream, measured, principal_axes_of
from midway.gen.metrics.class_share import MOST
from midway.gen.metrics.frechet import Root, frechet_distance, frechet_distance_of_features, frechet_distance_to
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.principal_axes import PrincipalAxes
from midway.gen.metrics.sliced import Slices
from midway.tokenizers.weights import check_tensors

FORMAT = "midway-reference-5"
EARLIER = ("midway-reference-2", "midway-reference-3", "midway-reference-4")
"""Formats whose files are replaced: sums about the origin; without axes; features of as many images of every class."""
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
    """Features float32 (<= 10,000, D) of training images, in an order in which the classes take turns in proportion."""
    root: Root = "eigen"
    """How the trace of the Fréchet distance is found where there are more images than features."""
    fingerprint: str = ""
    """Of the reference's images."""
    axes: PrincipalAxes | None = None
    """Those on which features are measured."""
    between: float | None = None
    """The share of the features' variance that lies between classes of training images, in [0, 1]."""

    @property
    def id(self) -> str:
        """The reference's images with their whole fingerprint, and the axes."""
        axes = "" if self.axes is None else f" axes={state_hash('axes', self.axes.to_tensors())}"
        return f"{self.name} {self.fingerprint} n={self.statistics.count}{axes}"

    @property
    def text(self) -> str:
        """The reference in words, as what images are measured against."""
        return f"all {self.statistics.count} training images"

    @property
    def warnings(self) -> tuple[str, ...]:
        """A line if the features hardly depend on the variety within classes."""
        if self.between is None or self.between <= MOST:
            return ()
        return (
            f"{self.between:.0%} of the variance of {self.features} lies between classes: distances depend little on the variety "
            "within a class. midway check-metric shows how little; effnet-lite0 was not trained on these images.",
        )

    @cached_property
    def kernel_unit(self) -> float:
        """The length in which KID's kernel takes features: their overall standard deviation on axes, else 1, as published.

        Coordinates that are small against 1 would make the cubic kernel a linear one, which sees means alone.
        """
        spread = float(self.statistics.covariance.trace() / self.statistics.dim) ** 0.5
        return spread if self.axes is not None and spread > 0 else 1.0

    @cached_property
    def slices(self) -> Slices:
        """Of `sample`, for the sliced distance. ValueError if none is stored."""
        if self.sample is None:
            raise ValueError("this reference has no features of single images: build it with make_reference")
        return Slices.of(self.sample)

    def activations(self, images: Tensor) -> Activations:
        """Features, on the axes if there are any (then on the CPU), and logits of uint8 images (N, C, H, W)."""
        found = self.network.activations(images)
        return found if self.axes is None else Activations(self.axes.project(found.features), found.logits)

    @property
    def has_logits(self) -> bool:
        """Whether the network names class probabilities."""
        return bool(getattr(self.network, "has_logits", False))

    def distance(self, images: Images) -> float:
        """Fréchet distance of uint8 images (N, C, H, W), read a few hundred at once, to the reference."""
        return self.distance_of(torch.cat([self.activations(part).features for part in images.split(AT_ONCE)]))

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
    """Statistics of all training images under the network of this name, from the folder `cache` if they are there.

    DataError for a cached file of other images or another network, or a damaged one.
    """
    axes = network.measured_dim(train.images) if isinstance(network, Extractor) and network.axes is not None else None
    features = features if axes is None else f"{features}, {axes} axes"
    name = f"{train.name}@{train.fingerprint[:12]}"
    path = None if cache is None else cache / f"{train.fingerprint[:8]}-{_short(features)}.safetensors"
    header = {"format": FORMAT, "data": train.fingerprint, "features": features, "n": str(len(train.images))}
    tensors = _read(path, header) if path is not None and path.exists() else None
    if tensors is None:
        tensors = _measured(network, train, axes)
        if path is not None:
            write_atomically(path, save(tensors, {**header, "hash": state_hash("reference", tensors)}))
    return FeatureReference(
        network,
        features,
        FeatureStatistics.from_tensors(tensors),
        name,
        tensors["sample"],
        root,
        train.fingerprint,
        PrincipalAxes.from_tensors(tensors) if axes is not None else None,
        float(tensors["between"]),
    )


def _measured(network: ImageFeatures, train: ImageData, axes: int | None) -> dict[str, Tensor]:
    """The tensors of a file."""
    stream, kept = FeatureStream(network, train.images), balanced(train.labels)[:KEPT]
    principal = None if axes is None else principal_axes_of(stream, axes)
    statistics, sample, between = measured(stream, train.labels, kept, principal)
    found = {"sample": sample, "between": torch.tensor(between, dtype=torch.float64), **statistics.to_tensors()}
    return found if principal is None else found | principal.to_tensors()


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _read(path: Path, expected: dict[str, str]) -> dict[str, Tensor] | None:
    """None of an earlier format."""
    remedy = "delete the file; the statistics are computed again"
    with raising(DataError, f"the reference statistics {path} cannot be read", remedy, *DAMAGE):
        tensors, found = read_tensors(path)
        if found.get("format") in EARLIER:
            return None
        if found.pop("hash", None) != state_hash("reference", tensors):
            raise ValueError("its contents do not match their hash")
    if found != expected:
        differing = [key for key in expected if found.get(key) != expected[key]]
        what = ", ".join(f"{key} {found.get(key)!r} instead of {expected[key]!r}" for key in differing)
        raise DataError(f"the reference statistics {path} are of something else", what or json.dumps(found), remedy)
    with raising(DataError, f"the reference statistics {path} cannot be read", remedy, *DAMAGE):
        check_tensors(tensors, _layout(int(expected["n"]), tensors))
    return tensors


def _layout(n: int, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names, shapes and types of the tensors of a file, without numbers, for the dimensions of its means."""
    dim = found["mean"].numel()
    layout = FeatureStatistics.of_rows(torch.empty(0, dim)).to_tensors()
    layout |= {"sample": torch.empty(min(n, KEPT), dim), "between": torch.empty((), dtype=torch.float64)}
    if "axes.mean" in found:
        wide = torch.empty(found["axes.mean"].numel(), dim, dtype=torch.float64)
        layout |= PrincipalAxes(wide[:, 0], wide).to_tensors()
    return layout


def balanced(labels: Tensor) -> Tensor:
    """int64 (N,): `in_proportion`, so that the first n have the classes as n seeds have them by default."""
    return in_proportion(labels)


@dataclass(frozen=True)
class Subject:
    """Held-out images uint8 (N, C, H, W), read as they are needed where they lie on the disk, with their labels and places in the
    split, int64 (N,), and their name."""

    images: Images
    labels: Tensor
    places: Tensor
    name: str

    @cached_property
    def pixels(self) -> Tensor:
        """All images in memory, always the same tensor."""
        return self.images[:]


def balanced_subject(held_out: ImageData, n: int | None = None) -> Subject:
    """The first n held-out images, or all if there are fewer, in an order in which the classes take turns in proportion."""
    chosen = balanced(held_out.labels)[:n]
    name = f"{held_out.name}@{held_out.fingerprint[:12]}"
    return Subject(part_of(held_out.images, chosen), held_out.labels[chosen], chosen, name)
