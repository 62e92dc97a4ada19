"""Images that somebody else made, for comparison with a reference: a folder or zip of image files, or an NPZ as ADM writes them.

    folder, zip     image files, decoded as training images are (files.py); every conversion is noted
    NPZ             arr_0, uint8 (N, H, W, C) with C 1 or 3; arr_1, the labels, is not read; nothing is unpickled

Images keep the order of their names, so that consecutive blocks of them are what consecutive seeds are to a model. Classes
(layouts.py) take turns, or a block would hold some classes alone.
"""

import hashlib
import io
import math
import tokenize
import zipfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, one_line, raising
from midway.gen.core.files import ZIP_DAMAGE, check_size, member, regular_file
from midway.gen.core.text import printable
from midway.gen.data.pixels import Images
from midway.gen.files.decoding import LOSSY, Decoded, Undecodable, check_options, prepare, stack
from midway.gen.files.file_set import check_bad, decode_all, open_files
from midway.gen.files.layouts import class_labels, layout_of

HASHED = 1024  # images at once
NPZ_LIMIT = 256 << 30
"""Bytes of the pixels of an NPZ: 50,000 RGB images have 9.8 GB at 256 x 256, 157 GB at 1024 x 1024."""
NPY_HEADER = 1 << 16  # bytes; those of uint8 arrays have 128
NPZ_DAMAGE = (*ZIP_DAMAGE, TypeError, MemoryError, tokenize.TokenError)  # the last of numpy's reader of headers
"""Errors of reading an NPZ that is missing, damaged or of another kind."""
LOSSY_SAMPLES = "lossy samples: the format itself changes the distance; write PNG or NPZ"


@dataclass(frozen=True)
class ReadingOptions:
    """How files become pixels; None leaves images as they are."""

    channels: int | None = None
    """1 converts to grey, 3 to RGB."""
    resize: int | None = None
    """Shorter side in pixels, then a centre crop."""
    on_bad_image: Literal["error", "skip"] = "error"


@dataclass(frozen=True)
class ExternalImages:
    """uint8 (N, C, H, W) in the order in which they are measured, and what was done to them."""

    name: str
    pixels: Tensor
    fingerprint: str
    """12 hexadecimal digits of the pixels and their shape."""
    notes: tuple[str, ...] = ()


# ---- reading ----


