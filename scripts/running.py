"""Shared by the training scripts: models with their images as items of fit(), and run directories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator

from midway.gen.core.runs import Run
from midway.gen.core.signals import stop_note
from midway.gen.data.splits import Splits
from midway.gen.training.batches import ImageBatch
from midway.gen.training.interface import Items
from tasks import TrainingTask

Model = TypeVar("Model")


@dataclass(frozen=True)
class Parts(Generic[Model]):
    """What is trained on images: the model, its items, the images, and validation of a step if there is one."""

    model: Model
    items: Items
    splits: Splits
    validate: Callable[[int], float] | None = None


def image_parts(
    model: Model, splits: Splits, device: torch.device, validate: Callable[[int], float] | None = None
) -> Parts[Model]:
    """With the training images and labels, moved to `device` batch by batch."""
    images, labels = splits.train.images, splits.train.labels

    def fetch(items: torch.Tensor) -> ImageBatch:
        return ImageBatch(images[items].to(device), labels[items].to(device))

    return Parts(model, Items(fetch, len(images), splits.train.fingerprint), splits, validate)


def open_run(task: TrainingTask, kind: str, config: dict[str, Any], accelerator: Accelerator, *lines: str) -> Run:
    """The run, created by the main process, which logs `lines` if it is new; returns when it exists."""
    run = Run(task.out, kind, config)
    if accelerator.is_main_process:
        run = Run.create(task.out, kind, config, task.overwrite, task.resume == "auto")
        for line in lines if run.is_new else ():
            run.say(line)
    accelerator.wait_for_everyone()
    stop_note(f"{task.out} has begun; the same command with --resume auto goes on")
    return run
