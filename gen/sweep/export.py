"""Measured images as files that other people's evaluators read (data/pictures.py): sampled again, as they were measured."""

import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from midway.gen.core.text import json_text
from midway.gen.data.pictures import NpzWriter, ZipWriter, npz_writer, zip_writer
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.sampling import labels_of
from midway.gen.evaluation.records import LIMITS, Measurement
from midway.gen.evaluation.sources import SampleSource
from midway.gen.progress.bar import reported
from midway.gen.sweep.run import Sweep
from midway.gen.sweep.store import Seeds


@dataclass(frozen=True)
class ImageSet:
    """The images of all blocks of seeds; `classes` of the labels, 0 without, of which `empty` are not drawn, by `draw`."""

    source: SampleSource
    seeds: Seeds
    classes: int = 0
    empty: tuple[int, ...] = ()
    draw: ClassDraw | None = None

    def parts(self) -> Iterator[Tensor]:
        """uint8 (<= 1024, C, H, W), in the parts in which they are measured."""
        for _, seeds in self.seeds.parts:
            yield self.source.images(self.source.sample(seeds))

    @property
    def about(self) -> str:
        """Names these images: a hash of everything that they depend on."""
        own = {"source": self.source.identity, "seeds": str(self.seeds), "classes": self.classes, "empty": self.empty}
        return f"midway {hashlib.sha256(json_text(own, sort_keys=True).encode()).hexdigest()[:16]}"

    def labels(self) -> Tensor | None:
        """int64 (count,), None of an unconditional model."""
        return labels_of(self.seeds.all, self.classes, self.empty, self.draw) if self.classes else None


def export(images: ImageSet, npz: Path | None = None, archive: Path | None = None) -> None:
    """Write an NPZ, a zip, or both from one pass over the images. DiskError; UsageError where a file is of other images."""
    labels = images.labels()
    with ExitStack() as stack:
        writers: list[NpzWriter | ZipWriter] = []
        if npz is not None:
            writers.append(stack.enter_context(npz_writer(npz, len(images.seeds.all), labels, images.about)))
        if archive is not None:
            writers.append(stack.enter_context(zip_writer(archive, labels, images.about)))
        for part in reported(images.parts(), "writing", len(images.seeds.all)):
            for writer in writers:
                writer.add(part)


def to_export(sweep: Sweep) -> list[Measurement]:
    """Solvers, few-step models and baselines; none that diverged, no limits, and no external images, which have no NFE."""
    return [m for m in sweep.measurements if m.nfe and not m.nonfinite and m.solver not in LIMITS]


def export_measurement(
    sweep: Sweep, m: Measurement, first_seed: int, npz: Path | None, archive: Path | None
) -> list[Path]:
    """The files written of a measurement into the folders `npz` and `archive`: <solver>-<grid>-nfe<k>."""
    job = sweep.jobs[m.solver, m.grid, m.nfe]
    stem = "-".join(part for part in (m.solver.replace(" ", "-"), m.grid, f"nfe{m.nfe}") if part)
    npz, archive = npz and npz / f"{stem}.npz", archive and archive / f"{stem}.zip"
    export(ImageSet(job.source, Seeds(first_seed, m.n, m.blocks), job.classes, job.empty, job.draw), npz, archive)
    return [path for path in (npz, archive) if path is not None]


def exported(sweep: Sweep, first_seed: int, npz: Path | None, archive: Path | None) -> Iterator[Path]:
    """The files of `export_measurement` of all that `to_export` has, as they are written; none without a folder."""
    for m in to_export(sweep) if npz or archive else ():
        yield from export_measurement(sweep, m, first_seed, npz, archive)
