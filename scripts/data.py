"""Look at images before training on them: python scripts/data.py check cifar10-train.zip --held-out 0.1"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from cli import main, resolve
from midway.gen.core.errors import UsageError, nearest
from midway.gen.data.check import DataFacts, check
from midway.gen.data.check_report import check_writable, refusal, text, write_data_report
from midway.gen.data.splits import DataConfig


@dataclass(frozen=True)
class CheckTask:
    """Decode every image fully; report bad files, sizes, statistics, duplicates, and leaks between the splits.

    Options are those of training, and mean the same. Exit code 0 when training would take the images (warnings
    included), 3 when it would not. Nothing is written without --out.
    """

    source: tyro.conf.Positional[str]
    """digits, cifar10, mnist, fashion_mnist, or the path of an image folder or zip with class folders."""
    against: str | None = None
    """Another source, to look for images that occur in both; read with the same options."""
    held_out: float = DataConfig.held_out
    """Share of the images kept from all training."""
    split_seed: int = DataConfig.split_seed
    channels: int | None = None
    """1 converts to grey, 3 to RGB."""
    resize: int | None = None
    """Shorter side in pixels, then a centre crop."""
    on_bad_image: Literal["error", "skip"] = DataConfig.on_bad_image
    """skip leaves out unreadable files, at most 1 % of them."""
    download: bool = False
    """Fetch a named data set that is not on this machine."""
    out: Path | None = None
    """Directory for data.json and, if there are bad files, bad_files.txt."""


def run(task: CheckTask) -> DataFacts:
    """Check, print, write; DataError at the end if the images cannot be used."""
    if task.out is not None:
        check_writable(task.out)
    facts = check(
        DataConfig(
            data=task.source,
            held_out=task.held_out,
            split_seed=task.split_seed,
            channels=task.channels,
            resize=task.resize,
            on_bad_image=task.on_bad_image,
            download=task.download,
        ),
        task.against,
    )
    print(text(facts), end="")
    if task.out is not None:
        print(*(f"{'written':<13}{path}" for path in write_data_report(task.out, facts)), sep="\n")
    if facts.problems:
        raise refusal(task.source, facts.problems)
    return facts


def check_command(arguments: list[str]) -> None:
    """`check SOURCE [flags]`."""
    run(resolve(CheckTask, {}, arguments))


COMMANDS = {"check": check_command}


def command(arguments: list[str]) -> None:
    """The command line: a subcommand and its flags."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: python scripts/data.py {'|'.join(COMMANDS)} ...\n\n{__doc__}\n\nEach has its own --help.")
        return
    if name not in COMMANDS:
        raise UsageError(f"unknown command '{name}'", "it is none of scripts/data.py", nearest(name, COMMANDS))
    COMMANDS[name](rest)


if __name__ == "__main__":
    main(command)
