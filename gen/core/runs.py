"""Run directories: what a command writes and other commands read.

config.yaml     the resolved configuration, with `kind` (tokenizer, latent_model, prior, features, solver)
env.json        versions, hardware, git commit, command; effective batch and data fingerprint once training has started
metrics.jsonl   one line per log interval        log.txt   what was printed
checkpoints/step-N/    a directory that exists only when it is complete
best/step-N/    weights of the best validation, in runs that validate
samples/*.png
"""

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from midway.gen.core import checkpoints
from midway.gen.core.config import from_file, read_yaml, write_yaml
from midway.gen.core.environment import environment
from midway.gen.core.errors import DataError, DiskError, MidwayError, UsageError, raising
from midway.gen.core.files import (
    DAMAGE,
    LOG_LIMIT,
    appending,
    check_path,
    clear_all_temporaries,
    read_json,
    read_text,
    reading,
    replaced_name,
    write_atomically,
)
from midway.gen.core.locks import LOCK, check_no_link, lock, locked_inside, made, remove
from midway.gen.core.text import echo, printable_lines

T = TypeVar("T")
CONFIG = "config.yaml"
UNUSED = (CONFIG, "env.json", "log.txt", "samples", LOCK)
"""All that is in a run whose training has not begun; of samples/ nothing."""
OWN = re.compile(
    r"env\.json|metrics\.jsonl|log\.txt|checkpoints|best|posthoc|samples|tokenizer|model|adapter|solver|solvers|report(-step-\d+)?|latents-.*\.safetensors"
    r"|latents-[0-9a-f]{8}-[0-9a-f]{8}(-flip|-crops10)?(-b?float16)?|codes-[0-9a-f]{8}-[0-9a-f]{8}(-flip|-crops10)?|pairs-[0-9a-f]{12}|maps-[0-9a-f]{8}-[0-9a-f]{8}-\d+x\d+-views\d+|midway|\.aim|mlruns|wandb|\.verify"
)
"""What commands write into a run, trackers among them, beside its configuration and lock: anything else is the user's."""


