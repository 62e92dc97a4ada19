"""What midway evaluate compares with: the training images, or a published reference; protocols; the classes of seeds."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from midway.gen.core.errors import UsageError
from midway.gen.data.splits import Splits
from midway.gen.diffusion.class_draw import ClassDraw, LabelRule, class_draw
from midway.gen.features.extractor import Extractor
from midway.gen.features.protocols import PROTOCOLS, Setting, protocol_line, settled
from midway.gen.features.published import NEED_IMAGES, PublishedReference, check_saved, has_images, open_reference
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.flags.evaluation_flags import DEFAULT_SPACES, EvaluateTask

METRICS = "kid,sliced"
"""Those that are measured where no flag names any."""


def with_protocol(task: EvaluateTask) -> EvaluateTask:
    """The flags that --protocol sets, and the metrics that its reference can have; UsageError for flags that contradict it."""
    if task.protocol is not None:
        reference = None if task.reference is None else str(task.reference)
        found = settled(task.protocol, Setting(_given(task), task.n, reference, task.labels, task.blocks))
        task = replace(task, features=found.features or task.features, n=found.n, blocks=found.blocks)
    if task.metrics is not None:
        return task
    without = task.reference is not None and not has_images(task.reference.expanduser())
    chosen = [name for name in METRICS.split(",") if not (without and name in NEED_IMAGES)]
    return replace(task, metrics=",".join(chosen))


def _given(task: EvaluateTask) -> str | None:
    """The value of --features, None where it is the default."""
    return None if task.features == ",".join(DEFAULT_SPACES) else task.features


def draw_of(task: EvaluateTask, splits: Splits, classes: int, empty: Sequence[int] = ()) -> ClassDraw | None:
    """How the seeds of a model of so many classes draw them; errors as `class_draw`."""
    rule: LabelRule | None = task.labels
    if rule is None and task.protocol is not None and classes:
        rule = PROTOCOLS[task.protocol].labels
    return class_draw(rule, splits.train, classes, empty)


def check_reference(task: EvaluateTask, extractors: Sequence[Extractor]) -> None:
    """UsageError for flags of the reference that do not fit the feature spaces."""
    if task.reference is not None and len(extractors) > 1:
        raise UsageError(
            f"--reference {task.reference} with {len(extractors)} feature spaces",
            "its mean and covariance are of one network",
            f"pass --features {extractors[0].name.split('@')[0]}, or another one of them",
        )
    if task.save_reference is not None:
        check_saved(task.save_reference, extractors[0].axes is not None)


def published(task: EvaluateTask, extractors: Sequence[Extractor], splits: Splits) -> PublishedReference | None:
    """The reference of --reference, None without the flag; errors as `open_reference`."""
    if task.reference is None or task.metrics is None:
        return None
    metrics = [name for name in task.metrics.split(",") if name]
    return open_reference(task.reference, extractors[0], metrics, task.root, tuple(splits.train.images.shape[1:]))


def references(
    task: EvaluateTask,
    extractors: Sequence[Extractor],
    splits: Splits,
    given: PublishedReference | None,
    folder: Path,
    device: torch.device,
) -> list[FeatureReference]:
    """One of each feature space: the one `given`, or statistics of the training images, which `folder` keeps."""
    moved = [extractor.to(device) for extractor in extractors]
    if given is not None:
        return [given]
    return [make_reference(extractor, extractor.name, splits.train, folder, task.root) for extractor in moved]


def protocol_note(n: int, reference: FeatureReference, draw: ClassDraw | None) -> str:
    """The line of a report on published protocols."""
    file = reference.name if isinstance(reference, PublishedReference) else None
    return protocol_line(Setting(reference.features, n, file, None if draw is None else draw.rule))
