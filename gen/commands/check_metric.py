"""Does a metric answer to damage? midway check-metric --data digits --features effnet-lite0,pixels

Real held-out images are damaged in known ways and measured in every feature space that --features names. The first is the
headline: where its Fréchet distance does not answer to a damage as required, the command ends with exit code 1 after its report.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import tyro

from midway.gen.commands.metric_report import check_out, lines, terminal_text, verdict, write_report
from midway.gen.core.errors import MidwayError, UsageError
from midway.gen.core.locks import made
from midway.gen.core.processes import best_device
from midway.gen.core.ranges import COUNT, check_flag_ranges
from midway.gen.core.text import echo
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.evaluation.damages import DAMAGES
from midway.gen.evaluation.metric_check import SpaceCheck, check_space
from midway.gen.features.extractor import Extractor, plain_float32
from midway.gen.features.open import named_extractor
from midway.gen.features.reference import Subject, balanced_subject, make_reference
from midway.gen.flags.cli import Flat, names, resolve
from midway.gen.progress.finished import unfinished
from midway.gen.report.table import ReportContext

LEAST, MOST = 20, 10_000
"""Held-out images of a check."""
SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class CheckTask:
    """The answers of Fréchet distance, KID and sliced distance to known damage of real images, as multiples of their floor.

    Writes results.csv, results.jsonl, report.md and report.html. Exit code 1: the first space does not answer as required.
    """

    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    features: str = "effnet-lite0,pixels"
    """Comma-separated feature spaces, the first of which must answer: effnet-lite0, effnet-lite0-full, pixels, inception,
    dinov2-vitb14, dinov2-vitl14, clip-vitb32, clip-vitl14, or run directories of networks trained on these images."""
    feature_weights: Annotated[Path | None, tyro.conf.arg(aliases=["--inception-weights"])] = None
    """File with the weights of the first, published, feature network (default: found on this machine, or downloaded)."""
    n: int | None = None
    """Held-out images, classes in proportion (default: all, at most 10,000, which are held in memory)."""
    out: Path = Path("runs/metric-check")
    """Directory to write."""
    title: str = "Does the metric answer to damage?"
    """Title of the report."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, n=COUNT)


def run(task: CheckTask) -> list[SpaceCheck]:
    """Check everything, measure, print the tables, write the report. MidwayError if the first space fails."""
    device = best_device()
    words = names(task.features)
    if not words or len({*words}) < len(words):
        raise UsageError(f"--features {task.features}", "every feature space is named once", "correct the list")
    check_out(task.out)
    extractors = open_all(task, words)
    splits = load_splits(task.data)
    subject = chosen(splits, task)
    for extractor in extractors:
        extractor.check(splits.train.images, "the data are")
        extractor.check_count(len(subject.images))
    with made(task.out), plain_float32(device):
        checks = []
        for extractor in extractors:
            reference = make_reference(extractor.to(device), extractor.name, splits.train)
            checks.append(check_space(reference, subject))
        write_report(task.out, checks, pictures(subject), context(task, splits, subject, extractors, checks))
    echo(terminal_text(checks))
    echo(f"report: {task.out / 'report.html'}")
    require_answers(checks[0])
    return checks


def open_all(task: CheckTask, words: tuple[str, ...]) -> list[Extractor]:
    """The feature networks by name; errors as `named_extractor`."""
    weights = {words[0]: task.feature_weights}
    return [named_extractor(word, task.data, "the data", weights.get(word)) for word in words]


def chosen(splits: Splits, task: CheckTask) -> Subject:
    """The held-out images, classes in proportion; UsageError for too few, or more than there are."""
    available = len(splits.held_out.images)
    n = min(available, MOST) if task.n is None else task.n
    if not LEAST <= n <= available:
        why = f"a check needs at least {LEAST} images, and {available} are held out"
        raise UsageError(f"{n} held-out images", why, "change --n, or raise --held-out")
    return balanced_subject(splits.held_out, n)


def pictures(subject: Subject) -> dict[str, torch.Tensor]:
    """The first images, undamaged and under every damage of pixels."""
    return {"held-out images": subject.images[:SHOWN]} | {
        damage.name: changed[:SHOWN] for damage in DAMAGES if (changed := damage.change(subject)) is not subject.pixels
    }


def require_answers(check: SpaceCheck) -> None:
    """MidwayError, with exit code 1, unless the headline's distance reaches what every damage requires."""
    if check.failed:
        raise MidwayError(
            "the metric does not answer to damage",
            verdict(check),
            "hold out more images, or name another feature space first, by default --features effnet-lite0,pixels",
        )


def context(
    task: CheckTask, splits: Splits, subject: Subject, extractors: list[Extractor], checks: list[SpaceCheck]
) -> ReportContext:
    """Everything a reader needs beside the numbers."""
    return ReportContext(
        title=task.title,
        warnings=unfinished(*names(task.features)),
        model="real images, damaged",
        data=f"{subject.name}, {len(subject.images)} images; reference {splits.train.name}@{splits.train.fingerprint[:12]}, "
        f"{len(splits.train.images)} images",
        notes=(
            *lines(checks),
            *(extractor.note for extractor in extractors),
            "A perceptual distance need not answer to noise 0.02, a shift of one pixel or JPEG 75: they are reported only.",
            "Missing classes leave fewer images; their floor is that of as many. Each class, or half, is left out in turn.",
        ),
    )


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(CheckTask, {}, arguments))
