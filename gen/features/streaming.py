"""Statistics of the features of all images of a set, of which a few hundred at a time are in memory.

Features are added up in pieces of at most 8192 images (2048 of a larger set, so that memory is that of a small one) and may be
gone through again: where they are few they are kept, otherwise the network computes them a second time, with the same bits.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from midway.gen.data.pixels import Images
from midway.gen.features.extractor import ImageFeatures
from midway.gen.metrics.class_share import ClassSums
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.principal_axes import PrincipalAxes, axes_of
from midway.gen.progress.bar import Progress

AT_ONCE = 256
"""Images that are read at once, a multiple of the networks' blocks."""
PIECE, PIECE_OF_MANY = 8192, 2048
"""Images whose features are added up at once: up to so many in all, and of more."""
IN_MEMORY = 256 << 20
"""Bytes of features that are kept from one pass to the next."""


class FeatureStream:
    """The features of uint8 images (N, C, H, W), float32 (n, D) on the CPU a piece, in the order of the images, repeatedly."""

    def __init__(self, network: ImageFeatures, images: Images) -> None:
        self.network, self.images = network, images
        self.piece = PIECE if len(images) <= PIECE else PIECE_OF_MANY
        self._kept: list[Tensor] = []
        self._complete = False

    def __iter__(self) -> Iterator[Tensor]:
        if self._complete:
            yield from self._kept
            return
        self._kept, fits = [], True
        with Progress("features of the training images:", len(self.images), "images") as progress:
            for start in range(0, len(self.images), self.piece):
                found = self._features(start, progress)
                fits = fits and found[0].numel() * found.element_size() * len(self.images) <= IN_MEMORY
                if fits:
                    self._kept.append(found)
                yield found
        self._complete = fits

    def _features(self, start: int, progress: Progress) -> Tensor:
        """Of the piece that begins at this image."""
        end = min(start + self.piece, len(self.images))
        places = [slice(at, min(at + AT_ONCE, end)) for at in range(start, end, AT_ONCE)]
        found = list[Tensor]()
        for place in places:
            found.append(self.network.features(self.images[place]).cpu())
            progress.advance(place.stop - place.start)
        return torch.cat(found)


def principal_axes_of(stream: FeatureStream, count: int) -> PrincipalAxes:
    """The first `count` axes of the features; ValueError as `axes_of`."""
    return axes_of(_sum(FeatureStatistics.of(features) for features in stream), count)


def measured(
    stream: FeatureStream, labels: Tensor, kept: Tensor, axes: PrincipalAxes | None = None
) -> tuple[FeatureStatistics, Tensor, float]:
    """Statistics of all features, the features of the images `kept`, and the between-class share for these labels int64 (N,).

    With `axes` of the coordinates on them in place of the features.
    """
    classes, members = labels.unique(return_inverse=True)
    statistics, sums, sample, start = None, None, torch.empty(0), 0
    for features in stream:
        rows = features if axes is None else axes.project(features)
        found = FeatureStatistics.of(rows)
        if sums is None or statistics is None:
            sums, sample = ClassSums(len(classes), found.mean), rows.new_empty(len(kept), rows.shape[1])
            statistics = FeatureStatistics.of_rows(rows[:0])
        statistics = statistics + found
        sums.add(rows, members[start : start + len(rows)])
        here = (kept >= start) & (kept < start + len(rows))
        sample[here] = rows[kept[here] - start]
        start += len(rows)
    if statistics is None or sums is None:
        raise ValueError("statistics of no images: a reference needs some")
    return statistics, sample, sums.share(statistics.mean)


def _sum(parts: Iterator[FeatureStatistics]) -> FeatureStatistics:
    total = None
    for part in parts:
        total = FeatureStatistics.of_rows(part.mean[None][:0]) + part if total is None else total + part
    if total is None:
        raise ValueError("statistics of no images: a reference needs some")
    return total
