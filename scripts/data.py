"""Look at images before training on them: python scripts/data.py check cifar10-train.zip --held-out 0.1"""

from dataclasses import dataclass, field, fields
from pathlib import Path

import tyro

from cli import main, resolve
from midway.gen.core.errors import UsageError, nearest
from midway.gen.core.text import echo
from midway.gen.data.check import DataFacts, check
from midway.gen.data.check_report import check_writable, error_of, text, write_data_report
from midway.gen.data.sources import check_unambiguous
from midway.gen.data.splits import DataConfig


@dataclass(frozen=True)
class CheckTask(DataConfig):
    """Decode every image fully; report bad files, sizes, statistics, duplicates, and leaks between the splits.

    Options are those of training, and mean the same. Exit code 0 when the images can be used for training (warnings
    included), 3 when they cannot. Nothing is written without --out.
    """

    data: tyro.conf.Positional[str] = field()  # without the default of DataConfig
    """digits, mnist5k, cifar10, mnist, fashion_mnist, or the path of an image folder or zip with class folders."""
    against: str | None = None
    """Another source, to look for images that occur in both; read with the same options."""
    out: Path | None = None
    """Directory for data.json and, if there are bad files, bad_files.txt."""


def run(task: CheckTask) -> DataFacts:
    """Check, print, write; DataError at the end if the images cannot be used."""
    for source in filter(None, (task.data, task.against)):
        check_unambiguous(source)
    if task.out is not None:
        check_writable(task.out)
    config = DataConfig(**{f.name: getattr(task, f.name) for f in fields(DataConfig)})
    facts = check(config, task.against)
    echo(text(facts).rstrip())
    if task.out is not None:
        echo(*(f"{'written':<13}{path}" for path in write_data_report(task.out, facts)))
    if facts.problems:
        raise error_of(task.data, facts.problems)
    return facts


def command(arguments: list[str]) -> None:
    """The command line: `check SOURCE [flags]`."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: python scripts/data.py check ...\n\n{__doc__}\n\nEach has its own --help.")
        return
    if name != "check":
        raise UsageError(f"unknown command '{name}'", "it is none of scripts/data.py", nearest(name, ["check"]))
    run(resolve(CheckTask, {}, rest))


if __name__ == "__main__":
    main(command, alone=True)
