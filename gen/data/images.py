"""Labelled images from named sources, folders, zips and built sets; uint8 <-> float.

Images are uint8 (N, C, H, W) wherever they are stored and float32 in [-1, 1] wherever a network sees them. The way there
is `to_float`, x / 127.5 - 1; the way back is `to_uint8`, round((x + 1) 127.5). All 256 values survive the round trip.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from midway.gen.core.environment import free_memory
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.text import printable
from midway.gen.data.pixels import Images, fingerprint
from midway.gen.data.sources import SOURCES, check_unambiguous, existing_path, local_namesake, prepared, read_named
from midway.gen.data.stored import StoredImages, is_stored, open_stored
from midway.gen.files.decoding import Decoded, Undecodable, check_options, counted, listed_counts, stack
from midway.gen.files.file_set import check_bad, decode_all, open_files
from midway.gen.files.layouts import layout_of
from midway.gen.files.shards import set_name


@dataclass(frozen=True)
class ImageData:
    """A labelled set of images of one size."""

    images: Images  # uint8 (N, C, H, W), in memory or on the disk
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]  # label -> name; ("all",) when the source has no classes
    name: str
    fingerprint: str  # sha256 hex of shape, pixels, labels and class names
    conversions: tuple[str, ...] = ()  # what was done to which number of images of the whole source
    left_out: tuple[str, ...] = ()  # files and folders of the source that are not read, counted by kind
    whole: Images | None = None  # where `images` are the centres of larger ones: those, uint8 (N, C, H, W)


# ---- loading ----


def load_images(
    source: str,
    *,
    download: bool = False,
    channels: int | None = None,
    resize: int | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
) -> ImageData:
    """The images of a name in `SOURCES`, of a folder or of a .zip (read in place), with labels by layouts.py.

    Write `./digits` for a folder of the name of a source. Files are taken in the order of their names.
    $MIDWAY_DATA (default: ~/.cache/midway/data) holds the files of named sources. `channels` 1 or 3 and `resize` (pixels;
    shorter side, then centre crop) apply to every image. `skip` leaves out at most 1 % bad files.
    UsageError: an unknown or ambiguous name or option. DataError: a source that cannot be used, with the file and the remedy.
    """
    check_unambiguous(source)
    return load_recorded(source, download, channels, resize, on_bad_image)


def load_recorded(
    source: str, download: bool, channels: int | None, resize: int | None, on_bad_image: Literal["error", "skip"]
) -> ImageData:
    """`load_images` of a source as a configuration has it, where a name is always the named source."""
    check_options(channels, resize, on_bad_image)
    if source in SOURCES:
        return _load_named(source, download, channels, resize)
    path = existing_path(source)
    if is_stored(path):
        return _load_stored(path, channels, resize)
    return _load_path(path, channels, resize, on_bad_image)


def _load_named(source: str, download: bool, channels: int | None, resize: int | None) -> ImageData:
    arrays, other = read_named(source, download), local_namesake(source)
    pixels, conversions = stack(prepared(arrays, channels, resize), len(arrays.pixels))
    left_out = () if other is None else (f"./{other}, since {source} is a named source",)
    images, labels = torch.from_numpy(pixels), torch.tensor(arrays.labels)
    return image_data(images, labels, arrays.classes, arrays.name, conversions, left_out)


def _load_stored(path: Path, channels: int | None, resize: int | None) -> ImageData:
    """A built set. UsageError for other options than those of its build that would change its images."""
    found = open_stored(path)
    own, height, width = found.images.shape[1:]
    if (resize or height, resize or height, channels or own) != (height, width, own):
        given = [f"--channels {channels}" if channels else "", f"--resize {resize}" if resize else ""]
        why = f"it was built of images {width}x{height} with {own} {'channel' if own == 1 else 'channels'}"
        fix = "drop them, or build another set with them: midway data build SOURCE --out DIR"
        raise UsageError(f"{' '.join(filter(None, given))} do not fit {path}", why, fix)
    digest = found.images.fingerprint(found.labels, found.classes)
    classes, left_out = tuple(map(printable, found.classes)), tuple(map(printable, found.left_out))
    return ImageData(found.images, found.labels, classes, printable(found.name), digest, found.conversions, left_out)


def _load_path(
    path: Path, channels: int | None, resize: int | None, on_bad_image: Literal["error", "skip"]
) -> ImageData:
    bad, kept = list[Undecodable](), list[int]()

    def good(results: Iterator[Decoded | Undecodable], labels: Sequence[int]) -> Iterator[Decoded]:
        for result, label in zip(results, labels, strict=True):
            if isinstance(result, Undecodable):
                bad.append(result)
            else:
                if not kept:
                    _check_memory(path, count, result)
                kept.append(label)
                yield result

    with open_files(path) as files:
        count = len(files.names)
        layout = layout_of(files)
        pixels, conversions = stack(good(decode_all(files, channels, resize), layout.labels), count)
    skipped = check_bad(bad, count, on_bad_image)
    stated = tuple(f"{counted(len(kept))}: {note}" for note in layout.notes)
    images, labels = torch.from_numpy(pixels), torch.tensor(kept)
    return image_data(images, labels, layout.classes, set_name(path), conversions + stated + skipped, layout.lines)


def _check_memory(path: Path, count: int, image: Decoded) -> None:
    """DataError, before all are decoded, where so many images and the copies of a split are larger than what is free."""
    needed, free = 2 * count * image.pixels.nbytes, free_memory()
    if needed > free:
        why = f"{count:,} images, and their split, need about {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} GiB are free"
        build = f"midway data build {path} --out DIR"
        fix = f"build a set on the disk once, {build} (with --resize if need be), and give --data DIR"
        raise DataError(f"{path} is too large for memory", why, fix)


def image_data(
    images: Images,
    labels: Tensor,
    classes: tuple[str, ...],
    name: str,
    conversions: tuple[str, ...],
    left_out: tuple[str, ...] = (),
) -> ImageData:
    """With the fingerprint of these images; names are text from here on (core/text.py)."""
    shown, left_out = tuple(map(printable, classes)), tuple(map(printable, left_out))
    stored = isinstance(images, StoredImages)
    digest = images.fingerprint(labels, classes) if stored else fingerprint(images, labels, classes)
    return ImageData(images, labels, shown, printable(name), digest, conversions, left_out)


def describe(data: ImageData) -> str:
    """A report to print before training: count, size, channels, classes, fingerprint, conversions, and what is left out."""
    count, channels, height, width = data.images.shape
    colour = "grey (1 channel)" if channels == 1 else f"RGB ({channels} channels)"
    lines = [
        f"data         {data.name}: {count} images, {width}x{height}, {colour}",
        f"classes      {len(data.classes)}: {_class_counts(data)}",
        f"fingerprint  {data.fingerprint[:12]}",
    ]
    if empty_classes(data):
        lines.append(f"no images    of {named_empty(data)}; a class without training images is not sampled")
    lines += [f"conversion   {note}" for note in data.conversions]
    return "\n".join(lines + [f"left out     {line}" for line in data.left_out])


def empty_classes(data: ImageData) -> tuple[int, ...]:
    """The classes of which `data` has no image: those of a folder whose images are all unusable, or all on the other side."""
    return tuple((torch.bincount(data.labels, minlength=len(data.classes)) == 0).nonzero()[:, 0].tolist())


def named_empty(data: ImageData) -> str:
    """`2 of 10 classes: cat, dog`, those of `empty_classes`, of which the first 12 are named."""
    names = [data.classes[label] for label in empty_classes(data)]
    more = f", ... and {len(names) - 12} more" if len(names) > 12 else ""
    return f"{len(names)} of {len(data.classes)} classes: {', '.join(names[:12])}{more}"


def _class_counts(data: ImageData) -> str:
    counts = torch.bincount(data.labels, minlength=len(data.classes)).tolist()
    text = listed_counts(dict(zip(data.classes, counts, strict=True)))
    return f"{text}; {min(counts)} to {max(counts)} images each" if len(counts) > 12 else text


# ---- the two conversions ----


def to_float(images: Tensor) -> Tensor:
    """uint8 (any shape) -> float32 in [-1, 1]: x / 127.5 - 1. ValueError for another dtype."""
    if images.dtype != torch.uint8:
        raise ValueError(f"to_float takes uint8 images, got {images.dtype}; they may be converted already")
    return images.float() / 127.5 - 1


def to_uint8(images: Tensor) -> Tensor:
    """Float in [-1, 1] -> uint8: round((x + 1) 127.5), clamped. ValueError for NaN, infinity or integers."""
    if not images.is_floating_point():
        raise ValueError(f"to_uint8 takes float images in [-1, 1], got {images.dtype}")
    if not bool(images.isfinite().all()):
        raise ValueError(f"{int((~images.isfinite()).sum())} of {images.numel()} values are NaN or infinite")
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
