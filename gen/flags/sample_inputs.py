"""What the flags of midway sample name: classes, images and noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, nearest
from midway.gen.core.files import read_bytes
from midway.gen.core.text import printable
from midway.gen.data.external import ReadingOptions, read_external
from midway.gen.data.images import load_images
from midway.gen.diffusion.sampling import labels_of
from midway.gen.files.decoding import IMAGE_LIMIT, Undecodable, decode, stack
from midway.gen.files.names import is_image
from midway.gen.flags.cli import names

LabelOf = Callable[[Tensor], Tensor]
"""Seeds (B,) -> their classes, int64 (B,)."""


class Classed(Protocol):
    """A model of classes, 0 without; `empty` had no training image, `class_names` are () where they are not known."""

    classes: int
    empty: tuple[int, ...]
    class_names: tuple[str, ...]


# ---- classes ----


def chosen_labels(words: str, model: Classed) -> tuple[int, ...]:
    """The classes that --labels names, by number or name; a word that is a class's name is that class.

    UsageError for none, for a class that the model does not have, and for one that had no training image.
    """
    if not model.classes:
        raise UsageError(f"--labels {words}", "this model was trained without classes", "drop --labels")
    found = tuple(_label(word, words, model) for word in names(words))
    if not found:
        raise UsageError(f"--labels {words!r}", "it names no class", f"choose some of them: {numbered_classes(model)}")
    return found


def _label(word: str, words: str, model: Classed) -> int:
    if word in model.class_names:
        label = model.class_names.index(word)
    elif word.lstrip("-").isdecimal() and 0 <= int(word) < model.classes:
        label = int(word)
    else:
        numbers = f"the model has classes 0 to {model.classes - 1}"
        why = numbers if not model.class_names or word.lstrip("-").isdecimal() else f"'{word}' is none of its classes"
        known = [name for number, name in enumerate(model.class_names) if number not in model.empty]
        close = nearest(word, known) if known and not word.lstrip("-").isdecimal() else ""
        fix = close or f"choose one of them: {numbered_classes(model)}"
        raise UsageError(f"--labels {words}", why, fix)
    if label in model.empty:
        why, fix = (
            f"class {named(model, label)} had no training image",
            f"choose one of them: {numbered_classes(model)}",
        )
        raise UsageError(f"--labels {words}", why, fix)
    return label


def label_rule(labels: Sequence[int], model: Classed) -> LabelOf:
    """Seed s has number s mod N of N labels; without labels its own class."""
    if not labels:
        return lambda seeds: labels_of(seeds, model.classes, model.empty)
    listed = torch.tensor(labels)
    return lambda seeds: listed[seeds % len(listed)]


def numbered_classes(model: Classed) -> str:
    """`0: cat, 1: dog`: every class that --labels takes; numbers alone of a run that does not hold the names."""
    trained = [label for label in range(model.classes) if label not in model.empty]
    return ", ".join(named(model, label) for label in trained)


def named(model: Classed, label: int) -> str:
    """A class as its number and its name."""
    return f"{label}: {model.class_names[label]}" if model.class_names else str(label)


# ---- images ----


@dataclass(frozen=True)
class InputImages:
    """uint8 (N, C, H, W) of the model's shape, in the order of their names, and the names of their classes, if they have some."""

    pixels: Tensor
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def labels(self, model: Classed) -> tuple[int, ...]:
        """The model's class of each image, by name; () unless all of them are the model's."""
        if not self.classes or not {*self.classes} <= {*model.class_names}:
            return ()
        return tuple(map(model.class_names.index, self.classes))


def read_images(source: str, shape: tuple[int, int, int], flag: str) -> InputImages:
    """A file, a folder, a zip, an NPZ, or a named source, in the model's channels, resized and cropped to its size.

    DataError for what cannot be read.
    """
    path, (channels, side, _) = Path(source).expanduser(), shape
    if path.is_file() and is_image(path.name):
        found = decode(path.name, lambda _: read_bytes(path, IMAGE_LIMIT), channels, side)
        if isinstance(found, Undecodable):
            raise DataError(f"{flag} {path} cannot be read", found.reason, "give an image, a folder or a zip of them")
        pixels, notes = stack([found], 1)
        return InputImages(torch.from_numpy(pixels), (), notes)
    if path.suffix.lower() == ".npz":
        external = read_external(path, ReadingOptions(channels, side))
        return InputImages(external.pixels, (), external.notes)
    data = load_images(source, channels=channels, resize=side)
    classes = tuple(data.classes[label] for label in data.labels.tolist()) if len(data.classes) > 1 else ()
    return InputImages(data.images[:], classes, tuple(map(printable, data.conversions)))
