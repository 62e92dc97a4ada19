"""The states of the other processes of a program, and the limits after which this one stops waiting for them.

A thread per process exchanges signs of life with the others (`rollcall.py`) and looks whether the main thread waits: whether it
has begun no collective operation for a while. A process is waited for if it has not come, has begun fewer operations, gives no
sign of life, or has ended. That is announced on stderr after 30 s, and the wait ends with three lines

    at once                                     for a process that ended
    after MIDWAY_TIMEOUT seconds (10 minutes)   for one that does not come or gives no sign of life
    after MIDWAY_TIMEOUT seconds (12 hours)     for one that is alive, but behind; always 12 hours within `at_work`
    20 s after a stop signal                    if the others do not come to the next point

Collective operations block inside of libraries, so the thread ends the process itself. What is on the disk is whole or absent.
"""

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, NoReturn

from torch import distributed

from midway.gen.core import partner_errors, signals
from midway.gen.core.errors import UsageError
from midway.gen.core.partner_errors import TIMEOUT, Late, PartnerError, exit_code, listed
from midway.gen.core.rollcall import BEFORE, JOINING, Caller, Status
from midway.gen.core.terminal import emit, exit_now

ANNOUNCED, SILENT, BEHIND, STOPPING = 30.0, 600.0, 43200.0, 20.0
"""Seconds of waiting until it is announced, and until it ends: for a process without a sign of life, for one that is behind, and
after a stop signal."""
ENDED, SETTLED = 2.0, 30.0
"""Seconds of waiting after which the end of a process that is behind, and of any, ends this one."""
LINGER, INTRODUCED = 2.0, 5.0
"""Seconds that a process which ends by an error waits until the others know, and that any process waits for the register."""


@dataclass(frozen=True)
class Limits:
    """Seconds of waiting."""

    announced: float
    silent: float
    behind: float
    stopping: float

    @property
    def last(self) -> timedelta:
        """Of the operations themselves, later than any other."""
        return timedelta(seconds=max(BEHIND, self.behind) + 60)

    @staticmethod
    def read() -> "Limits":
        """As MIDWAY_TIMEOUT sets them; UsageError if it is no positive number."""
        text = os.environ.get(TIMEOUT)
        if text is None:
            return Limits(ANNOUNCED, SILENT, BEHIND, STOPPING)
        try:
            seconds = float(text)
        except ValueError:
            seconds = 0.0
        if not 0 < seconds < float("inf"):
            raise UsageError(
                f"{TIMEOUT}={text}", "it is a positive number of seconds", f"set {TIMEOUT}=600, or unset it"
            )
        return Limits(min(ANNOUNCED, seconds / 2), seconds, seconds, min(STOPPING, seconds))


