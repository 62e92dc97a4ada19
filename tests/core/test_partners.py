"""A process of several whose partners end, are stopped or never come: it names them, and ends with three lines."""

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from multiprocess import Program, Surroundings, programs
from torch import distributed

from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.processes import ProcessInfo, at_work, device_and_process
from midway.gen.core.signals import Interrupts

SOON = Surroundings(variables={"MIDWAY_TIMEOUT": "2"})
Deed = Callable[[ProcessInfo], object]


def lines_of(program: Program) -> tuple[str, str, str]:
    """What, why and fix: the only error, at the end of what was written to stderr."""
    assert "Traceback" not in program.err and program.err.count("error: ") == 1, program.err
    what, why, fix = program.err.strip().splitlines()[-3:]
    assert [what[:7], why[:7], fix[:7]] == ["error: ", "  why: ", "  fix: "], program.err
    return what, why, fix


def sleep(*_: object) -> None:
    """Like a library that does not return: until a signal ends the process."""
    threading.Event().wait()


def meet(folder: Path) -> ProcessInfo:
    """Join the others, and wait for them once; leaves a file named by the rank."""
    _, process = device_and_process()
    process.wait()
    (folder / str(process.rank)).touch()
    return process


def have_met(both: list[Program]) -> None:
    both[0].wait_for(lambda: all((both[0].folder / str(rank)).exists() for rank in (0, 1)))


# ---- partners that do not come ----


def wait(folder: Path, asleep: int = 2) -> None:
    """All wait for one another, but for one that does something else."""
    process = meet(folder)
    if process.rank == asleep:
        sleep()
    process.wait()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_partner_that_was_not_started_is_named_and_ends_the_wait(rank: int, tmp_path: Path) -> None:
    """While the process group is made: the first process, which the others look for, and another."""
    with programs(wait, tmp_path, tmp_path, ranks=(rank,), processes=2, surroundings=SOON) as (program,):
        assert program.finish() == 1
    announced, *rest = program.err.splitlines()
    assert announced.startswith(
        f"waiting for 1 of 2 processes for 1 s (rank {1 - rank} did not come): check that all 2"
    )
    assert "127.0.0.1:" in announced and "MIDWAY_TIMEOUT" in announced
    assert len(rest) == 3
    what, why, fix = lines_of(program)
    assert what == "error: 1 of 2 processes did not come within 2 s"
    assert why == f"  why: rank {1 - rank} did not come" and "MIDWAY_TIMEOUT" in fix


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("stopped", [True, False])
def test_a_partner_that_is_stopped_or_elsewhere_is_named_and_ends_the_wait(
    rank: int, stopped: bool, tmp_path: Path
) -> None:
    """Also the first one, over which the others exchange their statuses."""
    with programs(wait, tmp_path, tmp_path, rank, ranks=(0, 1), processes=2, surroundings=SOON) as both:
        have_met(both)
        if stopped:
            both[rank].send(signal.SIGSTOP)
        other = both[1 - rank]
        assert other.finish() == 1
        words = "gave no sign of life" if stopped else "alive, but did not come to this point"
        assert re.match(
            rf"waiting for 1 of 2 processes for \d s \(rank {rank} {words}\): check their output", other.err
        )
        what, why, _ = lines_of(other)
        assert what.startswith("error: 1 of 2 processes did not come within") and f"rank {rank} {words}" in why


# ---- partners that end ----


def killed(_: ProcessInfo) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def raises(error: BaseException) -> Deed:
    def fail(_: ProcessInfo) -> None:
        raise error

    return fail


def waits(process: ProcessInfo) -> None:
    process.wait()


def has_begun(_: ProcessInfo) -> None:
    """An operation that nobody completes, and whose library does not notice: as NCCL's."""
    distributed.all_reduce(torch.ones(3), async_op=True)
    sleep()


def works(process: ProcessInfo) -> None:
    """Until the other one has ended; then it waits for it."""
    with at_work("a long job"), contextlib.suppress(RuntimeError):
        distributed.recv(torch.ones(1), 1 - process.rank)
    process.wait()


