"""Checkpoint directories that are whole or absent, and used only when every byte is as written.

checkpoints/step-N/manifest.json    format, step, versions, and the size and sha256 of every other file; written last
checkpoints/step-N/...              whatever the writer put there
checkpoints/latest                  the name of the newest one, for people and scripts; resume trusts manifests only

Saving: fill a temporary directory, fsync, rename, `latest`; older checkpoints are removed only after that. A killed process
leaves at most a temporary directory, which the next one removes.
"""

import contextlib
import errno
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from midway.gen.core.config import absolute, from_dict
from midway.gen.core.environment import versions
from midway.gen.core.errors import DataError, DiskError, MidwayError, one_line, raising
from midway.gen.core.files import (
    DAMAGE,
    WEIGHTS_LIMIT,
    file_hash,
    read_json,
    reading,
    regular_file,
    replacing,
    write_atomically,
)

FORMAT = "midway-checkpoint-1"
MANIFEST = "manifest.json"
AT = re.compile(r"(.+)@(?:step-)?(\d+)")
"""A run directory and a step."""
BACKOFF = (0.5, 2.0, 8.0)
"""Seconds to wait before each new attempt at a failed save."""


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose manifest was read; `step` is its optimizer step."""

    path: Path
    step: int

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The tensors of a safetensors file, on the CPU; DataError for anything else. Pickles are never loaded."""
        file = self.path / name
        with reading(file, "pickles are not loaded; restore the file", "it is no safetensors file ({})"):
            found = load_file(regular_file(file, WEIGHTS_LIMIT))
            return {key: value.clone() for key, value in found.items()}  # else the file stays mapped


@dataclass(frozen=True)
class Written:
    """A file of a checkpoint as it was written."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a manifest must have; writers add entries of their own."""

    format: str
    step: int
    files: dict[str, Written]


# ---- writing ----


def save(
    root: Path,
    step: int,
    write: Callable[[Path], object],
    keep: int = 1,
    needed: int = 0,
    header: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Let `write` fill a new directory and make it `root`/step-N; then keep only the newest `keep`.

    needed: bytes that must be free. header: more entries of the manifest. A failing write is tried again after each of BACKOFF
    seconds, then raises DiskError; it does not touch the older checkpoints.
    """
    for wait in BACKOFF:
        with contextlib.suppress(DiskError):
            path = _save_once(root, step, write, needed, header or {})
            break
        time.sleep(wait)
    else:
        path = _save_once(root, step, write, needed, header or {})
    prune(root, keep, path)
    return Checkpoint(path, step)


def _save_once(root: Path, step: int, write: Callable[[Path], object], needed: int, header: Mapping[str, Any]) -> Path:
    final = root / f"step-{step}"
    fix = "free space, then resume with --resume auto; earlier checkpoints are intact"
    causes = (OSError, SafetensorError, DiskError)
    with raising(DiskError, f"checkpoint {final} was not written", fix, *causes, why=one_line):
        root.mkdir(parents=True, exist_ok=True)
        _check_space(root, needed)
        with replacing(final) as folder:  # in place of a damaged one, or of an earlier attempt at this step
            folder.mkdir()
            write(folder)
            write_manifest(folder, step, header)
        point_to(root, step)
    return final


def _check_space(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 2**20:.0f} MiB are needed and {free / 2**20:.0f} MiB are free")


def write_manifest(folder: Path, step: int, header: Mapping[str, Any]) -> None:
    """Describe every file of `folder` in its manifest."""
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "sha256": file_hash(file)}
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    manifest = {"format": FORMAT, "step": step, **header, "versions": versions(), "files": files}
    text = json.dumps({**manifest, "sha256": _own_hash(manifest)}, indent=2)
    (folder / MANIFEST).write_text(text + "\n")


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """sha256 of a manifest, its own hash aside."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def prune(root: Path, keep: int, newest: Path) -> None:
    """Remove all but the newest `keep` checkpoints; `newest`, just written, always stays."""
    older = [path for path in directories(root) if path != newest]
    for path in older[max(keep, 1) - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def point_to(root: Path, step: int) -> None:
    """Have `latest` name the checkpoint of this step."""
    write_atomically(root / "latest", f"step-{step}\n".encode())


# ---- reading ----


def directories(root: Path) -> list[Path]:
    """All step-N directories, newest first, verified or not."""
    found = [p for p in root.glob("step-*") if p.name[5:].isdigit() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]), reverse=True)


