"""One writer of a folder at a time; folders are emptied under their lock, which stays, and only of what is one's own.

The lock is on a file in the folder. Whoever removes a folder does so with its lock, so that a process that opened the file
before finds that its path names another file by then, and tries again.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from midway.gen.core.errors import DiskError, UsageError, raising
from midway.gen.core.files import appending, check_path

LOCK = ".lock"


@contextlib.contextmanager
def lock(folder: Path, use: str = "trained") -> Iterator[None]:
    """Lock this folder against other processes; UsageError if one holds the lock. It ends with its process."""
    with _open_lock(folder, use):
        yield


def _open_lock(folder: Path, use: str) -> IO[str]:
    path, fix = folder / LOCK, "choose another --out, or permit writing"
    while True:
        with raising(DiskError, f"{folder} cannot be written", fix, OSError):
            file = appending(path)
        try:
            _take(file)
        except OSError:
            file.close()
            raise UsageError(
                f"{folder} is being {use} by another process", "two would mix", "wait for it, or end it first"
            ) from None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # the folder was removed meanwhile


def _take(file: IO[str]) -> None:
    """The lock of an open file; OSError if another process holds it."""
    try:
        import fcntl
    except ImportError:  # not on this operating system
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def locked_inside(folder: Path) -> Iterator[None]:
    """Lock every folder in this one that has a lock; UsageError if another process holds one of them."""
    with contextlib.ExitStack() as stack:
        for root, _, files in os.walk(folder):
            if LOCK in files and Path(root) != folder:
                stack.enter_context(lock(Path(root), "used"))
        yield


@contextlib.contextmanager
def made(folder: Path) -> Iterator[None]:
    """Make a folder and its parents; when the block raises, those are removed again that are new and empty. DiskError.

    UsageError for a name that is not UTF-8.
    """
    new = [path for path in (check_path(folder), *folder.parents) if not path.exists()]
    try:
        with raising(DiskError, f"{folder} cannot be written", "choose another --out, or free space", OSError):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with contextlib.suppress(OSError):
                path.rmdir()
        raise


@contextlib.contextmanager
def claimed(folder: Path, use: str = "written") -> Iterator[None]:
    """Within the block a folder of one's own, made if it is not there; nothing is left of one where nothing is written."""
    with made(folder), lock(folder, use):
        try:
            yield
        except BaseException:
            if {path.name for path in folder.iterdir()} == {LOCK}:
                (folder / LOCK).unlink()  # under the lock
            raise


def check_no_link(folder: Path) -> None:
    """UsageError for a link, where what it points to would be deleted."""
    if folder.is_symlink():
        raise UsageError(
            f"{folder} is a link", f"what is in {folder.resolve()} would be deleted", "name that folder itself"
        )


def check_replaceable(folder: Path, names: Sequence[str], own: bool) -> None:
    """UsageError if `folder` has files of these names that are not `own`, of an earlier report of the same kind."""
    there = [name for name in names if os.path.lexists(folder / name)]
    if there and not own:
        raise UsageError(
            f"{folder / there[0]} is not of an earlier report of this kind",
            "it would be replaced",
            "choose another --out",
        )


def empty(folder: Path, *keep: str) -> None:
    """Remove everything in a folder but its lock and the names `keep`; links are removed, not followed. DiskError."""
    with raising(DiskError, f"{folder} cannot be emptied", "empty it by hand, or choose another --out", OSError):
        for path in folder.iterdir():
            if path.name not in (LOCK, *keep):
                remove(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it. OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextlib.contextmanager
def made_empty(path: Path) -> Iterator[None]:
    """Within the block an empty folder and its lock."""
    check_no_link(path)
    with made(path), lock(path, "used"):
        empty(path)  # of a killed process
        try:
            yield
        finally:
            shutil.rmtree(path, ignore_errors=True)
