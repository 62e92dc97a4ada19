"""Lines of progress without a terminal, by a clock of their own; the bar on one, and warnings above it."""

import fcntl
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from midway.gen.progress import bar
from midway.gen.progress.bar import Progress, busy, duration, pause, reported


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """No line comes but by advancing, as often as in commands."""
    for name, value in (("FIRST", 5.0), ("LONGEST", 60.0), ("BEAT", math.inf)):
        monkeypatch.setattr(bar, name, value)
    return Clock()


def test_lines_come_less_and_less_often_and_name_what_is_left(clock: Clock) -> None:
    lines, times = list[str](), list[float]()

    def write(line: str) -> None:
        lines.append(line)
        times.append(clock.now - 100)

    with Progress("encoding", 7200, "images", write=write, clock=clock) as progress:
        for _ in range(3600):
            clock.now += 1
            progress.advance(2)
    assert times[0] == 5 and times[-1] > 3500
    gaps = [later - earlier for earlier, later in zip([0, *times], times)]
    assert gaps == [min(math.ceil(max(5, pause(time) if time <= 300 else 60)), 60) for time in times]
    assert gaps == sorted(gaps) and gaps[-1] == 60 and len(lines) < 75
    assert lines[0] == "encoding 10 of 7,200 images, eta 60 min"


def test_of_items_the_one_that_is_worked_on_is_named(clock: Clock) -> None:
    lines = list[str]()
    with Progress("cell", 3, done=1, write=lines.append, clock=clock) as progress:
        progress.at("ddim at NFE 6")
        progress.line()
        clock.now += 10
        progress.advance()
        progress.at("heun at NFE 6")
    assert lines == ["cell 2 of 3, ddim at NFE 6, 0 s so far", "cell 3 of 3, heun at NFE 6, eta 10 s"]


def test_of_several_the_newest_writes_and_other_processes_do_not(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = list[str]()
    with Progress("outer", 9, "images", write=lines.append, clock=clock) as outer:
        with Progress("inner", 9, "images", write=lines.append, clock=clock) as inner:
            clock.now += 10
            outer.advance()
            inner.advance()
        outer.advance()
        monkeypatch.setenv("RANK", "1")
        with Progress("of another process", 9, "images", write=lines.append, clock=clock) as other:
            clock.now += 10
            other.advance()
    assert [line.split()[0] for line in lines] == ["inner", "outer"]


def test_what_is_not_counted_has_no_estimate(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with busy("fitting") as progress:
        progress._clock = clock
        progress._began = clock.now - 90
        progress.line()
    assert capsys.readouterr().out == "fitting, 2 min so far\n"


def test_parts_are_counted_when_they_have_been_used(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, others = list[int](), list(bar._open)
    monkeypatch.setattr(Progress, "advance", lambda self, count: counts.append(count))
    for part in reported(["ab", "c", "def"], "reading", 6):
        assert sum(counts) == {"ab": 0, "c": 2, "def": 3}[part]
    assert counts == [2, 1, 3] and bar._open == others


def test_an_activity_that_begins_in_silence_reports_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 s after the last line of whatever kind, also if several short activities follow one another."""
    for name, value in (("FIRST", 5.0), ("LONGEST", 60.0), ("BEAT", math.inf)):
        monkeypatch.setattr(bar, name, value)
    monkeypatch.setattr(bar, "last_written", lambda: time.monotonic() - 6)
    lines = list[str]()
    with Progress("first", 9, "images", write=lines.append) as progress:
        progress.advance()
        progress.advance()
    monkeypatch.setattr(bar, "last_written", time.monotonic)
    with Progress("second", 9, "images", write=lines.append) as progress:
        progress.advance()
    assert [line.split()[0] for line in lines] == ["first"]


def test_lines_come_while_nothing_advances(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("BEAT", 0.001), ("FIRST", 0.0), ("SHARE", 0.0), ("LONGEST", 0.0)):
        monkeypatch.setattr(bar, name, value)
    written = threading.Semaphore(0)
    with Progress("compiling", 1, write=lambda line: written.release()):
        assert all(written.acquire(timeout=30) for _ in range(3))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (89, "89 s"),
        (95, "2 min"),
        (5000, "83 min"),
        (9000, "2.5 h"),
        (3e5, "3.5 days"),
        (math.inf, "unknown"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


PROGRAM = """
import logging, threading, warnings
from midway.gen.core.terminal import lasting_output, plain_warnings
from midway.gen.core.text import echo
from midway.gen.progress import bar
import torch, accelerate

own = logging.getLogger("a library")
own.addHandler(logging.StreamHandler())  # as diffusers does it
with lasting_output(), plain_warnings(), bar.Progress("working", 40, "images") as progress:
    progress._bar.refresh()
    for i in range(40):
        progress._bar.mininterval = 0
        progress.advance()
        if i % 2:
            warnings.warn("of the\\nmain thread", stacklevel=1)
            worker = threading.Thread(target=lambda: warnings.warn_explicit("of a worker", UserWarning, "a.py", i))
            worker.start()
            worker.join()
            logging.getLogger("accelerate.utils").warning("of accelerate")
            logging.getLogger("torch").warning("of %s", "torch")
            own.error("of its own handler")
            warnings.warn("evil \\x1b[31m", stacklevel=1)
        if i == 20:
            echo("a line of the program")
"""
EXPECTED = (
    "warning: of the main thread",
    "warning: of a worker",
    "warning: of accelerate",
    "warning: of torch",
    "error: of its own handler",
    r"warning: evil \x1b[31m",
    "a line of the program",
)


def test_on_a_terminal_warnings_of_all_are_lines_above_the_bar_once_each(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 100, 0, 0))
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    running = subprocess.Popen([sys.executable, "-W", "always", str(program)], stdout=theirs, stderr=theirs)
    os.close(theirs)
    parts = list[bytes]()
    try:
        while part := os.read(ours, 1 << 16):
            parts.append(part)
    except OSError:  # the end of a terminal
        pass
    os.close(ours)
    assert running.wait(60) == 0
    pieces = [piece.strip() for piece in re.split(r"[\r\n]+|\x1b\[A", b"".join(parts).decode())]
    assert any(re.match(r"working: .*\| 40/40", piece) for piece in pieces)
    assert [pieces.count(line) for line in EXPECTED] == [1] * len(EXPECTED)
    others = [piece for piece in pieces if piece and piece not in EXPECTED]
    assert all(piece.startswith("working") for piece in others), "everything else is the bar"
