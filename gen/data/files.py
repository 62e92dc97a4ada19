"""Image files to uint8 pixels: list a folder or a zip in place, decode every file fully, state every conversion.

Each file is decoded, turned upright (EXIF), brought to 8-bit grey (H, W) or RGB (H, W, 3), then to the channels and the
size that were asked for. A step that changes pixels leaves a note, so nothing is changed silently; a file that 8 bits
cannot hold (16-bit, float) is refused. `Image.verify()` misses truncated JPEGs, hence the full decode.
"""

import os
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from midway.gen.core.errors import DataError

Result = TypeVar("Result")

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # what Pillow may try; not EPS, which starts Ghostscript

_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258  # EXIF and TIFF tags
_PNG_SIGNATURE, _PNG_DEPTH_BYTE = b"\x89PNG\r\n\x1a\n", 24
_CHUNK = 16  # files a thread takes at once: one future per file would cost as much as a small JPEG
_WORTH_A_THREAD = 5e-4  # seconds an image; about a 128x128 PNG
_LISTED = 5  # bad files named in an error

# Pillow mode -> (mode it becomes, how that is stated)
_CONVERSIONS = {
    "1": ("L", "1-bit expanded to 8-bit grey"),
    "P": ("RGB", "palette expanded to RGB"),
    "CMYK": ("RGB", "CMYK converted to RGB"),
    "YCbCr": ("RGB", "YCbCr converted to RGB"),
    "HSV": ("RGB", "HSV converted to RGB"),
}


@dataclass(frozen=True)
class FileSet:
    """The image files of one folder or zip."""

    names: tuple[str, ...]  # sorted, relative to the source, "/" between parts
    read: Callable[[str], bytes]  # safe to call from several threads
    others: tuple[str, ...] = ()  # files beside them whose names do not end like an image's


@dataclass(frozen=True)
class Decoded:
    """One image as uint8 (H, W) or (H, W, 3), and what was done to it."""

    name: str
    pixels: NDArray[np.uint8]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Undecodable:
    """A file that gave no image, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Unusable(Undecodable):
    """A file that is intact, but holds what 8-bit grey or RGB cannot."""


# ---- which files, and their classes ----


@contextmanager
def open_files(path: Path) -> Iterator[FileSet]:
    """The images of a folder or zip, to be read while the context is open. DataError: missing, broken or without images."""
    if path.is_dir():
        yield _file_set(path, _walk(path), lambda name: (path / name).read_bytes())
    else:
        with _open_zip(path) as archive:
            found = (entry.filename for entry in archive.infolist() if not entry.is_dir())
            yield _file_set(path, found, _locked_read(archive))


def class_labels(names: Sequence[str]) -> tuple[list[int], tuple[str, ...]]:
    """(label of each file, class names): the folder just below a common wrapper; flat files are one class, `all`."""
    parts = _without_wrapper([PurePosixPath(name).parts for name in names])
    loose = [name for name, part in zip(names, parts, strict=True) if len(part) == 1]
    if len(loose) == len(names):
        return [0] * len(names), ("all",)
    classes = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    _refuse_loose_files(loose, classes)
    _refuse_splits_as_classes(classes)
    index = {name: label for label, name in enumerate(classes)}
    return [index[part[0]] for part in parts], classes


def _walk(folder: Path) -> Iterator[str]:
    """Relative names of all files below `folder`, through links but never back up into a parent."""
    for here, folders, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        parent = Path(here).resolve()
        folders[:] = [name for name in folders if not parent.is_relative_to((parent / name).resolve())]
        yield from ((Path(here) / name).relative_to(folder).as_posix() for name in files)


def _refuse_folder(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed", str(error), "check its permissions") from error


def _open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError) as error:
        fix = "give a folder of images or a complete .zip; if this was downloaded, download it again"
        raise DataError(f"{path} cannot be read as a zip of images", str(error), fix) from error


def _locked_read(archive: zipfile.ZipFile) -> Callable[[str], bytes]:
    lock = threading.Lock()  # ZipFile counts its open members without one

    def read(name: str) -> bytes:
        with lock:
            return archive.read(name)

    return read


def _is_junk(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _file_set(path: Path, found: Iterable[str], read: Callable[[str], bytes]) -> FileSet:
    files = {name for name in found if not _is_junk(name)}
    images = tuple(sorted(name for name in files if name.lower().endswith(EXTENSIONS)))
    if not images:
        endings = ", ".join(sorted({PurePosixPath(name).suffix or "no extension" for name in files})[:_LISTED])
        why = f"it holds {len(files)} other files ({endings})" if files else "it is empty"
        raise DataError(f"no images in {path}", why, f"put image files there ({' '.join(EXTENSIONS)})")
    return FileSet(images, read, tuple(sorted(files.difference(images))))


def _without_wrapper(parts: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Drop folders that all files share, as long as a folder remains below."""
    while all(len(part) > 2 and part[0] == parts[0][0] for part in parts):
        parts = [part[1:] for part in parts]
    return parts


