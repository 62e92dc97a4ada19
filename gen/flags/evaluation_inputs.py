"""What the flags of midway evaluate name: the model, its repeats, few-step models, priors and baselines.

Modules that only some sweeps need are imported in the functions that open them, so that the path of a plain sweep is short.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from midway.gen.core.errors import UsageError
from midway.gen.core.runs import kind_of
from midway.gen.data.splits import DataConfig, Splits
from midway.gen.diffusion.load import TrainedModel, check_apart, load_model, recorded_origin
from midway.gen.diffusion.samplers import learned_for
from midway.gen.evaluation.records import LIMITS
from midway.gen.evaluation.sources import EvaluatedLatentModel, EvaluatedModel
from midway.gen.features.extractor import Extractor
from midway.gen.features.open import named_extractor
from midway.gen.flags.cli import names, numbers
from midway.gen.flags.evaluation_flags import PRIOR, EvaluateTask
from midway.gen.flags.evaluation_reference import alike, draw_of
from midway.gen.progress.finished import unfinished
from midway.gen.sweep.jobs import Job, SweepConfig
from midway.samplers.jumps import JUMPS
from midway.samplers.solvers import ALIASES, SOLVERS

if TYPE_CHECKING:
    from midway.gen.flags.evaluation_priors import Priors
    from midway.gen.priors.load import TrainedPrior


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
    return unfinished(
        task.model, task.adapter, *task.repeats, *task.few_step, *task.priors, *task.baselines, *names(task.features)
    )


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


def check_teachers(extractors: Sequence[Extractor], models: Sequence[EvaluatedModel | TrainedModel | None]) -> None:
    """UsageError for a latent model that was aligned with one of the networks that are to measure it."""
    for one in models:
        trained = one.trained if isinstance(one, EvaluatedLatentModel) else one
        if isinstance(trained, TrainedModel):
            for extractor in extractors:
                check_apart(trained.run.place, recorded_origin(trained.run).aligned, extractor.name)


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


def open_main(task: EvaluateTask, device: torch.device) -> "TrainedModel | TrainedPrior | None":
    """The latent model or prior of --model, in tiles if --tile has them."""
    prior = task.model is not None and kind_of(task.model) == PRIOR
    if task.adapter is not None and (task.model is None or prior):
        what, why = f"--adapter {task.adapter}", "it is of a latent model, and --model names none"
        raise UsageError(what, why, "give its --model, or drop it")
    if task.model is None:
        return None
    if task.adapter is not None:
        from midway.gen.diffusion.adapters import load_adapted

        found = load_adapted(task.model, task.adapter, device)
    elif prior:
        from midway.gen.priors.load import load_prior

        found = load_prior(task.model, device)
    else:
        found = load_model(task.model, device)
    task.apply_tiles(found.tokenizer)
    return found


def open_priors(
    task: EvaluateTask, main: "TrainedModel | TrainedPrior | None", data: DataConfig, device: torch.device
) -> "Priors | None":
    """The prior that is --model, and those of --priors; None of a sweep without any. Errors as `Priors.opened`."""
    own = None if main is None or isinstance(main, TrainedModel) else main
    if own is None and not task.priors:
        return None
    from midway.gen.flags.evaluation_priors import Priors

    return Priors.opened(task, own, data, device)


def classes_of(
    model: EvaluatedModel | None, few_step: Mapping[str, TrainedModel], priors: "Priors | None"
) -> tuple[int, tuple[int, ...]] | None:
    """How many classes the seeds have, and those without images: of the model, or of the first few-step model or prior."""
    others = [*(its.model for its in few_step.values()), *([] if priors is None else [priors.first.prior])]
    first = model or next(iter(others), None)
    return None if first is None else (first.classes, first.empty)


def solver_names(words: str | None, trained: TrainedModel | None, budgets: tuple[int, ...]) -> tuple[str, ...]:
    """The solvers that --solvers names, or the default's; of `all`, the learned ones that were trained for every budget."""
    if words != "all":
        found = names(defaults_of(trained).solvers if words is None else words)
        if unknown := [name for name in found if name not in SOLVERS]:
            from midway.gen.priors.rules import check_solver

            for name in unknown:
                check_solver(name, "--solvers", "a model that is solved")
        return found
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
    """The models of --few-step by the names of their runs; errors as `alike`, UsageError for the model itself."""
    found = alike("--few-step", task.few_step, lambda path: load_model(path, device), data)
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
    """Jobs of --few-step and --baselines by the names of their runs; errors as `alike`."""
    from midway.gen.sweep.comparisons import baseline_job, few_step_jobs

    found = list[Job]()
    for name, trained in models.items():
        draw = draw_of(task, splits, trained.model.classes, trained.model.empty)
        found += few_step_jobs(name, trained, few_step_budgets(task), config, draw)
    if task.baselines:
        from midway.gen.baselines.registry import load_trained_baseline

        baselines = alike("--baselines", task.baselines, lambda path: load_trained_baseline(path, device), data)
        for name, its in baselines.items():
            draw = draw_of(task, splits, its.model.classes, its.model.empty)
            found.append(baseline_job(name, its, config.batch_size, draw))
    return found


def check_rows(jobs: Sequence[Job], solvers: Sequence[str]) -> None:
    """UsageError where rows of two models, or of a model and a solver or limit, have one name."""
    owners = {name: {("", "")} for name in (*solvers, *LIMITS)}
    for job in jobs:
        owners.setdefault(job.solver, set()).add((job.kind, job.model.name))
    for name in (name for name, its in owners.items() if len(its) > 1):
        what = f"a run is named {name}, as another row of the report"
        raise UsageError(what, "rows need different names", "rename the run's folder")
