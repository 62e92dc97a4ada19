"""The lists of labels of other systems: their files are read, and every name is that of a file of the whole source.

dataset.json         EDM, StyleGAN: {"labels": [["00000/img00000000.png", 6], ...]}, or null for one class
metadata.csv, .jsonl Hugging Face's image folders: a column file_name, and one of labels
"""

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from midway.gen.core.errors import DataError, one_line, raising
from midway.gen.files.file_set import FileSet
from midway.gen.files.headings import LABEL_COLUMNS, heading
from midway.gen.files.names import canonical, label_like

_FILE_NAME = "filename"


@dataclass(frozen=True)
class LabelList:
    """Labels by the full names of files; None where the list has none."""

    file: str
    labels: dict[str, str] | None
    column: str = ""
    candidates: tuple[str, ...] = ()
    """Columns of a list without labels that may be labels by their names."""

    def covers(self, files: FileSet) -> bool:
        """Whether all images lie below its folder."""
        folder = posixpath.dirname(self.file)
        return not folder or all(name.startswith(f"{folder}/") for name in files.names)


def read_lists(files: FileSet) -> Iterator[LabelList]:
    """The lists of labels beside the images; DataError for one that cannot be read."""
    for name in files.others:
        reader = _READERS.get(posixpath.basename(name).casefold())
        if reader is not None:
            what, fix = f"{name} is no list of labels", "correct it, or remove it if the folders are the classes"
            with raising(DataError, what, fix, ValueError, RecursionError, OSError, csv.Error, why=one_line):
                found = reader(name, files.read(name))
            yield from () if found is None else (found,)


def _list(file: str, pairs: Iterable[tuple[object, object]], column: str = "") -> LabelList:
    """A list of (name, label); ValueError for what is neither, and for a name with two labels."""
    labels = dict[str, str]()
    for name, label in pairs:
        if not isinstance(name, str) or not name or isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"the label of {name!r} is {str(label)[:80]!r}; a class is a number or a name")
        if not (text := unicodedata.normalize("NFC", str(label)).strip()):
            raise ValueError(f"{name} has no label")
        whole = canonical(posixpath.join(posixpath.dirname(file), name.replace("\\", "/")))
        if labels.setdefault(whole, text) != text:
            raise ValueError(f"{name} has the labels {labels[whole]} and {text}")
    return LabelList(file, labels, column)


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")  # Excel begins with the mark


def _read_dataset_json(file: str, data: bytes) -> LabelList | None:
    value = json.loads(_text(data))
    if not isinstance(value, dict) or "labels" not in value:
        return None  # of another program
    labels = value["labels"]
    if labels is None:
        return LabelList(file, None)
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("labels is not a list of pairs [name, number]")
    return _list(file, pairs)


def _read_csv(file: str, data: bytes) -> LabelList | None:
    for delimiter in ",;\t":
        rows = csv.DictReader(io.StringIO(_text(data), newline=""), delimiter=delimiter)
        if _FILE_NAME in map(heading, rows.fieldnames or ()):
            return _of_rows(file, list(rows))
    return None


def _read_jsonl(file: str, data: bytes) -> LabelList | None:
    rows = [json.loads(line) for line in _text(data).split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not an object")
    return _of_rows(file, rows)


def _of_rows(file: str, rows: Sequence[dict[str, Any]]) -> LabelList | None:
    """None without a column of labels, such as a list of captions."""
    columns = {heading(key): key for row in rows for key in reversed(row) if isinstance(key, str)}
    column = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
    if _FILE_NAME not in columns:
        return None
    if column is None:
        candidates = tuple(filter(label_like, columns.values()))
        return LabelList(file, None, candidates=candidates) if candidates else None
    return _list(file, [(row.get(columns[_FILE_NAME]), row.get(column)) for row in rows], column)


def _read_parquet(file: str, data: bytes) -> LabelList | None:
    raise ValueError("Parquet is not read: write it as metadata.csv, with the columns file_name and label")


_READERS: dict[str, Callable[[str, bytes], LabelList | None]] = {
    "dataset.json": _read_dataset_json,
    "metadata.csv": _read_csv,
    "metadata.jsonl": _read_jsonl,
    "metadata.parquet": _read_parquet,
}
