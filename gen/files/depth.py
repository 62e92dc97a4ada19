"""Samples of other than 8 bits become 8 bits by one rule, whatever the file: PNG, TIFF, PGM or PPM.

    y = round(255 x / white)        white = 2^bits - 1, or the maxval of PGM and PPM; for 16 bits this is round(x / 257)

Colour is a picture: it is converted, with a note. Grey of more than 8 bits is as often a depth map or a scan, which 256 levels
cannot hold, so it is converted only where `channels` states that grey levels (1) or colours (3) are meant. Signed samples, floats
and those of 32 bits have no white, and are never converted.

Pillow has no colour of 16 bits. It unpacks the high byte of a sample, and given the other byte order it unpacks the low one: the
file is read twice, and nothing is truncated.
"""

import re
import sys
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from midway.gen.core.errors import DataError

Samples = NDArray[np.uint32]  # (H, W, C)

_BITS, _PHOTOMETRIC, _PLANAR, _EXTRA, _SAMPLE_FORMAT = 258, 262, 284, 338, 339  # TIFF tags
_STRIPS, _TILES = (273, 279), (324, 325)  # their places and sizes
_MULTIPLIED, _UNSIGNED, _SIGNED, _FLOAT, _UNDEFINED = 1, 1, 2, 3, 4  # values of the last two
_PNG_BITS, _PNG_COLOUR, _GREY_ALPHA = 24, 25, 4  # two places in a PNG, and a value of the second
_WORDS = re.compile("(RGB|RGBA|RGBa|RGBX|CMYK);16[LBN]")  # Pillow's names of 16-bit colour in little, big, native order
_OTHER = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}
_CONVERT = "convert it to 8-bit with the scale you mean"


def to_eight_bits(image: Image.Image, data: bytes, channels: int | None) -> tuple[Image.Image, tuple[str, ...]]:
    """An opened image and the bytes of its file -> (the image in 8 bits a sample, how that is stated); DataError as above."""
    white = _white(image, data)
    if (bits := _coded_bits(image, data)) > 8:
        return image, (f"{bits}-bit brought to 8-bit by the decoder of {image.format}",)
    if white == 255 or image.mode in ("1", "P"):
        return image, ()
    if image.format == "PPM" and not image.mode.startswith("I"):  # Pillow's reader has this rule
        return image, (_note(white),)
    if white < 255:
        if isinstance(key := image.info.get("transparency"), int):  # Pillow compares it with pixels that are expanded
            image.info["transparency"] = key * 255 // white
        return image, (f"{white.bit_length()}-bit expanded to 8-bit grey",)
    samples, bands = _samples(image, data, white)
    if len(bands) < 3 and channels is None:
        why = f"its pixels are {white.bit_length()}-bit grey, whose scale to 8 bits is unknown"
        flags = "--channels 1 or 3 (of --images: --images-channels)"
        raise _unusable(why, f"{_CONVERT}, or pass {flags} to have 0 ... {white} become 0 ... 255")
    samples, bands = _with_transparency(image, samples, bands, white)
    eight = np.rint(samples * 255.0 / white).astype(np.uint8)
    return Image.frombytes(bands, eight.shape[1::-1], eight.tobytes()), (_note(white),)


def _note(white: int) -> str:
    if white == 65535:
        return "16-bit rounded to 8-bit: round(x / 257)"
    return f"0 ... {white} {'rounded' if white > 255 else 'expanded'} to 8-bit: round(255 x / {white})"


def _unusable(why: str, fix: str = _CONVERT) -> DataError:
    return DataError("is not an 8-bit image", why, fix)


# ---- the file's white ----


def _white(image: Image.Image, data: bytes) -> int:
    """The sample that is white, or fully on; DataError for samples that have none."""
    if image.mode == "F":
        raise _unusable("its pixels are float, without a scale")
    if image.format == "PNG":
        return 2 ** data[_PNG_BITS] - 1
    if image.format == "PPM":
        return _maxval(image)
    return _tiff_white(image) if isinstance(image, TiffImagePlugin.TiffImageFile) else 255


def _maxval(image: Image.Image) -> int:
    """Of a PGM or PPM that is not loaded yet; Pillow brings more than 255 grey levels to 65535."""
    codec, _, _, args = image.tile[0]  # pyright: ignore[reportAttributeAccessIssue] (of image files)
    if codec.startswith("ppm") and image.mode != "1":
        return int(args[-1])
    return 65535 if image.mode.startswith("I") else 255


def _tiff_white(image: TiffImagePlugin.TiffImageFile) -> int:
    bits = _tiff_bits(image.tag_v2)
    if bits > 8 and image.tag_v2.get(_PLANAR, 1) == 2:  # Pillow takes the two bytes of a sample for two samples
        raise _unusable(f"its {bits}-bit colours lie in separate planes")
    return 2**bits - 1


