"""The feature network that --features names: a published one, the pixels, or one trained on the data set.

A trained one must have the images and the split that are measured: one trained on held-out images would underestimate the floor.
"""

from pathlib import Path

from midway.gen.core.errors import DataError, UsageError, nearest
from midway.gen.core.runs import Run, kind_of
from midway.gen.data.places import data_of, trained_on
from midway.gen.data.sources import ambiguous
from midway.gen.data.splits import DataConfig, flags_of
from midway.gen.features.classifier import load_features
from midway.gen.features.extractor import Extractor
from midway.gen.names.nearest import ranked
from midway.gen.progress.finished import selected

DEFAULT = "effnet-lite0"
PIXELS = "pixels"
PUBLISHED = (
    DEFAULT,
    "effnet-lite0-full",
    "inception",
    "inception-pytorch",
    "dinov2-vitb14",
    "dinov2-vitl14",
    "clip-vitb32",
    "clip-vitl14",
)
"""Names of published networks (efficientnet.py, inception.py, vit.py)."""
NAMED = (*PUBLISHED, PIXELS)


def named_extractor(
    words: str | Path | None, data: DataConfig | None, what: str, weights: Path | None = None, flag: str = "--features"
) -> Extractor:
    """The network that `flag` names, by default effnet-lite0; on the CPU, its weights read.

    `weights` is the file of a published network. UsageError for a misspelt name, weights for a network that has its own, or a
    package that is not installed; DataError when weights are missing or damaged, or a run was trained on other images than
    `data`, the images of `what`; data None: on any.
    """
    name = DEFAULT if words is None else str(words)
    if name in PUBLISHED:
        return open_published(name, weights)
    if weights is not None:
        raise UsageError(
            f"--feature-weights {weights}",
            f"--features {name} is no published network, and a run has its own weights",
            f"pass --features with one of: {', '.join(PUBLISHED)}",
        )
    if name == PIXELS:
        from midway.gen.features.pixels import Pixels

        return Pixels()
    if not Path(name.split("@")[0]).exists() and (len(Path(name).parts) == 1 or ranked(name, NAMED)[0][0] > 0.8):
        raise UsageError(f"{flag} {name}", "there is neither a network nor a run of this name", nearest(name, NAMED))
    return load_features(selected(open_features(Path(name), data, what)) / "features.safetensors")


def check_feature_names(words: str) -> None:
    """UsageError for a name in a comma-separated list that a run directory here has too."""
    for name in words.split(","):
        if name.strip() in NAMED and kind_of(Path(name.strip())):
            raise ambiguous("feature space", "named network", name.strip())


def open_published(name: str, weights: Path | None = None) -> Extractor:
    """One of PUBLISHED with the weights given, or found. DataError or UsageError if there are none."""
    from midway.gen.features.efficientnet import EFFNET, FULL, open_efficientnet
    from midway.gen.features.inception import INCEPTION, PYTORCH, open_inception, open_pytorch_inception
    from midway.gen.features.vit import open_vision_transformer

    if name in (EFFNET.network, FULL):
        return open_efficientnet(name, weights)
    if name == PYTORCH:
        return open_pytorch_inception(weights)
    return open_inception(weights) if name == INCEPTION.network else open_vision_transformer(name, weights)


def open_features(path: Path, data: DataConfig | None, what: str) -> Run:
    """The feature run at `path`. DataError when it was trained on other images than `what`, whose data are `data`, if given."""
    run = Run.open(path, "features")
    if data is not None and not trained_on(run, data):
        raise DataError(
            f"{run.path} was trained on other images than {what}",
            f"its data are {flags_of(data_of(run))}, the others are {flags_of(data)}",
            "train features with the same --data, --held-out and --split-seed",
        )
    return run
