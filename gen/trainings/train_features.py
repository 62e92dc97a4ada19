"""Train the offline feature network of a data set: midway train features --data digits --out runs/digits-features

Such features are a choice beside the default, effnet-lite0, and not its equal: training for classes removes what varies within
them (neural collapse, Papyan et al. 2020, arXiv 2008.08186). Training ends when the accuracy on held-out images stops rising; yet
most of the variance lies between classes, so the distance hardly measures variety within a class, and samples with too little
of it score well. The share is printed at the end; midway check-metric shows what it does to a distance.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.core.config import to_record
from midway.gen.core.errors import UsageError, raising
from midway.gen.core.processes import one_thread
from midway.gen.core.ranges import WIDTH, check_flag_ranges
from midway.gen.core.runs import Run
from midway.gen.core.text import printable
from midway.gen.data.images import ImageData, describe
from midway.gen.data.pixels import Images, in_parts
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.features.classifier import FeatureConfig, FeatureNetwork, load_features, save_features
from midway.gen.features.reference import balanced_subject
from midway.gen.flags.cli import Flat, resolve
from midway.gen.flags.tasks import TrainingTask
from midway.gen.metrics.class_share import MOST, between_class_share
from midway.gen.progress.finished import selected
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import Hooks
from midway.gen.trainings.dry_run import random_splits, rehearse, resident
from midway.gen.trainings.running import Parts, built, image_parts, open_run, with_precision

VALIDATED = 2000
"""Most held-out images of a validation; the final accuracy is of all."""


@dataclass(frozen=True)
class FeaturesTask(TrainingTask):
    """Train a small classifier whose penultimate layer measures images of this data set."""

    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    width: int = 32
    """Channels of the first stage."""
    dim: int = 64
    """Features per image."""
    train: Annotated[TrainConfig, Flat] = field(
        default_factory=lambda: TrainConfig(
            steps=2000, lr=2e-3, ema=0, log_every=20, validate_every=20, patience_validations=5
        ),
        kw_only=True,
    )
    """Training ends when the held-out accuracy stops rising, and keeps the best weights."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, width=WIDTH, dim=WIDTH)


def make_parts(task: FeaturesTask, accelerator: Accelerator, splits: Splits | None = None) -> Parts[FeatureNetwork]:
    """The network and its images, or those given; nothing is written. UsageError for sizes that do not fit."""
    splits = splits or load_splits(task.data)
    torch.manual_seed(task.train.seed)
    channels, side = splits.train.images.shape[1:3]
    with raising(UsageError, "this feature network cannot be built", "change the flags or --data"):
        config = FeatureConfig(channels, side, len(splits.train.classes), task.width, task.dim)
        network = built(lambda: FeatureNetwork(config))
    subject = balanced_subject(splits.held_out, VALIDATED)
    return image_parts(network, splits, lambda step: 1 - accuracy_of(network, subject.images, subject.labels)[0])


def accuracy_of(network: FeatureNetwork, images: Images, labels: Tensor) -> tuple[float, Tensor]:
    """The share of images that the network classifies rightly, in [0, 1], and their features (N, D)."""
    with torch.no_grad():
        features = torch.cat([network.features(part) for part in in_parts(images)])
        right = network.classify(features).argmax(1).cpu() == labels
    return right.float().mean().item(), features


def dry_run(task: FeaturesTask) -> None:
    """Two steps on random images (dry_run.py)."""
    start, train = resident(), replace(task.train, validate_every=0, patience_validations=0)
    accelerator = make_accelerator(train)
    parts = make_parts(task, accelerator, random_splits(task.data, task.dry_run_classes))
    rehearse(parts.model, parts.items, train, accelerator, start)


def train(task: FeaturesTask) -> Run | None:
    """Train on the training images, report the held-out accuracy, save. The run on the main process."""
    check_unused(task.train, validates=True)
    task, precision = with_precision(task)
    if task.dry_run:
        return dry_run(task)
    accelerator = make_accelerator(task.train, task.out)
    parts = make_parts(task, accelerator)
    network = parts.model
    source = printable(Path(task.data.data).stem)
    with open_run(
        task, task.out, "features", to_record(task), accelerator, describe(parts.splits.train), *precision
    ) as run:
        hooks = Hooks(
            export=lambda folder, averaged: export(folder, network, averaged, source), validate=parts.validate
        )
        with one_thread():
            result = fit(network, parts.items, task.train, run, accelerator, hooks, task.resume == "auto")
            if not accelerator.is_main_process:
                return None
            report(run, parts.splits.held_out, result.steps)
        return run


def report(run: Run, held_out: ImageData, step: int) -> None:
    """Log what the stored network does on the held-out images."""
    folder = selected(run)
    network = load_features(folder / "features.safetensors")
    accuracy, features = accuracy_of(network, held_out.images, held_out.labels)
    between = between_class_share(features, held_out.labels)
    run.log({"step": step, "final": True, "held_out_accuracy": accuracy, "between_class_share": between})
    stored = folder.name.replace("-", " ") + (", the best in validation" if folder.parent == run.best else "")
    run.say(f"held-out accuracy {accuracy:.4f} ({stored}); metric {network.name}")
    blind = ": distances depend little on the variety within a class" if between > MOST else ""
    run.say(f"{between:.0%} of the variance of held-out features lies between classes{blind}")
    run.say(f"saved {folder}")


def export(folder: Path, network: FeatureNetwork, averaged: dict[str, Tensor], source: str) -> None:
    """Write the network with averaged weights, in the format of load_features."""
    copy = FeatureNetwork(network.config)
    copy.load_state_dict(averaged)
    save_features(copy, folder / "features.safetensors", source)


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    train(resolve(FeaturesTask, {}, arguments))
