"""Training and held-out images: a stratified split by seed, fixed by the configuration, so that every command agrees.

And the order in which classes take turns (`turns`), in which every beginning has them in proportion.
"""

import functools
import heapq
import math
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from midway.gen.core.config import PER_CALL, RECORDED_AS
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.randomness import permutation
from midway.gen.core.ranges import SEED, WIDTH, check_ranges
from midway.gen.data.crops import cropped
from midway.gen.data.images import ImageData, image_data, load_recorded
from midway.gen.data.pixels import part_of
from midway.gen.data.sources import SOURCES, recorded_source


@dataclass(frozen=True)
class DataConfig:
    """A source and its split."""

    data: str = field(default="digits", metadata={RECORDED_AS: recorded_source})
    """digits, mnist5k, cifar10, mnist, fashion_mnist, or the path of an image folder or zip with class folders."""
    held_out: float = 0.2
    """Share of the images kept from all training; the floor of every distance is measured on them."""
    split_seed: int = 0
    """Another number holds out other images."""
    channels: int | None = None
    """1 converts to grey, 3 to RGB."""
    resize: int | None = None
    """Shorter side in pixels, then a centre crop."""
    crop: int | None = None
    """Side of the window of each image that is used, at a random place in each step of training, else in the centre."""
    on_bad_image: Literal["error", "skip"] = "error"
    """skip leaves out files that cannot be decoded or used, at most 1 % of all."""
    download: bool = field(default=False, metadata=PER_CALL)
    """Fetch a named data set that is not on this machine."""

    def __post_init__(self) -> None:
        check_ranges(self, split_seed=SEED, resize=WIDTH, crop=WIDTH)


def same_source(a: DataConfig, b: DataConfig) -> bool:
    """Whether two configurations name the same source, by its name or as the same path."""
    if a.data in SOURCES or b.data in SOURCES:
        return a.data == b.data
    return Path(a.data).expanduser().resolve() == Path(b.data).expanduser().resolve()


def same_images(a: DataConfig, b: DataConfig) -> bool:
    """Whether two configurations have the same images in the same split."""
    return same_source(a, b) and same_choice(a, b)


def same_choice(a: DataConfig, b: DataConfig) -> bool:
    """Whether two configurations take the same images of a source, in the same split."""
    return _chosen(a) == _chosen(b)


def _chosen(config: DataConfig) -> dict[str, object]:
    """What decides about the images of a source."""
    flags = ("held_out", "split_seed", "channels", "resize", "crop")
    return {f"--{name.replace('_', '-')}": getattr(config, name) for name in flags}


def flags_of(config: DataConfig) -> str:
    """A configuration as it is written on the command line."""
    given = [f"{flag} {value}" for flag, value in _chosen(config).items() if value is not None]
    return " ".join([f"--data {config.data}", *given])


@dataclass(frozen=True)
class Splits:
    """Training images, and held-out images that no network has seen."""

    train: ImageData
    held_out: ImageData


def load(config: DataConfig) -> ImageData:
    """All images of the source."""
    return load_recorded(config.data, config.download, config.channels, config.resize, config.on_bad_image)


def load_splits(config: DataConfig) -> Splits:
    """Load, split and crop; the same images in the same order for the same configuration. UsageError for too large a crop."""
    train, held_out = split(load(config), config.held_out, config.split_seed)
    return Splits(cropped(train, config.crop), cropped(held_out, config.crop))


def split(data: ImageData, held_out: float = 0.2, seed: int = 0) -> tuple[ImageData, ImageData]:
    """(train, held-out): a function of `seed`, stratified: each class gives its share to within one image, and keeps one.

    Both keep the order of `data`. UsageError unless 0 < held_out < 1; DataError when a side would be empty.
    """
    chosen = held_out_mask(data.labels, held_out, seed)
    return _subset(data, ~chosen, "train"), _subset(data, chosen, "heldout")


