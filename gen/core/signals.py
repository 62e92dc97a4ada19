"""Signals that ask a program to stop, and what it does.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2, SIGXCPU

Within `Interrupts` (a training) the work goes on to a point where its state is saved; elsewhere `Stopped` is raised at once,
since everything is stored as it is finished. Either way the exit code is 128 + the signal's number. The same signal again,
REPEAT_AFTER seconds later, ends the program at once. A signal that was ignored when the program began stays ignored (nohup).

Python's handlers run between two instructions of the main thread, which may be inside a long call of a library. A second thread
therefore reads the signals as they arrive, and ends a program that has not reacted PROMPT seconds later.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import NoReturn

from midway.gen.core.errors import MidwayError
from midway.gen.core.terminal import emit, exit_now
from midway.gen.core.text import printable

_NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU")
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
REPEAT_AFTER = 3.0
"""Seconds within which a second signal is ignored: launchers forward signals that the terminal has sent as well."""
PROMPT = 5.0
"""Seconds that the main thread has to react where nothing is left to be saved."""
NOTHING = "no result was stored; the same command starts again"


class Stopped(KeyboardInterrupt):
    """A stop signal, where nothing is left to be saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Interrupted(MidwayError):
    """A run that saved its state after a signal."""

    def __init__(self, number: int, step: int, where: object) -> None:
        self.number = number
        self.exit_code = 128 + number  # pyright: ignore[reportIncompatibleVariableOverride]
        super().__init__(
            f"stopped by {name_of(number)} at step {step}",
            f"the state is saved in {where}",
            "--resume auto continues",
        )


@dataclass
class _State:
    """The stop signals that this program has received, and how it reacts to them."""

    number: int = 0
    since: float = 0.0
    arrived: dict[int, float] = field(default_factory=dict)
    handled: dict[int, float] = field(default_factory=dict)
    deferred: int = 0
    reacted: bool = False
    note: str = NOTHING
    noted: bool = False
    listening: bool = False
    last: bool = False
    end: Callable[[str, int], object] = lambda line, code: os._exit(code)

    def receive(self, number: int, times: dict[int, float]) -> bool:
        """Note a signal in `times`, of its arrival or of its handler's call; whether it is a repetition that ends the program."""
        now = time.monotonic()
        if not self.number:
            self.number, self.since = number, now
        first = times.setdefault(number, now)
        return now - first > REPEAT_AFTER and number != getattr(signal, "SIGXCPU", None)  # sent every second


_state = _State()


def name_of(number: int) -> str:
    """SIGTERM for 15."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def stop_note(text: str, last: bool = False) -> None:
    """What a stop from here on leaves behind, and how to go on: the end of the line that is printed then.

    `last`: also of the work that this program has parts of, whose own notes are ignored from here on."""
    if last or not _state.noted:
        _state.note, _state.noted = printable(text), last


def stop_line(number: int) -> str:
    """The line that a program ends with after a stop signal."""
    return f"stopped by {name_of(number)}: {_state.note}"


def received() -> tuple[int, float]:
    """The first stop signal, 0 if there was none, and the seconds since then."""
    return _state.number, time.monotonic() - _state.since


def conclude(last: bool = False) -> None:
    """The program ends: a signal changes nothing about that, unless it is repeated. `last`: also not after `handling`."""
    _state.reacted, _state.last = True, last


def end(line: str, code: int) -> NoReturn:
    """Print a line and end the process, from any thread."""
    emit(line)
    exit_now(code)


@contextlib.contextmanager
def handling(end: Callable[[str, int], object] = end) -> Iterator[None]:
    """Within the block stop signals raise Stopped in the main thread, or wait for the end of `Interrupts`.

    `end(line, exit code)` ends a process whose main thread does not react."""
    global _state
    if threading.current_thread() is not threading.main_thread() or _receive in map(signal.getsignal, STOPPING):
        yield
        return
    _state = _State(end=end)
    kept = (signal.SIG_IGN, None)  # None: a handler that is not Python's
    before = {n: handler for n in STOPPING if (handler := signal.getsignal(n)) not in kept}
    with _listening(_state):
        for number in before:
            signal.signal(number, _receive)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if _state.last else handler)
            _state = _State()


class Interrupts:
    """Within the block a stop signal only sets `number`. Stopped at its end, if it did not end by an error."""

    def __init__(self) -> None:
        self._handling = handling()

    @property
    def number(self) -> int:
        """The first signal, 0 if there was none."""
        return _state.number

    def __enter__(self) -> "Interrupts":
        self._handling.__enter__()
        _state.deferred += 1
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        number = _state.number
        _state.deferred -= 1
        self._handling.__exit__(None, None, None)
        if number and kind is None:
            _react(number)


def _receive(number: int, _: FrameType | None) -> None:
    if _state.receive(number, _state.handled):
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    elif _state.deferred:
        if not _state.reacted and os.environ.get("RANK", "0") == "0":
            emit("\nsaving after this step; once more to end at once")  # print is not safe in a handler
        _state.reacted = True
    elif not _state.reacted:
        _react(number)


def _react(number: int) -> NoReturn:
    _state.reacted = True
    raise Stopped(number)


@contextlib.contextmanager
def _listening(state: _State) -> Iterator[None]:
    """Within the block a thread reads the numbers of signals as they arrive."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before, state.listening = signal.set_wakeup_fd(writer, warn_on_full_buffer=False), True
    threading.Thread(target=_listen, args=(reader, state), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


def _forked() -> None:
    if _state.listening:
        signal.set_wakeup_fd(-1)  # else signals to the child would arrive at its parent


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)


def _listen(reader: int, state: _State) -> None:
    """Read signals until the pipe is closed."""
    with open(reader, "rb", buffering=0) as pipe:
        while byte := pipe.read(1):
            number = byte[0]
            if number not in STOPPING:
                continue
            again = state.receive(number, state.arrived)
            timer = threading.Timer(1.0 if again else PROMPT, _end_if_stuck, [number, state, again])
            timer.daemon = True
            timer.start()


def _end_if_stuck(number: int, state: _State, again: bool) -> None:
    """End a program whose main thread has not reacted to a signal."""
    if state is _state and (again or not (state.reacted or state.deferred)):
        state.end(stop_line(number), 128 + number)
