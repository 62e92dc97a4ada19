"""What the flags of midway evaluate name: the model, its repeats, few-step models, baselines and external images.

Modules that only some sweeps need are imported in the functions that open them, so that the path of a plain sweep is short.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.runs import Run
from midway.gen.data.external import ExternalImages, ReadingOptions, fitted, read_all
from midway.gen.data.places import trained_on
from midway.gen.data.splits import DataConfig, Splits, flags_of
from midway.gen.diffusion.load import TrainedModel, load_model
from midway.gen.diffusion.samplers import learned_for
from midway.gen.evaluation.records import FEW_STEP, LIMITS
from midway.gen.evaluation.sources import EvaluatedLatentModel, EvaluatedModel
from midway.gen.features.extractor import Extractor
from midway.gen.features.open import named_extractor
from midway.gen.flags.cli import names, numbers
from midway.gen.flags.evaluation_flags import EvaluateTask
from midway.gen.flags.evaluation_reference import draw_of
from midway.gen.progress.finished import unfinished
from midway.gen.sweep.jobs import Job, SweepConfig
from midway.samplers.jumps import JUMPS
from midway.samplers.solvers import ALIASES, SOLVERS


def open_model(task: EvaluateTask, trained: TrainedModel | None, device: torch.device) -> EvaluatedModel | None:
    """What solvers are measured on: the model `trained`, or that of --diffusers."""
    if trained is not None:
        return EvaluatedLatentModel(trained)
    if task.diffusers is None:
        return None
    from midway.gen.evaluation.diffusers_files import load_diffusers

    return load_diffusers(task.diffusers, device)


def open_repeats(task: EvaluateTask, trained: TrainedModel | None, device: torch.device) -> list[EvaluatedModel]:
    """The models of --repeats; DataError for other configurations."""
    if not task.repeats or trained is None:
        return []
    from midway.gen.sweep.repeats import check_repeats

    found = [load_model(path, device) for path in task.repeats]
    for repeat in found:
        task.apply_tiles(repeat.tokenizer)
    check_repeats(trained, found)
    return [EvaluatedLatentModel(repeat) for repeat in found]


def model_warnings(task: EvaluateTask) -> tuple[str, ...]:
    """Of every run that the flags name and whose training is not finished."""
    return unfinished(task.model, *task.repeats, *task.few_step, *task.baselines, *names(task.features))


def open_spaces(task: EvaluateTask, data: DataConfig, whose: str) -> list[Extractor]:
    """The feature networks of --features, the first with the weights of --feature-weights; errors as `named_extractor`.

    UsageError for none, and for one twice.
    """
    words = names(task.features)
    if not words or len(set(words)) < len(words):
        why = "distances need features" if not words else "a space is measured once"
        raise UsageError(
            f"--features {task.features!r}", why, "name one or several different spaces: effnet-lite0,pixels"
        )
    weights = [task.feature_weights, *[None] * (len(words) - 1)]
    return [named_extractor(word, data, whose, its) for word, its in zip(words, weights, strict=True)]


@dataclass(frozen=True)
class Defaults:
    """What is measured of a model where no flag names it."""

    solvers: str = "euler,ddim,heun,dpm2,dpmpp2m"
    nfe: str = "4,6,8,10,20"
    grids: str = "uniform,logsnr,karras"


def defaults_of(trained: TrainedModel | None) -> Defaults:
    """Of a model that jumps, what it is as a few-step model of another sweep."""
    if trained is None or not trained.model.config.is_jump:
        return Defaults()
    return Defaults(EvaluatedLatentModel(trained).few_step, "1,2,4,8", "uniform")


def solver_names(words: str | None, trained: TrainedModel | None, budgets: tuple[int, ...]) -> tuple[str, ...]:
    """The solvers that --solvers names, or the default's; of `all`, the learned ones that were trained for every budget."""
    if words != "all":
        return names(defaults_of(trained).solvers if words is None else words)
    if trained is not None and trained.model.config.is_jump:
        return tuple(JUMPS)
    plain = tuple(name for name in SOLVERS if name not in ALIASES)
    return plain if trained is None else (*plain, *learned_for(trained, budgets))


def budgets_of(task: EvaluateTask, trained: TrainedModel | None) -> tuple[int, ...]:
    """The budgets of --nfe; by default also those of --few-step, so that both kinds of rows meet."""
    if task.nfe is not None:
        return numbers(task.nfe, "--nfe")
    own = numbers(defaults_of(trained).nfe, "--nfe")
    return tuple(sorted({*own, *few_step_budgets(task)}) if task.few_step else own)


def few_step_budgets(task: EvaluateTask) -> tuple[int, ...]:
    """The budgets of --few-step-nfe, each once."""
    return tuple(dict.fromkeys(numbers(task.few_step_nfe, "--few-step-nfe")))


def open_few_step(
    task: EvaluateTask, trained: TrainedModel | None, data: DataConfig, device: torch.device
) -> dict[str, TrainedModel]:
    """The models of --few-step by the names of their runs; errors as `_alike`, UsageError for the model itself."""
    found = _alike("--few-step", task.few_step, lambda path: load_model(path, device), data)
    for name, model in found.items():
        task.apply_tiles(model.tokenizer)
        if trained is not None and model.hash == trained.hash:
            why = "its weights are those of --model, whose lines they would repeat"
            raise UsageError(f"--few-step names {name}", why, "name a model of other weights")
    return found


def jobs_beside(
    task: EvaluateTask,
    models: Mapping[str, TrainedModel],
    data: DataConfig,
    splits: Splits,
    config: SweepConfig,
    device: torch.device,
) -> list[Job]:
    """Jobs of --few-step and --baselines by the names of their runs; errors as `_alike`, UsageError for the name of a row."""
    from midway.gen.sweep.comparisons import baseline_job, few_step_jobs

    found = list[Job]()
    for name, trained in models.items():
        draw = draw_of(task, splits, trained.model.classes, trained.model.empty)
        found += few_step_jobs(name, trained, few_step_budgets(task), config, draw)
    if task.baselines:
        from midway.gen.baselines.registry import load_trained_baseline

        baselines = _alike("--baselines", task.baselines, lambda path: load_trained_baseline(path, device), data)
        for name, its in baselines.items():
            draw = draw_of(task, splits, its.model.classes, its.model.empty)
            found.append(baseline_job(name, its, config.batch_size, draw))
    solvers = config.solvers if task.model or task.diffusers else ()
    taken = [*solvers, *LIMITS, *models]
    for job in found:
        if taken.count(job.solver) > (job.kind == FEW_STEP):
            what = f"a run is named {job.solver}, as another row of the report"
            raise UsageError(what, "rows need different names", "rename the run's folder")
    return found


class _Loaded(Protocol):
    """A trained model of any kind."""

    @property
    def run(self) -> Run: ...
    @property
    def data(self) -> DataConfig: ...


Loaded = TypeVar("Loaded", bound=_Loaded)


def _alike(flag: str, paths: Sequence[Path], load: Callable[[Path], Loaded], data: DataConfig) -> dict[str, Loaded]:
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
