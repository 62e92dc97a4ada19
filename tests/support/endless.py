"""Paths that are no regular files, most of which never end or never begin, and a guard against waiting for them."""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")
PATIENCE = 60
"""Seconds, reached only by a test that fails."""


def linked(make: Callable[[Path], object]) -> Callable[[Path], None]:
    """A link to what `make` makes beside it."""

    def link(path: Path) -> None:
        make(path.with_name(f"{path.name}-target"))
        path.symlink_to(f"{path.name}-target")

    return link


def bind(path: Path) -> None:
    """A socket; bound by its name alone, since a whole path may be too long for one."""
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


ENDLESS: dict[str, tuple[Callable[[Path], object], str]] = {
    "fifo": (os.mkfifo, "a FIFO"),
    "link to a fifo": (linked(os.mkfifo), "a FIFO"),
    "link to a device": (lambda path: path.symlink_to("/dev/null"), "a character device"),  # /dev/zero fills the memory
    "socket": (bind, "a socket"),
    "directory": (Path.mkdir, "a directory"),
    "link to a directory": (linked(Path.mkdir), "a directory"),
}
"""How each is made, and the words for it."""


def guarded(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises. AssertionError if it waits for ever; its thread then ends with the process."""
    results, errors = list[Result](), list[BaseException]()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive(), "it waits for a file that never ends"
    if errors:
        raise errors[0]
    return results[0]
