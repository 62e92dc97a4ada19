"""Compare models in bits per dimension: midway evaluate-likelihood --models runs/digits-vae runs/digits-glow

Baselines have likelihoods or bounds of their own, pixel models the density of their ODE, latent models none; all have samples.
Priors over codes have bits of the codes, in a table of their own: codes are not the image.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from midway.gen.baselines.base import KIND
from midway.gen.baselines.registry import TrainedBaseline, load_trained_baseline
from midway.gen.commands.evaluate_tokenizer import NONE, open_reference
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.locks import claimed
from midway.gen.core.processes import best_device
from midway.gen.core.ranges import BATCH, COUNT, POSITIVE, SEED, STEPS, check_flag_ranges, check_ranges
from midway.gen.core.runs import Run, kind_of
from midway.gen.core.text import echo
from midway.gen.data.levels import to_levels, values_of
from midway.gen.data.places import DataPathFlag, changed_since, images_at, splits_of
from midway.gen.data.splits import DataConfig, Splits
from midway.gen.diffusion.class_draw import class_draw
from midway.gen.diffusion.likelihood import LikelihoodConfig
from midway.gen.diffusion.load import check_apart, load_model, recorded_origin
from midway.gen.diffusion.samplers import SamplerConfig
from midway.gen.evaluation.compared import load_alike
from midway.gen.evaluation.likelihood import Bounds, LikelihoodRow, levels_in_data
from midway.gen.evaluation.likelihood_models import Instruments, Trained, model_row, references, source_of
from midway.gen.features.extractor import Extractor
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import balanced_subject
from midway.gen.flags.cli import resolve
from midway.gen.priors.load import KIND as PRIOR
from midway.gen.priors.load import TrainedPrior, load_prior
from midway.gen.progress.bar import Progress
from midway.gen.progress.finished import unfinished
from midway.gen.report.likelihood import check_out, terminal_text, write_likelihood_report
from midway.gen.report.notes import empty_notes
from midway.gen.report.table import ReportContext
from midway.gen.report.text import under_warnings


@dataclass(frozen=True, kw_only=True)
class LikelihoodTask(DataPathFlag):
    """Bits per dimension of held-out images under models of the same images, and the distance and cost of their samples.
    Of priors over codes bits per image of the codes, which are no bits of the images, in a table of their own.

    Writes results.json, results.csv and report.md.
    """

    models: tuple[Path, ...]
    """Run directories of baselines, of latent or pixel models, and of priors over codes, of the same data and split."""
    features: str | None = None
    """Feature network (default: effnet-lite0, if installed): effnet-lite0-full, pixels, inception, inception-pytorch,
    dinov2-vitb14, dinov2-vitl14, clip-vitb32, clip-vitl14, or the run directory of one trained on these images.
    none: leave out the distances."""
    feature_weights: Annotated[Path | None, tyro.conf.arg(aliases=["--inception-weights"])] = None
    """File with the weights of a published feature network (default: found on this machine, or downloaded)."""
    out: Path | None = None
    """Directory to write (default: likelihood-report/ beside the first model)."""
    n: int | None = None
    """Held-out images, as many of every class (default: all); also the number of samples."""
    draws: int | None = None
    """Draws of the bound (default: 16 for a VAE, else the model's own)."""
    iwae: int = 64
    """VAE: draws K of the importance-weighted bound; 0 leaves it out."""
    masks: int | None = None
    """Masked priors: masks of the bound, of each image (default: one a token, at most 16)."""
    batch_size: int = 256
    """Images that are scored or sampled at once."""
    seed: int = 0
    """Of the draws of the bounds."""
    first_seed: int = 0
    """The first seed of the samples."""
    solver: str = "dpmpp2m"
    """Latent and pixel models: the solver that draws their samples."""
    nfe: int = 20
    """Latent and pixel models: network evaluations per sample."""
    grid: str = "karras"
    """Latent and pixel models: the spacing of the steps."""
    ode: LikelihoodConfig = field(default_factory=LikelihoodConfig)
    title: str = "Bits per dimension and distance of samples"
    """Title of the report."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, n=COUNT, nfe=STEPS, seed=SEED, first_seed=SEED, iwae=(0, COUNT[1]), batch_size=BATCH)
        check_flag_ranges(self, masks=COUNT)
        check_ranges(self.ode, steps=STEPS, probes=COUNT, rho_min=POSITIVE)


def run(task: LikelihoodTask) -> list[LikelihoodRow]:
    """Check everything, measure, print the table, write the report."""
    bounds, device = check(task), best_device()
    models = load_alike(task.models, "--models", lambda path: load_one(path, device), open_one)
    first = next(iter(models.values()))
    data = images_at(first.run, task.data_path)
    features = find_features(task, data)
    if features is not None:
        for name, trained in models.items():
            check_apart(name, recorded_origin(trained.run).aligned, features.name)
    splits = splits_of(first.run, data)
    state = unfinished(*task.models, task.features)
    subject = balanced_subject(splits.held_out, task.n)
    levels = check_images(models, splits)
    draw = class_draw(None, splits.train, len(splits.train.classes))
    plans = SamplerConfig(grids=(task.grid,), batch_size=task.batch_size, draw=draw)
    sources = {name: source_of(trained, task.solver, task.nfe, plans) for name, trained in models.items()}
    out = task.out or task.models[0].resolve().parent / "likelihood-report"
    seeds = torch.arange(task.first_seed, task.first_seed + len(subject.images))
    check_out(out)
    with claimed(out):
        reference = open_reference(features, splits, subject.images, device, "the models make")
        instruments = Instruments(
            subject, bounds, task.iwae, seeds, *reference, levels, task.ode, splits.train.images, task.masks
        )
        rows = list[LikelihoodRow]()
        with Progress("model", len(models)) as progress:
            for name, trained in models.items():
                progress.at(name)
                rows.append(model_row(name, trained, *sources[name], instruments))
                progress.advance()
        rows += references(splits, instruments)
        conditional = any(classes_of(trained) for trained in models.values())
        warnings = [note for trained in models.values() for note in changed_since(trained.run, splits.train)]
        warnings += empty_notes(splits, conditional)
        echo(*state, *warnings)
        write_likelihood_report(out, rows, context(task, splits, instruments, warnings, state))
    echo(under_warnings(terminal_text(rows), state))
    echo(f"report: {out / 'report.html'}")
    return rows


def check(task: LikelihoodTask) -> Bounds:
    """UsageError for numbers that measure nothing."""
    if task.n is not None and task.n < 2:
        raise UsageError(f"--n {task.n}", "a mean with its error, and a distance, need 2 images", "raise --n")
    if task.iwae < 0 or task.first_seed < 0 or task.seed < 0:
        raise UsageError(
            f"--iwae {task.iwae} --seed {task.seed} --first-seed {task.first_seed}",
            "none may be negative",
            "use 0 or more; --iwae 0 leaves that bound out",
        )
    try:
        return Bounds(task.draws, task.seed, task.batch_size)
    except ValueError as error:
        raise UsageError("likelihoods cannot be bounded so", str(error), "correct the value") from None


# ---- what is compared ----


def load_one(path: Path, device: torch.device) -> Trained:
    """A latent model, a prior, or else a baseline; DataError for any other run."""
    if kind_of(path) == PRIOR:
        return load_prior(path, device)
    if kind_of(path) == "latent_model":
        return load_model(path, device)
    return load_trained_baseline(path, device)


def open_one(path: Path) -> Run:
    """The run of `load_one`."""
    kind = kind_of(path)
    return Run.open(path, kind if kind in ("latent_model", PRIOR) else KIND)


def classes_of(trained: Trained) -> int:
    """0 of a model without classes."""
    return (trained.prior if isinstance(trained, TrainedPrior) else trained.model).classes


def check_images(models: dict[str, Trained], splits: Splits) -> int:
    """The number of levels of all models; DataError when they differ, or images have another shape than a model's."""
    levels = {n: t.model.levels for n, t in models.items() if isinstance(t, TrainedBaseline)}
    if len(set(levels.values())) > 1:
        raise DataError(
            "these models count other levels",
            ", ".join(f"{name} has {count}" for name, count in levels.items()),
            "bits of other integers do not compare: train them on the same images",
        )
    count = next(iter(levels.values()), levels_in_data(splits))
    for name, trained in models.items():
        shape = tuple(splits.held_out.images.shape[1:])
        own = tuple((trained.model if isinstance(trained, TrainedBaseline) else trained.tokenizer).image_shape)
        if shape != own:
            raise DataError(
                f"{name} is a model of {own} images",
                f"the data are {shape}",
                "train it again on these images",
            )
    try:
        for data in (splits.train, splits.held_out):
            to_levels(values_of(data.images), count)
    except ValueError as error:
        raise DataError("the images changed since training", str(error), "train the models again") from None
    return count


def find_features(task: LikelihoodTask, data: DataConfig) -> Extractor | None:
    """The feature network, None if none is installed or wanted; errors as named_extractor if one is named."""
    if task.features == NONE:
        return None
    try:
        return named_extractor(task.features, data, "the models", task.feature_weights)
    except UsageError as error:
        if task.features is not None or task.feature_weights is not None:
            raise
        echo(f"no distances: {error.why}")
        return None


# ---- the report ----


def context(
    task: LikelihoodTask, splits: Splits, instruments: Instruments, warnings: list[str], state: tuple[str, ...]
) -> ReportContext:
    """Everything a reader needs beside the numbers."""
    n = len(instruments.subject.images)
    return ReportContext(
        title=task.title,
        warnings=state,
        model=f"{len(task.models)} model(s)",
        data=f"{instruments.subject.name}, {n} of {len(splits.held_out.images)} held-out images",
        seeds=f"bounds {task.seed}; samples {task.first_seed}-{task.first_seed + n - 1}",
        notes=(
            f"Bits per dimension of the integers, lower is better: mean and standard error over {n} held-out images. Figures "
            "of models are upper bounds of the bits, and those of different bounds do not quite compare.",
            "Weights that are the best in validation were chosen on held-out images: their figures are a little too good.",
            f"Distances are of {n} samples to all {len(splits.train.images)} training images; samples of a VAE are expected "
            "images, without the noise of values.",
            *prior_notes(instruments, task),
            *warnings,
        ),
    )


def prior_notes(instruments: Instruments, task: LikelihoodTask) -> tuple[str, ...]:
    """How to read bits of codes, where there are any."""
    if not any(kind_of(path) == PRIOR for path in task.models):
        return ()
    n = len(instruments.subject.images)
    return (
        "Bits of codes are bits per image of the tokenizer's codes, given the class where the prior takes one: no bits of "
        "pixels, and none per dimension, since a decoder does not give the image back. They compare between priors of one "
        f"tokenizer. Mean and standard error over {n} held-out images. Exact of causal priors; of masked ones an upper bound, "
        "unbiased in the masks that are drawn, and tight where the conditionals are those of one law.",
    )


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(LikelihoodTask, {}, arguments))
