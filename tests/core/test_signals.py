"""Stop signals in a program, and outputs that nobody reads."""

import hashlib
import os
import pty
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from multiprocess import Program, Surroundings, programs

from midway.gen.core.errors import DataError
from midway.gen.core.signals import Interrupted, Interrupts, stop_note
from midway.gen.metrics.frechet import frechet_distance_of_features

STOPPING = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU]
LINE = "stopped by {}: no result was stored; the same command starts again\n"
SAVING = "\nsaving after this step; once more to end at once\n"


def compute(file: Path, note: str | None = None) -> None:
    """Instructions of Python until a signal."""
    if note is not None:
        stop_note(note)
    file.touch()
    while True:
        time.sleep(0.01)


def call_a_library(file: Path) -> None:
    """A call of C that no signal interrupts."""
    file.touch()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)


def save(file: Path, seconds: float, library: bool = False) -> None:
    """As a training: after a signal the step goes on for a while, and then the state is saved."""
    with Interrupts() as interrupts:
        file.touch()
        if library:
            call_a_library(file)
        while not interrupts.number:
            time.sleep(0.01)
        time.sleep(seconds)
        file.write_text("saved")
        raise Interrupted(interrupts.number, 7, "a run")


def finish(file: Path) -> None:
    """A training that ends by itself before it looks for signals again, and what follows it."""
    with Interrupts():
        file.touch()
        time.sleep(0.5)
        stop_note("step 7 is saved")
    file.write_text("more")


def ignore(file: Path, number: int) -> None:
    file.touch()
    while not file.read_text():
        time.sleep(0.01)
    raise DataError("went on", repr(signal.getsignal(number)), "c")


def hurried(**constants: float) -> Surroundings:
    return Surroundings(constants={f"midway.gen.core.signals.{name}": value for name, value in constants.items()})


def begun(started: list[Program], file: Path) -> Program:
    """The program, once it has touched the file."""
    (program,) = started
    program.wait_for(file.exists)
    return program


