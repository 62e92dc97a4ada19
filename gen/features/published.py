"""A reference that others publish, in place of the training images: mean and covariance, and where a file has them, images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, one_line, raising
from midway.gen.core.files import file_hash
from midway.gen.core.text import printable
from midway.gen.data.external import read_npz
from midway.gen.features.extractor import Extractor
from midway.gen.features.published_files import Published, array_names, read_published, write_published
from midway.gen.features.reference import FeatureReference
from midway.gen.metrics.frechet import Root
from midway.gen.metrics.moments import FeatureStatistics

NEED_IMAGES = ("kid", "sliced", "precision", "density")
"""Metrics of the features of single images of the reference."""


@dataclass(frozen=True)
class PublishedReference(FeatureReference):
    """A reference from a file; its name is that of the file with 12 digits of its sha256, its fingerprint the whole."""

    counted: bool = True
    """Whether the number of its images is known; else `statistics.count` is 2 D, which enters no distance."""

    @property
    def id(self) -> str:
        """The file, and the number of its images."""
        return f"{self.name} {self.fingerprint} n={self.statistics.count if self.counted else '?'}"

    @property
    def text(self) -> str:
        """The reference in words, as what images are measured against."""
        count = f" of {self.statistics.count} images" if self.counted else ""
        return f"mean and covariance{count} in a published file, {self.name}"


# ---- from a file to a reference ----


def open_reference(
    path: Path,
    network: Extractor,
    metrics: Sequence[str] = (),
    root: Root = "eigen",
    size: tuple[int, ...] | None = None,
) -> PublishedReference:
    """The reference in a file for this feature network, which must have made its numbers; with its images if `metrics` need any.

    `size` (C, H, W) of the samples, which its images must have. UsageError for metrics that it cannot give and for a network
    that measures on axes of images; DataError for a file that cannot be read, or is no mean and covariance of the network's.
    """
    path = path.expanduser()
    if network.axes is not None:
        why = f"{network.name} compares on principal axes of the reference's images"
        raise UsageError(
            f"--reference {path}", why, "pass --features with the network that made the file, such as inception"
        )
    names = array_names(path)
    check_metrics_of(path, names, metrics)
    with raising(DataError, f"{path} cannot be read", "name a file of mu and sigma", OSError, why=one_line):
        digest = file_hash(path)
    sample = _images(path, network, size) if _needs_images(names, metrics) else None
    if "mu" not in names and sample is not None and path.suffix.lower() == ".npz":
        statistics, counted = FeatureStatistics.of(sample), True
    else:
        found = read_published(path)
        _check_network(path, found, network)
        counted = found.count is not None
        own = 2 * network.dim
        count = found.count or own + (sample is not None and len(sample) == own)  # never that of the sample
        statistics = FeatureStatistics(count, found.mean, found.covariance * (count - 1))
    name = f"{printable(path.stem)}@{digest[:12]}"
    return PublishedReference(network, network.name, statistics, name, sample, root, digest, counted=counted)


def has_images(path: Path) -> bool:
    """Whether a file has images, for metrics of single images; DataError as `array_names`."""
    return "arr_0" in array_names(path)


def _needs_images(names: Sequence[str], metrics: Sequence[str]) -> bool:
    return "arr_0" in names and ("mu" not in names or any(name in NEED_IMAGES for name in metrics))


def check_metrics_of(path: Path, names: Sequence[str], metrics: Sequence[str]) -> None:
    """UsageError for metrics of single images where a file of these arrays has no images."""
    without = [name for name in metrics if name in NEED_IMAGES]
    if without and "arr_0" not in names:
        raise UsageError(
            f"--metrics {','.join(without)} with --reference {path}",
            "the file has a mean and a covariance, and these metrics compare with single images",
            "drop them (--metrics ''), or name a reference with images (arr_0), as ADM's",
        )


def _images(path: Path, network: Extractor, size: tuple[int, ...] | None) -> Tensor:
    """Features float32 (N, D) of the images in a file."""
    images = torch.from_numpy(read_npz(path)).permute(0, 3, 1, 2)
    if size is not None and tuple(images.shape[2:]) != tuple(size[1:]):
        found, needed = ("x".join(map(str, reversed(shape))) for shape in (images.shape[2:], size[1:]))
        raise DataError(
            f"the images of {path} are {found}",
            f"the samples are {needed}",
            "name the reference of that size, or resize neither",
        )
    network.check(images, f"those of {path} are")
    return network.features(images).cpu()


def _check_network(path: Path, found: Published, network: Extractor) -> None:
    """DataError unless the file's numbers are of this network, as far as it shows."""
    if len(found.mean) != network.dim:
        raise DataError(
            f"{path} is of another feature network",
            f"it has {len(found.mean)} features, {network.name} has {network.dim}",
            "pass the --features that made it: 2048 are Inception's, 1024 DINOv2 ViT-L/14's, 768 ViT-B/14's",
        )
    if found.features is not None and found.features != network.name:
        raise DataError(
            f"{path} is of another feature network",
            f"it was made by {found.features}, not by {network.name}",
            "pass the --features that made it, with the same weights",
        )


# ---- to a file ----


def save_reference(path: Path, reference: FeatureReference) -> None:
    """Write mean and covariance as an .npz that others read; errors of `check_saved`, DiskError."""
    check_saved(path, reference.axes is not None)
    statistics = reference.statistics
    count = statistics.count if getattr(reference, "counted", True) else None
    write_published(path, Published(statistics.mean, statistics.covariance, count, reference.features))


def check_saved(path: Path, axes: bool) -> None:
    """UsageError for a file that cannot hold a reference, and for one on axes; before anything is measured."""
    if path.suffix.lower() != ".npz":
        raise UsageError(
            f"--save-reference {path}", "others read mean and covariance as .npz", "give a name that ends in .npz"
        )
    if axes:
        why = "features on principal axes of a reference mean nothing to another evaluator"
        raise UsageError(f"--save-reference {path}", why, "measure with --features inception, say")
