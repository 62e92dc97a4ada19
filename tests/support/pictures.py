"""Image files for tests: noise, and bad files of every kind with the words that errors name them by."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def noise(*shape: int, seed: int = 0) -> NDArray[np.uint8]:
    """Uniform uint8 values."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save(path: Path, pixels: NDArray[Any], **options: Any) -> NDArray[Any]:
    """Write an image and its folders; the pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return pixels


def truncated_jpeg(path: Path) -> None:
    save(path, noise(24, 24, 3))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 3 // 4])


def flipped_png(path: Path) -> None:
    save(path, noise(16, 16, 3))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 2 2\n%%EOF\n"


@dataclass(frozen=True)
class Fault:
    """How a bad file is made, and a word of the reason that must be given."""

    name: str
    make: Callable[[Path], object]
    word: str


UNDECODABLE = (
    Fault("cut.jpg", truncated_jpeg, "runcated"),
    Fault("flipped.png", flipped_png, ":"),
    Fault("zero.png", lambda path: path.write_bytes(b""), "empty or not an image"),
    Fault("text.png", lambda path: path.write_text("hello"), "empty or not an image"),
    Fault("script.png", lambda path: path.write_bytes(POSTSCRIPT), "empty or not an image"),
)
UNUSABLE = (
    Fault("deep.png", lambda path: save(path, np.full((4, 6), 1000, np.uint16)), "16-bit"),
    Fault("deep.tiff", lambda path: save(path, np.full((4, 6), 1000, np.uint16)), "16-bit"),
    Fault("long.tiff", lambda path: save(path, np.full((4, 6), 1000, np.int32)), "32-bit"),
    Fault("float.tif", lambda path: save(path, np.zeros((4, 6), np.float32)), "float"),
    Fault("lab.tif", lambda path: Image.new("LAB", (6, 4)).save(path), "colour mode LAB"),
    Fault("huge.png", lambda path: save(path, np.zeros((40, 40), np.uint8)), "too many pixels"),
)
PIXEL_LIMIT = 500
"""Pillow's limit (Image.MAX_IMAGE_PIXELS) under which huge.png is an error: it has more than twice as many pixels."""
