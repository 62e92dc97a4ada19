"""Run directories: what a command leaves behind, and how another command finds it again.

config.yaml     the resolved configuration, with `kind` (tokenizer, latent_model, features, solver)
env.json        versions, hardware, git commit, command
metrics.jsonl   one line per log interval        log.txt   what was printed
checkpoints/step-N/    a directory that exists only when it is complete
samples/*.png
"""

import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from midway.gen.config import read_yaml, write_yaml
from midway.gen.errors import DataError, DiskError, UsageError

PACKAGES = ("midway", "torch", "torchvision", "accelerate", "diffusers", "numpy", "safetensors")


@dataclass(frozen=True)
class Run:
    """A run directory that exists."""

    path: Path
    kind: str

    @staticmethod
    def create(path: Path, kind: str, config: dict[str, Any], overwrite: bool = False) -> "Run":
        """Make the directory; UsageError when it already holds a run, unless `overwrite` removes that run.

        Only a run of the same kind is ever removed, and never a directory that holds the current one.
        """
        if (path / "config.yaml").exists():
            if not overwrite:
                raise UsageError(
                    f"{path} already holds a run",
                    "a second run would mix with its metrics and checkpoints",
                    "choose another --out, or pass --overwrite to delete it",
                )
            Run.open(path, kind)
            if Path.cwd().resolve().is_relative_to(path.resolve()):
                raise UsageError(f"{path} holds the current directory", "it would be deleted", "choose another --out")
            shutil.rmtree(path)
        elif path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UsageError(
                f"{path} exists and is no run directory", "it would be filled with a run", "choose another --out"
            )
        try:
            (path / "samples").mkdir(parents=True)
            write_yaml(path / "config.yaml", {"kind": kind, **config})
            (path / "env.json").write_text(json.dumps(environment(), indent=2) + "\n")
        except OSError as error:
            raise DiskError(f"{path} cannot be written", str(error), "choose another --out, or free space") from None
        return Run(path, kind)

    @staticmethod
    def open(path: Path, kind: str) -> "Run":
        """The run at `path`; DataError when there is none, or it is of another kind."""
        if not (path / "config.yaml").exists():
            raise DataError(
                f"{path} is not a run directory", "it has no config.yaml", f"give the --out of a {kind} run"
            )
        values = read_yaml(path / "config.yaml")
        found = values.get("kind") if isinstance(values, dict) else None
        if found != kind:
            raise DataError(
                f"{path} is a run of kind '{found}'", f"this needs a '{kind}' run", f"give the --out of a {kind} run"
            )
        return Run(path, kind)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration without `kind`."""
        values = read_yaml(self.path / "config.yaml")
        del values["kind"]
        return values

    def say(self, line: str) -> None:
        """Print a line and keep it in log.txt."""
        print(line, flush=True)
        with (self.path / "log.txt").open("a") as file:
            file.write(line + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a value that is not finite becomes null, as JSON requires."""
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(strict, allow_nan=False) + "\n")

    def save_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a temporary directory, then rename it to checkpoints/step-N. Older checkpoints go afterwards."""
        final = self.path / "checkpoints" / f"step-{step}"
        temporary = final.with_name(f".tmp-step-{step}-{os.getpid()}")
        try:
            temporary.mkdir(parents=True)
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    _sync(file)
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise DiskError(f"checkpoint {final} was not written", str(error), "free space and run again") from error
        for old in self._checkpoints():
            if old != final:
                shutil.rmtree(old)
        return final

    def _checkpoints(self) -> list[Path]:
        found = [p for p in (self.path / "checkpoints").glob("step-*") if p.name[5:].isdigit()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint; DataError when there is none."""
        found = self._checkpoints()
        if not found:
            raise DataError(
                f"{self.path} has no checkpoint",
                "its training did not reach the end",
                "train it again with --overwrite",
            )
        return found[-1]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(package: str) -> str:
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
    cpu = next(
        (x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")), platform.processor() or "CPU"
    )
    return f"{cpu}, {torch.get_num_threads()} threads"


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def command_line() -> str:
    """The command as typed, without the machine's paths."""
    return " ".join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a run."""
    return {
        "command": command_line(),
        "python": platform.python_version(),
        "hardware": hardware(),
        "git": _git_commit(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
