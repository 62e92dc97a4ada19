"""Shared by the training scripts: images as items of fit(), and run directories."""

from typing import Any

import torch
from accelerate import Accelerator

from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData
from midway.gen.training.batches import ImageBatch
from midway.gen.training.interface import Items
from tasks import TrainingTask


def image_items(data: ImageData, device: torch.device) -> Items:
    """Images and labels, moved to `device` batch by batch."""
    images, labels = data.images, data.labels
    return Items(
        lambda items: ImageBatch(images[items].to(device), labels[items].to(device)), len(images), data.fingerprint
    )


def open_run(task: TrainingTask, kind: str, config: dict[str, Any], accelerator: Accelerator, *lines: str) -> Run:
    """The run, created by the main process, which logs `lines` if it is new; returns when it exists."""
    run = Run(task.out, kind, config)
    if accelerator.is_main_process:
        run = Run.create(task.out, kind, config, task.overwrite, task.resume == "auto")
        for line in lines if run.is_new else ():
            run.say(line)
    accelerator.wait_for_everyone()
    return run
