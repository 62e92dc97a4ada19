"""Work of several gloo processes in tests: functions in forked processes, or commands; every exit code is checked."""

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from midway.gen.core.processes import leave_processes

LOADED = (
    "midway.gen.training.fit",
    "midway.gen.tokenizer.objective",
    "midway.gen.diffusion.load",
    "sklearn.datasets",
    "tyro",
)
multiprocessing.set_forkserver_preload(list(LOADED))  # imported once, not by every process


def together(function: Callable[..., object], processes: int, *arguments: object, timeout: float = 180.0) -> None:
    """`function(rank, *arguments)` in `processes` processes, in an environment as of a launcher; AssertionError if one hangs.

    `function` makes the process group, and need not destroy it.
    """
    group = mp.start_processes(
        _work, (function, processes, free_port(), arguments), processes, join=False, start_method="forkserver"
    )
    assert group is not None
    end = time.monotonic() + timeout
    try:
        while not group.join(timeout=1):
            assert time.monotonic() < end, f"still running after {timeout} s: one waits for the other"
    finally:
        for process in filter(None, group.processes):
            process.kill()


def _work(rank: int, function: Callable[..., object], processes: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(environment(rank, processes, port))
    code = 1
    try:
        function(rank, *arguments)
        code = 0
    finally:
        leave_processes(code)


def launch(*command: object, processes: int = 2) -> list[str]:
    """Run `python command` in several processes at once; what each wrote to stdout. AssertionError unless all exit with 0."""
    ended = run_all(*command, processes=processes)
    assert not any(process.returncode for process in ended), [p.stderr[-3000:] for p in ended if p.returncode]
    return [process.stdout for process in ended]


def run_all(*command: object, processes: int = 2, timeout: float = 300.0) -> list[subprocess.CompletedProcess[str]]:
    """Run `python command` in several processes at once, whatever their exit codes."""
    port, python, pipe = free_port(), [sys.executable, *map(str, command)], subprocess.PIPE
    environments = [{**os.environ, **environment(rank, processes, port)} for rank in range(processes)]
    started = [subprocess.Popen(python, env=env, stdout=pipe, stderr=pipe, text=True) for env in environments]
    try:
        told = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(python, process.returncode, *texts)
        for process, texts in zip(started, told, strict=True)
    ]


def environment(rank: int, processes: int, port: int) -> dict[str, str]:
    """What a launcher sets, and one thread each on the CPU."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1, "ACCELERATE_USE_CPU": "true"}
    return {name: str(value) for name, value in {**place, **master}.items()}


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
