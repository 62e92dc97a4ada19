"""The feature network of a data set: a published one by name, or a trained one.

A trained one is searched for beside the evaluated runs, and must have the same images and split: one trained on held-out images
would underestimate the floor.
"""

import difflib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from midway.gen.core.errors import DataError, UsageError, nearest
from midway.gen.core.runs import Run, kind_of
from midway.gen.data.splits import DataConfig, data_of, flags_of, same_images
from midway.gen.features.classifier import load_features
from midway.gen.features.extractor import Extractor

PUBLISHED = ("inception", "dinov2-vitb14", "dinov2-vitl14", "clip-vitb32", "clip-vitl14")
"""Names of published networks (inception.py, vit.py)."""


def open_extractor(
    words: str | Path | None, measured: Sequence[Path], data: DataConfig, what: str, weights: Path | None = None
) -> Extractor:
    """The network that --features names: published, or the run that open_features finds; on the CPU, its weights read.

    `weights` is the file of a published network. UsageError for a misspelt name, or weights for a trained network; DataError
    when weights are missing or damaged, or a run was trained on other images than those of the runs `measured`.
    """
    name = None if words is None else str(words)
    if name in PUBLISHED:
        return open_published(name, weights)
    if weights is not None:
        raise UsageError(
            f"--feature-weights {weights}",
            f"--features {name or ''} is no published network, and a run has its own weights",
            f"pass --features with one of: {', '.join(PUBLISHED)}",
        )
    if name is not None and not Path(name).exists() and difflib.get_close_matches(name, PUBLISHED):
        raise UsageError(
            f"--features {name}", "there is neither a network nor a run of this name", nearest(name, PUBLISHED)
        )
    run = open_features(None if name is None else Path(name), measured, data, what)
    return load_features(run.checkpoint / "features.safetensors")


def open_published(name: str, weights: Path | None = None) -> Extractor:
    """One of PUBLISHED with the weights given, or found on this machine or the internet. DataError if there are none."""
    from midway.gen.features.inception import INCEPTION, open_inception
    from midway.gen.features.vit import open_vision_transformer

    return open_inception(weights) if name == INCEPTION.network else open_vision_transformer(name, weights)


def open_features(path: Path | None, measured: Sequence[Path], data: DataConfig, what: str) -> Run:
    """The feature run at `path`, or the only one of these images beside the runs `measured`, which `what` names.

    UsageError when there is none or several, DataError when it was trained on other images.
    """
    run = Run.open(path or find_features(measured, data), "features")
    if not same_images(data_of(run), data):
        raise DataError(
            f"{run.path} was trained on other images than {what}",
            f"its data are {flags_of(data_of(run))}, the others are {flags_of(data)}",
            "train features with the same --data, --held-out and --split-seed",
        )
    return run


def find_features(measured: Sequence[Path], data: DataConfig) -> Path:
    """The only feature run of these images beside the runs `measured`; UsageError when there is none or several."""
    folders = dict.fromkeys(path.resolve().parent for path in measured)
    beside = sorted(path.parent for folder in folders for path in folder.glob("*/config.yaml"))
    runs = [Run.open(path, "features") for path in beside if _is_feature_run(path)]
    found = [run.path for run in runs if same_images(data_of(run), data)]
    if len(found) != 1:
        raise UsageError(
            "--features is not given",
            f"exactly one feature run of the same images must be beside the measured runs, found: "
            f"{', '.join(path.name for path in found) or 'none'}",
            "pass --features RUN, or train features with scripts/train_features.py",
        )
    return found[0]


def _is_feature_run(path: Path) -> bool:
    """Whether it is one, as far as its configuration can be read."""
    with suppress(DataError):
        return kind_of(path) == "features"
    return False
