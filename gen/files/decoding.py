"""One image file to uint8 pixels: decoded fully, turned upright, converted; every conversion is stated.

Each file is decoded, brought to 8 bits (depth.py), turned upright (EXIF), made grey (H, W) or RGB (H, W, 3), then brought to the
requested channels and size. A step that changes pixels leaves a note, so nothing is changed silently; a file that is intact, but
cannot be used (a grey depth map, floats), is `Unusable`. `Image.verify()` misses truncated JPEGs, hence the full decode.
"""

import contextlib
import functools
import importlib
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError, features

from midway.gen.core.errors import DataError, UsageError, nearest, one_line, raising
from midway.gen.core.files import check_size
from midway.gen.files.depth import check_tiff, to_eight_bits

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "AVIF", "HEIF")
"""What Pillow may try: not EPS, which starts Ghostscript. AVIF needs Pillow 11.3 or newer, HEIF the plugin pillow-heif."""
IMAGE_LIMIT = 1 << 30
"""Bytes of one image file: twice those of the largest RGB picture below, uncompressed."""
PIXEL_LIMIT = 178_956_970
"""Pixels of one image, where Pillow's own limit lies unless somebody has moved it: 13,377 x 13,377."""
LOSSY = "lossy"
"""How a note about a source that was saved with loss begins."""

