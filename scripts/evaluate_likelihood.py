"""Compare baselines in bits per dimension: python scripts/evaluate_likelihood.py --models runs/digits-vae runs/digits-glow"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from evaluate_tokenizer import NONE, report_names

from cli import main, resolve
from midway.gen.artefacts import best_device
from midway.gen.baseline import TrainedBaseline, load_trained_baseline
from midway.gen.errors import DataError, DivergedError, UsageError
from midway.gen.feature_runs import check_shape, open_features, same_images
from midway.gen.features import load_features
from midway.gen.likelihood import to_levels
from midway.gen.likelihood_evaluation import (
    Bounds,
    Score,
    Subject,
    bits_of,
    bound_name,
    choose,
    draw,
    histogram_score,
    iwae_of,
    uniform_score,
)
from midway.gen.likelihood_report import LikelihoodRow, check_out, text_table, write_likelihood_report
from midway.gen.measurer import Measurer, make_measurer
from midway.gen.report_cells import ReportContext
from midway.gen.runs import Run, command_line, environment, hardware
from midway.gen.splits import DataConfig, Splits, load_splits
from midway.gen.vae import VAE


@dataclass(frozen=True, kw_only=True)
class LikelihoodTask:
    """Bits per dimension of held-out images under baselines of the same images, and the distance and cost of their samples.

    Writes results.json, results.csv and report.md.
    """

    models: tuple[Path, ...]
    """Run directories of baselines that were trained on the same data and split."""
    features: str | None = None
    """Run directory of the feature network (default: the one beside the models that was trained on their images, if there is
    one). none: leave out the distances."""
    out: Path | None = None
    """Directory to write (default: likelihood-report/ beside the first model)."""
    n: int | None = None
    """Held-out images, as many of every class (default: all); also the number of samples."""
    draws: int | None = None
    """Draws of the bound (default: 16 for a VAE, else the model's own)."""
    iwae: int = 64
    """VAE: draws K of the importance-weighted bound; 0 leaves it out."""
    batch_size: int = 256
    seed: int = 0
    """Of the draws of the bounds."""
    first_seed: int = 0
    """The first seed of the samples."""
    title: str = "Bits per dimension"


@dataclass(frozen=True)
class Instruments:
    """What all models are measured with; `floor` is what held-out images score."""

    subject: Subject
    bounds: Bounds
    iwae: int
    seeds: torch.Tensor
    measurer: Measurer | None
    floor: float | None


def run(task: LikelihoodTask) -> list[LikelihoodRow]:
    """Check everything, measure, print the table, write the report."""
    bounds, device = check(task), best_device()
    models = load(task.models, device)
    first = next(iter(models.values()))
    features = find_features(task, first.data)
    splits = load_splits(first.data)
    subject = choose(splits.held_out, task.n)
    levels = check_images(models, splits)
    out = task.out or task.models[0].resolve().parent / "likelihood-report"
    check_out(out)
    instruments = make_instruments(task, bounds, features, splits, subject, device)
    rows = [measure(name, trained, instruments) for name, trained in models.items()]
    rows += references(splits, instruments, levels)
    write_likelihood_report(out, rows, context(task, splits, instruments))
    print(text_table(rows))
    print(f"report: {out / 'report.md'}")
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


def load(paths: tuple[Path, ...], device: torch.device) -> dict[str, TrainedBaseline]:
    """All models by name; DataError when one is no baseline, damaged, or was trained on other images than the first."""
    names = report_names(paths, "--models")
    loaded = {name: load_trained_baseline(path, device) for name, path in names.items()}
    first, *others = names
    for name in others:
        if not same_images(loaded[name].data, loaded[first].data):
            raise DataError(
                f"{names[name]} was trained on other images than {names[first]}",
                f"its data are {loaded[name].data}, the first's are {loaded[first].data}",
                "compare models of the same --data, --held-out, --split-seed, --channels and --resize",
            )
    return loaded


def check_images(models: dict[str, TrainedBaseline], splits: Splits) -> int:
    """The number of levels of all models; DataError when they differ, or images are not like those that a model knows."""
    levels = {name: trained.model.levels for name, trained in models.items()}
    if len(set(levels.values())) > 1:
        raise DataError(
            "these models count other levels",
            ", ".join(f"{name} has {count}" for name, count in levels.items()),
            "bits of other integers do not compare: train them on the same images",
        )
    count = next(iter(levels.values()))
    for name, trained in models.items():
        shape = tuple(splits.held_out.images.shape[1:])
        if shape != tuple(trained.model.image_shape):
            raise DataError(
                f"{name} is a model of {tuple(trained.model.image_shape)} images",
                f"the data are {shape}",
                "train it again on these images",
            )
    try:
        for data in (splits.train, splits.held_out):
            to_levels(data.images.unique(), count)
    except ValueError as error:
        raise DataError("the images changed since training", str(error), "train the models again") from None
    return count


def find_features(task: LikelihoodTask, data: DataConfig) -> Run | None:
    """The feature run, None if there is none to be found or none is wanted; errors as open_features if one is named."""
    if task.features == NONE:
        return None
    try:
        return open_features(None if task.features is None else Path(task.features), task.models, data, "the models")
    except UsageError as error:
        if task.features is not None:
            raise
        print(f"no distances: {error.why}")
        return None


def make_instruments(
    task: LikelihoodTask, bounds: Bounds, features: Run | None, splits: Splits, subject: Subject, device: torch.device
) -> Instruments:
    """Images, seeds, and the feature network with its reference and floor."""
    seeds = torch.arange(task.first_seed, task.first_seed + len(subject.images))
    if features is None:
        return Instruments(subject, bounds, task.iwae, seeds, None, None)
    network, name = load_features(features.checkpoint / "features.safetensors")
    check_shape(network, name, subject.images, "the models make")
    measurer = make_measurer(network.to(device), name, splits.train)
    return Instruments(subject, bounds, task.iwae, seeds, measurer, measurer.distance(subject.images))


# ---- measuring ----


def measure(name: str, trained: TrainedBaseline, instruments: Instruments) -> LikelihoodRow:
    """One model; DataError if its weights were never initialised or it has no likelihood, DivergedError for bad samples."""
    model, subject, bounds = trained.model, instruments.subject, instruments.bounds
    begun = time.perf_counter()
    try:
        score = bits_of(model, subject, bounds)
    except ValueError as error:
        raise DataError(
            f"{name} gives no bits per dimension", str(error), "leave it out, or train it again with --overwrite"
        ) from error
    seconds = time.perf_counter() - begun
    tight = iwae_of(model, subject, bounds, instruments.iwae) if isinstance(model, VAE) and instruments.iwae else None
    try:
        drawn = draw(model, instruments.seeds, bounds.batch_size)
    except ValueError as error:
        raise DivergedError(f"{name} cannot be sampled", str(error), "leave it out, or train it again") from error
    measurer = instruments.measurer
    return LikelihoodRow(
        name=name,
        kind=model.kind,
        bits=score.bits,
        error=score.error,
        n=score.n,
        levels=model.levels,
        dims=model.dims,
        bound=bound_name(model, bounds.draws),
        seed=bounds.seed,
        images=subject.name,
        iwae_bits=None if tight is None else tight.bits,
        iwae_draws=None if tight is None else instruments.iwae,
        parameters=sum(p.numel() for p in model.parameters()),
        conditional=model.classes > 0,
        weights=trained.weights,
        model=trained.hash,
        seconds=round(seconds, 3),
        sample_nfe=model.sample_nfe,
        sample_seconds=round(1000 * drawn.seconds / len(drawn.images), 3),
        distance=None if measurer is None else measurer.distance(drawn.images),
        floor=instruments.floor,
        features=None if measurer is None else measurer.features,
    )


def references(splits: Splits, instruments: Instruments, levels: int) -> list[LikelihoodRow]:
    """What needs no network: every value alone by its histogram in the training images, and all levels alike."""
    subject = instruments.subject
    dims = subject.images[0].numel()

    def row(name: str, score: Score) -> LikelihoodRow:
        return LikelihoodRow(
            name,
            "reference",
            score.bits,
            score.error,
            score.n,
            levels,
            dims,
            "exact",
            instruments.bounds.seed,
            subject.name,
        )

    histogram = row("per-pixel histogram", histogram_score(splits.train.images, subject, levels))
    return [histogram, row("uniform", uniform_score(subject, levels))]


# ---- the report ----


def context(task: LikelihoodTask, splits: Splits, instruments: Instruments) -> ReportContext:
    """Everything a reader needs beside the numbers."""
    known, n = environment(), len(instruments.subject.images)
    last = task.first_seed + n - 1
    return ReportContext(
        title=task.title,
        model=f"{len(task.models)} baseline(s)",
        data=f"{instruments.subject.name}, {n} of {len(splits.held_out.images)} held-out images",
        command=command_line(),
        hardware=hardware(),
        versions={**known["packages"], "git": known["git"]},
        seeds=f"bounds {task.seed}; samples {task.first_seed}-{last}",
        notes=(
            f"Bits per dimension of the integers, lower is better: mean and standard error over {n} held-out images. Figures "
            "of models are upper bounds of the bits, and those of different bounds do not quite compare.",
            "Weights that are the best in validation were chosen on held-out images: their figures are a little too good.",
            f"Distances are of {n} samples to all {len(splits.train.images)} training images; samples of a VAE are expected "
            "images, without the noise of values.",
        ),
    )


def command(arguments: list[str]) -> None:
    """The command line."""
    run(resolve(LikelihoodTask, {}, arguments))


if __name__ == "__main__":
    main(command)
