"""Interfaces of fit(): the model, the data and the hooks that it takes, and the result that it returns."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from midway.gen.training.batches import Context
from midway.gen.training.ema import EMA


class Trainable(Protocol):
    """A model (nn.Module) that fit() can train."""

    def loss(self, batch: Any, context: Context) -> tuple[Tensor, dict[str, Tensor]]:
        """The scalar to minimise, a mean over the batch, and logs (see progress.Averages) of the same names every time."""
        ...

    def after_step(self, step_ok: Tensor) -> None:
        """Called after each optimizer step. When the 0-dim bool `step_ok` is false the step was skipped: change nothing."""
        ...


@runtime_checkable
class Startable(Protocol):
    """A model that initialises something from data."""

    def start(self, batch: Any, context: Context) -> None:
        """Called once, before the first step, with the first (at most 1024) samples of step 0, the same on all processes."""
        ...


@runtime_checkable
class Adversarial(Protocol):
    """A model trained against a discriminator inside the same step.

    Parameters whose names begin with `discriminator_prefix` have their own learning rate, `discriminator_rate` times that of the
    others, and their own gradient norm and clipping."""

    discriminator_prefix: str
    discriminator_rate: float


@runtime_checkable
class Rated(Protocol):
    """A model some of whose parameters learn faster or slower than others."""

    def rate_of(self, name: str) -> float:
        """The factor of the learning rate of the parameter of this name."""
        ...


@dataclass(frozen=True)
class Items:
    """A data set of `size` items.

    `read` maps item indices int64 (b,) to a batch in memory: a tensor, or a dataclass or tuple of tensors, on the CPU unless
    the data are on a GPU. It is a pure function, called ahead of training and by several threads at once; it draws no random
    numbers. `augment`, called where the batch is used, on the device, draws from the context of the batch. `fingerprint` names
    the images.
    """

    read: Callable[[Tensor], Any]
    size: int
    fingerprint: str = ""
    augment: Callable[[Any, Context], Any] | None = None


@dataclass(frozen=True)
class Preview:
    """A picture that was written, what it shows in a few words, and figures of what is shown, for trackers."""

    path: Path
    title: str
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Hooks:
    """Callbacks on the main process: `preview(step)`, `measure(step)` and `validate(step)`, called with the averaged
    weights in the model, and `export(folder, averaged)`, which puts files for other commands into every checkpoint. The weights
    with the lowest value of `validate` are stored in best/ of the run. `preview` returns what it has written, `measure` the
    figures that it has logged; none of them changes what is learned."""

    preview: Callable[[int], Preview | None] | None = None
    export: Callable[[Path, dict[str, Tensor]], None] | None = None
    validate: Callable[[int], float] | None = None
    measure: Callable[[int], Mapping[str, float] | None] | None = None


@dataclass(frozen=True)
class FitResult:
    """Optimizer steps done, seconds of training, the average (None when `ema` is 0), the last interval's means, whether all of
    `steps` are done or validation ended the run, and step and value of the best validation, if there was one."""

    steps: int
    seconds: float
    ema: EMA | None
    last: dict[str, float]
    finished: bool
    best: tuple[int, float] | None = None