@dataclass(frozen=True)
class Run:
    """A run directory and the resolved configuration in it (without `kind`); `quiet` writes to log.txt only."""

    path: Path
    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    quiet: bool = False
    step: int | None = None
    """Of the checkpoint that is used (`RUN@300`); None: of the newest."""

    @staticmethod
    def create(path: Path, kind: str, config: dict[str, Any], overwrite: bool = False, resume: bool = False) -> "Run":
        """Make the directory; UsageError when it already holds a run, unless `overwrite` removes or `resume` keeps it.

        Only a run of the same kind is ever removed or resumed, by the holder of its lock, and never one that holds the current
        directory, what the configuration names, or a folder that another process has locked. Files of the user stay. A run
        whose training never began is no obstacle. What cannot be made whole is not left behind.
        """
        with Run.creating(path, kind, config, overwrite, resume) as run:
            return run

    @staticmethod
    @contextmanager
    def creating(
        path: Path, kind: str, config: dict[str, Any], overwrite: bool = False, resume: bool = False
    ) -> Iterator["Run"]:
        """`create`, and the lock of the run until the block ends."""
        run = Run(check_path(path), kind, config)
        run._check(overwrite, resume)
        with made(path), lock(path):
            run._check(overwrite, resume)  # another process may have been here first
            if resume and (path / CONFIG).exists():
                run.tidy()
                (path / "samples").mkdir(exist_ok=True)
            else:
                run._begin()
            yield run

    def _check(self, overwrite: bool, resume: bool) -> None:
        """UsageError or DataError where `create` cannot begin."""
        path = self.path
        if overwrite and resume:
            raise UsageError("--overwrite and --resume auto contradict", "one deletes what the other needs", "drop one")
        if not (path / CONFIG).exists():
            if path.exists() and not (path.is_dir() and all(map(_is_half_config, path.iterdir()))):
                raise UsageError(
                    f"{path} exists and is no run directory", "it would be filled with a run", "choose another --out"
                )
            return
        if not (overwrite or resume or self._is_unused):
            raise UsageError(
                f"{path} already holds a run",
                "a second run would mix with its metrics and checkpoints",
                "continue it with --resume auto, choose another --out, or pass --overwrite to delete it",
            )
        Run.open(path, self.kind)
        if not resume:
            self._check_removable()

    def _check_removable(self) -> None:
        """UsageError where more would be lost than a run."""
        check_no_link(self.path)
        if Path.cwd().resolve().is_relative_to(self.path.resolve()):
            raise UsageError(f"{self.path} holds the current directory", "it would be deleted", "choose another --out")
        own = {path.resolve() for path in self._own()}
        for text in _texts(self.config):
            if os.path.exists(text) and own & {Path(text).resolve(), *Path(text).resolve().parents}:
                raise UsageError(
                    f"{self.path} holds {text}", "it is needed, and would be deleted", "choose another --out"
                )

    def _begin(self) -> None:
        """Put a new run in the place of what is there."""
        path = self.path
        with locked_inside(path):
            self._clear()
        try:
            with raising(DiskError, f"{path} cannot be written", "choose another --out, or free space", OSError):
                self.write_config()  # first, so that a run killed right now can be resumed
                (path / "samples").mkdir()
                write_atomically(path / "env.json", (json.dumps(environment(), indent=2) + "\n").encode())
        except BaseException:
            with suppress(MidwayError, OSError):
                self._clear()
                if {there.name for there in path.iterdir()} <= {CONFIG, LOCK}:
                    (path / CONFIG).unlink(missing_ok=True)
                    (path / LOCK).unlink()
            raise

    def _own(self) -> list[Path]:
        return [path for path in self.path.iterdir() if OWN.fullmatch(replaced_name(path) or path.name)]

    def _clear(self) -> None:
        """Remove all that is its own but config.yaml, which stays to the end, so that this can be done again. DiskError."""
        with raising(DiskError, f"{self.path} cannot be emptied", "empty it by hand, or choose another --out", OSError):
            for path in self._own():
                remove(path)

    @property
    def _is_unused(self) -> bool:
        """Whether nothing is in the directory but the beginning of a run of this kind."""
        names = {replaced_name(path) or path.name for path in self.path.iterdir()}
        samples = self.path / "samples"
        begun = names <= {*UNUSED} and not (samples.is_dir() and any(samples.iterdir()))
        return begun and _kind_of(self.path)[0] == self.kind

    @staticmethod
    def open(path: Path, kind: str) -> "Run":
        """The run at `path`, also `RUN@step`; DataError when there is none, or it is of another kind."""
        path, step = checkpoints.split_step(path)
        if not (path / CONFIG).exists():
            raise DataError(
                f"{path} is not a run directory", "it has no config.yaml", f"give the --out of a {kind} run"
            )
        found, values = _kind_of(path)
        if found != kind:
            raise DataError(
                f"{path} is a run of kind '{found}'", f"this needs a '{kind}' run", f"give the --out of a {kind} run"
            )
        return Run(path, kind, values, step=step)

    def part(self, name: str, shape: type[T]) -> T:
        """One part of the configuration; DataError if it is missing or does not fit."""
        fix = f"give another run, or restore {name} from the config.yaml of a run of the same kind"
        return from_file(shape, self.config.get(name), self.path / CONFIG, fix, name)

    def write_config(self) -> None:
        """Write config.yaml, which marks a directory as a run."""
        write_yaml(self.path / CONFIG, {"kind": self.kind, **self.config})

    def note(self, facts: dict[str, Any], again: bool = False) -> None:
        """Add to env.json the facts of one start of its training, with today's environment; `again`: more of the last one."""
        path = self.path / "env.json"
        try:
            known = read_json(path)
            starts = [dict(start) for start in known.get("starts", [])]
        except DAMAGE:  # of a run that was killed as it began, say
            known, starts = environment(), []
        if again and starts:
            starts[-1] |= facts
        else:
            starts.append({**environment(), **facts} if starts else facts)
        write_atomically(path, (json.dumps({**known, "starts": starts}, indent=2) + "\n").encode())

    @property
    def is_new(self) -> bool:
        """Whether nothing has been logged yet."""
        return not (self.path / "log.txt").exists()

    def tidy(self) -> None:
        """Remove what killed processes left half-written."""
        clear_all_temporaries(self.path)

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
    def place(self) -> str:
        """The path as commands take it, with the step if one was chosen."""
        return str(self.path) if self.step is None else f"{self.path}@{self.step}"

    @property
    def checkpoint(self) -> Path:
        """The newest checkpoint, or that of `step`, verified; DataError when there is none or it is damaged."""
        if self.step is not None:
            return checkpoints.verify(checkpoints.of_step(self.path, self.step, self.checkpoints, self.best)).path
        found = checkpoints.directories(self.checkpoints)
        if not found:
            raise DataError(
                f"{self.path} has no checkpoint",
                "its training did not reach the end",
                "continue it with --resume auto, or train it again with --overwrite",
            )
        return checkpoints.verify(found[0]).path


def kind_of(path: Path) -> str:
    """The kind of the run at `path`; empty if there is none, or its config.yaml names none. DataError if it cannot be read."""
    path, _ = checkpoints.split_step(path)
    found = _kind_of(path)[0] if (path / CONFIG).exists() else None
    return found if isinstance(found, str) else ""


def _append(path: Path, line: str) -> None:
    fix = "free space, then resume with --resume auto"
    with raising(DiskError, f"{path} cannot be written", fix, OSError), appending(path) as file:
        file.write(line + "\n")


def _kind_of(path: Path) -> tuple[Any, dict[str, Any]]:
    """The kind of the run at `path`, and the rest of its configuration; None without one. DataError for what is not YAML."""
    try:
        values = read_yaml(path / CONFIG)
    except UsageError as error:
        raise DataError(error.what, error.why, "restore the config.yaml of the run, or give another run") from error
    values = values if isinstance(values, dict) else {}
    return values.pop("kind", None), values


def _is_half_config(path: Path) -> bool:
    """Whether this is all that a process killed as it made a run leaves."""
    return path.name == LOCK or replaced_name(path) == CONFIG


def _texts(value: Any) -> Iterable[str]:
    """Every text in a configuration."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _stays(line: str, step: int) -> bool:
    try:
        record = json.loads(line)
        return record["step"] <= step and not record.get("partial") and not record.get("final")
    except (ValueError, KeyError, TypeError, RecursionError):  # half a line, of a killed process
        return False