def _refuse_loose_files(loose: Sequence[str], classes: Sequence[str]) -> None:
    if loose:
        what = f"{len(loose)} images lie beside the class folders, for example {loose[0]}"
        why = f"with class folders ({', '.join(classes[:_LISTED])}) every image needs a class"
        raise DataError(what, why, "move them into a class folder, or all images into one folder")


def _refuse_splits_as_classes(classes: tuple[str, ...]) -> None:
    splits = {"train", "training", "test", "testing", "val", "valid", "validation", "dev"}
    if len(classes) > 1 and splits.issuperset(name.lower() for name in classes):
        what = f"the folders {', '.join(classes)} look like splits, not classes"
        raise DataError(what, "they would become the labels", "give the path of one of them (unpack a zip first)")


# ---- one file to pixels ----


def decode(name: str, read: Callable[[str], bytes], channels: int | None, resize: int | None) -> Decoded | Undecodable:
    """Read, decode and prepare one file. DataError for what is intact but unusable (16-bit, too many pixels)."""
    try:
        data = read(name)
        image = Image.open(BytesIO(data), formats=FORMATS)
        image.load()
        upright, turned = _upright(image)
        notes = _file_notes(image) + turned
    except Image.DecompressionBombError as error:
        raise DataError(f"{name} has too many pixels", str(error), "make that image smaller, or remove it") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, zlib.error, ... on damaged bytes
        return Undecodable(name, _reason(error))
    _refuse_deep(name, image, data)
    return prepare(name, upright, channels, resize, notes)


def attempt(name: str, read: Callable[[str], bytes], channels: int | None, resize: int | None) -> Decoded | Undecodable:
    """`decode`, with what is intact but unusable as a result too: nothing about one file stops a look at all of them."""
    try:
        return decode(name, read, channels, resize)
    except DataError as error:
        return Unusable(name, f"{error.what.removeprefix(name).strip()}: {error.why}")


def prepare(
    name: str, image: Image.Image, channels: int | None, resize: int | None, notes: tuple[str, ...] = ()
) -> Decoded:
    """Grey or RGB at 8 bits, then `channels` (1 or 3), then `resize`: shorter side, centre crop. None leaves as is."""
    image, to_eight_bits = _grey_or_rgb(name, image)
    image, to_channels = _with_channels(image, channels)
    image, to_size = _fit(image, resize)
    return Decoded(name, np.asarray(image), notes + to_eight_bits + to_channels + to_size)


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text is the address of a buffer
        return "empty or not an image"
    return f"{type(error).__name__}: {error}"


def _upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
        return ImageOps.exif_transpose(image), ("EXIF rotation applied",)
    return image, ()


def _file_notes(image: Image.Image) -> tuple[str, ...]:
    lossy = ("lossy JPEG source",) if image.format in ("JPEG", "MPO") else ()
    frames = ("first of several frames",) if getattr(image, "n_frames", 1) > 1 else ()
    return lossy + frames


def _refuse_deep(name: str, image: Image.Image, data: bytes) -> None:
    """DataError for more than 8 bits a sample; Pillow clips such values, or drops their low byte without a word."""
    bits = 8
    if data.startswith(_PNG_SIGNATURE):
        bits = data[_PNG_DEPTH_BYTE]
    elif isinstance(image, TiffImagePlugin.TiffImageFile):
        bits = max(image.tag_v2.get(_BITS_PER_SAMPLE, (8,)))
    if bits > 8 or image.mode.startswith(("I", "F")):
        why = f"its pixels are 16-bit, 32-bit or float (Pillow mode {image.mode}); their scale to 8 bits is unknown"
        raise DataError(f"{name} is not an 8-bit image", why, "convert it to 8-bit with the scale you mean")


