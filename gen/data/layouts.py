"""From files to labels: class folders, numbered folders that are none, and the lists of labels of other systems.

    class folders        the folder just below a common wrapper is the class, whatever folders are in it; flat files are one
    dataset.json         EDM, StyleGAN: {"labels": [["00000/img00000000.png", 6], ...]}, or null for one class
    metadata.csv, .jsonl Hugging Face's image folders: a column file_name, and one of labels

A list holds for the files below its own folder, and for all of them or none. Splits, copies and annotations in place of classes
are errors. Classes are sorted by name, and by number where all are numbers.
"""

import csv
import io
import json
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from midway.gen.core.errors import DataError, one_line, raising
from midway.gen.data.decoding import listed_counts
from midway.gen.data.files import FileSet
from midway.gen.data.names import (
    annotations_among,
    canonical,
    copies_among,
    ending,
    numbered_folders,
    parts_among,
    splits_among,
    without_wrapper,
)

ALL = ("all",)
"""The classes of a source without."""
_LISTED = 5
_COLUMNS = ("label", "labels", "class", "class_name", "category")
_ONE = "one class, since {} are no classes"


@dataclass(frozen=True)
class Layout:
    """The label of each file of a FileSet, the class names, and what a reader of the data should know."""

    labels: list[int]
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    """How the labels of all images were found, where they are not of class folders."""
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that are not read, counted by what their names end in or are left by."""
    bare: tuple[str, ...] = ()
    """Folders beside the classes in which no image was found."""

    @property
    def lines(self) -> tuple[str, ...]:
        """What was left out, in words."""
        return left_out_lines(self.left_out, self.bare)


def left_out_lines(left_out: dict[str, int], bare: Sequence[str]) -> tuple[str, ...]:
    """What was left out, in words; () for nothing."""
    count = sum(left_out.values())
    files = (f"{count} {'file' if count == 1 else 'files'}: {listed_counts(left_out)}",) if left_out else ()
    more = f", ... and {len(bare) - 12} more" if len(bare) > 12 else ""
    return (*files, *((f"folders without images: {', '.join(bare[:12])}{more}",) if bare else ()))


def layout_of(files: FileSet) -> Layout:
    """The labels that the layout means. DataError for one that means none, with the remedy."""
    lists = list(_lists(files))
    labels, classes, notes = _from_lists(files, lists) or class_labels(files.names, files.aliases)
    used = {found.file for found in lists}
    bare = () if lists else _bare(files, classes)
    return Layout(labels, classes, notes, left_out_of(files, used), bare)


def left_out_of(files: FileSet, used: set[str] | None = None) -> dict[str, int]:
    """Files that are not read, the most frequent kind first."""
    kinds = Counter(ending(name) for name in files.others if name not in (used or ()))
    kinds.update(files.junk)
    kinds.update({"read by another name": files.repeated} if files.repeated else {})
    return dict(kinds.most_common())


Labels = tuple[list[int], tuple[str, ...], tuple[str, ...]]
"""Labels, classes and notes."""


# ---- folders ----


def class_labels(names: Sequence[str], aliases: Sequence[tuple[str, str]] = ()) -> Labels:
    """The folder just below a common wrapper; flat files, and those in numbered folders, are one class, `all`."""
    parts = without_wrapper(names)
    loose = [name for name, part in zip(names, parts, strict=True) if len(part) == 1]
    if len(loose) == len(parts):
        return [0] * len(parts), ALL, ()
    classes = tuple(sorted({part[0] for part in parts if len(part) > 1}))
    if not loose and (numbered := numbered_folders(["/".join(part) for part in parts])) is not None:
        return [0] * len(parts), ALL, (_ONE.format(numbered),)
    _check_loose_files(loose, classes)
    _check_splits(classes, {part[0] for part in parts if len(part) > 2})
    _check_other_folders(classes)
    _check_aliases(names, aliases)
    index = {name: label for label, name in enumerate(classes)}
    inner = splits_among(sorted({part[1] for part in parts if len(part) > 2}))
    notes = (f"{', '.join(inner)} in the class folders are read as one set",) if len(inner) > 1 else ()
    return [index[part[0]] for part in parts], classes, notes


def _check_loose_files(loose: Sequence[str], classes: Sequence[str]) -> None:
    if loose:
        what = f"{len(loose)} images lie beside the class folders, for example {loose[0]}"
        why = f"with class folders ({', '.join(classes[:_LISTED])}) every image needs a class"
        raise DataError(what, why, "move them into a class folder, or all images into one folder")


def _check_splits(classes: Sequence[str], nested: set[str]) -> None:
    found = [] if len(classes) == 1 else splits_among(classes, nested)
    if len(found) == 1:
        what = f"the folder {found[0]} looks like a split, not a class"
        fix = "give the path of one set of classes (unpack a zip first), or rename it if it is a class"
        raise DataError(what, "its images would get its name as their label", fix)
    if found:
        what = f"the folders {', '.join(found)} look like splits, not classes"
        raise DataError(what, "they would become the labels", "give the path of one of them (unpack a zip first)")


def _check_other_folders(classes: Sequence[str]) -> None:
    for copy, original in copies_among(classes)[:1]:
        what = f"the folder {copy} looks like a copy of {original}"
        raise DataError(what, "its images would get another label", "remove it, or rename it if it is a class")
    if len(found := parts_among(classes)) > 1:
        what = f"the folders {', '.join(found[:_LISTED])} look like parts of one set, not like classes"
        raise DataError(what, "there are folders in them that could be the classes", "move those of all parts together")
    if found := annotations_among(classes):
        what = f"the folders {', '.join(found)} look like annotations of images, not like classes"
        raise DataError(what, "they lie beside a folder of images", "give the path of the folder of images")


def _check_aliases(names: Sequence[str], aliases: Sequence[tuple[str, str]]) -> None:
    for first, second in aliases:
        pairs = without_wrapper([*names, f"{first}/x/x", f"{second}/x/x"])[-2:]
        if pairs[0][0] != pairs[1][0]:
            why = f"each of its images would have the labels {pairs[0][0]} and {pairs[1][0]}"
            raise DataError(f"{first} and {second} are links to one folder", why, "remove one of them")


def _bare(files: FileSet, classes: Sequence[str]) -> tuple[str, ...]:
    """Folders beside the classes without an image."""
    depth = len(files.names[0].split("/")) - len(without_wrapper(files.names)[0])
    wrapper = files.names[0].split("/")[:depth]
    folders = (name.split("/") for name in (*files.folders, *(posixpath.dirname(name) for name in files.others)))
    beside = {parts[depth] for parts in folders if parts[:depth] == wrapper and len(parts) > depth and parts[depth]}
    return tuple(sorted(beside.difference(classes))) if classes != ALL else ()


# ---- lists of labels ----


@dataclass(frozen=True)
class _List:
    """Labels by the full names of files; None where the list has none."""

    file: str
    labels: dict[str, str] | None
    column: str = ""

    def covers(self, files: FileSet) -> bool:
        """Whether all images lie below its folder."""
        folder = posixpath.dirname(self.file)
        return not folder or all(name.startswith(f"{folder}/") for name in files.names)


def _lists(files: FileSet) -> Iterator[_List]:
    """The lists of labels beside the images; DataError for one that cannot be read."""
    for name in files.others:
        reader = _READERS.get(posixpath.basename(name).casefold())
        if reader is not None:
            what, fix = f"{name} is no list of labels", "correct it, or remove it if the folders are the classes"
            with raising(DataError, what, fix, ValueError, RecursionError, OSError, csv.Error, why=one_line):
                found = reader(name, files.read(name))
            yield from () if found is None else (found,)


def _from_lists(files: FileSet, lists: Sequence[_List]) -> Labels | None:
    """Labels of lists that name every image, None without lists; DataError for some images alone, or two labels of one."""
    for found in lists:
        if found.labels is None and found.covers(files):
            return [0] * len(files.names), ALL, (f"one class, since {found.file} holds no labels",)
    lists = [found for found in lists if found.labels is not None]
    if not lists:
        return None
    labels, listed = _merged(lists), ", ".join(found.file for found in lists[:_LISTED])
    missing = [name for name in files.names if name not in labels]
    if missing:
        what = f"{listed}: {len(files.names) - len(missing)} of {len(files.names)} images have a label"
        fix = "add the others, or remove the list if the folders are the classes"
        raise DataError(what, f"{missing[0]} is not listed", fix)
    values = [labels[name] for name in files.names]
    classes = tuple(sorted(set(values), key=int if all(map(_NUMBER.fullmatch, set(values))) else None))
    index = {name: label for label, name in enumerate(classes)}
    return [index[value] for value in values], classes, tuple(_notes(files, lists, listed, len(labels)))


def _notes(files: FileSet, lists: Sequence[_List], listed: str, count: int) -> Iterator[str]:
    """How labels were read; DataError for folders of splits that have a list each."""
    column = lists[0].column
    more = count - len(files.names)
    besides = f", which lists {more} that {'is' if more == 1 else 'are'} not here" if more else ""
    yield f"labels of {listed}{f', column {column}' if column else ''}{besides}"
    parts = without_wrapper(files.names)
    folders = sorted({part[0] for part in parts if len(part) > 1})
    if not any(found.covers(files) for found in lists):
        _check_splits(folders, set(folders))
    elif splits := splits_among(folders):
        yield f"{', '.join(splits)} are read as one set"


def _merged(lists: Sequence[_List]) -> dict[str, str]:
    labels = dict[str, str]()
    for found in lists:
        for name, label in (found.labels or {}).items():
            if labels.setdefault(name, label) != label:
                what = f"{name} has the labels {labels[name]} and {label}"
                raise DataError(what, f"the second is of {found.file}", "correct one of the lists")
    return labels


_NUMBER = re.compile(r"0|-?[1-9]\d*")


def _list(file: str, pairs: Iterable[tuple[object, object]], column: str = "") -> _List:
    """A list of (name, label); ValueError for what is neither, and for a name with two labels."""
    labels = dict[str, str]()
    for name, label in pairs:
        if not isinstance(name, str) or not name or isinstance(label, bool) or not isinstance(label, str | int):
            raise ValueError(f"the label of {name!r} is {str(label)[:80]!r}; a class is a number or a name")
        if label == "":
            raise ValueError(f"{name} has no label")
        whole = canonical(posixpath.join(posixpath.dirname(file), name.replace("\\", "/")))
        text = unicodedata.normalize("NFC", str(label))
        if labels.setdefault(whole, text) != text:
            raise ValueError(f"{name} has the labels {labels[whole]} and {text}")
    return _List(file, labels, column)


def _text(data: bytes) -> str:
    return data.decode("utf-8-sig")  # Excel begins with the mark


def _read_dataset_json(file: str, data: bytes) -> _List | None:
    value = json.loads(_text(data))
    if not isinstance(value, dict) or "labels" not in value:
        return None  # of another program
    labels = value["labels"]
    if labels is None:
        return _List(file, None)
    pairs = list(labels.items()) if isinstance(labels, dict) else labels
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError("labels is not a list of pairs [name, number]")
    return _list(file, pairs)


def _read_csv(file: str, data: bytes) -> _List | None:
    for delimiter in ",;\t":
        rows = csv.DictReader(io.StringIO(_text(data), newline=""), delimiter=delimiter)
        if "file_name" in (rows.fieldnames or ()):
            return _of_rows(file, list(rows))
    return None


def _read_jsonl(file: str, data: bytes) -> _List | None:
    rows = [json.loads(line) for line in _text(data).split("\n") if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not an object")
    return _of_rows(file, rows)


def _of_rows(file: str, rows: Sequence[dict[str, Any]]) -> _List | None:
    """None without a column of labels, such as a list of captions."""
    column = next((name for name in _COLUMNS if rows and name in rows[0]), None)
    if column is None:
        return None
    return _list(file, [(row.get("file_name"), row.get(column)) for row in rows], column)


def _read_parquet(file: str, data: bytes) -> _List | None:
    raise ValueError("Parquet is not read: write it as metadata.csv, with the columns file_name and label")


_READERS: dict[str, Callable[[str, bytes], _List | None]] = {
    "dataset.json": _read_dataset_json,
    "metadata.csv": _read_csv,
    "metadata.jsonl": _read_jsonl,
    "metadata.parquet": _read_parquet,
}