def split_step(path: Path) -> tuple[Path, int | None]:
    """`RUN@300` as the run directory and the step of a checkpoint; a folder of this whole name has no step."""
    found = None if path.exists() else AT.fullmatch(path.name)
    return (path, None) if found is None else (path.with_name(found[1]), int(found[2]))


def recorded_run(text: str) -> str:
    """A text that may name a run directory, also `RUN@300`, as a run stores it: absolute if it does, else as it is."""
    folder, _ = split_step(Path(text).expanduser())
    return str(absolute(Path(text))) if text and (folder / "config.yaml").exists() else text


def of_step(run: Path, step: int, *roots: Path) -> Path:
    """The directory of this step in the first of `roots` that has it; DataError with the steps that there are."""
    for root in roots:
        if (root / f"step-{step}").is_dir():
            return root / f"step-{step}"
    there = sorted({int(path.name[5:]) for root in roots for path in directories(root)})
    listed = f"its checkpoints are of steps {', '.join(map(str, there))}" if there else "it has no checkpoint"
    fix = f"name one of them, such as {run}@{there[-1]}; --keep N keeps more of a training" if there else "train it"
    raise DataError(f"{run} has no checkpoint of step {step}", listed, fix)


def verify(path: Path) -> Checkpoint:
    """The checkpoint at `path` if it has the files of its manifest, of their size and sha256; DataError naming what is wrong."""
    what, fix = f"checkpoint {path} is damaged", "resume from an older one with --resume auto, or train again"
    causes = (*DAMAGE, MidwayError)
    with raising(DataError, what, fix, *causes, why=lambda error: f"its manifest cannot be used ({one_line(error)})"):
        values = read_json(path / MANIFEST)
        if values["sha256"] != _own_hash(values):
            raise ValueError("sha256 differs")
        known = {name: values[name] for name in ("format", "step", "files")}
        manifest = from_dict(Manifest, known, MANIFEST)
        if manifest.format != FORMAT or f"step-{manifest.step}" != path.name:
            raise ValueError(f"format {manifest.format!r}, step {manifest.step}")
    for name, expected in manifest.files.items():
        with raising(DataError, what, fix, OSError, why=one_line):
            size = (path / name).stat().st_size
            if size != expected.size:
                raise DataError(what, f"{name} has {size} bytes, {expected.size} were written", fix)
            if file_hash(path / name) != expected.sha256:
                raise DataError(what, f"{name} is not what was written (sha256 differs)", fix)
    surplus = sorted(_names(path) - manifest.files.keys() - {MANIFEST})
    if surplus:
        raise DataError(what, f"{surplus[0]} was not written with it", f"move that file elsewhere, or {fix}")
    return Checkpoint(path, manifest.step)


def _names(folder: Path) -> set[str]:
    """Of all files in a checkpoint, but for those that other programs hide there."""
    inner = {file.relative_to(folder) for file in folder.rglob("*") if file.is_file()}
    return {path.as_posix() for path in inner if not any(part.startswith(".") for part in path.parts)}


def valid(root: Path, say: Callable[[str], None]) -> Iterator[Checkpoint]:
    """The checkpoints that verify, newest first; `say` is called for each one that is there and skipped."""
    for path in directories(root):
        try:
            yield verify(path)
        except DataError as error:
            if path.exists():  # else a training has removed it meanwhile
                say(f"skipped {path.name}: {error.why}")


def set_aside(root: Path, newer_than: int) -> None:
    """Rename checkpoints after step `newer_than`, all of them damaged, so that they are never mistaken for the newest."""
    for path in directories(root):
        if int(path.name[5:]) > newer_than:
            aside = path.with_name(f"damaged-{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
