"""Parquet files with a column of images, as Hugging Face stores data sets, read in place by pyarrow: rows in their order.

image    a struct {bytes, path}, or bytes; `path` alone, without bytes, names a file that is elsewhere, and is an error
label    a ClassLabel, whose names are in the schema's metadata; or a column `label`, `class`, ... of numbers or names
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from midway.gen.core.errors import DataError, UsageError, one_line, raising
from midway.gen.core.files import regular_file
from midway.gen.files.headings import is_label_column

CACHED = 256 << 20
"""Bytes of row groups that are kept; two are kept whatever they have."""
_IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")


class ParquetImages:
    """The rows of some files. Safe in several threads."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """DataError: a file that cannot be read, has no images, or other columns than the first."""
        parquet = _pyarrow()
        self.paths, self._lock = paths, threading.Lock()
        self._groups = OrderedDict[tuple[int, int], Any]()
        self._files = [self._open(parquet, path) for path in paths]
        self.image, self.label, self.classes, self.other_labels = _columns(self._files[0].schema_arrow, paths[0])
        for path, file in zip(paths, self._files, strict=True):
            if _columns(file.schema_arrow, path)[:3] != (self.image, self.label, self.classes):
                raise DataError(f"{path} has other columns than {paths[0].name}", "they are no one set", "give one set")
        self._bounds = [
            np.cumsum([0, *(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups))])
            for file in self._files
        ]
        self._by_stem = {path.stem: number for number, path in enumerate(paths)}
        if len(self._by_stem) < len(paths):
            raise DataError("two parquet files have one name", "rows are named by their files", "rename one of them")

    def _open(self, parquet: Any, path: Path) -> Any:
        with _reading(path):
            return parquet.ParquetFile(regular_file(path))

    def names(self) -> list[str]:
        """Of all rows: `train-00000-of-00002[0000017]`."""
        return [
            f"{path.stem}[{row:07}]"
            for path, file in zip(self.paths, self._files, strict=True)
            for row in range(file.metadata.num_rows)
        ]

    def size(self, name: str) -> int:
        """The mean bytes of a row of its file: rows have none of their own."""
        number, _ = self._place(name)
        return self.paths[number].stat().st_size // max(self._files[number].metadata.num_rows, 1)

    def read(self, name: str) -> bytes:
        """The bytes of an image. OSError, also for a row without."""
        number, row = self._place(name)
        group = int(np.searchsorted(self._bounds[number], row, "right")) - 1
        value = self._group(number, group)[row - int(self._bounds[number][group])].as_py()
        if isinstance(value, dict):
            value = value.get("bytes")
        if not value:
            raise OSError("this row has no bytes of an image")
        return value

    def labels(self) -> list[str] | None:
        """Of all rows; None without a column of labels. DataError for one that is missing, or outside of the classes."""
        if self.label is None:
            return None
        found = list[str]()
        for path, file in zip(self.paths, self._files, strict=True):
            with _reading(path):
                values = file.read(columns=[self.label])[self.label].to_pylist()
            for row, value in enumerate(values):
                if value is None or isinstance(value, float | bool | bytes):
                    raise DataError(f"row {row} of {path} has no label", f"{self.label} is {value!r}", "remove it")
                if self.classes is not None and not 0 <= value < len(self.classes):
                    why = f"{self.label} is {value}, and there are {len(self.classes)} classes"
                    fix = "give a split that has labels (those of test sets are often -1)"
                    raise DataError(f"row {row} of {path} has a label of no class", why, fix)
                found.append(str(value))
        return found

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def _place(self, name: str) -> tuple[int, int]:
        stem, _, row = name.rpartition("[")
        return self._by_stem[stem], int(row[:-1])

    def _group(self, number: int, group: int) -> Any:
        """The images of a row group, read once for many rows."""
        with self._lock:
            if (number, group) not in self._groups:
                with _reading(self.paths[number]):
                    table = self._files[number].read_row_group(group, columns=[self.image], use_threads=False)
                self._groups[number, group] = table[self.image].combine_chunks()
                while len(self._groups) > 2 and sum(each.nbytes for each in self._groups.values()) > CACHED:
                    self._groups.popitem(last=False)
            self._groups.move_to_end((number, group))
            return self._groups[number, group]


@contextmanager
def open_parquet(paths: Sequence[Path]) -> Iterator[ParquetImages]:
    """The rows of some files, to be read while the context is open. Errors as of `ParquetImages`."""
    found = ParquetImages(paths)
    try:
        yield found
    finally:
        found.close()


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UsageError("parquet files need pyarrow", one_line(error), "pip install 'midway[parquet]'") from None
    return pyarrow.parquet


def _reading(path: Path) -> Any:
    fix = "if this was downloaded, download it again"
    return raising(DataError, f"{path} cannot be read as parquet", fix, Exception, why=one_line)


Columns = tuple[str, str | None, tuple[str, ...] | None, tuple[str, ...]]


def _columns(schema: Any, path: Path) -> Columns:
    """The columns of images and of labels, the names of the classes, and other columns of labels."""
    features = _features(schema)
    types = {name: schema.field(name).type for name in schema.names}
    images = [name for name in schema.names if _holds_images(name, str(types[name]), features.get(name))]
    if not images:
        what = f"no images in {path}"
        raise DataError(what, f"its columns are {', '.join(map(str, types))}", "give files with a column of images")
    image = next((name for name in images if name.casefold() in _IMAGES), images[0])
    named = {name: tuple(map(str, of["names"])) for name, of in features.items() if _is_classes(of) and name in types}
    plain = [name for name in schema.names if is_label_column(name) and name not in named and name not in images]
    labels = sorted(named, key=lambda name: not is_label_column(name)) or plain
    return (image, labels[0], named.get(labels[0]), tuple(labels[1:])) if labels else (image, None, None, ())


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns."""
    try:
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: of for name, of in found.items() if isinstance(of, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _is_classes(of: dict[str, Any]) -> bool:
    return of.get("_type") == "ClassLabel" and isinstance(of.get("names"), list)


def _holds_images(name: str, kind: str, of: dict[str, Any] | None) -> bool:
    struct = kind.startswith("struct<") and "bytes: " in kind and "path: " in kind
    blob = kind in ("binary", "large_binary")
    if of is not None and of.get("_type") in ("Image", "Audio", "Video"):
        return of["_type"] == "Image" and (struct or blob)
    return struct or (blob and name.casefold() in _IMAGES)