def _grey_or_rgb(name: str, image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if image.has_transparency_data:
        return _on_white(image), ("alpha composited on white",)
    if image.mode in ("L", "RGB"):
        return image, ()
    if image.mode not in _CONVERSIONS:
        raise DataError(f"{name} has colour mode {image.mode}", "only grey and RGB are used", "convert it to RGB")
    mode, note = _CONVERSIONS[image.mode]
    return image.convert(mode), (note,)


def _on_white(image: Image.Image) -> Image.Image:
    grey = image.mode in ("1", "L", "LA")
    colours = image.convert("RGBA")
    composite = Image.alpha_composite(Image.new("RGBA", image.size, "white"), colours)
    return composite.convert("L" if grey else "RGB")


def _with_channels(image: Image.Image, channels: int | None) -> tuple[Image.Image, tuple[str, ...]]:
    if channels == 1 and image.mode == "RGB":
        return image.convert("L"), ("RGB converted to grey (ITU-R 601 luma)",)
    if channels == 3 and image.mode == "L":
        return image.convert("RGB"), ("grey repeated to RGB",)
    return image, ()


def _fit(image: Image.Image, size: int | None) -> tuple[Image.Image, tuple[str, ...]]:
    if size is None or image.size == (size, size):
        return image, ()
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    # Pillow widens the kernel when it shrinks, which is the antialiasing
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    note = f"resized to {size}x{size} (antialiased bicubic, shorter side, centre crop)"
    return scaled.crop((left, top, left + size, top + size)), (note,)


# ---- all files ----


def decode_all(files: FileSet, channels: int | None, resize: int | None) -> list[Decoded | Undecodable]:
    """Every file, decoded, in the order of `files.names`; by several threads where that is the faster way."""
    return map_files(files.names, lambda name: decode(name, files.read, channels, resize))


def map_files(names: Sequence[str], work: Callable[[str], Result]) -> list[Result]:
    """`work` of every name, in their order; by several threads where that is the faster way."""
    Image.init()  # plugins are registered once here rather than by racing threads

    def work_chunk(names: Sequence[str]) -> list[Result]:
        return [work(name) for name in names]

    start = time.perf_counter()
    first = work_chunk(names[:_CHUNK])
    pool = ThreadPoolExecutor(_threads((time.perf_counter() - start) / len(first)))
    try:
        chunks = [names[at : at + _CHUNK] for at in range(_CHUNK, len(names), _CHUNK)]
        return [result for results in (first, *pool.map(work_chunk, chunks)) for result in results]
    finally:
        pool.shutdown(cancel_futures=True)


def _threads(seconds_each: float) -> int:
    """Small images hold the interpreter lock for most of their time: two threads took twice as long as one."""
    return 1 if seconds_each < _WORTH_A_THREAD else os.cpu_count() or 1


def check_bad(bad: Sequence[Undecodable], total: int, on_bad_image: Literal["error", "skip"]) -> tuple[str, ...]:
    """The stated skip, if any. DataError naming the first few files: when not skipping, or above 1 % of `total`."""
    if not bad:
        return ()
    if on_bad_image == "skip" and 100 * len(bad) <= total:
        return (f"{_images(len(bad))}: skipped, cannot be decoded (first: {bad[0].name})",)
    listed = "; ".join(f"{item.name} ({item.reason})" for item in bad[:_LISTED])
    more = f"; and {len(bad) - _LISTED} more" if len(bad) > _LISTED else ""
    above = "more than 1 % is bad; " if on_bad_image == "skip" else "up to 1 % may be left out by --on-bad-image skip; "
    fix = above + "replace or remove these files"
    raise DataError(f"{len(bad)} of {_images(total)} cannot be decoded", listed + more, fix)


def stack(images: Sequence[Decoded]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """(uint8 (N, C, H, W), stated conversions). Grey among RGB is promoted. DataError for mixed sizes."""
    _refuse_mixed_sizes(images)
    if len({image.pixels.ndim for image in images}) > 1:
        images = [_promoted(image) for image in images]
    pixels = np.stack([image.pixels for image in images])
    planes = pixels[:, None] if pixels.ndim == 3 else pixels.transpose(0, 3, 1, 2)
    counts = Counter(note for image in images for note in image.notes)
    return np.ascontiguousarray(planes), tuple(f"{_images(count)}: {note}" for note, count in sorted(counts.items()))


def _refuse_mixed_sizes(images: Sequence[Decoded]) -> None:
    first = images[0]
    other = next((image for image in images if image.pixels.shape[:2] != first.pixels.shape[:2]), None)
    if other is not None:
        what = f"images differ in size: {first.name} is {_size(first)}, {other.name} is {_size(other)}"
        smallest = min(min(image.pixels.shape[:2]) for image in images)
        fix = f"pass --resize N to bring all to N x N (the smallest side here is {smallest})"
        raise DataError(what, "all images of a set are stacked to one tensor", fix)


def _promoted(image: Decoded) -> Decoded:
    if image.pixels.ndim == 3:
        return image
    return replace(image, pixels=np.stack([image.pixels] * 3, axis=2), notes=(*image.notes, "grey promoted to RGB"))


def _size(image: Decoded) -> str:
    height, width = image.pixels.shape[:2]
    return f"{width}x{height}"


def _images(count: int) -> str:
    return f"{count} image" if count == 1 else f"{count} images"
