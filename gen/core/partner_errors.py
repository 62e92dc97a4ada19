"""Errors of programs of several processes: one that ended or does not come, and failures of communication."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass

from torch import distributed

from midway.gen.core.errors import MidwayError, one_line
from midway.gen.core.signals import name_of

TIMEOUT = "MIDWAY_TIMEOUT"
RESUME = "run the same command again, a training with --resume auto"
_COMMUNICATION = re.compile(
    r"gloo|nccl|c10d|process ?group|closed by peer|reset by peer|pair closure|tcpstore|rendezvous", re.IGNORECASE
)
_CLOSED = re.compile(r"closed|reset by peer|broken pipe|exited|closure|got 0 bytes|aborted", re.IGNORECASE)


_KINDS = {1: "runtime", 2: "usage", 3: "data", 4: "diverged", 5: "disk"}


class PartnerError(MidwayError):
    """Another process ended, or did not come. The exit code is that of the one that ended, if it is known."""

    def __init__(self, what: str, why: str, fix: str, code: int = 1) -> None:
        self.exit_code = code  # pyright: ignore[reportIncompatibleVariableOverride]
        super().__init__(what, why, fix)


@dataclass(frozen=True)
class Late:
    """A process without which this one cannot go on: why, the seconds waited so far, and those after which the wait ends.

    code: with which it ended, -1 if that is not known. works: it is known to be at work. came: it has started.
    """

    why: str
    waited: float
    limit: float
    code: int = 0
    works: bool = False
    came: bool = True


def ended(late: dict[int, Late]) -> PartnerError:
    """The error of processes that ended."""
    code = next((its.code for its in late.values() if its.code > 0), 1)
    why, fix = f"{listed(late)}; this one cannot go on alone", f"see the output of {_ranks(list(late))}; then {RESUME}"
    return PartnerError("a partner process ended", why, fix, code)


def timed_out(late: dict[int, Late], advice: str, world_size: int) -> PartnerError:
    """The error of processes that do not come."""
    waited = max(its.waited for its in late.values())
    what = f"{len(late)} of {world_size} processes did not come within {waited:.0f} s"
    return PartnerError(what, listed(late), f"{advice}; {TIMEOUT}=SECONDS waits longer; then {RESUME}")


def stopped(late: dict[int, Late], number: int) -> PartnerError:
    """The error of a stop signal after which the others do not come to the point at which the state is saved."""
    what = f"stopped by {name_of(number)} while waiting for other processes"
    why = f"{listed(late)}, so that this step could not be completed and saved"
    return PartnerError(what, why, f"earlier checkpoints are intact: {RESUME}", 128 + number)


def exit_code(code: int) -> str:
    """`exit code 3 (data)`."""
    kind = name_of(code - 128) if code > 128 else _KINDS.get(code)
    return f"exit code {code}" + (f" ({kind})" if kind else "")


def listed(late: dict[int, Late]) -> str:
    """`rank 1 did not come, ranks 2, 3 ended with exit code 3 (data)`."""
    reasons: dict[str, list[int]] = {}
    for rank, its in late.items():
        reasons.setdefault(its.why, []).append(rank)
    return ", ".join(f"{_ranks(ranks)} {why}" for why, ranks in reasons.items())


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return f"rank{'s' * (len(ranks) > 1)} {shown}{', ...' * (len(ranks) > 8)}"


def communication_error(error: Exception, find: Callable[[], dict[int, Late]]) -> PartnerError | None:
    """The error of other processes behind this error of torch, None for any other; `find` gives processes that ended."""
    text = one_line(error)
    known = isinstance(error, getattr(distributed, "DistError", ()))
    if not known and not (isinstance(error, RuntimeError) and _COMMUNICATION.search(text)):
        return None
    if re.search(r"in use|EADDRINUSE", text):
        fix = "end the program that uses it, or choose another (--master_port, MASTER_PORT)"
        return PartnerError(f"port {os.environ.get('MASTER_PORT')} is in use", text, fix)
    if _CLOSED.search(text):
        late = find()
        cut = PartnerError(
            "a partner process ended", f"the connection to it was closed ({text})", f"see its output; {RESUME}"
        )
        return ended(late) if late else cut
    if re.search(r"timed? ?out", text, re.IGNORECASE):
        return PartnerError("other processes did not come in time", text, f"see their output; {RESUME}")
    return PartnerError(
        "the processes cannot communicate", text, "check the network between them; NCCL_DEBUG=INFO prints more"
    )
