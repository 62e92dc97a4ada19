"""What lies in a folder or a zip, each file once, by names that are the same on every operating system.

A folder is read where it is, and through a link only if it is found nowhere else: links between folders, and up into a parent,
lead nowhere. A link to a file that is listed is not listed again. Several hard links to one file, or links to one file
outside, are listed once a class, as a copy in another class would be.
"""

import contextlib
import os
import posixpath
import stat
import zipfile
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from midway.gen.core.errors import DataError
from midway.gen.core.files import ZIP_METHODS
from midway.gen.files.names import canonical, is_image, junk, of_windows, without_wrapper

Identity = tuple[int, int] | str
"""Device and number of a file, or its real path where the file system numbers none."""


@dataclass
class Listing:
    """Names of files, relative to their source, and what else is in it."""

    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    raw: dict[str, str] = field(default_factory=dict)
    """The names by which files of a folder are opened, where they are others."""
    repeated: list[str] = field(default_factory=list)
    """Names of what is listed by another name."""
    aliases: list[tuple[str, str]] = field(default_factory=list)
    """Pairs of links to one folder that is not among those listed itself; the second is not listed."""


# ---- folders ----


@dataclass
class _Walk:
    """Files below a folder as they are found: real ones first, then those behind links."""

    root: str
    files: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    links: list[str] = field(default_factory=list)  # to folders
    file_links: list[str] = field(default_factory=list)
    visited: dict[Identity, str] = field(default_factory=dict)
    hidden: dict[Identity, str] = field(default_factory=dict)  # visited, but left-overs of programs
    several: dict[str, Identity] = field(default_factory=dict)  # files of more than one name
    repeated: list[str] = field(default_factory=list)
    aliases: list[tuple[str, str]] = field(default_factory=list)
    followed: set[str] = field(default_factory=set)

    def path(self, name: str) -> str:
        return os.path.join(self.root, name)

    def visit(self, top: str) -> None:
        """The folder `top` and the folders in it, but those that were visited and, but for their names, links."""
        ahead = [top]
        while ahead:
            name = ahead.pop()
            hidden = bool(name) and junk(name) is not None
            known = self.hidden if hidden else self.visited  # a link may lead to what is hidden here
            try:
                identity = _identity(self.path(name))
                entries = [] if identity in known else self._entries(name)
            except OSError as error:
                if hidden:  # lost+found is root's
                    continue
                raise DataError(f"{error.filename} cannot be listed", str(error), "check its permissions") from error
            if identity in known:
                self._again(name, identity)
            else:
                known[identity] = name
                ahead += reversed(self._look(name, entries))

    def _again(self, name: str, identity: Identity) -> None:
        """Note that the folder `name` was visited; by a link before, it may have another class there."""
        self.repeated.append(name)
        first = self.visited.get(identity, "")
        if any(f"{first}/".startswith(f"{link}/") for link in self.followed):
            self.aliases.append((first, name))

    def _look(self, folder: str, entries: Sequence[os.DirEntry[str]]) -> list[str]:
        """The folders in one, its files and links noted."""
        found = list[str]()
        for entry in entries:
            name = f"{folder}/{entry.name}" if folder else entry.name
            if entry.is_symlink() and junk(name) is None:
                (self.links if os.path.isdir(entry.path) else self.file_links).append(name)
            elif entry.is_dir(follow_symlinks=False):
                self.folders.append(name)
                found.append(name)
            else:
                self.files.append(name)
                self._note_several(name, entry)
        return found

    def _note_several(self, name: str, entry: os.DirEntry[str]) -> None:
        with contextlib.suppress(OSError):  # it may be gone
            if is_image(name) and entry.stat(follow_symlinks=False).st_nlink > 1:
                self.several[name] = _identity(entry.path)

    def _entries(self, folder: str) -> list[os.DirEntry[str]]:
        with os.scandir(self.path(folder)) as entries:
            return sorted(entries, key=lambda entry: entry.name)

    def follow_folders(self) -> None:
        """Visit what links lead to, unless it holds the link or was visited."""
        above = {_identity(str(parent)) for parent in Path(self.root).resolve().parents}
        while self.links:
            batch, self.links = sorted(self.links), []
            for name in batch:
                self._follow(name, above)

    def _follow(self, name: str, above: Collection[Identity]) -> None:
        target = Path(self.path(name)).resolve()
        inside = Path(self.path(name)).parent.resolve().is_relative_to(target)
        identity = _identity(str(target))
        if inside or identity in above:
            self.repeated.append(name)
        elif identity in self.visited:
            self._again(name, identity)
        else:
            self.folders.append(name)
            self.followed.add(name)
            self.visit(name)

    def follow_files(self) -> None:
        """Add links to files, but not to those of a visited folder."""
        for name in self.file_links:
            target = os.path.realpath(self.path(name))
            if self._is_listed(target):
                self.repeated.append(name)
            else:
                self.files.append(name)
                if is_image(name) and os.path.exists(target):
                    self.several[name] = _identity(target)

    def _is_listed(self, target: str) -> bool:
        folder, base = os.path.split(target)
        return os.path.isfile(target) and not junk(base) and is_image(base) and _identity(folder) in self.visited