_ORIENTATION = 0x0112  # EXIF and TIFF tag
_LOSSY = {
    "JPEG": "JPEG",
    "MPO": "JPEG",
    "AVIF": "AVIF",
    "HEIF": "HEIF",
}  # of the last two a few are not, which no header shows
_LOSSY_IN_TIFF = {"jpeg": "JPEG", "tiff_jpeg": "JPEG", "webp": "WebP"}
_BRANDS = {"AVIF": (b"avif", b"avis"), "HEIF": (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1")}

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
    """Read, decode and prepare one file; nothing about one file stops a look at all of them."""
    try:
        return _decode(name, read(name), channels, resize)
    except Image.DecompressionBombError as error:
        return Unusable(name, f"has too many pixels: {error}")
    except DataError as error:
        return Unusable(name, f"{error.what.removeprefix(name).strip()}: {error.why}; {error.fix}")
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers raise SyntaxError, struct.error, zlib.error, ... on damaged bytes
        return Undecodable(name, str(error) if isinstance(error, UnidentifiedImageError) else one_line(error))


def _decode(name: str, data: bytes, channels: int | None, resize: int | None) -> Decoded:
    image = _open(data)
    with raising(DataError, f"{name} is too large", "make it smaller", OSError):
        check_size(image.width * image.height, PIXEL_LIMIT, "pixels")
    notes, orientation = _file_notes(image, data), image.getexif().get(_ORIENTATION, 1)
    eight, depth = to_eight_bits(image, data, channels)
    upright, turned = _upright(eight, orientation, turned=image.format == "TIFF")  # Pillow turns a TIFF as it loads it
    return prepare(name, upright, channels, resize, notes + depth + turned)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=_readable())
    except UnidentifiedImageError:  # its own text is the address of a buffer
        reason = _unidentified(data)
    if reason.startswith("TIFF"):
        with contextlib.suppress(SyntaxError, ValueError, TypeError, LookupError, OSError, struct.error):
            check_tiff(data)
    raise UnidentifiedImageError(reason)


@functools.cache
def _readable() -> tuple[str, ...]:
    """Those of `FORMATS` that can be read here."""
    Image.init()
    with contextlib.suppress(ImportError):
        importlib.import_module("pillow_heif").register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@functools.cache
def decoder_versions() -> dict[str, str]:
    """Of Pillow and the libraries with which it decodes what was saved with loss: other versions may give other pixels."""
    libraries = {"libjpeg-turbo": features.version("libjpeg_turbo"), "libjpeg": features.version("jpg")}
    libraries |= {"libwebp": features.version("webp"), "libavif": features.version("avif")}
    return {"Pillow": PIL.__version__, **{name: version for name, version in libraries.items() if version}}


def prepare(
    name: str, image: Image.Image, channels: int | None, resize: int | None, notes: tuple[str, ...] = ()
) -> Decoded:
    """Grey or RGB at 8 bits, then `channels` (1 or 3), then `resize`: shorter side, centre crop. None leaves as is."""
    image, to_eight_bits = _grey_or_rgb(name, image)
    image, to_channels = _with_channels(image, channels)
    image, to_size = _fit(image, resize)
    return Decoded(name, np.asarray(image), notes + to_eight_bits + to_channels + to_size)


def _unidentified(data: bytes) -> str:
    """Why Pillow opens no image in these bytes."""
    brand = data[8:12] if data[4:8] == b"ftyp" else b""
    if brand in _BRANDS["AVIF"] and not ("AVIF" in _readable() and features.check("avif")):
        return "AVIF, which Pillow reads from 11.3 on: pip install --upgrade pillow, or convert it to PNG"
    if brand in _BRANDS["HEIF"] and "HEIF" not in _readable():
        return "HEIF, which needs a plugin: pip install pillow-heif, or convert it to PNG"
    names = [name for name in _readable() if (accepts := Image.OPEN[name][1]) is not None and accepts(data[:16])]
    return f"{names[0]}, but its header is damaged or of a kind that is not read" if names else "empty or not an image"


def _upright(image: Image.Image, orientation: int, turned: bool) -> tuple[Image.Image, tuple[str, ...]]:
    """As it is to be shown, by its EXIF orientation, 1 to 8; `turned`: that is so already."""
    if orientation not in range(2, 9):
        return image, ()
    if not turned:
        image.getexif()[_ORIENTATION] = orientation
        image = ImageOps.exif_transpose(image)
    return image, ("EXIF rotation applied",)


def _file_notes(image: Image.Image, data: bytes) -> tuple[str, ...]:
    name = _loss(image, data)
    lossy = (f"{LOSSY} {name} source",) if name else ()
    frames = ("first of several frames",) if getattr(image, "is_animated", False) else ()  # to count them takes long
    return lossy + frames


def _loss(image: Image.Image, data: bytes) -> str | None:
    """The lossy format that an image was saved in, by its file's own header."""
    if image.format == "WEBP":
        return "WebP" if _webp_is_lossy(data) else None
    if image.format == "TIFF":
        return _LOSSY_IN_TIFF.get(image.info.get("compression", ""))
    return _LOSSY.get(image.format or "")


def _webp_is_lossy(data: bytes) -> bool:
    """By the chunk of the first frame: `VP8 ` is lossy, `VP8L` is not; others, which may hold one, come before it."""
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind in (b"VP8 ", b"VP8L"):
            return kind == b"VP8 "
        at += 24 if kind == b"ANMF" else 8 + size + size % 2  # a frame of an animation: 16 bytes, then its chunks
    return True


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
        raise sizes_differ(first, other, smallest)
    return planes[: place + 1], stated(notes, grey if planes.shape[1] == 3 else 0)


def sizes_differ(first: Decoded, other: Decoded, smallest: int) -> DataError:
    """The error of two images of different sizes in a set; `smallest` is the smallest side of all that were seen."""
    what = f"images differ in size: {first.name} is {_size(first)}, {other.name} is {_size(other)}"
    fix = f"pass --resize N to bring all to N x N (the smallest side here is {smallest})"
    return DataError(what, "all images of a set are stacked to one tensor", fix)


def stated(notes: Mapping[str, int], promoted: int) -> tuple[str, ...]:
    """Conversions with their numbers of images, in words; `promoted`: how many grey images became RGB for the others' sake."""
    counts = {**notes, **({"grey promoted to RGB": promoted} if promoted else {})}
    return tuple(f"{counted(number)}: {note}" for note, number in sorted(counts.items()))


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
