"""Contents of a source of images, from decoding every file once, whether or not it can be used for training.

Pixels are integers v in 0 .. 255, so sums over a channel are exact, and are rounded only in the final division:

    mean = S1 / n,   std = sqrt(n S2 - S1^2) / n,   S1 = sum v, S2 = sum v^2 over the n pixels of all images (no n - 1)

in grey levels; in [-1, 1], where networks see them, mean / 127.5 - 1 and std / 127.5. Two images are the same when they have
the same size and the same pixels after all conversions; grey equals RGB of three equal channels. Copies that differ in a
single pixel are not found. `Image.verify()` misses truncated JPEGs, hence the full decode; no decoder notices a JPEG whose
bytes were changed but still decode.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.data.build_pass import as_planes
from midway.gen.data.crops import cropped
from midway.gen.data.images import ImageData
from midway.gen.data.levels import levels_of
from midway.gen.data.pixels import Fingerprinter
from midway.gen.data.sources import SOURCES, existing_path, prepared, read_named
from midway.gen.data.splits import DataConfig, load
from midway.gen.data.stored import is_stored, open_stored
from midway.gen.files.decoding import Decoded, Undecodable, check_options, decode
from midway.gen.files.file_set import FileSet, decode_all, map_files, open_files
from midway.gen.files.layouts import ALL, Layout, layout_of, left_out_of

NAMED = 5
"""How many groups of equal images are named; all are counted."""

_VALUES = np.arange(256, dtype=np.int64)


@dataclass(frozen=True)
class Picture:
    """Statistics of one decoded image, without its pixels."""

    name: str
    size: tuple[int, int]  # width, height
    channels: int
    notes: tuple[str, ...]  # conversions
    content: bytes  # sha256; equal for the same pixels
    sums: tuple[int, ...]  # of the pixels, per channel
    squares: tuple[int, ...]  # sums of their squares
    values: int  # bit v is set when the value v occurs


@dataclass(frozen=True)
class Contents:
    """A source as it is. `labels` int64 (N,) and `classes` are those of training, or one class with an `error`."""

    source: str
    pictures: tuple[Picture, ...]
    labels: Tensor
    classes: tuple[str, ...]
    bad: tuple[Undecodable, ...] = ()
    notes: tuple[str, ...] = ()  # how the labels of all images were found
    left_out: Mapping[str, int] = field(default_factory=dict)  # files that are not read, by kind
    bare: tuple[str, ...] = ()  # folders without images
    error: DataError | None = None  # why the folders are not classes
    built: tuple[str, ...] = ()  # what the build of a set stated about its images


@dataclass(frozen=True)
class ChannelStatistics:
    """Of all pixels of one channel of all images."""

    mean: float  # in [-1, 1]
    std: float
    mean_level: float  # in 0 .. 255
    std_level: float


@dataclass(frozen=True)
class Duplicates:
    """Images of one source with the same pixels: `copies` counts all but one of each group."""

    groups: int
    copies: int
    first: tuple[tuple[str, ...], ...]  # the names in the first few groups


@dataclass(frozen=True)
class Shared:
    """Images whose pixels occur on another side as well; `first` pairs a few with their equal there."""

    count: int
    first: tuple[tuple[str, str], ...]


# ---- reading ----


def read_contents(config: DataConfig) -> Contents:
    """Decode all images of `config.data`; bad files and folders that are no classes are recorded, not raised.

    Only a source that cannot be opened, or has no images, raises: DataError, UsageError as of `load_images`.
    """
    check_options(config.channels, config.resize, config.on_bad_image)
    if config.data in SOURCES:
        return _named(config)
    path = existing_path(config.data)
    return _built(path, config) if is_stored(path) else _files(path, config)


def fingerprint_of(contents: Contents, config: DataConfig) -> str:
    """As of training, without all images in memory. Only of contents that can be used; UsageError for too large a crop."""
    if config.data in SOURCES or is_stored(existing_path(config.data)):
        return cropped(load(config), config.crop).fingerprint
    planes = max(picture.channels for picture in contents.pictures)
    width, height = contents.pictures[0].size
    shape = (len(contents.pictures), planes, height, width)
    found = Fingerprinter(shape, contents.labels, contents.classes)
    with open_files(existing_path(config.data)) as files:
        for image in decode_all(files, config.channels, config.resize):
            if isinstance(image, Decoded):
                found.add(as_planes(image, planes))
    without_pixels = torch.empty(shape, dtype=torch.uint8, device="meta")
    data = ImageData(without_pixels, contents.labels, contents.classes, config.data, found.result())
    return cropped(data, config.crop).fingerprint


def _built(path: Path, config: DataConfig) -> Contents:
    data, names = load(config), open_stored(path).names()

    def work(item: int) -> Picture:
        pixels = data.images[item : item + 1][0].permute(1, 2, 0).numpy()
        return examine(Decoded(names[item], pixels[..., 0] if pixels.shape[2] == 1 else pixels))

    pictures = tuple(map_files(range(len(names)), work))
    return Contents(config.data, pictures, data.labels, data.classes, built=data.conversions)


def _named(config: DataConfig) -> Contents:
    arrays = read_named(config.data, download=config.download)
    pictures = tuple(examine(image) for image in prepared(arrays, config.channels, config.resize))
    return Contents(config.data, pictures, torch.tensor(arrays.labels), arrays.classes)


def _files(path: Path, config: DataConfig) -> Contents:
    with open_files(path) as files:
        results = list(map_files(files.names, _examiner(files.read, config)))
        layout, error = _layout(files)
    labelled = zip(results, layout.labels, strict=True)
    good = [(result, label) for result, label in labelled if isinstance(result, Picture)]
    bad = tuple(result for result in results if isinstance(result, Undecodable))
    kept = torch.tensor([label for _, label in good], dtype=torch.int64)
    pictures = tuple(picture for picture, _ in good)
    facts = (layout.notes, layout.left_out, layout.bare)
    return Contents(config.data, pictures, kept, layout.classes, bad, *facts, error)


def _examiner(read: Callable[[str], bytes], config: DataConfig) -> Callable[[str], Picture | Undecodable]:
    def work(name: str) -> Picture | Undecodable:
        result = decode(name, read, config.channels, config.resize)
        return examine(result) if isinstance(result, Decoded) else result  # the pixels are freed here

    return work


def _layout(files: FileSet) -> tuple[Layout, DataError | None]:
    try:
        return layout_of(files), None
    except DataError as error:
        return Layout([0] * len(files.names), ALL, left_out=left_out_of(files)), error


def examine(image: Decoded) -> Picture:
    """The figures of one image."""
    height, width = image.pixels.shape[:2]
    planes = image.pixels.reshape(height * width, -1).T
    counts = np.stack([np.bincount(plane, minlength=256) for plane in planes])
    occurring = np.packbits(counts.any(0), bitorder="little")
    return Picture(
        image.name,
        (width, height),
        len(planes),
        image.notes,
        _content(image),
        tuple((counts @ _VALUES).tolist()),
        tuple((counts @ _VALUES**2).tolist()),
        int.from_bytes(occurring.tobytes(), "little"),
    )


def _content(image: Decoded) -> bytes:
    pixels = image.pixels
    if pixels.ndim == 3 and bool((pixels == pixels[..., :1]).all()):
        pixels = pixels[..., 0]
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).digest()


# ---- figures ----


def channel_statistics(pictures: Sequence[Picture]) -> tuple[ChannelStatistics, ...]:
    """Per channel, over all pixels; grey among RGB counts in all three, as in training. () for no images."""
    channels = max((picture.channels for picture in pictures), default=0)
    return tuple(_channel(pictures, channel) for channel in range(channels))


def _channel(pictures: Sequence[Picture], channel: int) -> ChannelStatistics:
    n = sum(picture.size[0] * picture.size[1] for picture in pictures)
    s1 = sum(picture.sums[min(channel, picture.channels - 1)] for picture in pictures)
    s2 = sum(picture.squares[min(channel, picture.channels - 1)] for picture in pictures)
    mean, std = s1 / n, math.sqrt(n * s2 - s1 * s1) / n  # Python integers: nothing is rounded or overflows before
    return ChannelStatistics(mean / 127.5 - 1, std / 127.5, mean, std)


def levels(pictures: Sequence[Picture]) -> int | None:
    """The smallest usual number of levels that holds all values, 256 for photographs; None for no images."""
    mask = 0
    for picture in pictures:
        mask |= picture.values
    values = [value for value in range(256) if mask >> value & 1]
    return levels_of(torch.tensor(values, dtype=torch.uint8)) if values else None


def conversions(contents: Contents) -> dict[str, int]:
    """Number of images of each conversion, of each note about loss, and of notes of all images."""
    pictures = contents.pictures
    counts = Counter(note for picture in pictures for note in picture.notes)
    counts.update(dict.fromkeys(contents.notes, len(pictures)))
    counts.update(
        {note: int(count) for count, note in re.findall(r"^(\d+) images?: (.*)$", "\n".join(contents.built), re.M)}
    )
    grey = sum(picture.channels == 1 for picture in pictures)
    if 0 < grey < len(pictures):
        counts["grey promoted to RGB"] = grey
    return dict(sorted(counts.items()))


def sizes(pictures: Iterable[Picture]) -> dict[str, int]:
    """Images of each `width x height`, the most frequent first."""
    return dict(Counter(f"{width}x{height}" for width, height in (picture.size for picture in pictures)).most_common())


# ---- the same pixels ----


def same_pixels(pictures: Sequence[Picture]) -> list[list[int]]:
    """The places of images with the same pixels, one list for each such group, in the order of the first."""
    groups: dict[bytes, list[int]] = {}
    for place, picture in enumerate(pictures):
        groups.setdefault(picture.content, []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def duplicates(pictures: Sequence[Picture], groups: Sequence[Sequence[int]]) -> Duplicates:
    """These groups counted, the first few named."""
    first = tuple(tuple(pictures[place].name for place in group) for group in groups[:NAMED])
    return Duplicates(len(groups), sum(len(group) - 1 for group in groups), first)


def shared(mine: Iterable[Picture], others: Sequence[Picture]) -> Shared:
    """Images of `mine` whose pixels occur among `others`."""
    known = {picture.content: picture.name for picture in reversed(others)}  # the first of equals is named
    pairs = [(picture.name, known[picture.content]) for picture in mine if picture.content in known]
    return Shared(len(pairs), tuple(pairs[:NAMED]))
