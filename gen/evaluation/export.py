"""Measured images as files that other people's evaluators read; both hold one image a seed, in the order of the seeds.

    NPZ     arr_0 uint8 (N, H, W, 3), grey repeated; arr_1 int64 (N,), labels of a conditional model: what ADM's evaluator takes
    zip     stored, not compressed: 00000/img00000000.png, ... by thousands, and dataset.json with labels, or null: EDM's layout

Images are sampled again part by part, as they were measured, so no more than a part is held; a file is whole or absent.
"""

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from midway.gen.core.errors import DiskError
from midway.gen.core.files import replacing
from midway.gen.diffusion.sampling import labels_of
from midway.gen.evaluation.external import ImagesSource
from midway.gen.evaluation.records import FLOOR, Measurement
from midway.gen.evaluation.sources import SampleSource
from midway.gen.evaluation.store import part_ranges, seeds_of
from midway.gen.evaluation.sweep import Sweep

EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every entry of a zip, so that the same images are the same file."""


@dataclass(frozen=True)
class ImageSet:
    """The images of `blocks` blocks of n seeds; `classes` of the labels, 0 without."""

    source: SampleSource
    first: int
    n: int
    blocks: int
    classes: int = 0

    @property
    def count(self) -> int:
        """All images."""
        return self.n * self.blocks

    def parts(self) -> Iterator[Tensor]:
        """uint8 (<= 1024, C, H, W), in the parts in which they are measured."""
        for _, first, count in part_ranges(self.first, self.n, self.blocks):
            yield self.source.images(self.source.sample(seeds_of(first, count)))

    def labels(self) -> Tensor | None:
        """int64 (count,), None of an unconditional model."""
        return labels_of(seeds_of(self.first, self.count), self.classes) if self.classes else None


class Writer(Protocol):
    """Takes the parts one after the other."""

    def add(self, images: Tensor) -> None: ...


def check_folders(folders: Mapping[str, Path | None]) -> None:
    """Make them, so that one that cannot be written shows before anything is sampled. DiskError naming the flag."""
    for flag, folder in folders.items():
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DiskError(f"{flag} {folder} cannot be made", str(error), "choose another folder") from None


def export(images: ImageSet, npz: Path | None = None, archive: Path | None = None) -> None:
    """Write an NPZ, a zip, or both from one pass over the images. DiskError."""
    with ExitStack() as stack:
        writers: list[Writer] = []
        if npz is not None:
            writers.append(stack.enter_context(npz_writer(npz, images.count, images.labels())))
        if archive is not None:
            writers.append(stack.enter_context(zip_writer(archive, images.labels())))
        for part in images.parts():
            for writer in writers:
                writer.add(part)


@contextmanager
def _whole_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """A stored zip that replaces `path` when all is written, and leaves nothing otherwise."""
    try:
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            yield archive
    except OSError as error:
        raise DiskError(f"cannot write {path}", str(error), "free disk space or choose another directory") from error


# ---- which measurements ----


def to_export(sweep: Sweep) -> list[Measurement]:
    """The best grid of each solver and NFE, all grids of a sweep of one solver, and baselines; none that diverged."""
    ours = [m for m in sweep.measurements if m.solver != FLOOR and not _is_external(sweep, m) and not m.nonfinite]
    single = len({m.solver for m in ours if not m.baseline}) == 1
    return [m for m in ours if m.best or single]


def _is_external(sweep: Sweep, m: Measurement) -> bool:
    return isinstance(sweep.jobs[m.solver, m.grid, m.nfe].source, ImagesSource)


def export_measurement(
    sweep: Sweep, m: Measurement, first_seed: int, npz: Path | None, archive: Path | None
) -> list[Path]:
    """The files written of a measurement into the folders `npz` and `archive`: <solver>-<grid>-nfe<k>."""
    job = sweep.jobs[m.solver, m.grid, m.nfe]
    stem = "-".join(part for part in (m.solver, m.grid, f"nfe{m.nfe}") if part)
    npz, archive = npz and npz / f"{stem}.npz", archive and archive / f"{stem}.zip"
    export(ImageSet(job.source, first_seed, m.n, m.blocks, job.classes), npz, archive)
    return [path for path in (npz, archive) if path is not None]


# ---- NPZ ----


@dataclass
class NpzWriter:
    """Appends images to the member `arr_0.npy`, whose shape is known before the first."""

    archive: zipfile.ZipFile
    count: int
    member: IO[bytes] | None = None

    def add(self, images: Tensor) -> None:
        """uint8 (n, C, H, W); grey is repeated to three channels."""
        pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).contiguous().numpy()
        if self.member is None:
            self.member = self.archive.open(_entry("arr_0.npy"), "w", force_zip64=True)
            _write_header(self.member, (self.count, *pixels.shape[1:]), pixels.dtype)
        self.member.write(pixels.data)


@contextmanager
def npz_writer(path: Path, count: int, labels: Tensor | None) -> Iterator[NpzWriter]:
    """A writer of `count` images, and of the labels after them."""
    with _whole_zip(path) as archive:
        writer = NpzWriter(archive, count)
        try:
            yield writer
        finally:
            if writer.member is not None:  # a zip cannot be closed around an open member
                writer.member.close()
        if labels is not None:
            buffer = io.BytesIO()
            npy.write_array(buffer, labels.numpy(), allow_pickle=False)
            archive.writestr(_entry("arr_1.npy"), buffer.getvalue())


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[np.uint8]) -> None:
    npy.write_array_header_1_0(file, {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape})


# ---- zip of PNGs ----


@dataclass
class ZipWriter:
    """Numbered PNGs."""

    archive: zipfile.ZipFile
    written: int = 0

    def add(self, images: Tensor) -> None:
        """uint8 (n, C, H, W), in their own channels."""
        for pixels in images.permute(0, 2, 3, 1).numpy():
            self.archive.writestr(_entry(png_name(self.written)), _png(pixels))
            self.written += 1


@contextmanager
def zip_writer(path: Path, labels: Tensor | None) -> Iterator[ZipWriter]:
    """A writer of PNGs, and of dataset.json after them."""
    with _whole_zip(path) as archive:
        writer = ZipWriter(archive)
        yield writer
        archive.writestr(_entry("dataset.json"), json.dumps({"labels": named_labels(labels)}))


def png_name(number: int) -> str:
    """EDM's name of an image: 1234 -> 00001/img00001234.png."""
    return f"{number // 1000:05d}/img{number:08d}.png"


def named_labels(labels: Tensor | None) -> list[tuple[str, int]] | None:
    """(name, label) of every image, as dataset.json holds them."""
    return None if labels is None else [(png_name(number), label) for number, label in enumerate(labels.tolist())]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    grey_or_rgb = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(np.ascontiguousarray(grey_or_rgb)).save(buffer, format="PNG", compress_level=0)
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, EPOCH)