def _tiff_bits(tags: Any) -> int:
    """The most bits of a sample; DataError unless samples are unsigned numbers of at most 16 bits."""
    bits, kinds = max(tags.get(_BITS, (1,))), set(tags.get(_SAMPLE_FORMAT, ())) - {_UNSIGNED, _UNDEFINED}
    if kinds or bits > 16:
        kind = {_SIGNED: "signed ", _FLOAT: "float "}.get(max(kinds, default=0), "")
        raise _unusable(f"its pixels are {kind}{bits}-bit numbers, without a scale")
    return bits


def check_tiff(data: bytes) -> None:
    """DataError for a whole TIFF that Pillow does not open because of the depth of its samples; any error for damage."""
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if data[2] == 43 or data[3] == 43 else 8])  # 43: BigTIFF
    file = BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    strips, tiles = ([tags.get(tag, ()) for tag in pair] for pair in (_STRIPS, _TILES))
    ends = [place + size for place, size in zip(*(strips if strips[0] else tiles), strict=True)]
    if max(ends) <= len(data) and (bits := _tiff_bits(tags)) > 8:
        raise _unusable(f"its pixels are {bits}-bit numbers in a layout that is not read")


def _coded_bits(image: Image.Image, data: bytes) -> int:
    """Bits of a sample of AVIF, by the third byte of its box av1C, or of HEIF, by its plugin; 8 of others."""
    if image.format != "AVIF":
        return int(image.info.get("bit_depth", 8)) if image.format == "HEIF" else 8
    flags = data[data.find(b"av1C") + 6]
    return 8 + 2 * (flags >> 6 & 1) * (1 + (flags >> 5 & 1))


# ---- samples ----


def _samples(image: Image.Image, data: bytes, white: int) -> tuple[Samples, str]:
    """The samples of a file with more than 8 bits, and its bands as Pillow names them."""
    if image.format == "PNG" and data[_PNG_COLOUR] == _GREY_ALPHA:  # four bytes a pixel
        pixels = np.asarray(_reread(image, data, lambda _: "RGBA"))
        return pixels.view(">u2").astype(np.uint32), "LA"
    if image.mode.startswith("I"):
        return _grey(image, white), "L"
    high, low = (_colour_bytes(image, data, other) for other in (False, True))
    samples = (256 * high.astype(np.uint32) + low).astype(np.uint32)
    multiplied = isinstance(image, TiffImagePlugin.TiffImageFile) and _MULTIPLIED in image.tag_v2.get(_EXTRA, ())
    return (_unmultiplied(samples) if multiplied else samples), image.mode


def _grey(image: Image.Image, white: int) -> Samples:
    values = np.asarray(image).astype(np.int64)[..., None]
    if image.format == "PPM":
        values = (2 * white * values + 65535) // (2 * 65535)  # as they were in the file
    inverted = isinstance(image, TiffImagePlugin.TiffImageFile) and image.tag_v2.get(_PHOTOMETRIC) == 0
    return (white - values if inverted else values).astype(np.uint32)


def _colour_bytes(image: Image.Image, data: bytes, low: bool) -> NDArray[np.uint8]:
    """uint8 (H, W, C): one of the two bytes of every sample."""

    def rawmode(name: str) -> str:
        if not _WORDS.fullmatch(name):
            raise _unusable(f"its pixels have more than 8 bits, in a layout that is not read ({name})")
        return name.replace("RGBa", "RGBA")[:-1] + (_OTHER[name[-1]] if low else name[-1])

    return np.asarray(_reread(image, data, rawmode))


def _reread(image: Image.Image, data: bytes, rawmode: Any) -> Image.Image:
    """The file opened again, its bytes to be unpacked as `rawmode` makes of the name that Pillow has for their layout."""
    again: Any = Image.open(BytesIO(data), formats=[str(image.format)])
    again.tile = [_laid_out(tile, rawmode) for tile in again.tile]
    return again


def _laid_out(tile: Any, rawmode: Any) -> Any:
    args = rawmode(tile[3]) if isinstance(tile[3], str) else (rawmode(tile[3][0]), *tile[3][1:])
    return (*tile[:3], args) if type(tile) is tuple else tile._replace(args=args)  # a tuple before Pillow 11


def _unmultiplied(samples: Samples) -> Samples:
    """RGBA whose colours were multiplied by alpha -> RGBA whose colours were not."""
    colours, alpha = samples[..., :3], samples[..., 3:]
    whole = (2 * 65535 * colours.astype(np.uint64) + alpha) // np.maximum(2 * alpha, 1)
    return np.concatenate([np.minimum(whole, 65535).astype(np.uint32), alpha], -1)


def _with_transparency(image: Image.Image, samples: Samples, bands: str, white: int) -> tuple[Samples, str]:
    """With alpha where the file names a transparent colour."""
    key = image.info.get("transparency")
    if key is None or bands not in ("L", "RGB"):
        return samples, bands
    alpha = np.where((samples == np.asarray(key)).all(-1, keepdims=True), 0, white)
    return np.concatenate([samples, alpha.astype(np.uint32)], -1), bands + "A"