def _identity(path: str) -> Identity:
    facts = os.stat(path)
    return (facts.st_dev, facts.st_ino) if facts.st_ino else os.path.realpath(path)


def list_folder(path: Path) -> Listing:
    """Everything below `path`; DataError for a folder that cannot be listed, and for two files of one name."""
    walk = _Walk(str(path))
    walk.visit("")
    walk.follow_folders()
    walk.follow_files()
    windows, raw = of_windows(walk.files), dict[str, str]()
    again = _repeated_in_a_class(walk.files, walk.several, windows)
    for name in walk.files:
        whole = canonical(name, windows)
        if name not in again and (first := raw.setdefault(whole, name)) is not name and junk(whole) is None:
            raise _twice(path, first, name)
    found = Listing(sorted(raw), [canonical(name, windows=False) for name in walk.folders])
    found.raw = {whole: name for whole, name in raw.items() if whole != name}
    found.repeated, found.aliases = [*walk.repeated, *sorted(again)], walk.aliases
    return found


def _repeated_in_a_class(names: Collection[str], several: dict[str, Identity], windows: bool) -> set[str]:
    """Those of `several` that are the same file as an earlier one of the same class folder."""
    if not several:
        return set()
    images = [name for name in names if is_image(name) and junk(name) is None]
    groups = defaultdict[tuple[Identity, str], list[str]](list)
    for name, parts in zip(images, without_wrapper(canonical(name, windows) for name in images), strict=True):
        if name in several:
            groups[several[name], parts[0] if len(parts) > 1 else ""].append(name)
    return {name for group in groups.values() for name in sorted(group)[1:]}


def _twice(path: Path, first: object, second: object) -> DataError:
    why = f"{first!r} and {second!r} are one name on other systems, and need not be one image"
    return DataError(f"two files of {path} have one name", why, "rename or remove one of them")


# ---- zips ----


def list_zip(archive: zipfile.ZipFile, path: Path) -> tuple[Listing, dict[str, zipfile.ZipInfo]]:
    """Everything in a zip, and its members by name. DataError for two members of one name that differ, and for encrypted ones."""
    found, members = Listing(), dict[str, zipfile.ZipInfo]()
    names = [_member_name(info) for info in archive.infolist()]
    windows = of_windows(names)
    for raw, info in zip(names, archive.infolist(), strict=True):
        name = canonical(raw, windows or "/" not in raw)
        if raw.endswith(("/", "\\")):
            found.folders.append(name)
        elif stat.S_ISLNK(info.external_attr >> 16):
            found.repeated.append(name)
        elif (first := members.setdefault(name, info)) is not info:
            if (first.CRC, first.file_size) != (info.CRC, info.file_size) and junk(name) is None:
                raise _twice(path, first.filename, info.filename)
            found.repeated.append(name)
    found.files = sorted(members)
    found.folders += sorted({posixpath.dirname(name) for name in members})  # not all zips list them
    _check_readable(path, [members[name] for name in found.files if is_image(name) and junk(name) is None])
    if sum(info.compress_size for info in archive.infolist()) > path.stat().st_size:
        why = "its members have more compressed bytes than the file, so they share some, as in a zip bomb"
        raise DataError(f"{path} cannot be read as a zip of images", why, "pack the images again")
    return found, members


def _member_name(info: zipfile.ZipInfo) -> str:
    """Its name; UTF-8 that is not marked as such, as macOS writes it, is read as code page 437 by the standard."""
    if info.flag_bits & 0x800 or info.filename.isascii():
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _check_readable(path: Path, images: Collection[zipfile.ZipInfo]) -> None:
    """DataError for encryption, and for a compression that is not read."""
    for info in images:
        if info.flag_bits & 1:
            raise DataError(
                f"{path} is encrypted", f"{info.filename} needs a password", "unpack it, and give the folder"
            )
        if info.compress_type not in ZIP_METHODS:
            why = f"{info.filename} is neither stored nor deflated"
            raise DataError(f"{path} is compressed in a way that is not read", why, "unpack it, and give the folder")