def held_out_mask(labels: Tensor, held_out: float, seed: int) -> Tensor:
    """bool (N,): which of the images with these labels, int64 (N,), `split` holds out; errors as there."""
    check_share(held_out)
    sizes = torch.bincount(labels)
    if not 0 < _total(sizes, held_out) < len(labels):
        what = f"held_out={held_out} of {len(labels)} images leaves one side of the split empty"
        raise DataError(what, "both sides need images", "use more images or another share")
    order = permutation(seed, "split", 0, len(labels))
    shares = _shares(sizes, held_out, seed)
    by_class = order[labels[order].argsort(stable=True)].split(sizes.tolist())
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[torch.cat([members[:share] for members, share in zip(by_class, shares.tolist(), strict=True)])] = True
    return chosen


def check_share(held_out: float) -> None:
    """UsageError unless 0 < held_out < 1."""
    if not 0 < held_out < 1:
        raise UsageError(f"held_out={held_out}", "it is the held-out share of the images", "choose between 0 and 1")


def _total(sizes: Tensor, fraction: float) -> int:
    return round(float((sizes.double() * fraction).sum()))


def _shares(sizes: Tensor, fraction: float, seed: int) -> Tensor:
    """int64 (classes,): fraction * sizes rounded so that the sum is right too: the largest remainders go up, ties by `seed`.

    A class that would give its last image does not go up, so the sum is smaller where most classes have one image; they
    give it only if no class has more.
    """
    quotas = sizes.double() * fraction
    floors = quotas.floor().long()
    missing = _total(sizes, fraction) - int(floors.sum())
    remainders = (quotas - floors).round(decimals=9)  # those of 3 and 13 images at 0.1 differ by rounding alone
    order = permutation(seed, "split ties", 0, len(sizes))
    ranked = order[remainders[order].argsort(descending=True, stable=True)]
    able = floors + 1 < sizes
    if not bool(able.any() | floors.any()):
        able = sizes > 0
    up = ranked[able[ranked]][:missing]
    return floors.scatter_add(0, up, torch.ones_like(up))


def _subset(data: ImageData, keep: Tensor, suffix: str) -> ImageData:
    images, labels, name = part_of(data.images, keep), data.labels[keep], f"{data.name}-{suffix}"
    return image_data(images, labels, data.classes, name, data.conversions, data.left_out)


# ---- classes in turn ----


@functools.lru_cache(maxsize=8)
def turns(counts: tuple[int, ...]) -> Tensor:
    """int64 (N,): classes in an order, to be repeated, whose every beginning has them in proportion to `counts`.

    N is the sum of the counts, divided by their greatest common divisor. Of the first m places class c, of share q, has
    floor(m q) or ceil(m q): its k-th lies in [floor((k - 1) / q), ceil(k / q)), and the place goes to the class whose interval
    ends first (Baruah et al. 1996, "Proportionate progress", section 2). Equal counts give 0, 1, 2, ...; a count of 0 no place.

    Any m places in a row are thus off by less than 2. Off by less than 1 in every window no order can be, but for few shares
    (Fraenkel 1973). ValueError for a negative count, and for none above 0.
    """
    if min(counts, default=0) < 0 or not sum(counts):
        raise ValueError(f"counts of classes are {counts}: none may be negative, and one must be above 0")
    divisor = math.gcd(*counts)
    shares = [count // divisor for count in counts]
    total = sum(shares)
    opening: dict[int, list[tuple[int, int]]] = defaultdict(list)  # place -> (class, k) whose interval begins there
    opening[0] = [(label, 1) for label, share in enumerate(shares) if share]
    open_now: list[tuple[int, int, int]] = []
    order: list[int] = []
    for place in range(total):
        for label, k in opening.pop(place, ()):
            heapq.heappush(open_now, (-(-k * total // shares[label]), label, k))
        _, label, k = heapq.heappop(open_now)
        order.append(label)
        if k < shares[label]:
            opening[max(k * total // shares[label], place + 1)].append((label, k + 1))
    return torch.tensor(order)


def in_proportion(labels: Tensor, seed: int = 0) -> Tensor:
    """int64 (N,): items with these labels, int64 (N,), in an order whose every beginning has the classes in proportion.

    That of `turns`, within a class by `seed`. A plain random subset has too many of some classes, which alone raises a distance.
    """
    order = permutation(seed, "floor", 0, len(labels))
    counts = torch.bincount(labels)
    places = turns(tuple(counts.tolist()))
    places = places.repeat(len(labels) // len(places))
    found = torch.empty_like(order)
    found[places.argsort(stable=True)] = order[labels[order].argsort(stable=True)]
    return found
