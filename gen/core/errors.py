"""Errors that teach: what happened, why, how to fix it; each kind has its exit code.

Exit codes: 0 ok, 1 runtime, 2 usage, 3 data, 4 diverged, 5 disk, 130 and 143 interrupted (128 + the signal).
"""

import contextlib
import difflib
from collections.abc import Callable, Iterable, Iterator

from midway.gen.core.text import printable


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
    """A hint naming the closest choice, then all of them: `did you mean 'ddim'? (ddim, euler)`."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}choose one of: {', '.join(known)}"


def one_line(error: BaseException) -> str:
    """Kind and text of an error, in one line of at most 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


@contextlib.contextmanager
def raising(
    kind: type[MidwayError],
    what: str,
    fix: str,
    *causes: type[Exception],
    why: Callable[[Exception], str] = str,
) -> Iterator[None]:
    """Within the block an error of `causes` (ValueError by default) becomes one of `kind`, with its text as the reason."""
    expected = causes or (ValueError,)
    try:
        yield
    except expected as error:
        raise kind(what, why(error), fix) from error
