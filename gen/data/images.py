"""Images in memory: named sources, folders and zips; splits by seed; a fingerprint of the content; uint8 <-> float.

Images are uint8 (N, C, H, W) wherever they are stored and float32 in [-1, 1] wherever a network sees them. The way there
is `to_float`, x / 127.5 - 1; the way back is `to_uint8`, round((x + 1) 127.5). All 256 values survive the round trip.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, nearest
from midway.gen.core.randomness import permutation
from midway.gen.data.files import Decoded, Undecodable, check_bad, class_labels, decode_all, open_files, prepare, stack

_SHOWN_CLASSES = 12


@dataclass(frozen=True)
class ImageData:
    """A labelled set of images of one size."""

    images: Tensor  # uint8 (N, C, H, W)
    labels: Tensor  # int64 (N,)
    classes: tuple[str, ...]  # label -> name; ("all",) when the source has no classes
    name: str
    fingerprint: str  # sha256 hex of shape, pixels, labels and class names
    conversions: tuple[str, ...] = ()  # what was done to which number of images of the whole source


# ---- named sources ----


@dataclass(frozen=True)
class Arrays:
    """A named source as it comes: uint8 (N, H, W) or (N, H, W, 3), labels (N,)."""

    pixels: NDArray[np.uint8]
    labels: Sequence[int]
    classes: tuple[str, ...]
    name: str


def _digits(root: Path, download: bool) -> Arrays:
    """1797 handwritten digits, 8 x 8; scikit-learn carries them, so `root` and `download` have nothing to do."""
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    pixels = np.rint(values * 255 / 16).astype(np.uint8).reshape(-1, 8, 8)
    return Arrays(pixels, labels.tolist(), tuple("0123456789"), "digits")


def _cifar10(root: Path, download: bool) -> Arrays:
    def read() -> Arrays:
        from torchvision.datasets import CIFAR10

        train = CIFAR10(root, train=True, download=download)
        return Arrays(train.data, train.targets, tuple(train.classes), "cifar10-train")

    return _torchvision("cifar10", read, f"cifar-10-python.tar.gz in {root}", download)


def _mnist(root: Path, download: bool) -> Arrays:
    def read() -> Arrays:
        from torchvision.datasets import MNIST

        train = MNIST(root, train=True, download=download)
        return Arrays(train.data.numpy(), train.targets.tolist(), tuple(train.classes), "mnist-train")

    return _torchvision("mnist", read, _four_files(root / "MNIST" / "raw"), download)


def _fashion_mnist(root: Path, download: bool) -> Arrays:
    def read() -> Arrays:
        from torchvision.datasets import FashionMNIST

        train = FashionMNIST(root, train=True, download=download)
        return Arrays(train.data.numpy(), train.targets.tolist(), tuple(train.classes), "fashion_mnist-train")

    return _torchvision("fashion_mnist", read, _four_files(root / "FashionMNIST" / "raw"), download)


def _four_files(folder: Path) -> str:
    return f"{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz (four files) in {folder}"


def _torchvision(name: str, read: Callable[[], Arrays], place: str, download: bool) -> Arrays:
    """`read()`, its many kinds of failure turned into one DataError that says where the files belong."""
    by_hand = f"place {place} and pass --download (files already there are checked, not fetched)"
    try:
        return read()
    except Exception as error:  # network, checksum, archive, disk, or a torchvision that does not fit torch
        if download:
            what, fix = f"{name} could not be downloaded or read", f"try again; or {by_hand}"
        else:
            what, fix = f"{name} is not on this machine", f"pass --download; without a network: {by_hand}"
        raise DataError(what, f"{type(error).__name__}: {error}", fix) from error


SOURCES: dict[str, Callable[[Path, bool], Arrays]] = {
    "digits": _digits,
    "cifar10": _cifar10,
    "mnist": _mnist,
    "fashion_mnist": _fashion_mnist,
}


# ---- loading ----


def load_images(
    source: str,
    *,
    root: Path | None = None,
    download: bool = False,
    channels: int | None = None,
    resize: int | None = None,
    on_bad_image: Literal["error", "skip"] = "error",
) -> ImageData:
    """The images of a name in `SOURCES`, of a folder or of a .zip (read in place); class folders are the labels.

    A name wins over a path; write `./digits` for a folder of that name. Files are taken in the order of their names.
    `root` holds the files of named sources (default: $MIDWAY_DATA or ~/.cache/midway/data). `channels` 1 or 3 and
    `resize` (pixels; shorter side, then centre crop) apply to every image. `skip` leaves out at most 1 % bad files.
    UsageError: an unknown name or option. DataError: a source that cannot be used, with the file and the remedy.
    """
    check_options(channels, resize, on_bad_image)
    if source in SOURCES:
        return _load_named(read_named(source, root, download), channels, resize)
    return _load_path(existing_path(source), channels, resize, on_bad_image)


def read_named(source: str, root: Path | None = None, download: bool = False) -> Arrays:
    """The arrays of a name in `SOURCES`, as they come; `root` as in `load_images`. DataError when they are not there."""
    return SOURCES[source]((root or _default_root()).expanduser(), download)


def prepared(arrays: Arrays, channels: int | None, resize: int | None) -> Iterator[Decoded]:
    """The images of a named source one by one, each named by its place: `digits[0]`."""
    for index, pixels in enumerate(arrays.pixels):
        yield prepare(f"{arrays.name}[{index}]", Image.fromarray(pixels), channels, resize)


def _default_root() -> Path:
    return Path(os.environ.get("MIDWAY_DATA") or "~/.cache/midway/data")


def check_options(channels: int | None, resize: int | None, on_bad_image: str) -> None:
    """UsageError for an option of `load_images` that cannot be."""
    if channels not in (None, 1, 3):
        raise UsageError(f"channels={channels}", "images are grey (1) or RGB (3)", "pass --channels 1 or --channels 3")
    if resize is not None and resize < 1:
        raise UsageError(f"resize={resize}", "it is a side in pixels", "pass --resize with a positive number")
    if on_bad_image not in ("error", "skip"):
        raise UsageError(f"on_bad_image={on_bad_image!r}", "no such policy", nearest(on_bad_image, ("error", "skip")))


def existing_path(source: str) -> Path:
    """The folder or file of a source that is no name. DataError for a path that does not exist, UsageError for a word."""
    path = Path(source).expanduser()
    if source and path.exists():
        return path
    if source and (path.suffix or len(path.parts) > 1 or source != path.name):
        raise DataError(f"{source} does not exist", f"looked for {path.absolute()}", "check the path")
    hint = nearest(source.lower().replace("-", "_"), SOURCES)
    raise UsageError(f"unknown data source {source!r}", "neither a named source nor a folder or zip here", hint)


def _load_named(arrays: Arrays, channels: int | None, resize: int | None) -> ImageData:
    images = list(prepared(arrays, channels, resize))
    return _assemble(images, arrays.labels, arrays.classes, arrays.name, ())


def _load_path(
    path: Path, channels: int | None, resize: int | None, on_bad_image: Literal["error", "skip"]
) -> ImageData:
    with open_files(path) as files:
        labels, classes = class_labels(files.names)
        results = decode_all(files, channels, resize)
    bad = [result for result in results if isinstance(result, Undecodable)]
    skipped = check_bad(bad, len(results), on_bad_image)
    good = [(image, label) for image, label in zip(results, labels, strict=True) if isinstance(image, Decoded)]
    name = path.resolve().name if path.is_dir() else path.stem
    return _assemble([image for image, _ in good], [label for _, label in good], classes, name, skipped)


def _assemble(
    images: Sequence[Decoded], labels: Sequence[int], classes: tuple[str, ...], name: str, skipped: tuple[str, ...]
) -> ImageData:
    pixels, conversions = stack(images)
    return _image_data(torch.from_numpy(pixels), torch.tensor(labels), classes, name, conversions + skipped)


def _image_data(
    images: Tensor, labels: Tensor, classes: tuple[str, ...], name: str, conversions: tuple[str, ...]
) -> ImageData:
    return ImageData(images, labels, classes, name, _fingerprint(images, labels, classes), conversions)


def _fingerprint(images: Tensor, labels: Tensor, classes: tuple[str, ...]) -> str:
    """sha256 of shape, class names, labels (little-endian int64) and pixels, in the order of the images."""
    digest = hashlib.sha256(json.dumps({"shape": list(images.shape), "classes": list(classes)}).encode())
    digest.update(labels.numpy().astype("<i8").tobytes())
    digest.update(images.contiguous().view(-1).numpy().data)
    return digest.hexdigest()


# ---- splitting and reporting ----


def split(data: ImageData, held_out: float = 0.2, seed: int = 0) -> tuple[ImageData, ImageData]:
    """(train, held-out): a function of `seed`, stratified: each class gives its share to within one image.

    Both keep the order of `data`. UsageError unless 0 < held_out < 1; DataError when a side would be empty.
    """
    chosen = held_out_mask(data.labels, held_out, seed)
    return _subset(data, ~chosen, "train"), _subset(data, chosen, "heldout")


def held_out_mask(labels: Tensor, held_out: float, seed: int) -> Tensor:
    """bool (N,): which of the images with these labels, int64 (N,), `split` holds out; errors as there."""
    check_share(held_out)
    sizes = torch.bincount(labels)
    shares = _shares(sizes, held_out)
    if not 0 < int(shares.sum()) < len(labels):
        what = f"held_out={held_out} of {len(labels)} images leaves one side of the split empty"
        raise DataError(what, "both sides need images", "use more images or another share")
    order = permutation(seed, "split", 0, len(labels))
    by_class = order[labels[order].argsort(stable=True)].split(sizes.tolist())
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat([members[:share] for members, share in zip(by_class, shares.tolist(), strict=True)])] = True
    return chosen


def check_share(held_out: float) -> None:
    """UsageError unless 0 < held_out < 1."""
    if not 0 < held_out < 1:
        raise UsageError(f"held_out={held_out}", "it is the held-out share of the images", "choose between 0 and 1")


def _shares(sizes: Tensor, fraction: float) -> Tensor:
    """int64 (classes,): fraction * sizes rounded so that the sum is right too (largest remainders go up)."""
    quotas = sizes.double() * fraction
    floors = quotas.floor().long()
    missing = round(float(quotas.sum())) - int(floors.sum())
    up = (floors - quotas).argsort(stable=True)[:missing]
    return floors.scatter_add(0, up, torch.ones_like(up))


def _subset(data: ImageData, keep: Tensor, suffix: str) -> ImageData:
    return _image_data(data.images[keep], data.labels[keep], data.classes, f"{data.name}-{suffix}", data.conversions)


def describe(data: ImageData) -> str:
    """A report to print before training: count, size, channels, classes with their counts, fingerprint, conversions."""
    count, channels, height, width = data.images.shape
    colour = "grey (1 channel)" if channels == 1 else f"RGB ({channels} channels)"
    lines = [
        f"data         {data.name}: {count} images, {width}x{height}, {colour}",
        f"classes      {len(data.classes)}: {_class_counts(data)}",
        f"fingerprint  {data.fingerprint[:12]}",
    ]
    return "\n".join(lines + [f"conversion   {note}" for note in data.conversions])


def _class_counts(data: ImageData) -> str:
    counts = torch.bincount(data.labels, minlength=len(data.classes)).tolist()
    shown = [f"{name} ({count})" for name, count in zip(data.classes, counts, strict=True)][:_SHOWN_CLASSES]
    more = len(counts) - len(shown)
    tail = f", ... and {more} more; {min(counts)} to {max(counts)} images each" if more else ""
    return ", ".join(shown) + tail


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
