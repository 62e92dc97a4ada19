"""Shared by the training scripts: models with their images as items of fit(), and run directories."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator

from midway.gen.core.runs import Run
from midway.gen.data.splits import Splits
from midway.gen.training.batches import ImageBatch
from midway.gen.training.interface import Items

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


class RunFlags(Protocol):
    """What to do with a run that is there."""

    @property
    def overwrite(self) -> bool: ...
    @property
    def resume(self) -> str: ...


@contextmanager
def open_run(
    flags: RunFlags, path: Path, kind: str, config: dict[str, Any], accelerator: Accelerator, *lines: str
) -> Iterator[Run]:
    """The run, created by the main process, which logs `lines` if it is new and holds the run's lock until the block ends.

    The others wait until it exists.
    """
    main = accelerator.is_main_process
    creating = Run.creating(path, kind, config, flags.overwrite, flags.resume == "auto")
    with creating if main else nullcontext(Run(path, kind, config)) as run:
        for line in lines if main and run.is_new else ():
            run.say(line)
        accelerator.wait_for_everyone()
        yield run
