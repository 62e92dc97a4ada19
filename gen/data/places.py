"""Where the images of a run are: where its configuration names them, or where they are now.

A run stores absolute paths; earlier versions stored them as they were typed. A path that is not there is tried where it would be
if it had been moved together with the run: as far from the run's folder as it was. Images from any other place than the stored
one are used only if their fingerprint is the one that the training recorded in env.json.
"""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from midway.gen.core.checkpoints import split_step
from midway.gen.core.config import PER_CALL
from midway.gen.core.errors import DataError
from midway.gen.core.files import read_json
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData
from midway.gen.data.sources import SOURCES, is_there
from midway.gen.data.splits import DataConfig, Splits, load_splits, same_choice, same_images


@dataclass(frozen=True, kw_only=True)
class DataPathFlag:
    """The flag of commands that read the images of a run."""

    data_path: str | None = field(default=None, metadata=PER_CALL)
    """Where the images of the run are, if they are no longer where it was trained on them; their fingerprint must be the recorded
    one."""


def stored_data(run: Run) -> DataConfig:
    """The data configuration of a run as it is stored; DataError if it is missing or does not fit."""
    return run.part("data", DataConfig)


def data_of(run: Run) -> DataConfig:
    """The data configuration of a run, with the place of its images if they were moved with it; errors as of `stored_data`."""
    config = stored_data(run)
    if is_there(config.data):
        return config
    moved = moved_with(run, Path(config.data))
    return config if moved is None or not moved.exists() else replace(config, data=str(moved))


def images_at(run: Run, data_path: str | None = None, download: bool = False) -> DataConfig:
    """The data configuration of a run for a command that reads its images: from `data_path` if it is given.

    DataError naming the places that were tried when no images are there.
    """
    config = replace(data_of(run) if data_path is None else stored_data(run), download=download)
    if data_path is not None:
        return replace(config, data=data_path)
    if is_there(config.data):
        return config
    moved = moved_with(run, Path(config.data))
    second = "" if moved is None else f" nor, relative to the run, at {moved}"
    raise DataError(
        f"the images of {run.path} are not there",
        f"they are not at {Path(config.data).expanduser().absolute()}{second}",
        "give their place with --data-path",
    )


def splits_of(run: Run, config: DataConfig) -> Splits:
    """The images of a run at a place that `images_at` found.

    DataError where that is another place than the stored one, and the images are not those that the training recorded.
    """
    splits = load_splits(config)
    if config.data == stored_data(run).data:
        return splits
    then, now = recorded_fingerprint(run), splits.train.fingerprint
    if then != now:
        known = f"recorded {then[:12]}" if then else "recorded none"
        raise DataError(
            f"{config.data} holds other images than {run.path} was trained on",
            f"their fingerprint is {now[:12]}, the training {known}",
            "give the place of the same files with --data-path",
        )
    return splits


def moved_with(run: Run, stored: Path) -> Path | None:
    """Where a stored path is if it was moved with the run; None if the run does not tell."""
    out = run.config.get("out")
    if run.kind == "solver":  # in the folder of its model
        out = os.path.join(str(run.config.get("model")), "solvers", run.path.name)
    if not isinstance(out, str) or Path(out).is_absolute() != stored.is_absolute():
        return None
    return Path(os.path.normpath(run.path.absolute() / os.path.relpath(stored, out)))


def moved_run(run: Run, stored: Path) -> Path:
    """The place of a run that another one names, also `RUN@step`: as stored, or where it is if both were moved together."""
    moved = None if split_step(stored)[0].exists() else moved_with(run, stored)
    return stored if moved is None or not split_step(moved)[0].exists() else moved


# ---- fingerprints ----


def recorded_fingerprint(run: Run) -> str:
    """The fingerprint of the training images that the last start of the training recorded; empty without a record."""
    try:
        return str(read_json(run.path / "env.json")["starts"][-1]["data_fingerprint"]).split(" ")[0]
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def changed_since(run: Run, train: ImageData) -> tuple[str, ...]:
    """A warning where `train` are not the images that the run recorded as it was trained; () without a record."""
    then = recorded_fingerprint(run)
    if then in ("", train.fingerprint):
        return ()
    return (
        f"{run.path.name} was trained on other images than {train.name} now has (fingerprint {then[:12]}, now "
        f"{train.fingerprint[:12]}): the source or its split changed, and what is held out now may have been trained on.",
    )


def trained_on(run: Run, data: DataConfig) -> bool:
    """Whether a run was trained on these images: the same source in the same split, or images of the recorded fingerprint."""
    own = data_of(run)
    if same_images(own, data):
        return True
    then = recorded_fingerprint(run) if same_choice(own, data) and _may_be_moved(own, data) else ""
    return bool(then) and load_splits(data).train.fingerprint == then


def trained_alike(a: Run, b: Run) -> bool:
    """Whether two runs were trained on the same images in the same split, wherever they were."""
    first, second = data_of(a), data_of(b)
    if same_images(first, second):
        return True
    prints = {recorded_fingerprint(a), recorded_fingerprint(b)}
    return same_choice(first, second) and _may_be_moved(first, second) and len(prints) == 1 and "" not in prints


def _may_be_moved(a: DataConfig, b: DataConfig) -> bool:
    """Whether two sources are both paths."""
    return a.data not in SOURCES and b.data not in SOURCES
