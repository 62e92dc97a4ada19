"""Work of several gloo processes in tests: functions in forked processes, or commands; every exit code is checked."""

import contextlib
import importlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from midway.gen.core.processes import leave_processes
from midway.gen.core.signals import STOPPING

LOADED = (
    "midway.gen.training.fit",
    "midway.gen.tokenizer.objective",
    "midway.gen.diffusion.load",
    "midway.gen.sweep.run",
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


def launch(script: Path, *flags: object, processes: int = 2) -> list[str]:
    """Run a script in several forked processes at once; what each wrote to stdout. AssertionError unless all exit with 0."""
    with tempfile.TemporaryDirectory() as folder:
        together(_script, processes, [str(script), *map(str, flags)], folder)
        return [Path(folder, str(rank)).read_text() for rank in range(processes)]


def _script(rank: int, line: list[str], folder: str) -> None:
    sys.argv, sys.path[0:0] = line, [str(Path(line[0]).parent)]
    with Path(folder, str(rank)).open("w") as out, contextlib.redirect_stdout(out):
        try:
            runpy.run_path(line[0], run_name="__main__")
        except SystemExit as ended:
            assert not ended.code, f"exit code {ended.code}"


def run_all(*command: object, processes: int = 2, timeout: float = 300.0) -> list[subprocess.CompletedProcess[str]]:
    """Run `python command` in several processes at once, whatever their exit codes."""
    port, python, pipe = free_port(), [sys.executable, *map(str, command)], subprocess.PIPE
    environments = [{**os.environ, **environment(rank, processes, port)} for rank in range(processes)]
    started = [subprocess.Popen(python, env=env, stdout=pipe, stderr=pipe, text=True) for env in environments]
    try:
        output = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [
        subprocess.CompletedProcess(python, process.returncode, *texts)
        for process, texts in zip(started, output, strict=True)
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


# ---- programs ----


@dataclass(frozen=True)
class Program:
    """A program in a process of its own; `folder` holds what it wrote to stdout and stderr."""

    process: BaseProcess
    rank: int
    folder: Path

    @property
    def out(self) -> str:
        return (self.folder / f"{self.rank}.out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / f"{self.rank}.err").read_text()

    def send(self, number: int) -> None:
        """A signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def finish(self, timeout: float = 60.0) -> int:
        """Wait for the end; the exit code, minus the number of a signal that ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"rank {self.rank} still ran after {timeout} s: {self.err[-3000:]}")
        return self.process.exitcode

    def wait_for(self, what: Callable[[], object], timeout: float = 60.0) -> None:
        """Until `what()` is true; an AssertionError if the process ends before."""
        end = time.monotonic() + timeout
        while not what():
            assert self.process.is_alive() and time.monotonic() < end, self.err[-3000:]
            time.sleep(0.005)


@dataclass(frozen=True)
class Surroundings:
    """Of a program: environment variables, other values by `module.NAME`, signals that are ignored, and files in place of
    stdout and stderr."""

    variables: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, object] = field(default_factory=dict)
    ignored: Sequence[int] = ()
    outputs: tuple[str | None, str | None] = (None, None)

    def enter(self) -> None:
        """Make them those of this process."""
        for number in STOPPING:
            default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number in self.ignored else default)
        os.environ.update(self.variables)
        for name, value in self.constants.items():
            module, _, constant = name.rpartition(".")
            setattr(importlib.import_module(module), constant, value)
        for stream, path in zip((sys.stdout, sys.stderr), self.outputs, strict=True):
            assert path is not None
            with open(path, "w") as file:
                os.dup2(file.fileno(), stream.fileno())


@contextlib.contextmanager
def programs(
    command: Callable[..., object],
    folder: Path,
    *arguments: object,
    ranks: Sequence[int] = (0,),
    processes: int = 1,
    surroundings: Surroundings | None = None,
) -> Iterator[list[Program]]:
    """Within the block, `main(lambda _: command(*arguments))` in forked processes: some ranks of a program of several.

    What still runs at the end is killed."""
    folder.mkdir(parents=True, exist_ok=True)
    port, given, started = free_port(), surroundings or Surroundings(), list[Program]()
    for rank in ranks:
        variables = {**(environment(rank, processes, port) if processes > 1 else {}), **given.variables}
        out, err = (path or str(folder / f"{rank}.{n}") for n, path in zip(("out", "err"), given.outputs, strict=True))
        work = (command, arguments, replace(given, variables=variables, outputs=(out, err)))
        process = multiprocessing.get_context("forkserver").Process(target=_program, args=work, daemon=True)
        process.start()
        started.append(Program(process, rank, folder))
    try:
        yield started
    finally:
        for program in started:
            program.process.kill()


def _program(command: Callable[..., object], arguments: tuple[Any, ...], surroundings: Surroundings) -> None:
    from midway.gen.flags.cli import main

    torch.set_num_threads(1)
    surroundings.enter()
    sys.argv = ["program.py"]
    main(lambda _: command(*arguments))
