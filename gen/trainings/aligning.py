"""Alignment of a latent model with a trained feature network: the teacher, the projector, and the teacher's feature maps."""

from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.errors import UsageError, raising
from midway.gen.core.processes import ProcessInfo
from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import Origin
from midway.gen.diffusion.model import LatentModel
from midway.gen.features.extractor import Extractor
from midway.gen.features.open import named_extractor
from midway.gen.flags.tasks import LatentTask
from midway.gen.objectives.alignment import AlignConfig, Alignment
from midway.gen.tokenizer.feature_maps import MapSource, open_maps, with_maps, write_maps
from midway.gen.tokenizer.latents import Latents
from midway.gen.tokenizer.stored import Views
from midway.gen.training.interface import Items


def planned_alignment(task: LatentTask) -> LatentTask:
    """The task with the number of steps that follows from `until`. UsageError for flags that have no effect, or no images."""
    align = task.align
    if align.teacher is None:
        if align != AlignConfig():
            raise UsageError("--align without a teacher", "there is nothing to align with", "add --align.teacher")
        return task
    if task.reflow.source is not None:
        why = "pairs are samples of a model, and features by place are those of the images"
        raise UsageError("--align.teacher with --reflow.source", why, "drop one of the two")
    if align.until < 1 and align.steps == 0:
        task = replace(task, align=replace(align, steps=max(1, round(align.until * task.train.steps))))
    return task


def prepared(task: LatentTask, model: LatentModel, data: DataConfig, images: ImageData) -> Extractor | None:
    """The network of --align.teacher, for which the model gets a projector; None without one.

    Errors as `named_extractor`; UsageError for a network without a feature map, or tokens that there are not.
    """
    if task.align.teacher is None:
        return None
    teacher = named_extractor(task.align.teacher, data, "the tokenizer", flag="--align.teacher")
    teacher.check(images.images, "the tokenizer's images are")
    add_alignment(model, task.align, teacher, task.train.seed)
    return teacher


def random_maps(task: LatentTask, model: LatentModel, count: int, generator: torch.Generator) -> Tensor | None:
    """Random maps (count, C, h, w) in place of the teacher's, for which the model gets a projector; None without a teacher."""
    if task.align.teacher is None:
        return None
    teacher = named_extractor(task.align.teacher, None, "the tokenizer", flag="--align.teacher")
    add_alignment(model, task.align, teacher, task.train.seed)
    return torch.randn(count, teacher.map_channels, *model.network.grid, generator=generator)


def add_alignment(model: LatentModel, config: AlignConfig, teacher: Extractor, seed: int) -> None:
    """Give the model a projector, whose first weights depend on the seed alone; errors as `prepared`."""
    teacher.check_map()
    network = model.network
    with (
        raising(UsageError, "hidden tokens cannot be aligned", "change the --align flags"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.manual_seed(randomness.integer(seed, "projector", 0))
        model.align(Alignment(config, network.feature_dim, network.grid, teacher.map_channels))


def aligned_items(
    task: LatentTask,
    model: LatentModel,
    teacher: Extractor,
    latents: Latents,
    images: ImageData,
    folder: Path,
    accelerator: Accelerator,
) -> tuple[Items, Origin]:
    """Latents with the teacher's maps, which are made if they are not in `folder`; the teacher's name and passes.

    Errors as `write_maps` and `open_maps`.
    """
    views = Views(latents.views.windows, task.flip)
    source = MapSource(teacher.to(accelerator.device), images, views, images.images.shape[-1], model.network.grid)
    path = source.folder(folder)
    process = ProcessInfo(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    write_maps(path, source, process)
    passes = Origin(evaluations=views.count * len(images.images), aligned=(teacher.name,))
    return with_maps(latents, open_maps(path, source), task.flip), passes
