"""Jobs beside those of solvers: baselines and external images."""

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.core.errors import DataError
from midway.gen.data.external import ExternalImages
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.evaluation.other_sources import BaselineSource, ImagesSource
from midway.gen.sweep.jobs import Job, SweepConfig


def baseline_job(name: str, trained: TrainedBaseline, batch_size: int, draw: ClassDraw | None = None) -> Job:
    """Its samples, in batches, of classes by `draw`."""
    model, source = trained.model, BaselineSource(trained, batch_size, draw)
    return Job(name, "", source, baseline=True, classes=model.classes, empty=model.empty, draw=draw)


def image_job(name: str, external: ExternalImages, config: SweepConfig) -> Job:
    """The images in their order; DataError for fewer than the blocks hold."""
    count, needed = len(external.pixels), config.n * config.blocks
    if count < needed:
        raise DataError(
            f"{external.name} has {count} images, {needed} are needed",
            f"{config.blocks} blocks of {config.n} images each are measured",
            f"make more samples, or pass --n {max(count // config.blocks, 1)}, or fewer --blocks",
        )
    return Job(f"images: {name}", "", ImagesSource(external, config.first_seed), baseline=True)
