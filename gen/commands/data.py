"""Look at images before training on them, and build sets that are larger than memory.

midway data check cifar10-train.zip --held-out 0.1
midway data build imagenet/train --resize 256 --out imagenet-256
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import tyro

from midway.gen.core.errors import UsageError
from midway.gen.core.ranges import COUNT, check_ranges
from midway.gen.core.text import echo
from midway.gen.data.build import build
from midway.gen.data.check import DataFacts, check
from midway.gen.data.check_report import check_writable, error_of, text, write_data_report
from midway.gen.data.images import describe
from midway.gen.data.sources import check_unambiguous
from midway.gen.data.splits import DataConfig, load
from midway.gen.flags.cli import resolve


@dataclass(frozen=True)
class CheckTask(DataConfig):
    """Decode every image fully; report bad files, sizes, statistics, duplicates, and leaks between the splits.

    Options are those of training, and mean the same. Exit code 0 when the images can be used for training (warnings
    included), 3 when they cannot. Nothing is written without --out.
    """

    data: tyro.conf.Positional[str] = field()  # without the default of DataConfig
    """A named source, or the path of an image folder, zip, tar, parquet file, or built set."""
    against: str | None = None
    """Another source, to look for images that occur in both; read with the same options."""
    full: bool = False
    """Of a built set: compare the sha256 of every file first."""
    out: Path | None = None
    """Directory for data.json and, if there are bad files, bad_files.txt."""


@dataclass(frozen=True)
class BuildTask(DataConfig):
    """Decode every image once, and write all into few large files, which every command reads by index as --data DIR.

    A set in memory and a built one have the same images, labels and fingerprint. What was ended goes on when the same command
    is run again. Fingerprints of both sides of the split with --held-out and --split-seed are computed in the same pass; those of
    another split at its first use.
    """

    data: tyro.conf.Positional[str] = field()
    """A named source, or the path of an image folder, zip, tar shards, or parquet files."""
    out: Path = field(kw_only=True)
    """Folder of the built set."""
    keep_encoded: bool = False
    """Keep the bytes of the image files, and decode them each time they are read: smaller, slower."""
    workers: int | Literal["auto"] = "auto"
    """Threads that decode; auto: as many as there are cores, where that is faster than one."""
    overwrite: bool = False
    """Delete another set of images in --out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.workers != "auto":
            check_ranges(self, workers=COUNT)


def run(task: CheckTask) -> DataFacts:
    """Check, print, write; DataError at the end if the images cannot be used."""
    for source in filter(None, (task.data, task.against)):
        check_unambiguous(source)
    if task.out is not None:
        check_writable(task.out)
    facts = check(_config(task), task.against, task.full)
    echo(text(facts).rstrip())
    if task.out is not None:
        echo(*(f"{'written':<13}{path}" for path in write_data_report(task.out, facts)))
    if facts.problems:
        raise error_of(task.data, facts.problems)
    return facts


def run_build(task: BuildTask) -> None:
    """Build, and describe the set; errors as of `build`."""
    check_unambiguous(task.data)
    if task.crop is not None:
        fix = "build without it, and pass it to the training; --resize brings images to one size here"
        raise UsageError(f"--crop {task.crop}", "windows are cut as images are used, not as they are stored", fix)
    workers = None if task.workers == "auto" else task.workers
    built = build(_config(task), task.out, task.keep_encoded, workers, task.overwrite)
    echo(describe(load(DataConfig(str(task.out)))))
    echo(f"{'built' if built else 'was there':<13}{task.out}")


def _config(task: DataConfig) -> DataConfig:
    return DataConfig(**{f.name: getattr(task, f.name) for f in fields(DataConfig)})


def check_command(arguments: list[str]) -> None:
    """`midway data check SOURCE [flags]`."""
    run(resolve(CheckTask, {}, arguments))


def build_command(arguments: list[str]) -> None:
    """`midway data build SOURCE --out DIR [flags]`."""
    run_build(resolve(BuildTask, {}, arguments))
