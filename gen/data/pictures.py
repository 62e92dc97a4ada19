"""Images as files: grids for people, and what other people's evaluators read.

    grid    a PNG of many images in rows, below a caption
    NPZ     arr_0 uint8 (N, H, W, 3), grey repeated; arr_1 int64 (N,), labels of a conditional model: what ADM's evaluator takes
    zip     stored, not compressed: 00000/img00000000.png, ... by thousands, and dataset.json with labels, or null: EDM's layout

NPZ and zip hold one image a seed, in the order of the seeds. Images are added part by part, so no more than a part is held; a
file is whole or absent. `about`, the comment of the zip (an NPZ is one too), names the images: only the same are replaced.
"""

import io
import json
import math
import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from midway.gen.core.errors import DiskError, UsageError, remedy
from midway.gen.core.files import ZIP_DAMAGE, regular_file, replacing, write_atomically

LEAST_SIDE = 48  # pixels an image should have in a grid to be looked at
EPOCH = (1980, 1, 1, 0, 0, 0)
"""The time of every entry of a zip, so that the same images are the same file."""


# ---- grids ----


CAPTION = 22
"""Pixels of the type of a caption, twice the size of Pillow's default font."""


def grid_png(images: Tensor, columns: int, scale: int | None = None, caption: str = "") -> bytes:
    """uint8 (N, C, H, W) -> a PNG with `columns` images a row, 2 pixels apart, each enlarged by a whole factor.

    A caption is drawn into a strip above, broken into lines at spaces, but not at no-break spaces, where the picture is narrow.
    """
    factor = scale or max(1, math.ceil(LEAST_SIDE / images.shape[-1]))
    large = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    large = F.pad(large.expand(-1, 3, -1, -1), (1, 1, 1, 1), value=255)
    missing = -len(large) % columns
    large = torch.cat([large, large.new_full((missing, *large.shape[1:]), 255)])
    rows = large.unflatten(0, (-1, columns))  # (R, K, 3, h, w)
    picture = rows.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    buffer = io.BytesIO()
    made = Image.fromarray(np.ascontiguousarray(picture.numpy()))
    (_captioned(made, caption) if caption else made).save(buffer, format="PNG")
    return buffer.getvalue()


def _captioned(picture: Image.Image, caption: str) -> Image.Image:
    """The picture below its caption, and wider where a word is."""
    font, lines = ImageFont.load_default(CAPTION), list[str]()
    for word in caption.split(" "):
        longer = f"{lines[-1]} {word}" if lines else word
        fits = bool(lines) and font.getlength(longer) <= picture.width - 8
        lines = [*lines[:-1], longer] if fits else [*lines, word]
    row = CAPTION + 8
    width = max(picture.width, *(int(font.getlength(line)) + 9 for line in lines))
    whole = Image.new("RGB", (width, picture.height + row * len(lines)), "white")
    draw = ImageDraw.Draw(whole)
    for number, line in enumerate(lines):
        draw.text((4, row * number + 1), line.replace("\u00a0", " "), fill="black", font=font)
    whole.paste(picture, (0, row * len(lines)))
    return whole


def save_grid(path: str | Path, images: Tensor, columns: int, caption: str = "") -> None:
    """Write `grid_png` of uint8 images (N, C, H, W) to `path`, completely or not at all. DiskError."""
    write_atomically(Path(path), grid_png(images, columns, caption=caption))


# ---- archives ----


def is_of(path: Path, about: str) -> bool:
    """Whether there is an archive of these images."""
    with suppress(*ZIP_DAMAGE), zipfile.ZipFile(regular_file(path)) as archive:
        return archive.comment.decode(errors="replace") == about
    return False


def check_own(path: Path, about: str) -> None:
    """UsageError if there is a file that is not an earlier one of the same images."""
    if os.path.lexists(path) and not is_of(path, about):
        fix = "choose another folder, or move that file away"
        raise UsageError(f"{path} is of other images", "it would be replaced", fix)


@contextmanager
def _whole_zip(path: Path, about: str) -> Iterator[zipfile.ZipFile]:
    """A stored zip that replaces `path` when all is written, and leaves nothing otherwise. UsageError as `check_own`."""
    check_own(path, about)
    try:
        with replacing(path) as temporary:
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                archive.comment = about.encode()
                yield archive
            check_own(path, about)  # another process may have been here first
    except OSError as error:
        raise DiskError(f"cannot write {path}", str(error), remedy(error, "choose another directory")) from error


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
            shape, kind = (self.count, *pixels.shape[1:]), npy.dtype_to_descr(pixels.dtype)
            npy.write_array_header_1_0(self.member, {"descr": kind, "fortran_order": False, "shape": shape})
        self.member.write(pixels.data)


@contextmanager
def npz_writer(
    path: Path, count: int, labels: Tensor | None, about: str = "", seeds: Tensor | None = None
) -> Iterator[NpzWriter]:
    """A writer of `count` images, and of labels and seeds after them."""
    with _whole_zip(path, about) as archive:
        writer = NpzWriter(archive, count)
        try:
            yield writer
        finally:
            if writer.member is not None:  # a zip cannot be closed around an open member
                writer.member.close()
        for name, values in {"arr_1": labels, "seeds": seeds}.items():
            if values is not None:
                buffer = io.BytesIO()
                npy.write_array(buffer, values.numpy(), allow_pickle=False)
                archive.writestr(_entry(f"{name}.npy"), buffer.getvalue())


# ---- zip of PNGs ----


@dataclass
class ZipWriter:
    """Numbered PNGs."""

    archive: zipfile.ZipFile
    written: int = 0

    def add(self, images: Tensor) -> None:
        """uint8 (n, C, H, W), in their own channels."""
        for pixels in images.permute(0, 2, 3, 1).numpy():
            self.archive.writestr(_entry(png_name(self.written)), png_bytes(pixels))
            self.written += 1


def zip_files(path: Path, names: Sequence[str], folder: Path, about: str) -> None:
    """A zip of these files of a folder, stored, under their names. DiskError; UsageError if `path` is of other images."""
    with _whole_zip(path, about) as archive:
        for name in names:
            archive.writestr(_entry(name), (folder / name).read_bytes())


@contextmanager
def zip_writer(path: Path, labels: Tensor | None, about: str = "") -> Iterator[ZipWriter]:
    """A writer of PNGs, and of dataset.json after them."""
    with _whole_zip(path, about) as archive:
        writer = ZipWriter(archive)
        yield writer
        archive.writestr(_entry("dataset.json"), json.dumps({"labels": named_labels(labels)}))


def png_name(number: int) -> str:
    """EDM's name of an image: 1234 -> 00001/img00001234.png."""
    return f"{number // 1000:05d}/img{number:08d}.png"


def named_labels(labels: Tensor | None) -> list[tuple[str, int]] | None:
    """(name, label) of every image, as dataset.json holds them."""
    return None if labels is None else [(png_name(number), label) for number, label in enumerate(labels.tolist())]


def png_bytes(pixels: NDArray[np.uint8], compression: int = 0) -> bytes:
    """uint8 (H, W, C) as a PNG, grey or RGB."""
    buffer = io.BytesIO()
    grey_or_rgb = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(np.ascontiguousarray(grey_or_rgb)).save(buffer, format="PNG", compress_level=compression)
    return buffer.getvalue()


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, EPOCH)
