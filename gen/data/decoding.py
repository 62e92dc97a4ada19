"""One image file to uint8 pixels: decoded fully, turned upright, converted; every conversion is stated.

Each file is decoded, turned upright (EXIF), brought to 8-bit grey (H, W) or RGB (H, W, 3), then to the requested channels and
size. A step that changes pixels leaves a note, so nothing is changed silently; a file that 8 bits cannot hold (16-bit, float)
raises DataError. `Image.verify()` misses truncated JPEGs, hence the full decode.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from midway.gen.core.errors import DataError, UsageError, nearest, one_line

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")  # what Pillow may try; not EPS, which starts Ghostscript

_ORIENTATION, _BITS_PER_SAMPLE = 0x0112, 258  # EXIF and TIFF tags
_PNG_SIGNATURE, _PNG_DEPTH_BYTE = b"\x89PNG\r\n\x1a\n", 24

# Pillow mode -> (mode it becomes, how that is stated)
_CONVERSIONS = {
    "1": ("L", "1-bit expanded to 8-bit grey"),
    "P": ("RGB", "palette expanded to RGB"),
    "CMYK": ("RGB", "CMYK converted to RGB"),
    "YCbCr": ("RGB", "YCbCr converted to RGB"),
    "HSV": ("RGB", "HSV converted to RGB"),
}


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


def check_options(channels: int | None, resize: int | None, on_bad_image: str) -> None:
    """UsageError for an option of `load_images` that cannot be."""
    if channels not in (None, 1, 3):
        raise UsageError(f"channels={channels}", "images are grey (1) or RGB (3)", "pass --channels 1 or --channels 3")
    if resize is not None and resize < 1:
        raise UsageError(f"resize={resize}", "it is a side in pixels", "pass --resize with a positive number")
    if on_bad_image not in ("error", "skip"):
        raise UsageError(f"on_bad_image={on_bad_image!r}", "no such policy", nearest(on_bad_image, ("error", "skip")))


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
    _check_depth(name, image, data)
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
    return one_line(error)


def _upright(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    if image.getexif().get(_ORIENTATION, 1) in range(2, 9):
        return ImageOps.exif_transpose(image), ("EXIF rotation applied",)
    return image, ()


def _file_notes(image: Image.Image) -> tuple[str, ...]:
    lossy = ("lossy JPEG source",) if image.format in ("JPEG", "MPO") else ()
    frames = ("first of several frames",) if getattr(image, "n_frames", 1) > 1 else ()
    return lossy + frames


def _check_depth(name: str, image: Image.Image, data: bytes) -> None:
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


def stack(images: Iterable[Decoded], count: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """(uint8 (N, C, H, W), stated conversions) of N <= `count` images, taken one by one, so that they are in memory once.

    Grey among RGB is promoted. DataError for images of different sizes.
    """
    first, other, smallest, grey, place = None, None, 0, 0, -1
    planes, notes = np.empty((0, 1, 0, 0), np.uint8), Counter[str]()
    for place, image in enumerate(images):
        size, channels = image.pixels.shape[:2], 1 if image.pixels.ndim == 2 else 3
        if first is None:
            first, smallest = image, min(size)
            planes = np.empty((count, channels, *size), np.uint8)
        notes.update(image.notes)
        grey, smallest = grey + (channels == 1), min(smallest, *size)
        if size != planes.shape[2:]:
            other = other or image
            continue
        if channels > planes.shape[1]:
            planes = planes.repeat(3, axis=1)
        planes[place] = image.pixels if channels == 1 else image.pixels.transpose(2, 0, 1)
    if first is not None and other is not None:
        what = f"images differ in size: {first.name} is {_size(first)}, {other.name} is {_size(other)}"
        fix = f"pass --resize N to bring all to N x N (the smallest side here is {smallest})"
        raise DataError(what, "all images of a set are stacked to one tensor", fix)
    if grey and planes.shape[1] == 3:
        notes["grey promoted to RGB"] = grey
    return planes[: place + 1], tuple(f"{counted(number)}: {note}" for note, number in sorted(notes.items()))


def _size(image: Decoded) -> str:
    height, width = image.pixels.shape[:2]
    return f"{width}x{height}"


def counted(count: int) -> str:
    """`1 image`, `2 images`."""
    return f"{count} image" if count == 1 else f"{count} images"


def listed_counts(counts: Mapping[str, int], most: int = 12) -> str:
    """`cat (2), dog (1), ... and 3 more`: the first `most` of them."""
    listed = [f"{name} ({count})" for name, count in counts.items()]
    more = f", ... and {len(listed) - most} more" if len(listed) > most else ""
    return (", ".join(listed[:most]) or "none") + more