def read_all(paths: Sequence[Path], options: ReadingOptions) -> dict[str, ExternalImages]:
    """By the name of file or folder, by the whole path where names repeat. UsageError for one path twice."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise UsageError("--images names a path twice", "rows would repeat", "name it once")
    names = [printable(path.name or path) for path in paths]
    found = {
        (name if names.count(name) == 1 else printable(path)): read_external(path, options)
        for name, path in zip(names, paths, strict=True)
    }
    return {name: replace(images, name=name) for name, images in found.items()}


def read_external(path: Path, options: ReadingOptions | None = None) -> ExternalImages:
    """The images of a folder, a zip or an NPZ; DataError naming the unusable file and the remedy."""
    options = options or ReadingOptions()
    check_options(options.channels, options.resize, options.on_bad_image)
    path = path.expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist", f"looked for {path.absolute()}", "check the path given to --images")
    pixels, notes = _from_npz(path, options) if path.suffix.lower() == ".npz" else _from_files(path, options)
    return ExternalImages(printable(path.name), pixels, fingerprint(pixels), notes)


def fingerprint(pixels: Tensor) -> str:
    """12 hexadecimal digits: sha256 of the shape and values of uint8 images, whatever their strides."""
    digest = hashlib.sha256(str(tuple(pixels.shape)).encode())
    for part in pixels.split(HASHED):
        digest.update(part.contiguous().view(-1).numpy().data)
    return digest.hexdigest()[:12]


def _from_files(path: Path, options: ReadingOptions) -> tuple[Tensor, tuple[str, ...]]:
    with open_files(path) as files:
        layout = layout_of(files)
        names = in_turn(files.names, layout.labels)
        results = list(decode_all(replace(files, names=names), options.channels, options.resize))
    bad = [result for result in results if isinstance(result, Undecodable)]
    skipped = check_bad(bad, len(results), options.on_bad_image)
    good = [result for result in results if isinstance(result, Decoded)]
    lossy = any(note.startswith(LOSSY) for image in good for note in image.notes)
    turns = () if names == files.names else ("classes take turns, so that every block holds every class",)
    pixels, conversions = stack(good, len(good))
    left_out = tuple(printable(f"left out: {line}") for line in layout.lines)
    notes = (*conversions, *((LOSSY_SAMPLES,) if lossy else ()), *turns, *layout.notes, *skipped, *left_out)
    return torch.from_numpy(pixels), notes


def in_turn(names: Sequence[str], labels: Sequence[int] | None = None) -> tuple[str, ...]:
    """Names in an order in which classes take turns, those of `labels` or of their folders; as they are in one class."""
    classes: dict[int, list[str]] = defaultdict(list)
    for name, label in zip(names, class_labels(names)[0] if labels is None else labels, strict=True):
        classes[label].append(name)
    return tuple(name for turn in zip_longest(*classes.values()) for name in turn if name is not None)


def _from_npz(path: Path, options: ReadingOptions) -> tuple[Tensor, tuple[str, ...]]:
    array = read_npz(path)
    if options.channels in (None, array.shape[3]) and options.resize is None:
        return torch.from_numpy(array).permute(0, 3, 1, 2), ()  # a view: 50,000 images are not held twice
    grey_or_rgb = (pixels[..., 0] if pixels.shape[2] == 1 else pixels for pixels in array)
    named = ((f"{path.name}[{index}]", Image.fromarray(pixels)) for index, pixels in enumerate(grey_or_rgb))
    pixels, conversions = stack(
        (prepare(name, image, options.channels, options.resize) for name, image in named), len(array)
    )
    return torch.from_numpy(pixels), conversions


def read_npz(path: Path) -> NDArray[np.uint8]:
    """`arr_0`, uint8 (N, H, W, C). DataError for a file that cannot be read, and for any other array, with the remedy."""
    fix = "write it with np.savez(path, images), uint8 (N, H, W, 3)"
    with (
        raising(DataError, f"{path} holds no images that can be read", fix, *NPZ_DAMAGE, why=one_line),
        zipfile.ZipFile(regular_file(path)) as archive,
    ):
        shape, kind, _ = _header(archive, "arr_0", NPZ_LIMIT)
        if (remedy := _remedy(shape, kind)) is not None:
            raise DataError(f"arr_0 of {path} is {kind} {shape}", "it should be uint8 (N, H, W, 1 or 3)", remedy)
        return read_array(archive, "arr_0", NPZ_LIMIT)


def read_array(archive: zipfile.ZipFile, name: str, limit: int) -> NDArray[Any]:
    """An array of an NPZ, of as many bytes as it declares and at most `limit`; errors of `NPZ_DAMAGE`. Nothing is unpickled."""
    shape, kind, size = _header(archive, name, limit)
    count = math.prod(shape) * kind.itemsize
    check_size(count, limit)
    entry = member(archive, f"{name}.npy", limit + NPY_HEADER)
    if size + count != entry.file_size:
        raise ValueError(f"{name} declares {count:,} bytes and holds {entry.file_size - size:,}")
    with archive.open(entry) as file:
        return npy.read_array(file, allow_pickle=False)


def _header(archive: zipfile.ZipFile, name: str, limit: int) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    with archive.open(member(archive, f"{name}.npy", limit + NPY_HEADER)) as file:
        return _npy_header(file.read(NPY_HEADER), name)


def _npy_header(start: bytes, name: str) -> tuple[tuple[int, ...], np.dtype[Any], int]:
    """(shape, type, bytes of the header) of an array, of which no more is read than `start`; ValueError."""
    file = io.BytesIO(start)
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    version = npy.read_magic(file)
    if version not in readers:
        raise ValueError(f"{name} is of version {version}, which no array of numbers needs")
    shape, _, kind = readers[version](file)
    if kind.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not unpickled (allow_pickle=False)")
    return shape, kind, file.tell()


def _remedy(shape: tuple[int, ...], kind: np.dtype[Any]) -> str | None:
    """What would make an array uint8 (N, H, W, C); None if it is."""
    if kind == np.uint16:
        return "bring it to 0 ... 255: np.rint(x / 257).astype(np.uint8) if 65535 is white"
    if kind != np.uint8:
        return "bring it to 0 ... 255: np.rint((x + 1) * 127.5).clip(0, 255).astype(np.uint8) if x lies in [-1, 1]"
    if len(shape) == 3:
        return "add the channel: arr_0[..., None]"
    if len(shape) != 4 or min(shape) < 1:
        return "write N > 0 images of one size"
    if shape[3] in (1, 3):
        return None
    return "put channels last: arr_0.transpose(0, 2, 3, 1)" if shape[1] in (1, 3) else "write grey or RGB"


# ---- against a reference ----


def fitted(external: ExternalImages, reference: Images) -> ExternalImages:
    """The images in the channels of a reference (N, C, H, W): RGB that is grey in all pixels becomes grey, which loses nothing.

    DataError for another size, and for other channels.
    """
    channels, *size = reference.shape[1:]
    if channels == 1 and _is_grey(external.pixels):
        notes = (*external.notes, "RGB of three equal channels, read as grey")
        external = replace(external, pixels=external.pixels[:, :1].contiguous(), notes=notes)
    found = external.pixels.shape
    if list(found[2:]) != size:
        fix = f"make samples of that size, or pass --images-resize {size[0]} (which changes the distance)"
        raise DataError(
            f"{external.name}: images are {_size(found)}", f"the reference has {_size(reference.shape)}", fix
        )
    if found[1] != channels:
        fix = f"make such samples, or pass --images-channels {channels}"
        raise DataError(f"{external.name}: images have {found[1]} channels", f"the reference has {channels}", fix)
    return external


def _is_grey(pixels: Tensor) -> bool:
    return pixels.shape[1] == 3 and torch.equal(pixels[:, 0], pixels[:, 1]) and torch.equal(pixels[:, 0], pixels[:, 2])


def _size(shape: Sequence[int]) -> str:
    return f"{shape[3]}x{shape[2]}"


def images_per_block(externals: Sequence[ExternalImages], blocks: int) -> int:
    """The most images that all of them can give to each of `blocks` blocks; different counts do not compare."""
    return min(len(external.pixels) for external in externals) // blocks
