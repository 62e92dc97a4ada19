"""Errors that teach: what happened, why, how to fix it; each kind has its exit code.

Exit codes: 0 ok, 1 runtime, 2 usage, 3 data, 4 diverged, 5 disk, 128 + the number of a signal
(129 SIGHUP, 130 SIGINT, 143 SIGTERM). A process whose partner ends has that one's code.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator

from midway.gen.core.text import printable
from midway.gen.names.nearest import suggestion


class MidwayError(Exception):
    """A failure that a user can act on. `str(error)` is three lines: what, why, how to fix."""

    exit_code = 1

    def __init__(self, what: str, why: str, fix: str) -> None:
        self.what, self.why, self.fix = printable(what), printable(why), printable(fix)
        super().__init__(f"{self.what}\n  why: {self.why}\n  fix: {self.fix}")


class UsageError(MidwayError):
    """A name, flag or value that the command cannot use."""

    exit_code = 2


class DataError(MidwayError):
    """Images, caches or run directories that cannot be used as they are."""

    exit_code = 3


class DivergedError(MidwayError):
    """Training or sampling produced non-finite values."""

    exit_code = 4


class DiskError(MidwayError):
    """A file could not be written completely."""

    exit_code = 5


def nearest(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'ddim'? choose one of: ddim, euler`: the nearest name, then at most eight, the nearest first."""
    return suggestion(name, choices)


def one_line(error: BaseException) -> str:
    """Kind and text of an error, in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


REMEDIES = {
    errno.EACCES: "choose a place that is yours, or change the permissions",
    errno.EPERM: "choose a place that is yours, or change the permissions",
    errno.EROFS: "choose a folder on another file system: this one is read-only",
    errno.ENOSPC: "free disk space, or choose a folder on another disk",
    errno.EDQUOT: "free disk space, or choose a folder on another disk: the quota is used up",
    errno.EFBIG: "choose a folder on another file system: this one holds no file of that size",
    errno.EIO: "check the disk, or choose a folder on another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EISDIR: "name a file: this is a folder",
    errno.ENOTDIR: "name a folder: this, or a part of it, is a file",
    errno.EEXIST: "choose another name: what is there is no folder",
    errno.ELOOP: "repair the link: it leads back to itself",
    errno.EMFILE: "raise the number of open files, `ulimit -n 4096`",
    errno.ENFILE: "end other programs: this machine has too many open files",
    errno.ENOMEM: "use a smaller --batch-size or model, or a machine with more memory",
}
"""What helps against an error of the operating system, whatever was being done."""
UNWRITTEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)
MISNAMED = (errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ELOOP)
MEMORY = ("out of memory", "not enough memory", "allocate memory", "integer multiplication overflow", "Storage size")
"""What torch's errors call it."""


def remedy(error: BaseException, otherwise: str) -> str:
    """How to fix it: `REMEDIES` of an error of the operating system that has one, or `otherwise`."""
    return REMEDIES.get(getattr(error, "errno", None) or 0, otherwise)


def is_memory(error: Exception) -> bool:
    """Whether there was not enough memory, or a tensor was larger than any can be."""
    return isinstance(error, MemoryError) or any(word in str(error) for word in MEMORY)


def as_midway(error: Exception, keep: Callable[[], str]) -> MidwayError:
    """Any exception as three lines and an exit code; `keep` stores the traceback of an unexpected one and returns where."""
    code = getattr(error, "errno", None)
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # of Path.resolve, up to Python 3.12
        return UsageError(str(error), os.strerror(errno.ELOOP), REMEDIES[errno.ELOOP])
    if is_memory(error) or code == errno.ENOMEM:
        return MidwayError("memory ran out", one_line(error), REMEDIES[errno.ENOMEM])
    if isinstance(error, OSError) and code is not None:
        kind = DiskError if code in UNWRITTEN else UsageError if code in MISNAMED else DataError
        fix = remedy(error, "check that it is there, and readable")
        return kind(f"{error.filename or 'a file'} cannot be used", error.strerror or one_line(error), fix)
    return MidwayError("this is a fault of the program", one_line(error), f"report it with its traceback, {keep()}")


@contextlib.contextmanager
def raising(
    kind: type[MidwayError],
    what: str,
    fix: str,
    *causes: type[Exception],
    why: Callable[[Exception], str] = str,
) -> Iterator[None]:
    """Within the block an error of `causes` (ValueError by default) becomes one of `kind`, with its text as the reason.

    `REMEDIES` take the place of `fix` where they have one; a name that cannot be used is a UsageError, not a full disk.
    """
    expected = causes or (ValueError,)
    try:
        yield
    except expected as error:
        code = getattr(error, "errno", None)
        fits = kind is DiskError and code in (errno.ENOSPC, errno.EDQUOT)  # then `fix` is about space already
        misnamed = kind is DiskError and code in MISNAMED
        raise (UsageError if misnamed else kind)(what, why(error), fix if fits else remedy(error, fix)) from error