# ---- one signal ----


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_ends_a_program_with_a_line_and_an_exit_code_of_its_own(
    number: signal.Signals, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    with programs(compute, tmp_path, file) as one:
        begun(one, file).send(number)
        assert one[0].finish() == 128 + number
    assert one[0].err == LINE.format(number.name) and one[0].out == ""


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_waits_for_what_has_to_be_saved(number: signal.Signals, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with programs(save, tmp_path, file, 0.0) as one:
        begun(one, file).send(number)
        assert one[0].finish() == 128 + number
    assert file.read_text() == "saved"
    what = f"error: stopped by {number.name} at step 7"
    assert one[0].err.startswith(f"{SAVING}{what}\n  why: the state is saved in a run\n  fix: --resume auto")


def test_the_line_names_what_is_stored(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with programs(compute, tmp_path, file, "measurements are in cells/; the same command goes on") as one:
        begun(one, file).send(signal.SIGTERM)
        assert one[0].finish() == 143
    assert one[0].err == "stopped by SIGTERM: measurements are in cells/; the same command goes on\n"


def test_a_program_inside_of_a_library_ends_as_well(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with programs(call_a_library, tmp_path, file, surroundings=hurried(PROMPT=0.2)) as one:
        begun(one, file).send(signal.SIGTERM)
        assert one[0].finish() == 143
    assert one[0].err == LINE.format("SIGTERM")


def test_a_signal_that_arrives_after_the_last_step_ends_the_program(tmp_path: Path) -> None:
    """Not what follows the training; else a demo would begin its next stage."""
    file = tmp_path / "file"
    with programs(finish, tmp_path, file) as one:
        begun(one, file).send(signal.SIGTERM)
        assert one[0].finish() == 143
    assert file.read_text() == "" and one[0].err.endswith("stopped by SIGTERM: step 7 is saved\n")


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_was_ignored_stays_ignored(number: int, tmp_path: Path) -> None:
    """As under nohup, and in the background of a script."""
    file = tmp_path / "file"
    with programs(ignore, tmp_path, file, number, surroundings=Surroundings(ignored=(number,))) as one:
        begun(one, file).send(number)
        file.write_text("go on")
        assert one[0].finish() == 3
    assert "SIG_IGN" in one[0].err


# ---- more than one ----


def test_an_echo_of_a_signal_is_ignored(tmp_path: Path) -> None:
    """Launchers pass on what the terminal has sent as well, and signals of another kind are about the same end."""
    file = tmp_path / "file"
    with programs(save, tmp_path, file, 0.5) as one:
        program = begun(one, file)
        for number in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGTERM):
            program.send(number)
            time.sleep(0.05)
        assert program.finish() == 128 + signal.SIGUSR1
    assert file.read_text() == "saved" and program.err.count("saving after this step") == 1


@pytest.mark.parametrize(("library", "code"), [(False, -signal.SIGTERM), (True, 143)])
def test_the_same_signal_again_ends_at_once(library: bool, code: int, tmp_path: Path) -> None:
    file = tmp_path / "file"
    with programs(save, tmp_path, file, 60.0, library, surroundings=hurried(REPEAT_AFTER=0.1)) as one:
        program = begun(one, file)
        program.send(signal.SIGTERM)
        time.sleep(0.3)
        program.send(signal.SIGTERM)
        assert program.finish(timeout=30) == code
    assert file.read_text() == ""


def test_the_signal_of_a_time_limit_is_sent_every_second(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with programs(save, tmp_path, file, 0.5, surroundings=hurried(REPEAT_AFTER=0.1)) as one:
        program = begun(one, file)
        program.send(signal.SIGXCPU)
        time.sleep(0.2)
        program.send(signal.SIGXCPU)
        assert program.finish() == 128 + signal.SIGXCPU
    assert file.read_text() == "saved"


# ---- a terminal or a pipe that is gone ----


def print_much(file: Path, fail: bool) -> None:
    """In several pieces, the last of which waits in a buffer."""
    file.touch()
    while not file.read_text():
        time.sleep(0.01)
    for _ in range(3):
        print("x" * 100_000, flush=True)
        print("x", file=sys.stderr)
    print("no line", end="")
    if fail:
        raise DataError("a", "b", "c")


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("fail", [True, False])
def test_a_program_goes_on_when_nobody_reads_what_it_prints(terminal: bool, fail: bool, tmp_path: Path) -> None:
    """As `| head` does, and a terminal that is closed: the exit code is that of the work."""
    file, fifo = tmp_path / "file", tmp_path / "fifo"
    os.mkfifo(fifo)
    readers = [*pty.openpty()] if terminal else [os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)]
    path = os.ttyname(readers[-1]) if terminal else str(fifo)
    with programs(print_much, tmp_path, file, fail, surroundings=Surroundings(outputs=(path, path))) as one:
        program = begun(one, file)
        for reader in readers:
            os.close(reader)
        file.write_text("go on")
        assert program.finish() == (3 if fail else 0)


def test_a_full_disk_is_no_reader_that_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("go on")
    with programs(print_much, tmp_path, file, False, surroundings=Surroundings(outputs=("/dev/full", None))) as one:
        assert one[0].finish() == 5
    assert (
        one[0].err.endswith("fix: free disk space, or choose a folder on another disk\n")
        and "Traceback" not in one[0].err
    )


def warn(file: Path) -> None:
    """Our own warning, and one of a library."""
    frechet_distance_of_features(torch.eye(2), torch.eye(2))
    warnings.warn("a library's\nsecond line", FutureWarning, stacklevel=1)
    file.touch()


def test_a_warning_is_a_line_without_the_file_that_raised_it(tmp_path: Path) -> None:
    with programs(warn, tmp_path, tmp_path / "file") as one:
        assert one[0].finish() == 0
    lines = one[0].err.splitlines()
    assert [line for line in lines if line.startswith("warning: ")] == lines
    assert "2 images for 2 features" in lines[0]
    assert lines[1:] == ["warning: a library's second line"]
    assert ".py" not in one[0].err
