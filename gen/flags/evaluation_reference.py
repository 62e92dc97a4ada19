"""What midway evaluate compares with: the training images, or a published reference; protocols; the classes of seeds; and
external images."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.runs import Run
from midway.gen.data.external import ExternalImages, ReadingOptions, fitted, read_all
from midway.gen.data.places import trained_on
from midway.gen.data.splits import DataConfig, Splits, flags_of
from midway.gen.diffusion.class_draw import ClassDraw, LabelRule, class_draw
from midway.gen.features.extractor import Extractor
from midway.gen.features.protocols import PROTOCOLS, Setting, protocol_line, settled
from midway.gen.features.published import NEED_IMAGES, PublishedReference, check_saved, has_images, open_reference
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.flags.evaluation_flags import DEFAULT_SPACES, EvaluateTask
from midway.gen.sweep.jobs import Job, SweepConfig

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


class _Loaded(Protocol):
    """A trained model of any kind."""

    @property
    def run(self) -> Run: ...
    @property
    def data(self) -> DataConfig: ...


Loaded = TypeVar("Loaded", bound=_Loaded)


def alike(flag: str, paths: Sequence[Path], load: Callable[[Path], Loaded], data: DataConfig) -> dict[str, Loaded]:
    """Runs by the names of their folders. UsageError for one name twice, DataError for other images than the reference."""
    found = dict[str, Loaded]()
    for path in paths:
        name, loaded = path.resolve().name, load(path)
        if name in found:
            raise UsageError(f"{flag} names {name} twice", "rows need different names", "rename one of the runs")
        if not trained_on(loaded.run, data):
            raise DataError(
                f"{path} was trained on other images than the reference",
                f"its data are {flags_of(loaded.data)}, the reference is {flags_of(data)}",
                "train it on the same --data, --held-out, --split-seed, --channels and --resize",
            )
        found[name] = loaded
    return found


def external_images(task: EvaluateTask, splits: Splits) -> dict[str, ExternalImages]:
    """What --images names, in the channels of the reference; DataError for what does not compare with it."""
    options = ReadingOptions(task.images_channels, task.images_resize, task.data.on_bad_image)
    found = read_all(task.images, options)
    return {name: fitted(images, splits.train.images) for name, images in found.items()}


def image_jobs(externals: dict[str, ExternalImages], config: SweepConfig) -> list[Job]:
    """Jobs of --images; DataError for fewer images than the blocks hold."""
    if not externals:
        return []
    from midway.gen.sweep.comparisons import image_job

    return [image_job(name, images, config) for name, images in externals.items()]


def image_notes(externals: dict[str, ExternalImages], config: SweepConfig) -> tuple[str, ...]:
    """How external images were read and converted, and how many of them count."""
    found = [
        f"images: {name} ({images.fingerprint}): {text}"
        for name, images in externals.items()
        for text in (f"the first {config.n * config.blocks} of {len(images.pixels)} images", *images.notes)
    ]
    sorting = "Blocks of external images are consecutive: samples sorted by class need --blocks 1."
    return (*((sorting,) if externals and config.blocks > 1 else ()), *found)
