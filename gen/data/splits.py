"""Which images a run uses, and which it never sees: named in the configuration, so that every later command agrees."""

from dataclasses import dataclass
from typing import Literal

from midway.gen.data.images import ImageData, load_images, split


@dataclass(frozen=True)
class DataConfig:
    """A source and its split."""

    data: str = "digits"
    """digits, cifar10, mnist, fashion_mnist, or the path of an image folder or zip with class folders."""
    held_out: float = 0.2
    """Share of the images kept from all training; the floor of every distance is measured on them."""
    split_seed: int = 0
    channels: int | None = None
    """1 converts to grey, 3 to RGB."""
    resize: int | None = None
    """Shorter side in pixels, then a centre crop."""
    on_bad_image: Literal["error", "skip"] = "error"
    """skip leaves out unreadable files, at most 1 % of them."""
    download: bool = False
    """Fetch a named data set that is not on this machine."""


@dataclass(frozen=True)
class Splits:
    """Training images, and held-out images that no network has seen."""

    train: ImageData
    held_out: ImageData


def load_splits(config: DataConfig) -> Splits:
    """Load and split; the same images in the same order for the same configuration."""
    data = load_images(
        config.data,
        download=config.download,
        channels=config.channels,
        resize=config.resize,
        on_bad_image=config.on_bad_image,
    )
    return Splits(*split(data, config.held_out, config.split_seed))
