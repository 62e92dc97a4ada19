"""Runs the parts of gpu.py one after another, each in processes of its own, within a budget of seconds.

A part writes its rows, one JSON object a line, as it measures them. The report is replaced as a whole after every part, so that
whatever ends the driver leaves a valid one; a part that fails, takes too long or finds no time left is an entry with its reason.
All processes of a part are one group, which is killed when the part ends in any way.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from midway.gen.core.files import write_atomically

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL."""
POLL = 0.1
TAIL = 400
"""Characters at the end of a failed part's output that become its reason."""
STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))

Row = dict[str, Any]
now = time.monotonic


@dataclass(frozen=True)
class Part:
    """`command` gets `--rows FILE --seconds S` appended; it has `limit` seconds at most, and below `least` is not started."""

    name: str
    about: str
    command: tuple[str, ...]
    limit: float
    least: float = 10.0


@dataclass
class Entry:
    """A part in the report. `status`: done, failed, timeout, skipped or interrupted; `reason` for all but done."""

    name: str
    about: str
    status: str = "done"
    reason: str = ""
    limit_s: float = 0.0
    seconds: float = 0.0
    rows: list[Row] = field(default_factory=list)


class Stop(BaseException):
    """A signal asks the driver to end."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def run_parts(
    parts: list[Part], out: Path, budget: float, show: Callable[[str, Row], None], head: dict[str, Any]
) -> tuple[list[Entry], int | None]:
    """The entries of all parts, and the signal that ended the run before its end, None without one; writes `out`.

    `show` gets every row and every entry without its rows as it comes, with the part's name; a row with "header" goes into the
    head of the report. DiskError where `out` cannot be written.
    """
    begun, entries = now(), list[Entry]()
    head = {**head, "budget_s": budget}

    def take(entry: Entry, row: Row) -> None:
        if "header" in row:
            head.update(row["header"])
            return
        entry.rows.append(row)
        show(entry.name, row)

    def write(complete: bool) -> None:
        report = {
            **head,
            "complete": complete,
            "seconds": round(now() - begun, 1),
            "parts": [*map(asdict, entries)],
        }
        write_atomically(out, (json.dumps(finite(report), indent=1, allow_nan=False) + "\n").encode())

    with _stopping():
        try:
            for part in parts:
                entry = Entry(part.name, part.about)
                entries.append(entry)
                left = budget - (now() - begun) - GRACE
                _run(part, entry, left, take)
                show(part.name, {key: value for key, value in asdict(entry).items() if key not in ("rows", "about")})
                write(part is parts[-1])
        except Stop as stop:
            for entry in entries[-1:]:
                entry.status, entry.reason = "interrupted", f"by {signal.Signals(stop.number).name}"
            write(complete=False)
            return entries, stop.number
    return entries, None


def _run(part: Part, entry: Entry, left: float, take: Callable[[Entry, Row], None]) -> None:
    """Fill the entry; what is wrong with the part becomes its status and reason."""
    entry.limit_s = round(min(part.limit, left), 1)
    if left < part.least:
        entry.status, entry.limit_s = "skipped", 0.0
        entry.reason = f"{max(left, 0):.0f} s of the budget are left, it needs {part.least:g}"
        return
    begun = now()
    with tempfile.TemporaryDirectory() as folder:
        rows, log = Path(folder) / "rows.jsonl", Path(folder) / "log.txt"
        rows.touch()
        try:
            command = [*part.command, "--rows", str(rows), "--seconds", f"{entry.limit_s:g}"]
            with log.open("wb") as output, rows.open() as lines, _group(command, output) as process:
                code = _follow(process, lambda: _whole_lines(lines), entry, take, begun + entry.limit_s)
                entry.seconds = round(now() - begun, 1)
            if code is None:
                entry.status, entry.reason = "timeout", f"ended after {entry.limit_s:g} s; rows until then are here"
            elif code != 0:
                entry.status, entry.reason = "failed", f"exit code {code}: {_tail(log)}"
        except (OSError, ValueError) as error:
            entry.status, entry.reason = "failed", f"{type(error).__name__}: {error}"


def _follow(
    process: subprocess.Popen[bytes],
    lines: Callable[[], Iterator[str]],
    entry: Entry,
    take: Callable[[Entry, Row], None],
    deadline: float,
) -> int | None:
    """Take rows as they are written; the exit code, None when the deadline has passed."""
    while True:
        code = process.poll()
        for line in lines():
            take(entry, json.loads(line))
        if code is not None or now() > deadline:
            return code
        time.sleep(POLL)


def _whole_lines(file: Any) -> Iterator[str]:
    """Those that are complete; the place of one that is not yet is kept."""
    while True:
        place = file.tell()
        line = file.readline()
        if not line.endswith("\n"):
            file.seek(place)
            return
        yield line


def _tail(log: Path) -> str:
    """The end of what the part has printed, in one line."""
    return " ".join(log.read_text(errors="replace")[-TAIL:].split()) or "it printed nothing"


# ---- processes ----


@contextlib.contextmanager
def _group(command: list[str], output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process and all that it starts, none of which is left after the block."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        yield process
    finally:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        _signal_group(process, signal.SIGKILL)
        process.wait()


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


@contextlib.contextmanager
def _stopping() -> Iterator[None]:
    """Within the block the first signal to stop raises Stop; later ones are ignored, for the end is already coming."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        raise Stop(number)

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # nohup
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- the report ----


def finite(value: Any) -> Any:
    """The same with numbers that JSON does not have as strings."""
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def python(file: Path, *arguments: str) -> tuple[str, ...]:
    """The command that runs a file by this Python."""
    return (sys.executable, str(file), *arguments)
