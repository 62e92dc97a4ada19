"""Count bad exits of processes that train a step together and leave: python tests/support/launch_many.py --launches 200

The processes are forked from one that has imported torch, and end as every program does, through the interpreter's own end.
With --abandon they do not leave their process group: the failure that `leave_processes` prevents.
"""

import argparse
import os
import sys
import time

import torch
import torch._dynamo  # which every optimizer imports at its first step
from multiprocess import environment, free_port
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from midway.gen.core.processes import leave_processes


def work(abandon: bool) -> None:
    """One step of a linear layer under DDP."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(4, 8)).sum().backward()
    optimizer.step()
    if not abandon:
        leave_processes()


def launch(processes: int, abandon: bool) -> list[int]:
    """The exit codes of one launch, minus the number of a signal that ended a process."""
    port, children = free_port(), list[int]()
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os.environ.update(environment(rank, processes, port))
            work(abandon)
            sys.exit(0)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main() -> int:
    """1 if any launch had a bad exit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--launches", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--abandon", action="store_true")
    flags = parser.parse_args()
    began = time.monotonic()
    codes = [launch(flags.processes, flags.abandon) for _ in range(flags.launches)]
    bad = [code for code in codes if any(code)]
    print(*(f"exit codes {code}" for code in bad), sep="\n")
    print(f"{len(bad)} bad exits in {len(codes)} launches of {flags.processes}, {time.monotonic() - began:.0f} s")
    return min(len(bad), 1)


if __name__ == "__main__":
    sys.exit(main())
