"""From files to labels: class folders, numbered folders that are none, and the lists of labels of other systems (labels.py).

The folder just below a common wrapper is the class, whatever folders are in it; flat files are one class. A list holds for the
files below its own folder, and for all of them or none. Splits, copies, versions and annotations in place of classes are errors.
Classes are sorted by name, those of lists by number where all are numbers.
"""

import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from midway.gen.core.errors import DataError
from midway.gen.files.decoding import listed_counts
from midway.gen.files.file_set import FileSet
from midway.gen.files.labels import LabelList, read_lists
from midway.gen.files.names import (
    annotations_among,
    copies_among,
    ending,
    numbered_folders,
    one_on_windows,
    parts_among,
    splits_among,
    versions_among,
    without_wrapper,
)

ALL = ("all",)
"""The classes of a source without."""
_LISTED = 5
_NUMBER = re.compile(r"0|-?[1-9]\d{0,17}")
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
    if files.labels is not None and files.classes is not None:
        labels = [int(files.labels[name]) for name in files.names]
        return Layout(labels, files.classes, (f"labels of {files.labels_from}",), left_out_of(files))
    found = list(read_lists(files)) if files.labels is None else [LabelList(files.labels_from, dict(files.labels))]
    lists = [each for each in found if not each.candidates]
    labels, classes, notes = _from_lists(files, lists) or class_labels(files.names, files.aliases)
    _check_candidates(classes, [each for each in found if each.candidates])
    if same := one_on_windows(classes, case=True):
        notes = (*notes, f"{' and '.join(same)} are classes, which differ in case alone")
    used = {each.file for each in lists}
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
    inside = defaultdict[str, set[str]](set)  # the folders in each class
    for part in parts:
        if len(part) > 2:
            inside[part[0]].add(part[1])
    _check_splits(classes, inside.keys())
    _check_other_folders(classes, inside)
    _check_aliases(names, aliases)
    index = {name: label for label, name in enumerate(classes)}
    return [index[part[0]] for part in parts], classes, _inner_notes(inside)


def _inner_notes(inside: Mapping[str, set[str]]) -> tuple[str, ...]:
    """What is read as one: folders in the classes that are splits, or are in several classes, and could be the classes."""
    counts = Counter(name for names in inside.values() for name in names)
    splits = splits_among(sorted(counts))
    again = splits if len(splits) > 1 else [name for name, count in sorted(counts.items()) if count > 1]
    more = ", ..." if len(again) > _LISTED else ""
    return (f"{', '.join(again[:_LISTED])}{more} in the class folders are read as one set",) if len(again) > 1 else ()


def _check_loose_files(loose: Sequence[str], classes: Sequence[str]) -> None:
    if loose:
        what = f"{len(loose)} images lie beside the class folders, for example {loose[0]}"
        why = f"with class folders ({', '.join(classes[:_LISTED])}) every image needs a class"
        raise DataError(what, why, "move them into a class folder, or all images into one folder")


def _check_splits(classes: Sequence[str], nested: Collection[str]) -> None:
    found = [] if len(classes) == 1 else splits_among(classes, nested)
    if len(found) == 1:
        what = f"the folder {found[0]} looks like a split, not a class"
        fix = "give the path of one set of classes (unpack a zip first), or rename it if it is a class"
        raise DataError(what, "its images would get its name as their label", fix)
    if found:
        what = f"the folders {', '.join(found)} look like splits, not classes"
        raise DataError(what, "they would become the labels", "give the path of one of them (unpack a zip first)")


def _check_other_folders(classes: Sequence[str], inside: Mapping[str, set[str]]) -> None:
    for copy, original in copies_among(classes)[:1]:
        what = f"the folder {copy} looks like a copy of {original}"
        raise DataError(what, "its images would get another label", "remove it, or rename it if it is a class")
    for name in classes:
        if len(classes) > 2 and inside.get(name, set()).issuperset(set(classes) - {name}):
            what = f"the folder {name} holds folders that are called like the classes beside it"
            raise DataError(what, "their images would get its name as their label", "remove it, or give its path")
    if found := one_on_windows(classes):
        what = f"the folders {' and '.join(map(repr, found))} differ in a space or dot at the end"
        raise DataError(what, "they would be two labels", "put their images into one, or rename one if it is a class")
    if len(found := parts_among(classes)) > 1:
        what = f"the folders {', '.join(found[:_LISTED])} look like parts of one set, not like classes"
        raise DataError(what, "there are folders in them that could be the classes", "move those of all parts together")
    if found := annotations_among(classes):
        what = f"the folders {', '.join(found)} look like annotations of images, not like classes"
        raise DataError(what, "they lie beside a folder of images", "give the path of the folder of images")
    if found := versions_among(classes):
        what = f"the folders {', '.join(found[:_LISTED])} look like versions of one set, not like classes"
        raise DataError(what, "they would become the labels", "give the path of one, or rename those that are classes")


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


def _check_candidates(classes: Sequence[str], lists: Sequence[LabelList]) -> None:
    if lists and classes == ALL:
        what = f"{lists[0].file} has no column `label`"
        why = f"{', '.join(lists[0].candidates[:_LISTED])} may hold the labels; without, all images are one class"
        raise DataError(what, why, "call the column of labels `label`, or remove the list for one class")


def _from_lists(files: FileSet, lists: Sequence[LabelList]) -> Labels | None:
    """Labels of lists that name every image, None without lists; DataError for some images alone, or two labels of one."""
    empty = [found for found in lists if found.labels is None and found.covers(files)]
    lists = [found for found in lists if found.labels is not None]
    if not lists and empty:
        why = f"one class, since {empty[0].file} holds no labels"
        return [0] * len(files.names), ALL, (why, *_joined_splits(_folders(files)))
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


def _notes(files: FileSet, lists: Sequence[LabelList], listed: str, count: int) -> Iterator[str]:
    """How labels were read; DataError for folders of splits that have a list each."""
    column = lists[0].column
    more = count - len(files.names)
    besides = f", which lists {more} that {'is' if more == 1 else 'are'} not here" if more else ""
    yield f"labels of {listed}{f', column {column}' if column else ''}{besides}"
    folders = _folders(files)
    if not any(found.covers(files) for found in lists):
        _check_splits(folders, set(folders))
    yield from _joined_splits(folders)


def _folders(files: FileSet) -> list[str]:
    return sorted({part[0] for part in without_wrapper(files.names) if len(part) > 1})


def _joined_splits(folders: Sequence[str]) -> tuple[str, ...]:
    splits = splits_among(folders)
    return (f"{', '.join(splits)} are read as one set",) if len(splits) > 1 else ()


def _merged(lists: Sequence[LabelList]) -> dict[str, str]:
    labels = dict[str, str]()
    for found in lists:
        for name, label in (found.labels or {}).items():
            if labels.setdefault(name, label) != label:
                what = f"{name} has the labels {labels[name]} and {label}"
                raise DataError(what, f"the second is of {found.file}", "correct one of the lists")
    return labels
