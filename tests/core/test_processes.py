"""Programs of several processes end in order: with their own exit codes, and without one waiting for another that failed."""

from pathlib import Path

import pytest
from multiprocess import run_all

PROGRAM = """
import fcntl, os, sys, time
import torch
from torch import distributed
from midway.gen.core import processes
from midway.gen.core.errors import UsageError
from midway.gen.flags.cli import main

processes.PATIENCE, processes.GRACE = 60, 0.5
alive = open({lock!r} + os.environ["RANK"], "w")
fcntl.flock(alive, fcntl.LOCK_EX)  # until this process ends

def wait_for_the_end_of_rank_0():
    with open({lock!r} + "0") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

def command(arguments):
    distributed.init_process_group("gloo")
    first = distributed.get_rank() == 0
    distributed.barrier()
    {body}

main(command)
"""
FAIL = "raise UsageError('a flag', 'a reason', 'a remedy')"


@pytest.mark.parametrize(
    ("body", "codes"),
    [
        (
            f"if first: distributed.all_reduce(torch.ones(3), async_op=True); {FAIL}\n    wait_for_the_end_of_rank_0()",
            [2, 0],
        ),
        ("if first: raise KeyboardInterrupt\n    wait_for_the_end_of_rank_0()", [130, 0]),
        ("if first: raise ValueError(3)\n    distributed.barrier()", [1, 1]),
    ],
    ids=["one fails in a collective", "one is interrupted", "an error of one fails the collective of the other"],
)
def test_processes_exit_with_their_own_codes(body: str, codes: list[int], tmp_path: Path) -> None:
    """Rank 0 ends although rank 1 waits for its end; rank 1, its work done, needs no peer for the last barrier."""
    (tmp_path / "program.py").write_text(PROGRAM.format(lock=f"{tmp_path}/lock", body=body))
    ended = run_all(tmp_path / "program.py")
    assert [process.returncode for process in ended] == codes, [process.stderr for process in ended]
    for process in ended:
        assert "Traceback" not in process.stderr
        assert "terminate called" not in process.stderr
