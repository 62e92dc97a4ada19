"""The class that a seed draws: a function of the seed alone, so that all solvers draw the same.

    balanced       classes take turns, each as often as any other
    proportional   classes take turns in proportion to their training images: equal counts give `balanced`
    random         each seed draws by itself, with the frequencies of the training images

Published figures mostly have classes drawn at random, as ADM, DiT and EDM sample, which raises a distance by the chance of their
counts. In proportion, a sampler as good as the data has the distance of held-out images.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.errors import UsageError
from midway.gen.data.images import ImageData
from midway.gen.data.splits import turns

LabelRule = Literal["balanced", "random", "proportional"]


@dataclass(frozen=True)
class ClassDraw:
    """Draws classes by their `counts` of training images; a class of 0 is never drawn. ValueError where all are 0."""

    counts: tuple[int, ...]
    rule: LabelRule = "proportional"

    def __post_init__(self) -> None:
        if min(self.counts, default=0) < 0 or not sum(self.counts):
            raise ValueError(f"counts of classes are {self.counts}: none may be negative, and one must be above 0")

    @classmethod
    def in_turn(cls, classes: int, empty: Sequence[int] = ()) -> "ClassDraw":
        """Every class but those that had no training image, `empty`, as often as any other."""
        return cls(tuple(int(label not in empty) for label in range(classes)), "balanced")

    def labels(self, seeds: Tensor) -> Tensor:
        """int64 (B,) on the CPU: the class of each seed (B,)."""
        seeds = seeds.cpu()
        if self.rule == "random":
            bounds = torch.tensor(self.counts, dtype=torch.float64).cumsum(0)
            place = (randomness.uniform(0, "class", 0, seeds) * bounds[-1]).floor()
            return torch.searchsorted(bounds, place.clamp(max=bounds[-1] - 1), right=True)  # 1 - 2^-53 may round to 1
        order = turns(self._weights)
        return order[seeds % len(order)]

    @property
    def _weights(self) -> tuple[int, ...]:
        return tuple(min(count, 1) for count in self.counts) if self.rule == "balanced" else self.counts

    @property
    def identity(self) -> str:
        """Names what every seed draws: equal for equal draws, for the names of stored measurements."""
        if self.rule == "random":
            return f"random {_digits(self.counts)}"
        return f"in turn {_digits(turns(self._weights).tolist())} of {len(self.counts)}"

    @property
    def text(self) -> str:
        """A sentence for reports."""
        return {
            "balanced": "Classes of seeds take turns (--labels balanced).",
            "proportional": "Classes of seeds take turns in proportion to their training images (--labels proportional).",
            "random": "Classes of seeds are drawn at random, by the frequencies of the training images (--labels random).",
        }[self.rule]


def _digits(numbers: Sequence[int]) -> str:
    return hashlib.sha256(" ".join(map(str, numbers)).encode()).hexdigest()[:12]


def class_draw(rule: LabelRule | None, train: ImageData, classes: int, empty: Sequence[int] = ()) -> ClassDraw | None:
    """How the seeds of a model of so many classes draw them, by the images `train`; None for a model without classes.

    `rule` None is proportional, and balanced for a model of other classes than the images have. UsageError for a rule that such a
    model, or one without classes, cannot have.
    """
    if classes == len(train.classes) and classes > 0:
        found = torch.bincount(train.labels, minlength=classes).tolist()
        counts = tuple(0 if label in empty else count for label, count in enumerate(found))
        if sum(counts):
            return ClassDraw(counts, rule or "proportional")
    if rule not in (None, "balanced"):
        why = (
            f"the model has {classes} classes" if classes else "the model has no classes, and draws the mixture of all"
        )
        fix = "drop the flag" if not classes else "drop the flag, or pass --labels balanced"
        raise UsageError(f"--labels {rule}", f"{why}; the reference has {len(train.classes)}", fix)
    return ClassDraw.in_turn(classes, empty) if classes else None
