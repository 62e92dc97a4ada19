"""Sources of several files: a folder of tar or parquet files, or a pattern of their names, such as `train-{000..127}.tar`."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from midway.gen.core.errors import DataError
from midway.gen.files.names import is_image, junk, splits_among

TAR, PARQUET = ".tar", ".parquet"
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LIST = re.compile(r"\{([^{}]*,[^{}]*)\}")
_LISTS = ("metadata.parquet",)
"""Of labels of images beside them."""


def is_pattern(path: Path) -> bool:
    """Whether this is no file or folder, but a pattern of names of tar or parquet files."""
    return path.suffix in (TAR, PARQUET) and re.search(r"[{*?]", path.name) is not None and not path.exists()


def shard_paths(path: Path) -> list[Path]:
    """The tar or parquet files that a file, a folder or a pattern is; [] for any other source.

    DataError: a file of a range is missing, none fits a pattern, or they are of several splits.
    """
    if is_pattern(path):
        found = _matching(path)
    elif path.is_dir():
        found = _inside(path)
    else:
        return [path] if path.suffix in (TAR, PARQUET) else []
    kinds = {file.suffix for file in found}
    if len(kinds) > 1:
        raise DataError(f"{path} has tar and parquet files", "a source has one kind", f"give {path}/*{min(kinds)}")
    stems = sorted({re.split(r"[-_.]?\d", file.stem, maxsplit=1)[0] for file in found})
    if len(splits := splits_among(stems)) > 1 and not _LIST.search(path.name):
        fix = f"give the path of one of them: {found[0].parent / splits[0]}-*{found[0].suffix}"
        raise DataError(f"{path} has the splits {', '.join(splits)}", "they would be one set", fix)
    return found


def set_name(path: Path) -> str:
    """The name of the images at a path: of its folder, its file, or what its pattern begins with."""
    if is_pattern(path):
        begin = re.split(r"[{*?]", path.name)[0].rstrip("-_.")
        return begin or path.parent.resolve().name
    return path.resolve().name if path.is_dir() else path.stem


def _inside(folder: Path) -> list[Path]:
    """The shards of a folder that holds nothing else which could be images; `data` in it may hold them."""
    try:
        with os.scandir(folder) as entries:
            inside = {entry.name: entry.is_dir() for entry in entries if junk(entry.name) is None}
    except OSError:  # whoever lists it again names the error
        return []
    folders = [folder / name for name, is_folder in inside.items() if is_folder]
    if any(map(is_image, inside)) or any(path.name != "data" for path in folders):
        return []
    paths = (folder / name for name in sorted(inside) if not inside[name] and name not in _LISTS)
    files = [path for path in paths if path.suffix in (TAR, PARQUET)]
    return files or [shard for path in folders for shard in _inside(path)]


def _matching(path: Path) -> list[Path]:
    found = list[Path]()
    for name in _expanded(path.name):
        several = bool(re.search(r"[*?]", name))
        files = sorted(path.parent.glob(name)) if several else [path.parent / name]
        for file in files:
            if not file.is_file():
                raise DataError(
                    f"{file} does not exist", f"it is one of {path.name}", "correct the pattern, or fetch it"
                )
        found += files
    if not found:
        raise DataError(f"no file is called {path}", f"looked in {path.parent.absolute()}", "correct the pattern")
    return found


def _expanded(name: str) -> Iterator[str]:
    """`a-{08..10}` -> a-08, a-09, a-10; `{train,val}` -> train, val."""
    if match := _RANGE.search(name):
        first, last = match.groups()
        parts = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    elif match := _LIST.search(name):
        parts = match[1].split(",")
    else:
        yield name
        return
    for part in parts:
        yield from _expanded(name[: match.start()] + part + name[match.end() :])
