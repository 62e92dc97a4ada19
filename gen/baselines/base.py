"""The interface of baselines (VAE, flows): trained by fit(), scored in nats of integers, sampled by seed.

Each checkpoint of a `baseline` run has `model.json` (kind, config, image_shape, levels, classes) beside the weights that fit()
writes: `model.safetensors`, and `ema.safetensors` if weights are averaged. A validated run has its best weights in best/, which
are the ones loaded (registry.py).
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from midway.gen.core.config import to_dict
from midway.gen.data.levels import levels_unchecked, to_levels
from midway.gen.training.batches import Context, ImageBatch
from midway.gen.training.optim import is_on_host
from midway.tokenizers.precision import Convert, at_least_float32

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
    empty: tuple[int, ...] = ()
    """Classes of a conditional model without a training image, which no seed draws."""

    def __init__(self, config: Any, image_shape: tuple[int, int, int], levels: int, classes: int = 0) -> None:
        super().__init__()
        if not 2 <= levels <= 256:
            raise ValueError(f"levels is {levels}; uint8 images have 2 to 256 levels: use the result of levels_of()")
        if classes < 0:
            raise ValueError(f"classes is {classes}; give the number of classes, or 0 for an unconditional model")
        self.config, self.image_shape, self.levels, self.classes = config, image_shape, levels, classes

    @property
    def dims(self) -> int:
        """Values of an image, C H W."""
        channels, height, width = self.image_shape
        return channels * height * width

    # ---- defined by each subclass ----

    @abstractmethod
    def loss(self, batch: ImageBatch, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, in bits per dimension, and logs; they include `bits_per_dim` if it bounds a likelihood."""

    @abstractmethod
    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        """Nats (B,) float64 of the integers of uint8 images (B, C, H, W), or a lower bound, with labels (B,) if conditional.

        Noise comes from the context by sample, so results depend on neither the batch nor the order.
        """

    @abstractmethod
    def sample(self, seeds: Tensor, labels: Tensor | None = None) -> Tensor:
        """Float images (n, C, H, W) in [-1, 1] on the model's device, one for each int64 seed, with labels if conditional."""

    # ---- optional hooks ----

    def start(self, batch: ImageBatch, context: Context) -> None:
        """Initialise from data, once; nothing by default."""

    def after_step(self, step_ok: Tensor) -> None:
        """Between optimizer steps; nothing by default."""

    # ---- helpers ----

    def _apply(self, fn: Convert, recurse: bool = True) -> Self:
        """`.to()`: follows devices and float64, not half precision, in which 256 levels have no likelihood."""
        return super()._apply(at_least_float32(fn), recurse)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def levels_in(self, images: Tensor) -> Tensor:
        """int64 levels (B, C, H, W) of uint8 images, on the model's device.

        ValueError for another shape, and for values that are no levels where the check needs no host synchronisation.
        """
        if tuple(images.shape[1:]) != tuple(self.image_shape):
            raise ValueError(
                f"images are {tuple(images.shape[1:])}, the model's are {tuple(self.image_shape)} (C, H, W): "
                "use images of the training size"
            )
        convert = to_levels if is_on_host(images) else levels_unchecked
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
        if is_on_host(labels) and count and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise ValueError(
                f"labels are {int(labels.min())} to {int(labels.max())}, classes 0 to {self.classes - 1}: "
                "use the labels of the training data"
            )
        return labels.to(self.device)


def write_baseline(folder: Path, model: Baseline) -> None:
    """Write `model.json`, the description from which the registry builds the model, to a checkpoint directory."""
    description = {
        "kind": model.kind,
        "config": to_dict(model.config),
        "image_shape": list(model.image_shape),
        "levels": model.levels,
        "classes": model.classes,
        **({"empty": list(model.empty)} if model.empty else {}),
    }
    (folder / "model.json").write_text(json.dumps(description, indent=2) + "\n")