ENDS: dict[str, tuple[tuple[Deed, Deed], tuple[int, int], str]] = {
    "an error in three lines": (
        (waits, raises(DataError("a", "b", "c"))),
        (3, 3),
        "rank 1 ended with exit code 3 (data)",
    ),
    "an error of the first": (
        (raises(UsageError("a", "b", "c")), waits),
        (2, 2),
        "rank 0 ended with exit code 2 (usage)",
    ),
    "any other error": ((waits, raises(KeyError(3))), (1, 1), "rank 1 ended with exit code 1 (runtime)"),
    "sys.exit": ((waits, raises(SystemExit(7))), (7, 7), "rank 1 ended with exit code 7"),
    "SIGKILL": ((waits, killed), (1, -9), "rank 1 ended without an exit code (killed"),
    "SIGKILL of the first": ((killed, waits), (-9, 1), "rank 0 ended without an exit code (killed"),
    "an error, in a library": ((has_begun, raises(DataError("a", "b", "c"))), (3, 3), "rank 1 ended with exit code 3"),
    "SIGKILL, in a library": ((has_begun, killed), (1, -9), "rank 1 ended without an exit code (killed"),
    "the first, in a library": (
        (raises(UsageError("a", "b", "c")), has_begun),
        (2, 2),
        "rank 0 ended with exit code 2",
    ),
    "SIGKILL of the first, in a library": ((killed, has_begun), (-9, 1), "rank 0 ended without an exit code (killed"),
    "an error, at work": ((works, raises(DataError("a", "b", "c"))), (3, 3), "rank 1 ended with exit code 3 (data)"),
}


def do(folder: Path, name: str) -> None:
    process = meet(folder)
    ENDS[name][0][process.rank](process)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Program]]]:
    """Every program of ENDS, all started at once."""
    folder = tmp_path_factory.mktemp("ends")
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(programs(do, folder / name, folder / name, name, ranks=(0, 1), processes=2))
            for name in ENDS
        }


@pytest.mark.parametrize("name", ENDS)
def test_a_process_whose_partner_ends_does_so_too_with_its_exit_code(
    name: str, ended: dict[str, list[Program]]
) -> None:
    """The one that fails prints its own reason, the other one that it cannot go on; no traceback of a socket."""
    deeds, codes, words = ENDS[name]
    both = ended[name]
    assert tuple(program.finish() for program in both) == codes, [program.err for program in both]
    left = next(program for program, deed in zip(both, deeds, strict=True) if deed in (waits, has_begun, works))
    what, why, fix = lines_of(left)
    assert what == "error: a partner process ended" and words in why and "--resume auto" in fix
    own = both[1 - left.rank].err
    assert own.count("error: a\n  why: b\n  fix: c") == (codes[0] in (2, 3))
    assert "Traceback" not in own and "a partner process" not in own
    assert own.count("fault of the program") == (name == "any other error")


def fail_early(folder: Path) -> None:
    """Rank 1 does not get to the others."""
    if os.environ["RANK"] == "1":
        raise UsageError("a", "b", "c")
    meet(folder)


def test_a_process_that_fails_before_it_joins_the_others_ends_their_wait(tmp_path: Path) -> None:
    with programs(fail_early, tmp_path, tmp_path, ranks=(0, 1), processes=2) as (first, second):
        assert second.finish() == 2
        assert first.finish() == 2
        assert "rank 1 ended with exit code 2 (usage)" in lines_of(first)[1]
        assert second.err == "error: a\n  why: b\n  fix: c\n"


# ---- stop signals ----


def wait_deferred(folder: Path) -> None:
    """As a training does: the signal is for the next point at which state is saved, which never comes."""
    with Interrupts():
        wait(folder, asleep=1)


@pytest.mark.parametrize("stopped", [True, False])
def test_a_signal_ends_a_training_whose_partner_hangs(stopped: bool, tmp_path: Path) -> None:
    hurry = Surroundings(constants={"midway.gen.core.watch.STOPPING": 1.0})
    with programs(wait_deferred, tmp_path, tmp_path, ranks=(0, 1), processes=2, surroundings=hurry) as (first, second):
        have_met([first, second])
        if stopped:
            second.send(signal.SIGSTOP)
        first.send(signal.SIGTERM)
        assert first.finish() == 143
        what, why, fix = lines_of(first)
        assert what == "error: stopped by SIGTERM while waiting for other processes"
        assert "rank 1" in why and "--resume auto" in fix


@pytest.mark.parametrize("to", [(0,), (1,), (0, 1)])
def test_a_signal_ends_processes_that_wait_for_one_another(to: tuple[int, ...], tmp_path: Path) -> None:
    """One of them hears it, or both, one inside of a library; they print one line between them."""
    hurry = Surroundings(constants={"midway.gen.core.watch.SETTLED": 1.0})
    with programs(wait, tmp_path, tmp_path, 1, ranks=(0, 1), processes=2, surroundings=hurry) as both:
        have_met(both)
        for rank in to:
            both[rank].send(signal.SIGTERM)
        assert [program.finish() for program in both] == [143, 143]
        together = both[0].err + both[1].err
        assert together.count("stopped by SIGTERM: no result was stored") == 1
        assert "Traceback" not in together
