"""Compare tokenizers: midway evaluate-tokenizer --tokenizers runs/cifar10-fsq runs/cifar10-vq"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.core.locks import made
from midway.gen.core.processes import best_device
from midway.gen.core.ranges import BATCH, COUNT, SEED, WIDTH, check_flag_ranges
from midway.gen.core.runs import Run
from midway.gen.core.text import echo, printable
from midway.gen.data.pixels import Images
from midway.gen.data.places import DataPathFlag, changed_since, data_of, images_at, splits_of
from midway.gen.data.sources import shown_source
from midway.gen.data.splits import (
    DataConfig,
    Splits,
    load_splits,
    same_images,
    same_source,
)
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.evaluation.compared import load_alike
from midway.gen.evaluation.tokenizers import (
    SHOWN,
    EvaluationConfig,
    Instruments,
    TokenizerResult,
    check_size,
    choose,
    measure,
)
from midway.gen.features.extractor import Extractor
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import FeatureReference, Subject, make_reference
from midway.gen.flags.cli import Flat, resolve
from midway.gen.flags.evaluation_flags import UNNAMED
from midway.gen.flags.sampling_flags import TileFlags
from midway.gen.progress.bar import Progress
from midway.gen.progress.finished import unfinished
from midway.gen.report.notes import empty_notes
from midway.gen.report.table import ReportContext
from midway.gen.report.tokenizers import check_out, terminal_text, write_tokenizer_report
from midway.tokenizers.tokenizer import ImageTokenizer

NONE = "none"


@dataclass(frozen=True, kw_only=True)
class TokenizersTask(DataPathFlag, TileFlags):
    """Reconstruction, codes, latents and robustness of tokenizers on the same images, in one report.

    Writes results.csv, results.jsonl, report.md, report.html and three plots.
    """

    tokenizers: tuple[Path, ...]
    """Run directories of tokenizers; without --data they were trained on the same data and split."""
    data: Annotated[DataConfig, Flat] = field(default_factory=lambda: UNNAMED)
    """Measure on the held-out side of another source (default: of the tokenizers' own), against its training side."""
    features: str | None = None
    """Feature network (default: effnet-lite0): effnet-lite0-full, pixels, inception, inception-pytorch, dinov2-vitb14,
    dinov2-vitl14, clip-vitb32, clip-vitl14, or the run directory of one trained on these images. none: leave out the
    distances."""
    feature_weights: Annotated[Path | None, tyro.conf.arg(aliases=["--inception-weights"])] = None
    """File with the weights of a published feature network (default: found on this machine, or downloaded)."""
    out: Path | None = None
    """Directory to write (default: tokenizer-report/ beside the first tokenizer, with --data tokenizer-report-SOURCE/)."""
    n: int | None = None
    """Held-out images, as many of every class (default: all). Distances compare only at the same number."""
    batch_size: int | None = None
    """Images encoded and decoded at once (default: by the memory of this machine)."""
    noise: tuple[float, ...] = EvaluationConfig.noise
    """Noise on the latents, in standard deviations of each channel."""
    lpips_weights: Path | None = None
    """LPIPS is measured when torchvision's weights of VGG-16 are given."""
    seed: int = 0
    """Of the noise and of draws from posteriors."""
    title: str = "Tokenizers compared"
    """Title of the report."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, n=COUNT, batch_size=BATCH, seed=SEED, tile=WIDTH)


def run(task: TokenizersTask) -> list[TokenizerResult]:
    """Check everything, measure, print the table, write the report."""
    config = EvaluationConfig(task.n, task.batch_size, task.noise, task.seed)
    device = best_device()
    other = named_data(task.data)
    tokenizers, _ = load(task.tokenizers, device, other)
    runs = [Run.open(path, "tokenizer") for path in task.tokenizers]
    data = other or images_at(runs[0], task.data_path, task.data.download)
    features = read_features(task, data)
    splits = load_splits(data) if other else splits_of(runs[0], data)
    subject = choose(splits.held_out, config)
    for name, tokenizer in tokenizers.items():
        check_size(name, tokenizer, subject.images, named=other is not None)
    folder = "tokenizer-report" if other is None else f"tokenizer-report-{printable(Path(other.data).stem)}"
    out = task.out or task.tokenizers[0].resolve().parent / folder
    check_out(out)
    warnings = image_notes(task.tokenizers, other, splits)
    state = unfinished(*runs, task.features)
    echo(*state, *warnings)
    for tokenizer in tokenizers.values():
        task.apply_tiles(tokenizer)
    perceptual = make_perceptual(task.lpips_weights, subject.images, device)
    reference = open_reference(features, splits, subject.images, device, "the tokenizers make")
    instruments = Instruments(*reference, *perceptual)
    measured = []
    with made(out):  # an error before the work
        with Progress("tokenizer", len(tokenizers)) as progress:
            for name, tokenizer in tokenizers.items():
                progress.at(name)
                measured.append(measure(name, tokenizer, subject, instruments, config))
                progress.advance()
        write_tokenizer_report(
            out, measured, subject.images[:SHOWN], context(task, splits, subject, features, warnings, state)
        )
    echo(terminal_text([m.row for m in measured], state))
    echo(f"report: {out / 'report.html'}")
    return measured


def named_data(data: DataConfig) -> DataConfig | None:
    """What --data and its flags name; None for nothing, UsageError for flags without --data."""
    if data.data:
        return data
    if replace(data, download=UNNAMED.download) != UNNAMED:
        what, why = "--data is not given", "the tokenizers' own images are measured as they were trained on"
        raise UsageError(what, why, "drop --held-out, --split-seed, --channels, --resize and --on-bad-image")
    return None


def load(
    paths: tuple[Path, ...], device: torch.device, other: DataConfig | None = None
) -> tuple[dict[str, ImageTokenizer], DataConfig]:
    """All tokenizers by name, and the data of the first, which all share unless they are measured on `other`.

    Errors as `load_alike`; UsageError where `other` is a tokenizer's own source in another split.
    """
    loaded = load_alike(
        paths,
        "--tokenizers",
        lambda path: load_tokenizer(path, device),
        lambda path: Run.open(path, "tokenizer"),
        other,
    )
    for name, (_, own) in loaded.items():
        if other is not None and same_source(own, other) and not same_split(own, other):
            raise UsageError(
                f"--data {other.data} with {name}",
                f"it was trained on this source by --held-out {own.held_out} --split-seed {own.split_seed}; of another split the "
                "held-out images are training images",
                "pass these flags, drop --data, or name another source",
            )
    return {name: tokenizer for name, (tokenizer, _) in loaded.items()}, next(iter(loaded.values()))[1]


def same_split(a: DataConfig, b: DataConfig) -> bool:
    """Whether two configurations of one source hold out the same images."""
    return (a.held_out, a.split_seed) == (b.held_out, b.split_seed)


def image_notes(paths: tuple[Path, ...], other: DataConfig | None, splits: Splits) -> tuple[str, ...]:
    """Warnings about the measured images: another source than the tokenizers', or their own that changed."""
    runs = [Run.open(path, "tokenizer") for path in paths]
    own = [run for run in runs if other is None or same_images(data_of(run), other)]
    notes = (
        *(note for run in own for note in changed_since(run, splits.train)),
        *empty_notes(splits, conditional=False),
    )
    if other is None:
        return notes
    trained = ", ".join(f"{run.path.name} on {shown_source(data_of(run).data)}" for run in runs)
    return (f"Measured on {shown_source(other.data)}; trained: {trained}.", *notes)


def read_features(task: TokenizersTask, data: DataConfig) -> Extractor | None:
    """The feature network, None for `--features none`; DataError if it was trained on other images."""
    if task.features == NONE:
        return None
    what = f"--data {data.data}" if task.data.data else "the tokenizers"
    try:
        return named_extractor(task.features, data, what, task.feature_weights)
    except UsageError as error:
        raise UsageError(error.what, error.why, f"{error.fix}, or --features none to leave out the distances") from None


def open_reference(
    features: Extractor | None, splits: Splits, images: Images, device: torch.device, what: str
) -> tuple[FeatureReference | None, float | None]:
    """The feature network with its reference, and what the held-out `images` score; warnings of the reference are printed.

    DataError if the network takes no such images, UsageError if it needs more of them.
    """
    if features is None:
        return None, None
    features.check(images, what)
    features.check_count(len(images))
    reference = make_reference(features.to(device), features.name, splits.train)
    echo(*reference.warnings)
    return reference, reference.distance(images)


def make_perceptual(
    weights: Path | None, images: Images, device: torch.device
) -> tuple[Callable[[Tensor, Tensor], Tensor] | None, str | None]:
    """LPIPS and its name; UsageError if the weights cannot be read or the images are too small for it."""
    if weights is None:
        return None, None
    from midway.tokenizers.perceptual import Perceptual

    try:
        perceptual = Perceptual("vgg", weights).to(device)
        blank = torch.zeros(1, *images.shape[1:], device=device)
        perceptual(blank, blank)
    except ValueError as error:
        raise UsageError("LPIPS cannot be measured", str(error), "correct or drop --lpips-weights") from None
    return perceptual, perceptual.protocol


def context(
    task: TokenizersTask,
    splits: Splits,
    subject: Subject,
    features: Extractor | None,
    warnings: tuple[str, ...],
    state: tuple[str, ...],
) -> ReportContext:
    """Everything a reader needs beside the numbers."""
    n, train = len(subject.images), len(splits.train.images)
    distances = (
        f"Every distance is measured on {n} images against all {train} training images, and depends on the number of images. "
        + ("" if features is None else features.note),
        "The interpolated distance follows iFID (arXiv 2603.05630): spherical interpolation at 1/2 with the neighbour of least "
        f"angle, here among the {n} images themselves and in latents standardised per channel.",
    )
    count = len(task.tokenizers)
    return ReportContext(
        title=task.title,
        model=f"{count} tokenizer{'s' if count > 1 else ''}",
        data=f"{subject.name}, {len(subject.images)} images",
        seeds=str(task.seed),
        warnings=state,
        notes=(
            *warnings,
            "Reconstructions are rounded to 8 bits. The PSNR of an image is at most 58.92 dB, that of rounding to 8 bits itself; "
            "the figure is the mean over images.",
            "SSIM is that of Wang et al. 2004: 11 x 11 Gaussian window, or the largest odd one that fits, inside the image, the "
            "mean over channels.",
            *(() if task.features == NONE else distances),
            f"Codes are counted over {n} images; a codebook cannot show more codes than there were tokens.",
        ),
    )


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(TokenizersTask, {}, arguments))
