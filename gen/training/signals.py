"""SIGTERM and SIGINT: save after the current step, then exit with code 128 + the signal's number."""

import os
import signal
import threading
import time
from types import FrameType

from midway.gen.core.errors import MidwayError

REPEAT_AFTER = 3.0
"""Seconds within which a second signal is ignored: launchers forward signals that the terminal has sent as well."""


class Interrupted(MidwayError):
    """A run that saved its state after a signal."""

    def __init__(self, number: int, step: int, where: object) -> None:
        self.exit_code = 128 + number  # pyright: ignore[reportIncompatibleVariableOverride]
        name = signal.Signals(number).name
        super().__init__(
            f"stopped by {name} at step {step}", f"the state is saved in {where}", "--resume auto continues"
        )


class Interrupts:
    """Within the block the two signals set `number`; one that arrives REPEAT_AFTER seconds later has its usual effect."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._before = {}

    def _receive(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self.number:
            self.number, self._since = number, now
            os.write(2, b"\nsaving after this step; once more to end at once\n")  # print is not safe in a handler
        elif now - self._since > REPEAT_AFTER:
            self.__exit__()
            os.kill(os.getpid(), number)
