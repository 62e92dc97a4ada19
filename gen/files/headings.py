"""Headings of columns, and keys of objects, that hold the labels of images."""

import re
from collections.abc import Mapping

LABEL_COLUMNS = ("label", "labels", "class", "classname", "category")
"""Headings of labels."""


def heading(name: str) -> str:
    """A heading without what writers of tables vary: `File Name`, `file_name` and `filename` are one."""
    return re.sub(r"[\W_]", "", name).casefold()


def is_label_column(name: str) -> bool:
    """Whether this is a heading of labels."""
    return heading(name) in LABEL_COLUMNS


def label_of(row: Mapping[str, object]) -> str | None:
    """The label of one row, or of an object; None if it has none that is a number or a name."""
    columns = {heading(key): key for key in reversed([*row]) if isinstance(key, str)}
    value = next((row[columns[name]] for name in LABEL_COLUMNS if name in columns), None)
    return str(value) if isinstance(value, int | str) and not isinstance(value, bool) and value != "" else None
