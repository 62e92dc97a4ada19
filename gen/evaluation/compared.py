"""Several runs in one report: by their names, of the same images."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.runs import Run
from midway.gen.data.places import data_of, trained_alike
from midway.gen.data.splits import DataConfig, flags_of

Loaded = TypeVar("Loaded")


def load_alike(
    paths: tuple[Path, ...],
    flag: str,
    load: Callable[[Path], Loaded],
    run: Callable[[Path], Run],
    other: DataConfig | None = None,
) -> dict[str, Loaded]:
    """What `load` makes of each run, by name.

    DataError for one that was trained on other images than the first, unless all are measured on `other`.
    """
    names = report_names(paths, flag)
    loaded = {name: load(path) for name, path in names.items()}
    first, *others = names
    for name in others if other is None else ():
        theirs, ours = run(names[name]), run(names[first])
        if not trained_alike(theirs, ours):
            raise DataError(
                f"{names[name]} was trained on other images than {names[first]}",
                f"its data are {flags_of(data_of(theirs))}, the first's are {flags_of(data_of(ours))}",
                f"compare {flag.removeprefix('--')} of the same --data, --held-out, --split-seed, --channels and --resize",
            )
    return loaded


def report_names(paths: tuple[Path, ...], flag: str = "--tokenizers") -> dict[str, Path]:
    """Directory names, or whole paths where two have the same name. UsageError for none, and for one twice."""
    resolved = [path.resolve() for path in paths]
    if not paths or len(set(resolved)) < len(paths):
        raise UsageError(
            f"{flag} {' '.join(map(str, paths))}",
            "a run is named twice" if paths else "there is nothing to measure",
            "name every run once",
        )
    short = [path.name for path in resolved]
    return {name if short.count(name) == 1 else str(path): path for name, path in zip(short, paths, strict=True)}
