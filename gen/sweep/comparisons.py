"""Jobs beside those of solvers: few-step models, baselines and external images."""

from collections.abc import Sequence
from dataclasses import replace

from midway.gen.baselines.registry import TrainedBaseline
from midway.gen.core.errors import DataError
from midway.gen.data.external import ExternalImages
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.model import EVERYWHERE
from midway.gen.evaluation.other_sources import BaselineSource, ImagesSource
from midway.gen.evaluation.records import BASELINE, FEW_STEP
from midway.gen.evaluation.sources import EvaluatedLatentModel
from midway.gen.sweep.jobs import Job, SweepConfig

FEW_STEP_GRID = "uniform"
"""That of few-step models, equal steps of t: none is chosen, so that none favours them."""


def few_step_jobs(
    name: str, trained: TrainedModel, budgets: Sequence[int], config: SweepConfig, draw: ClassDraw | None
) -> list[Job]:
    """A model of its own weights at every budget on `FEW_STEP_GRID`: by `jump`, `consistency`, or Euler's method.

    Unguided, but for a model that takes the scale of guidance as an input, which costs nothing.
    """
    model, settings = EvaluatedLatentModel(trained), trained.model.config
    sampler, learned = model.few_step, settings.is_jump and settings.jump.guidance > 1
    scale, facts = config.guidance if learned else 1.0, model.facts
    if learned:  # as much of it as is used
        facts = replace(facts, guided=f"guidance {scale:g} paid in training" if scale != 1 else "")
    own = replace(
        config,
        grids=(FEW_STEP_GRID,),
        analytic_first=False,
        eta=0.0,
        guidance=scale,
        interval=EVERYWHERE,
        weak=None,
        draw=draw,
    )
    return [
        Job(
            name,
            FEW_STEP_GRID,
            model.source(model.samplers(sampler, nfe, own)[FEW_STEP_GRID], own.sampling()),
            nfe,
            network_flops=model.network_flops,
            network_tokens=model.network_tokens,
            kind=FEW_STEP,
            model=facts,
            sampler=sampler,
            classes=model.classes,
            empty=model.empty,
            draw=draw,
        )
        for nfe in budgets
    ]


def baseline_job(name: str, trained: TrainedBaseline, batch_size: int, draw: ClassDraw | None = None) -> Job:
    """Its samples, in batches, of classes by `draw`."""
    model, source = trained.model, BaselineSource(trained, batch_size, draw)
    return Job(name, "", source, kind=BASELINE, classes=model.classes, empty=model.empty, draw=draw)


def image_job(name: str, external: ExternalImages, config: SweepConfig) -> Job:
    """The images in their order; DataError for fewer than the blocks hold."""
    count, needed = len(external.pixels), config.n * config.blocks
    if count < needed:
        raise DataError(
            f"{external.name} has {count} images, {needed} are needed",
            f"{config.blocks} blocks of {config.n} images each are measured",
            f"make more samples, or pass --n {max(count // config.blocks, 1)}, or fewer --blocks",
        )
    return Job(f"images: {name}", "", ImagesSource(external, config.first_seed), kind=BASELINE)
