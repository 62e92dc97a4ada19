"""What a set is built of: the images of a source one by one, and the plan by which a build that was ended goes on."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.data.sources import SOURCES, existing_path, read_named
from midway.gen.data.splits import DataConfig
from midway.gen.files.decoding import Decoded, Undecodable, decode, decoder_versions, prepare
from midway.gen.files.file_set import FileSet, open_files
from midway.gen.files.layouts import layout_of
from midway.gen.files.shards import set_name


@dataclass(frozen=True)
class BuildSource:
    """The images of a source, in its order."""

    name: str
    names: Sequence[str]
    sizes: NDArray[np.int64]
    """Bytes of each file, (N,)."""
    labels: Tensor
    """int64 (N,)."""
    classes: tuple[str, ...]
    notes: tuple[str, ...]
    """How labels were found."""
    left_out: tuple[str, ...]
    image: Callable[[int], tuple[Decoded | Undecodable, bytes]]
    """The image at a place, and the bytes of its file. Safe in several threads."""


@contextmanager
def open_source(config: DataConfig, keep_encoded: bool) -> Iterator[BuildSource]:
    """The source of a configuration, to be read while the context is open. Errors as of `load_images`."""
    if config.data in SOURCES:
        if keep_encoded:
            why = f"{config.data} is read as arrays, not as image files"
            raise UsageError("--keep-encoded keeps the bytes of files", why, "drop it")
        yield _of_arrays(config)
        return
    path = existing_path(config.data)
    with open_files(path) as files:
        layout = layout_of(files)
        yield BuildSource(
            set_name(path),
            files.names,
            np.fromiter(map(files.size, files.names), np.int64, len(files.names)),
            torch.tensor(layout.labels),
            layout.classes,
            layout.notes,
            layout.lines,
            _reader(files, config),
        )


def _reader(files: FileSet, config: DataConfig) -> Callable[[int], tuple[Decoded | Undecodable, bytes]]:
    def image(item: int) -> tuple[Decoded | Undecodable, bytes]:
        data = b""

        def read(name: str) -> bytes:
            nonlocal data
            data = files.read(name)
            return data

        return decode(files.names[item], read, config.channels, config.resize), data

    return image


def _of_arrays(config: DataConfig) -> BuildSource:
    arrays = read_named(config.data, config.download)
    names = [f"{arrays.name}[{index}]" for index in range(len(arrays.pixels))]

    def image(item: int) -> tuple[Decoded | Undecodable, bytes]:
        return prepare(names[item], Image.fromarray(arrays.pixels[item]), config.channels, config.resize), b""

    sizes = np.full(len(names), arrays.pixels[:1].nbytes, np.int64)
    return BuildSource(arrays.name, names, sizes, torch.tensor(arrays.labels), arrays.classes, (), (), image)


# ---- plans ----

_WORDS = {
    "images": "the number of files",
    "names": "the names of the files",
    "sizes": "the sizes of the files",
    "labels": "the labels",
    "classes": "the names of the classes",
    "channels": "--channels",
    "resize": "--resize",
    "codec": "--keep-encoded",
    "decoder": "the versions of the decoders",
}


def plan_of(source: BuildSource, config: DataConfig, keep_encoded: bool) -> dict[str, Any]:
    """All that the bytes of a built set depend on, but for the contents of files of the same names and sizes."""
    return {
        "images": len(source.names),
        "names": _hash(name.encode(errors="surrogateescape") + b"\0" for name in source.names),
        "sizes": _hash([source.sizes.astype("<i8").tobytes()]),
        "labels": _hash([source.labels.numpy().astype("<i8").tobytes()]),
        "classes": _hash(name.encode(errors="surrogateescape") + b"\0" for name in source.classes),
        "channels": config.channels,
        "resize": config.resize,
        "codec": "bytes" if keep_encoded else "raw",
        "decoder": decoder_versions(),
    }


def differences(plan: dict[str, Any], other: object) -> list[str]:
    """In words, what differs between plans; `other` may be anything."""
    found = other if isinstance(other, dict) else {}
    return [words for name, words in _WORDS.items() if found.get(name) != plan[name]]


def _hash(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
