"""How far a command is: a bar on a terminal, else a line now and then, the first after 5 s of silence, then less and less often.

    encoding 12,288 of 50,000 images, eta 3 min        so many are done
    cell 12 of 75, dpmpp3m at NFE 6, eta 6 min         so many, and this one is worked on
    fitting the mixture, 12 s so far                   it is not counted

Of several that are open the newest alone writes lines. Lines also come while nothing advances, from a thread.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, Self, TypeVar

from tqdm import tqdm

from midway.gen.core.text import echo, last_written, printable

FIRST, SHARE, LONGEST = 5.0, 0.2, 60.0
"""Seconds to the first line; the part of the time so far after which the next is due; and the most seconds between two."""
BEAT = 1.0
"""Seconds between two looks of the thread whether a line is due."""
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
"""Of a bar whose time left is known better than by counting."""
UNCOUNTED = "{desc} [{elapsed}{postfix}]"
_open: list["Progress"] = []


Part = TypeVar("Part", bound=Sized)


def pause(elapsed: float) -> float:
    """Seconds from one line to the next, so long after the start."""
    return min(max(FIRST, SHARE * elapsed), LONGEST)


def duration(seconds: float) -> str:
    """`40 s`, `6 min`, `2.5 h` or `3.1 days`."""
    if not math.isfinite(seconds):
        return "unknown"
    for unit, size, least, digits in (("days", 86400, 172800, 1), ("h", 3600, 5400, 1), ("min", 60, 90, 0)):
        if seconds >= least:
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds:.0f} s"


class Progress:
    """Counts to `total`, and reports within a `with` block. Only the first of several processes reports.

    what: the activity, or, without `unit`, the name of an item; total 0: it is not counted. done: what was there before. left:
    the seconds that are left, by default as long as the same number took here; None where that is not known. write: takes the
    lines; text: the line in place of the default.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str = "",
        done: int = 0,
        shown: bool = True,
        left: Callable[[], float | None] | None = None,
        write: Callable[[str], object] = echo,
        text: Callable[[], str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.what, self.total, self.unit, self.done, self.about = what, total, unit, done, ""
        self.shown = shown and os.environ.get("RANK", "0") == "0"
        self._left, self._write, self._text, self._clock = left or self._by_count, write, text or self._default, clock
        self.before, self._began = done, clock()
        # several short activities must not be silent one after the other
        self._last = min(last_written(), self._began) if clock is time.monotonic else self._began
        self._bar: Any = None
        self._ended = threading.Event()

    # ---- reporting ----

    def __enter__(self) -> Self:
        if self.shown:
            form = UNCOUNTED if not self.total else None if self._left == self._by_count else BAR
            shown: dict[str, Any] = (
                {"desc": self.what.rstrip(":"), "unit": f" {self.unit}"} if self.unit else {"desc": self.what}
            )
            shown |= {"disable": None, "leave": False, "bar_format": form}
            self._bar = tqdm(total=self.total, initial=self.done, **shown)
            _open.append(self)
            if math.isfinite(BEAT):
                threading.Thread(target=self._beats, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the bar and the thread; a second call does nothing."""
        self._ended.set()
        if self in _open:
            _open.remove(self)
            self._bar.close()

    @property
    def has_bar(self) -> bool:
        """Whether a bar is drawn in place of lines."""
        return self._bar is not None and not self._bar.disable

    def at(self, about: str) -> None:
        """Name what is done now."""
        self.about = printable(about)
        self._describe()
        if not self.unit:
            self.beat()

    def _describe(self) -> None:
        if self.has_bar:
            parts = (self.about, "" if self._left == self._by_count else self.eta)
            self._bar.set_postfix_str(", ".join(filter(None, parts)))

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        if self.unit:  # an item is named before it is reported
            self.beat()

    def back_to(self, done: int) -> None:
        """Begin again with so many done."""
        self.done = self.before = done
        self._began = self._last = self._clock()
        if self._bar is not None:
            self._bar.n = done
            self._bar.refresh()

    def beat(self) -> None:
        """Write a line if one is due, and something is left."""
        if self.total and self.done >= self.total:
            return
        if self in _open[-1:] and not self.has_bar and self._clock() - self._last >= pause(self.elapsed):
            self.line()

    def line(self) -> None:
        """Write a line now."""
        self._last = self._clock()
        self._write(self._text())

    def _beats(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # a stream that was closed
            while not self._ended.wait(BEAT):
                self._describe() if self.has_bar else self.beat()

    # ---- what is left ----

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._began

    @property
    def eta(self) -> str:
        """`eta 6 min`, or how long it has taken where that is not known."""
        left = self._left()
        return f"{duration(self.elapsed)} so far" if left is None else f"eta {duration(left)}"

    def _by_count(self) -> float | None:
        made = self.done - self.before
        return self.elapsed / made * (self.total - self.done) if made and self.total else None

    def _default(self) -> str:
        here = min(self.done + (not self.unit), self.total)
        counted = f"{self.what} {here:,} of {self.total:,} {self.unit}".rstrip() if self.total else self.what
        return ", ".join(part for part in (counted, self.about, self.eta) if part)


def busy(what: str) -> Progress:
    """Of an activity of one piece."""
    return Progress(what, 0)


def reported(parts: Iterable[Part], what: str, total: int, unit: str = "images") -> Iterator[Part]:
    """The parts, which are counted by their lengths as each has been used."""
    with Progress(what, total, unit) as progress:
        for part in parts:
            yield part
            progress.advance(len(part))