class Watch:
    """The signs of life of this process and of its partners. `work`, `joining` and `leaving` tell what the main thread does."""

    def __init__(self, rank: int, world_size: int, host: str, port: int, limits: Limits) -> None:
        self.rank, self.world_size, self.address, self.limits = rank, world_size, f"{host}:{port}", limits
        self.tick = min(max(1.0, world_size / 32), limits.announced / 4)
        self.own, self.work, self.joining, self.leaving = Status(), "", False, False
        self.code: int | None = None
        self.partners: dict[int, Status] = {}
        self.silence: dict[int, float] = {}
        self._still = 0.0
        self._next = self._next_alive = limits.announced
        self._caller, self._lock = Caller(rank, host, port, 2 * self.tick), threading.RLock()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        then = time.monotonic()
        while self.code is None:
            time.sleep(self.tick)
            now = time.monotonic()
            passed, then = min(now - then, 3 * self.tick), now  # a program that was suspended has not waited
            with self._lock:
                self.exchange(passed)
                self._judge()

    # ---- signs of life ----

    def exchange(self, passed: float = 0.0, claim: str = "") -> bool:
        """Send the own status and learn those of the others; whether nobody else has claimed `claim` (true if unknown)."""
        with self._lock:
            own = Status(self._begun(), self.work, self.code)
            self._still, self.own = self._still + passed if own == self.own else 0.0, own
            try:
                first, statuses = self._caller.exchange(own, claim)
            except LookupError:
                return True
            except TimeoutError:
                self.silence[0] = self.silence.get(0, 0.0) + passed
                return True
            except ConnectionRefusedError:
                if 0 in self.partners:
                    self.partners[0] = replace(self.partners[0], gone=True)
                return True
            except (OSError, ValueError):  # tried again
                return True
            for rank, its in statuses.items():
                alive = rank not in self.partners or its.beats != self.partners[rank].beats
                self.silence[rank] = 0.0 if alive else self.silence[rank] + passed
            self.partners = statuses
            return first

    def introduce(self, seconds: float = INTRODUCED) -> None:
        """Return when the others have the status of this process, or cannot be reached."""
        end = time.monotonic() + seconds
        while not self.partners and time.monotonic() < end:
            self.exchange()
            time.sleep(self.tick / 10)

    def _begun(self) -> int:
        """Collective operations that this process has begun."""
        if not distributed.is_initialized():
            return JOINING if self.joining else BEFORE
        with contextlib.suppress(Exception):  # of a backend that does not count them, and while the group is destroyed
            group: Any = distributed.distributed_c10d._get_default_group()
            return group._get_sequence_number_for_group()
        return 0

    def leave(self, code: int) -> None:
        """Tell the others that this process ends with this exit code, once."""
        if self.code is not None:
            return
        self.leaving, self.code = True, code
        self.introduce(LINGER if code else 0.0)
        self.exchange()
        before, end = self.partners, time.monotonic() + LINGER
        while code and self.rank == 0 and time.monotonic() < end and not self._all_know(before):
            time.sleep(self.tick / 10)
            self.exchange()

    def _all_know(self, before: dict[int, Status]) -> bool:
        others = [(its, before.get(rank, Status())) for rank, its in self.partners.items() if rank]
        return all(its.gone or its.code is not None or its.beats > then.beats for its, then in others)

    def find_ended(self) -> dict[int, Late]:
        """Processes that ended, as soon as that is known, for at most 2 s."""
        end = time.monotonic() + LINGER
        while True:
            self.exchange()
            others = {rank: self._late(rank) for rank in self.partners if rank != self.rank}
            found = {rank: its for rank, its in others.items() if its is not None and its.code}
            if found or time.monotonic() > end:
                return found
            time.sleep(self.tick / 10)

    # ---- waiting ----

    def _judge(self) -> None:
        """Announce a wait, or end it."""
        if self.leaving or self.work or self.own.begun == BEFORE or self._still < min(ENDED, self.limits.announced):
            self._next = self.limits.announced
            return
        candidates = range(self.world_size) if self.partners else [0]  # of others nothing is known yet
        found = {rank: self._late(rank) for rank in candidates if rank != self.rank}
        late = {rank: its for rank, its in found.items() if its is not None}
        gone = {rank: its for rank, its in late.items() if its.code and its.waited >= its.limit}
        number, since = signals.received()
        if gone:
            self._end(partner_errors.ended(gone))
        elif number and min(since, self._still) >= self.limits.stopping and any(not its.works for its in late.values()):
            self._end(partner_errors.stopped(late, number))
        elif any(its.waited >= its.limit for its in late.values()):
            self._end(partner_errors.timed_out(late, self._advice(late), self.world_size))
        elif late:
            self._announce(late)

    def _late(self, rank: int) -> Late | None:
        """Why this process cannot go on without `rank`; None if it can."""
        its, still, limits = self.partners.get(rank), self._still, self.limits
        joining = self.own.begun == JOINING
        if its is None:
            return Late("did not come", still, limits.silent, came=False) if joining else None
        behind = its.begun < self.own.begun
        patience = ENDED if behind or joining else SETTLED
        if its.code is not None and (its.code or behind):
            return Late(f"ended with {exit_code(its.code)}", still, patience, its.code or -1)
        if its.code == 0:
            return None
        if its.gone:
            return Late("ended without an exit code (killed, or its machine is gone)", still, patience, -1)
        silence = self.silence.get(rank, 0.0)
        if silence >= min(5 * self.tick, limits.announced):
            return Late("gave no sign of life", min(still, silence), limits.silent)
        if behind:
            why = f"still at work ({its.work})" if its.work else "alive, but did not come to this point"
            return Late(why, still, BEHIND if its.work else limits.behind, works=bool(its.work))
        if its.begun == self.own.begun and not its.work and (joining or _in_collective()):
            return Late("came to this point too, but no answer arrives", still, limits.silent)
        return None

    def _advice(self, late: dict[int, Late]) -> str:
        if all(its.came for its in late.values()):
            return "check their output, whether they are stopped, and the network"
        return f"check that all {self.world_size} processes were started and reach {self.address}"

    def _announce(self, late: dict[int, Late]) -> None:
        """A line on stderr; of processes that are alive less and less often."""
        alive, waited = all(its.works for its in late.values()), max(its.waited for its in late.values())
        if waited < (self._next_alive if alive else self._next):
            return
        self._next = 2 * waited
        self._next_alive *= 2 if alive else 1
        limit = min(its.limit for its in late.values())
        text = f"waiting for {len(late)} of {self.world_size} processes for {waited:.0f} s ({listed(late)}): {self._advice(late)}"
        if self.exchange(claim=f"{sorted(late)} {self.own.begun} {self._next}"):
            emit(f"{text}; the wait ends after {limit:.0f} s ({TIMEOUT})")

    def _end(self, error: PartnerError) -> None:
        self.end(f"error: {error}", error.exit_code)

    def end(self, text: str, code: int) -> NoReturn:
        """Print a text unless another process has, tell the others, and end this process, from any thread."""
        if self.exchange(claim=text):
            emit(text)
        self.leave(code)
        exit_now(code)


def _in_collective() -> bool:
    """Whether the main thread is inside of a function of torch.distributed."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            return True
        frame = frame.f_back
    return False
