"""Tar files, alone or as the shards of a WebDataset, read in place: their members are indexed once, nothing is unpacked.

    cat/1.png, dog/2.png               as in a folder
    000123.jpg with 000123.cls         the label; or .json with `label`, `class`, ...; or .txt if all hold a number

Names that recur in several shards have the shard's name before them.
"""

import json
import os
import posixpath
import re
import tarfile
import threading
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from midway.gen.core.errors import DataError, one_line, raising
from midway.gen.core.files import check_size, regular_file
from midway.gen.files.decoding import IMAGE_LIMIT
from midway.gen.files.headings import label_of
from midway.gen.files.listing import Listing
from midway.gen.files.names import canonical, is_image, junk

_NUMBER = re.compile(r"-?\d{1,18}")


@dataclass
class Members:
    """Where the members of some tar files lie: names, and in arrays the file, the first byte and the bytes of each."""

    paths: Sequence[Path]
    places: dict[str, int] = field(default_factory=dict)
    files: "array[int]" = field(default_factory=lambda: array("l"))
    starts: "array[int]" = field(default_factory=lambda: array("q"))
    sizes: "array[int]" = field(default_factory=lambda: array("q"))

    def size(self, name: str) -> int:
        """Bytes of a member."""
        return self.sizes[self.places[name]]


def index_tars(paths: Sequence[Path]) -> tuple[Listing, Members]:
    """Everything in some tar files. DataError for one that cannot be read, and for two members of one name in one file."""
    found, members = Listing(), Members(paths)
    shards = [list(_regular(path, found)) for path in paths]
    names = [name for shard in shards for name, _, _ in shard]
    repeated = len(set(names)) < len(names) and len(paths) > 1
    for number, (path, shard) in enumerate(zip(paths, shards, strict=True)):
        for name, start, size in shard:
            whole = f"{path.stem}/{name}" if repeated else name
            if members.places.setdefault(whole, len(members.files)) != len(members.files):
                why = f"{name} is there twice, and need not be one image"
                raise DataError(f"two members of {path} have one name", why, "pack the images again")
            members.files.append(number)
            members.starts.append(start)
            members.sizes.append(size)
    found.files = sorted(members.places)
    found.folders = sorted({*found.folders, *(posixpath.dirname(name) for name in found.files)} - {""})
    return found, members


def _regular(path: Path, found: Listing) -> Iterator[tuple[str, int, int]]:
    """(name, first byte, bytes) of the files in a tar; its folders and links are noted."""
    fix = "give an uncompressed .tar; if this was downloaded, download it again"
    causes = (OSError, tarfile.TarError, ValueError, EOFError)
    with raising(DataError, f"{path} cannot be read as a tar of images", fix, *causes, why=one_line):
        size = regular_file(path).stat().st_size
        if any(_end_of(path)):  # tarfile takes a file that is cut in a header for a complete one
            raise ValueError("it is cut short: the empty blocks of its end are missing")
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                archive.members = []  # it would keep them all  # pyright: ignore[reportAttributeAccessIssue]
                if member.isdir():
                    found.folders.append(canonical(member.name))
                elif member.isreg() and not member.issparse():
                    if member.offset_data + member.size > size:
                        raise ValueError(f"{member.name} ends beyond the end of the file")
                    yield canonical(member.name), member.offset_data, member.size
                else:
                    found.repeated.append(member.name)


def _end_of(path: Path) -> bytes:
    """The last block of a file."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
        return file.read()


@contextmanager
def reading_members(members: Members) -> Iterator[Callable[[str], bytes]]:
    """A function that reads a member by its name, from any thread. OSError."""
    opened, lock = dict[int, int](), threading.Lock()

    def read(name: str) -> bytes:
        place = members.places[name]
        number, size = members.files[place], members.sizes[place]
        check_size(size, IMAGE_LIMIT)
        with lock:
            if number not in opened:
                opened[number] = os.open(members.paths[number], os.O_RDONLY | getattr(os, "O_BINARY", 0))
        found = _read_at(opened[number], size, members.starts[place], lock)
        if len(found) != size:
            raise OSError(f"{members.paths[number]} ends within {name}")
        return found

    try:
        yield read
    finally:
        for descriptor in opened.values():
            os.close(descriptor)


def _read_at(descriptor: int, size: int, start: int, lock: threading.Lock) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, start)
    with lock:  # Windows
        os.lseek(descriptor, start, os.SEEK_SET)
        return os.read(descriptor, size)


# ---- labels beside images ----


def sidecar_labels(listing: Listing, read: Callable[[str], bytes]) -> tuple[dict[str, str] | None, str]:
    """The label of each image from the file beside it, and that file's ending; (None, "") if there are none.

    DataError for one that cannot be read, or if only some images have one.
    """
    images = [name for name in listing.files if is_image(name) and junk(name) is None]
    there = set(listing.files)
    for ending, value in ((".cls", _of_cls), (".json", _of_json), (".txt", _of_txt)):
        beside = {name: key_of(name) + ending for name in images if key_of(name) + ending in there}
        found = {name: label for name, other in beside.items() if (label := value(other, read)) is not None}
        if found and len(found) < len(images) and ending != ".txt":
            missing = next(name for name in images if name not in found)
            what = f"{len(found)} of {len(images)} images have a label in a {ending} file"
            raise DataError(what, f"{missing} has none", f"add the others, or pack the images without {ending} files")
        if found and len(found) == len(images):
            return found, ending
    return None, ""


def key_of(name: str) -> str:
    """A name up to the first dot after its folder, which the files of a sample share."""
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.split(".")[0])


def _text(name: str, read: Callable[[str], bytes]) -> str:
    with raising(DataError, f"{name} is no label", "correct it, and pack the images again", OSError, ValueError):
        return read(name).decode().strip()


def _of_cls(name: str, read: Callable[[str], bytes]) -> str | None:
    return _text(name, read) or None


def _of_txt(name: str, read: Callable[[str], bytes]) -> str | None:
    text = _text(name, read)
    return text if _NUMBER.fullmatch(text) else None


def _of_json(name: str, read: Callable[[str], bytes]) -> str | None:
    with raising(DataError, f"{name} is no JSON", "correct it, and pack the images again", ValueError, RecursionError):
        value = json.loads(_text(name, read))
    return label_of(value) if isinstance(value, Mapping) else None
