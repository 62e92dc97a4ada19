"""Shared by the training scripts: models with their images as items of fit(), and run directories."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import torch
from accelerate import Accelerator

from midway.gen.core.errors import UsageError, is_memory
from midway.gen.core.processes import raised_by_all
from midway.gen.core.runs import Run
from midway.gen.core.signals import stop_note
from midway.gen.data.splits import Splits
from midway.gen.training.batches import ImageBatch, RandomCrop
from midway.gen.training.interface import Items
from midway.gen.training.precision import resolve_precision

if TYPE_CHECKING:
    from midway.gen.flags.tasks import TrainingTask

Model = TypeVar("Model", bound=torch.nn.Module)
Task = TypeVar("Task", bound="TrainingTask")


@dataclass(frozen=True)
class Parts(Generic[Model]):
    """What is trained on images: the model, its items, the images, and validation of a step if there is one."""

    model: Model
    items: Items
    splits: Splits
    validate: Callable[[int], float] | None = None


def image_parts(model: Model, splits: Splits, validate: Callable[[int], float] | None = None) -> Parts[Model]:
    """With the training images and labels, which are read batch by batch; where they are cropped, at random places."""
    train = splits.train
    images, labels = train.images if train.whole is None else train.whole, train.labels
    crop = None if train.whole is None else RandomCrop(train.images.shape[-1])

    def read(items: torch.Tensor) -> ImageBatch:
        return ImageBatch(images[items], labels[items])

    return Parts(model, Items(read, len(images), train.fingerprint, crop), splits, validate)


def built(build: Callable[[], Model]) -> Model:
    """`build()`, after its size has been counted without memory; UsageError where this machine cannot train it.

    Training keeps parameters, gradients and two moments. The random numbers of `build()` are those it has by itself.
    """
    there, needed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 0.0
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            network = build()
        needed = 16.0 * sum(p.numel() for p in network.parameters()) + 4.0 * sum(b.numel() for b in network.buffers())
    except Exception as error:  # what cannot be counted is built; its own errors come then
        needed = math.inf if is_memory(error) else 0.0
    if needed > there:
        words = "more than a tensor can hold" if needed == math.inf else f"{needed / 2**30:,.0f} GiB"
        raise UsageError(
            "this network is too large",
            f"its training keeps {words}, and this machine has {there / 2**30:,.0f} GiB",
            "choose smaller sizes of the model",
        )
    return build()


def with_precision(
    task: Task, network: Literal["conv", "transformer"] = "conv", width: int = 0
) -> tuple[Task, tuple[str, ...]]:
    """`task` with the precision in place of `auto`, and a line about it for the log; see resolve_precision."""
    out = task.out if task.resume == "auto" else None
    train, lines = resolve_precision(task.train, out, network, width)
    return replace(task, train=train), lines


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
    with ExitStack() as stack:
        with raised_by_all():
            run = stack.enter_context(creating if main else nullcontext(Run(path, kind, config)))
            for line in lines if main and run.is_new else ():
                run.say(line)
        stop_note(f"{path} has begun; the same command with --resume auto goes on")
        yield run
