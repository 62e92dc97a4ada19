"""The feature maps of a data set under a trained network, in a folder of records like the latents of the same images.

A record has the maps of all views of one image, (V, C, h, w) in bfloat16, resized to the grid of a latent model's tokens: by
means over areas where the network has more rows and columns, else bilinear. Views are those of the latents, in the same order,
so that the sample of a training step has the latent and the map of one view.

feature-maps.json     the plan: images, network, views, grid, batch
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.errors import DataError, DivergedError
from midway.gen.core.processes import ProcessInfo, first_of_all
from midway.gen.core.text import echo
from midway.gen.data.images import ImageData
from midway.gen.features.extractor import Extractor, weights_of
from midway.gen.files.record_work import RecordWork, Span, write_records
from midway.gen.files.record_writer import RecordFormat
from midway.gen.files.records import Records, is_records, open_records, record_bytes
from midway.gen.progress.bar import Progress
from midway.gen.tokenizer.encoding import images_of, views_of
from midway.gen.tokenizer.latents import Latents
from midway.gen.tokenizer.stored import IN_MEMORY, StoredViews, Views
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.interface import Items

KIND, PLAN = "feature maps", "feature-maps.json"
REMAKE = "delete the folder: the same command makes it again"
BATCH = 64
"""Images whose maps are made at once."""


@dataclass(frozen=True)
class MapSource:
    """A network, images, and which maps of them are wanted: of windows of `side` pixels, on a grid of tokens."""

    network: Extractor
    data: ImageData
    views: Views
    side: int
    grid: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a record."""
        return (self.views.count, self.network.map_channels, *self.grid)

    @property
    def plan(self) -> dict[str, Any]:
        """What the maps depend on, as JSON."""
        return {
            "data": self.data.fingerprint,
            "network": weights_of(self.network.name),
            "windows": self.views.windows,
            "mirrored": self.views.mirrored,
            "side": self.side,
            "grid": list(self.grid),
        }

    def folder(self, beside: Path) -> Path:
        """Where they belong, in the run directory of the tokenizer."""
        words = f"{self.data.fingerprint[:8]}-{weights_of(self.network.name)[:8]}-{self.grid[0]}x{self.grid[1]}"
        return beside / f"maps-{words}-views{self.views.count}"


def resized(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, C, h, w) on the rows and columns of `grid`."""
    if maps.shape[2:] == grid:
        return maps
    if maps.shape[2] >= grid[0] and maps.shape[3] >= grid[1]:
        return F.adaptive_avg_pool2d(maps, grid)
    return F.interpolate(maps, grid, mode="bilinear", align_corners=False)


def write_maps(folder: Path, source: MapSource, process: ProcessInfo | None = None) -> None:
    """Write the folder if it is not there, together with the other processes; an interrupted call is gone on with.

    UsageError for a network without a map, and where the folder has other files or is being written; DivergedError, DiskError.
    """
    if first_of_all(is_records(folder, KIND)):
        return
    form, count = RecordFormat("bfloat16", source.shape), len(source.data.images)
    plan, words = {**source.plan, "batch": BATCH}, (("features by place", "made"), "images", REMAKE)
    write_records(
        RecordWork(folder, KIND, form, count, BATCH, PLAN, plan, *words),
        process or ProcessInfo(),
        lambda span, progress: _Batches(source, span, progress),
        lambda _: {},
    )
    echo(f"{KIND} {(count, *source.shape)} in {folder}")


@dataclass
class _Batches:
    """The maps of a shard."""

    source: MapSource
    span: Span
    progress: Progress
    facts: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        (first, end), source = self.span, self.source
        images = images_of(source.data, source.views)
        for start in range(first, end, BATCH):
            part = images[start : min(start + BATCH, end)]
            views = views_of(part, source.views, source.side)
            maps = [resized(source.network.feature_map(view, source.grid), source.grid).cpu() for view in views]
            made = torch.stack(maps, dim=1)
            if not bool(made.isfinite().all()):
                what = f"the feature maps of {source.network.name} are not finite"
                raise DivergedError(
                    what, f"one of the images {start} to {start + len(part) - 1}", "use another teacher"
                )
            yield made.bfloat16(), {}
            self.progress.advance(len(part))


@dataclass(frozen=True)
class FeatureMaps:
    """An opened folder, read by index from the disk."""

    records: Records
    kept: Tensor | None = None
    """All records, if they are few."""

    def read(self, items: Tensor) -> Tensor:
        """bfloat16 (B, V, C, h, w) of the images int64 (B,), on the CPU. DataError naming a file that has changed."""
        return self.records.read(items) if self.kept is None else self.kept[items]


def open_maps(folder: Path, source: MapSource) -> FeatureMaps:
    """The maps of this source. DataError where they are missing, of other images, another network or grid, or damaged."""
    records = open_records(folder, KIND, REMAKE)
    for key, value in source.plan.items():
        found = records.facts.get(key)
        if found != value:
            raise DataError(
                f"{folder} has other feature maps", f"their {key} is {found}, this run's is {value}", REMAKE
            )
    if records.shape != source.shape or len(records) != len(source.data.images):
        what = f"it has {len(records)} records {records.shape}, not {len(source.data.images)} of {source.shape}"
        raise DataError(f"{folder} is no whole folder of {KIND}", what, REMAKE)
    few = len(records) * record_bytes(records.dtype, source.shape) <= IN_MEMORY
    return FeatureMaps(records, records.read(torch.arange(len(records))) if few else None)


def with_maps(latents: Latents, maps: FeatureMaps, flip: bool) -> Items:
    """For fit(): latents as of `latents.items(flip)`, each with the map of the same view."""

    def read(items: Tensor) -> tuple[StoredViews, Tensor]:
        return latents.read(items), maps.read(items)

    def augment(stored: tuple[StoredViews, Tensor], context: Context) -> LatentBatch:
        views, found = stored
        chosen = latents.chosen(StoredViews(found, views.labels), context, flip)
        return replace(latents.standardised(views, context, flip), features=chosen.float())

    return Items(read, len(latents), latents.items(flip).fingerprint, augment)
