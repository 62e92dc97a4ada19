"""Output on a terminal or a pipe that may be gone: what is printed there is lost, and the program goes on.

Lines are written above progress bars, and warnings in one form, whoever raises them.
"""

import contextlib
import errno
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NoReturn, TextIO

from midway.gen.core.text import printable, write_line

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET)
"""Errors of writing to a pipe that nobody reads, and to a terminal that was closed."""


class _Descriptor(io.FileIO):
    """An open file whose reader may go away."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            return memoryview(data).nbytes


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Within the block, printing to stdout and stderr does not raise when their reader is gone, or for what it cannot show.

    OSError of a full disk.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_lasting, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Within the block a warning is one line on stderr, `warning: <message>`, above progress bars, and each is written once.

    So are the messages of loggers that would write to stderr, libraries' among them, with their level in front.
    """
    before = warnings.showwarning, logging.Handler.handle
    shown, streams = set[str](), (sys.stderr, sys.__stderr__)

    def show(level: str, message: object) -> None:
        text = f"{level.lower()}: {' '.join(str(message).split())}"
        if text not in shown:
            shown.add(text)
            write_line(printable(text), sys.stderr)

    def handle(self: logging.Handler, record: logging.LogRecord) -> Any:
        if getattr(self, "stream", None) not in (sys.stderr, *streams):
            return before[1](self, record)
        passed = self.filter(record)
        if passed:
            show(record.levelname, record.getMessage())
        return passed

    warnings.showwarning = lambda message, category, filename, lineno, file=None, line=None: show("warning", message)
    logging.Handler.handle = handle  # of all of them, also of libraries that are imported later
    try:
        yield
    finally:
        warnings.showwarning, logging.Handler.handle = before


def _lasting(stream: TextIO) -> TextIO:
    """A stream like this one whose reader may go away; the same stream where it has no file (None, and those of tests)."""
    unshowable = "backslashreplace"  # what a terminal cannot show must not end a command
    try:
        descriptor = stream.fileno()
    except (AttributeError, OSError, ValueError):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=unshowable)
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Descriptor(descriptor, "w", closefd=False)),
        encoding=stream.encoding,
        errors=unshowable,
        line_buffering=getattr(stream, "line_buffering", True),
    )


def emit(text: str) -> None:
    """Write a line to stderr from any thread or signal handler, whatever state the streams of Python are in."""
    with contextlib.suppress(OSError):
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))


def exit_now(code: int) -> NoReturn:
    """End the process, from any thread."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
