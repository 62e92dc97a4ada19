"""What every baseline (VAE, flows) is to the scripts: trained by fit(), scored in nats of integers, sampled by seed.

A run of kind `baseline` leaves, in each checkpoint, `model.json` (kind, config, image_shape, levels, classes) beside the
weights that fit() writes: `model.safetensors`, and `ema.safetensors` if the run kept an average. Where validation kept the best
weights, in best/ of the run, those are what is loaded.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from midway.gen import checkpoint
from midway.gen.config import from_dict, to_dict
from midway.gen.context import Context, ImageBatch
from midway.gen.errors import DataError
from midway.gen.files import state_hash
from midway.gen.likelihood import levels_unchecked, to_levels
from midway.gen.optim import free_to_read
from midway.gen.runs import Run
from midway.gen.splits import DataConfig

KIND = "baseline"
CPU = torch.device("cpu")


class Baseline(nn.Module, ABC):
    """A model of uint8 images (C, H, W) of `levels` levels; `classes` is 0 for an unconditional one.

    A subclass names its `kind` and the dataclass of its configuration, `config_type`, is built as
    `cls(config, image_shape, levels, classes)`, and defines `loss`, `log_likelihood` and `sample`.
    """

    kind: ClassVar[str]
    config_type: ClassVar[type]
    sample_nfe: int = 1
    """Network evaluations per sample."""

    def __init__(self, config: Any, image_shape: tuple[int, int, int], levels: int, classes: int = 0) -> None:
        super().__init__()
        if not 2 <= levels <= 256:
            raise ValueError(f"levels is {levels}; uint8 images have 2 to 256 levels: take what levels_of() finds")
        if classes < 0:
            raise ValueError(f"classes is {classes}; give the number of classes, or 0 for an unconditional model")
        self.config, self.image_shape, self.levels, self.classes = config, image_shape, levels, classes

    @property
    def dims(self) -> int:
        """Values of an image, C H W."""
        channels, height, width = self.image_shape
        return channels * height * width

    # ---- what a subclass defines ----

    @abstractmethod
    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, in bits per dimension; logs, with `bits_per_dim` among them if integers have bits under it."""

    @abstractmethod
    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        """Nats (B,) float64 of the integers of uint8 images (B, C, H, W), or a lower bound, with labels (B,) if conditional.

        Draws come from the context by sample, so that they depend on neither the batch nor the order.
        """

    @abstractmethod
    def sample(self, seeds: Tensor, labels: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """Float images (n, C, H, W) in [-1, 1] on the model's device, one for each int64 seed, with labels if conditional."""

    # ---- what it may define ----

    def start(self, batch: ImageBatch, context: Context) -> None:
        """Initialise from data, once; nothing by default."""

    def after_step(self, kept: Tensor) -> None:
        """Between optimizer steps; nothing by default."""

    # ---- what it is given ----

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def levels_in(self, images: Tensor) -> Tensor:
        """int64 levels (B, C, H, W) of uint8 images, on the model's device.

        ValueError for another shape, and for values that are no levels wherever reading them makes nobody wait.
        """
        if tuple(images.shape[1:]) != tuple(self.image_shape):
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, the model's are {tuple(self.image_shape)} (C, H, W): "
                "give it images like those it was trained on"
            )
        convert = to_levels if free_to_read(images) else levels_unchecked
        return convert(images, self.levels).to(self.device)

    def labels_in(self, labels: Tensor | None, count: int) -> Tensor | None:
        """int64 labels (count,) on the model's device; None for an unconditional model, which ignores them.

        ValueError for missing labels, another number of them, and, on a CPU, labels outside the classes.
        """
        if not self.classes:
            return None
        if labels is None or labels.shape != (count,):
            found = "none" if labels is None else f"of shape {tuple(labels.shape)}"
            raise ValueError(f"a conditional model needs {count} labels, one an image; these are {found}")
        if free_to_read(labels) and count and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(
                f"labels are {int(labels.min())} to {int(labels.max())}, classes 0 to {self.classes - 1}: "
                "use the labels of the data it was trained on"
            )
        return labels.to(self.device)


# ---- files ----


@dataclass(frozen=True)
class TrainedBaseline:
    """A baseline with averaged weights, in eval mode and frozen, and the data it was trained on."""

    model: Baseline
    data: DataConfig
    hash: str
    run: Run
    weights: str
    """Which weights these are, for reports: averaged or newest, and the optimizer step."""


def write_baseline(folder: Path, model: Baseline) -> None:
    """Add to a checkpoint directory what tells how to read its weights."""
    description = {
        "kind": model.kind,
        "config": to_dict(model.config),
        "image_shape": list(model.image_shape),
        "levels": model.levels,
        "classes": model.classes,
    }
    (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n")


def load_baseline(
    path: Path, device: torch.device = CPU, kinds: Mapping[str, type[Baseline]] | None = None
) -> Baseline:
    """The model of a baseline run, its best weights if it has them, or of one checkpoint directory: averaged, eval mode, frozen.

    `kinds` are the classes by name, by default all that there are. DataError for files that are missing or do not fit.
    """
    folder = path if (path / "model.json").exists() else _chosen(Run.open(path, KIND))
    return _read(folder, device, kinds)[0]


def load_trained_baseline(
    path: Path, device: torch.device = CPU, kinds: Mapping[str, type[Baseline]] | None = None
) -> TrainedBaseline:
    """The model of a baseline run with what reports say about it; errors as `load_baseline`."""
    run = Run.open(path, KIND)
    folder = _chosen(run)
    model, digest = _read(folder, device, kinds)
    averaged = "averaged" if _weights(folder).name == "ema.safetensors" else "newest"
    data = from_dict(DataConfig, run.config["data"], "config.data")
    best = ", the best in validation" if folder.parent == run.best else ""
    return TrainedBaseline(model, data, digest, run, f"{averaged}, step {folder.name.removeprefix('step-')}{best}")


def _chosen(run: Run) -> Path:
    """The directory of the best weights, verified, or of the newest checkpoint."""
    best = checkpoint.directories(run.best)
    return checkpoint.verify(best[0]).path if best else run.checkpoint


def _weights(folder: Path) -> Path:
    averaged = folder / "ema.safetensors"
    return averaged if averaged.exists() else folder / "model.safetensors"


def _all_kinds() -> Mapping[str, type[Baseline]]:
    from midway.gen.baselines import BASELINES  # here, because its classes need this module

    return cast(Mapping[str, type[Baseline]], BASELINES)


def _read(folder: Path, device: torch.device, kinds: Mapping[str, type[Baseline]] | None) -> tuple[Baseline, str]:
    """The model in `folder` and the hash of its description and weights."""
    known = _all_kinds() if kinds is None else kinds
    try:
        text = (folder / "model.json").read_text()
        state = load_file(_weights(folder))
        description = json.loads(text)
        cls = known[description["kind"]]
        config = from_dict(cls.config_type, description["config"], "model.json")
        model = cls(config, tuple(description["image_shape"]), description["levels"], description["classes"])
        model.load_state_dict(state)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
        raise DataError(f"{folder} cannot be read", reason, "train the model again with --overwrite") from error
    return model.to(device).eval().requires_grad_(False), state_hash(text, state)
