"""Run directories: what a command writes and other commands read.

config.yaml     the resolved configuration, with `kind` (tokenizer, latent_model, features, solver)
env.json        versions, hardware, git commit, command; effective batch and data fingerprint once training has started
metrics.jsonl   one line per log interval        log.txt   what was printed
checkpoints/step-N/    a directory that exists only when it is complete
best/step-N/    weights of the best validation, in runs that validate
samples/*.png
"""

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from midway.gen.core import checkpoints
from midway.gen.core.config import read_yaml, write_yaml
from midway.gen.core.environment import environment
from midway.gen.core.errors import DataError, DiskError, UsageError, raising
from midway.gen.core.files import (
    LOG_LIMIT,
    check_path,
    clear_temporaries,
    read_json,
    read_text,
    reading,
    write_atomically,
)
from midway.gen.core.text import echo, printable_lines

HALF_CONFIG = ".config.yaml.*tmp"
"""What a process that was killed as it made a run leaves."""


@dataclass(frozen=True)
class Run:
    """A run directory and the resolved configuration in it (without `kind`); `quiet` writes to log.txt only."""

    path: Path
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False

    @staticmethod
    def create(path: Path, kind: str, config: dict[str, Any], overwrite: bool = False, resume: bool = False) -> "Run":
        """Make the directory; UsageError when it already holds a run, unless `overwrite` removes or `resume` keeps it.

        Only a run of the same kind is ever removed or resumed, and never a directory removed that holds the current one.
        """
        run = Run(check_path(path), kind, config)
        if overwrite and resume:
            raise UsageError("--overwrite and --resume auto contradict", "one deletes what the other needs", "drop one")
        if (path / "config.yaml").exists():
            if not (overwrite or resume):
                raise UsageError(
                    f"{path} already holds a run",
                    "a second run would mix with its metrics and checkpoints",
                    "continue it with --resume auto, choose another --out, or pass --overwrite to delete it",
                )
            Run.open(path, kind)
            if resume:
                (path / "samples").mkdir(exist_ok=True)
                return run
            if Path.cwd().resolve().is_relative_to(path.resolve()):
                raise UsageError(f"{path} holds the current directory", "it would be deleted", "choose another --out")
            with lock(path):
                _remove(path)
        elif path.exists() and (not path.is_dir() or not all(p.match(HALF_CONFIG) for p in path.iterdir())):
            raise UsageError(
                f"{path} exists and is no run directory", "it would be filled with a run", "choose another --out"
            )
        with raising(DiskError, f"{path} cannot be written", "choose another --out, or free space", OSError):
            path.mkdir(parents=True, exist_ok=True)
            run.write_config()  # first, so that a run killed right now can be resumed
            (path / "samples").mkdir()
            write_atomically(path / "env.json", (json.dumps(environment(), indent=2) + "\n").encode())
        return run

    @staticmethod
    def open(path: Path, kind: str) -> "Run":
        """The run at `path`; DataError when there is none, or it is of another kind."""
        if not (path / "config.yaml").exists():
            raise DataError(
                f"{path} is not a run directory", "it has no config.yaml", f"give the --out of a {kind} run"
            )
        values = read_yaml(path / "config.yaml")
        found = values.pop("kind", None) if isinstance(values, dict) else None
        if found != kind:
            raise DataError(
                f"{path} is a run of kind '{found}'", f"this needs a '{kind}' run", f"give the --out of a {kind} run"
            )
        return Run(path, kind, values)

    def write_config(self) -> None:
        """Write config.yaml, which marks a directory as a run."""
        write_yaml(self.path / "config.yaml", {"kind": self.kind, **self.config})

    def note(self, facts: dict[str, Any]) -> None:
        """Add to env.json the facts of one start of its training, with today's environment."""
        path = self.path / "env.json"
        try:
            known = read_json(path)
        except (OSError, ValueError):  # of a run that was killed as it began
            known = environment()
        starts = [*known.get("starts", []), facts if not known.get("starts") else {**environment(), **facts}]
        write_atomically(path, (json.dumps({**known, "starts": starts}, indent=2) + "\n").encode())

    @property
    def is_new(self) -> bool:
        """Whether nothing has been logged yet."""
        return not (self.path / "log.txt").exists()

    def tidy(self) -> None:
        """Remove what killed processes left half-written."""
        for folder in (self.path, self.checkpoints, self.path / "posthoc"):
            clear_temporaries(folder)

    def say(self, line: str) -> None:
        """Print a line and append it to log.txt."""
        if not self.quiet:
            echo(line)
        _append(self.path / "log.txt", printable_lines(line))

    def log(self, record: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; a value that is not finite becomes null, as JSON requires."""
        strict = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        _append(self.path / "metrics.jsonl", json.dumps(strict, allow_nan=False))

    def forget_after(self, step: int) -> None:
        """Drop from metrics.jsonl what a resumed run will log again: later steps, unfinished intervals, final results."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        with reading(path, "move it elsewhere: the run continues without its earlier lines"):
            kept = [line for line in read_text(path, LOG_LIMIT).splitlines() if _stays(line, step)]
        write_atomically(path, "".join(f"{line}\n" for line in kept).encode())

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def best(self) -> Path:
        """The folder of the weights that did best in validation; absent in runs that do not validate."""
        return self.path / "best"

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, verified; DataError when there is none or it is damaged."""
        found = checkpoints.directories(self.checkpoints)
        if not found:
            raise DataError(
                f"{self.path} has no checkpoint",
                "its training did not reach the end",
                "continue it with --resume auto, or train it again with --overwrite",
            )
        return checkpoints.verify(found[0]).path


@contextmanager
def lock(path: Path, use: str = "trained") -> Iterator[None]:
    """Lock this folder against other processes; UsageError if one holds the lock. It ends with its process."""
    try:
        import fcntl
    except ImportError:  # not on this operating system
        yield
        return
    with (path / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(
                f"{path} is being {use} by another process", "two would mix", "wait for it, or end it first"
            ) from None
        yield


def _append(path: Path, line: str) -> None:
    fix = "free space, then resume with --resume auto"
    with raising(DiskError, f"{path} cannot be written", fix, OSError), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def _remove(path: Path) -> None:
    with raising(DiskError, f"{path} cannot be removed", "remove it by hand, or choose another --out", OSError):
        shutil.rmtree(path)


def _stays(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] <= step and not record.get("partial") and not record.get("final")
    except (ValueError, KeyError, TypeError, RecursionError):  # half a line, of a killed process
        return False
