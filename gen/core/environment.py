"""The environment of a run: versions, hardware, git commit and the command."""

import contextlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("midway", "torch", "torchvision", "accelerate", "diffusers", "numpy", "safetensors")


def versions() -> dict[str, str]:
    """Installed version of every package that numbers may depend on."""
    return {name: version_of(name) for name in PACKAGES}


def version_of(package: str) -> str:
    """The installed version, or `absent`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _git_commit() -> str:
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return answer.stdout.strip() if answer is not None and answer.returncode == 0 else "unknown"


def hardware() -> str:
    """One line: the GPU if torch sees one, else the processor and the threads used."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cpu = next(names, platform.processor() or "CPU")
    threads = torch.get_num_threads()
    return f"{cpu}, {threads} thread{'s' if threads > 1 else ''}"


def command_line() -> str:
    """The command as typed, without the machine's paths: those outside of the current directory are their last part."""
    program = Path(sys.argv[0])
    ours = program.stem == "midway" or (program.name == "__main__.py" and program.parent.name in ("midway", "front"))
    start = ["midway"] if ours else ["python", os.path.relpath(program)]
    return shlex.join([*start, *map(without_machine, sys.argv[1:])])


def without_machine(argument: str) -> str:
    """An argument whose path, also behind a flag's `=`, is relative; others as they are."""
    flag, equals, value = argument.rpartition("=")
    if not os.path.isabs(value):
        return argument
    below = os.path.relpath(value)
    return flag + equals + (os.path.basename(os.path.normpath(value)) if below.startswith("..") else below)


def free_memory() -> int:
    """Bytes that this process may still fill: what the system has available, within the limit of a container."""
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        return min(free, max(limit - used, 0))
    return free


def environment() -> dict[str, Any]:
    """Everything needed to repeat a run on another machine."""
    return {
        "command": command_line(),
        "python": platform.python_version(),
        "hardware": hardware(),
        "git": _git_commit(),
        "packages": versions(),
    }
