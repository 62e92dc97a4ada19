"""Whether a source of images can be used for training and evaluation: problems and warnings.

A problem is an error that training would raise; a warning is accepted by training, but makes distances between sets of images
hard to interpret: images on both sides of the split, few held-out images (its bias falls as 1 / n), and
images that were saved with loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from midway.gen.core.config import to_dict
from midway.gen.core.errors import DataError, UsageError
from midway.gen.data.contents import (
    NAMED,
    ChannelStatistics,
    Contents,
    Duplicates,
    Picture,
    Shared,
    channel_statistics,
    conversions,
    duplicates,
    fingerprint_of,
    levels,
    read_contents,
    same_pixels,
    shared,
    sizes,
)
from midway.gen.data.sources import SOURCES, existing_path
from midway.gen.data.splits import DataConfig, check_share, held_out_mask
from midway.gen.data.stored import is_stored, open_stored
from midway.gen.files.decoding import LOSSY, Undecodable, counted
from midway.gen.files.file_set import check_bad
from midway.gen.files.layouts import left_out_lines

FEW = 1000
"""Held-out images below which a distance is mostly bias."""
LEAST = 2
"""Images that a covariance needs."""


@dataclass(frozen=True)
class Problem:
    """Why the images cannot be used, and what to do."""

    what: str
    why: str
    fix: str


@dataclass(frozen=True)
class SplitFacts:
    """The two sides; `leak` is of held-out images that are training images too."""

    train: int
    held_out: int
    one_sided: tuple[str, ...]  # classes with images on one side only
    untrained: tuple[str, ...]  # classes without training images
    leak: Shared


@dataclass(frozen=True)
class AgainstFacts:
    """Images that occur in another source too; `held_out` counts those of the held-out side, if there is one."""

    source: str
    images: int
    bad: int
    sizes: dict[str, int]
    shared: Shared
    held_out: int | None


@dataclass(frozen=True)
class DataFacts:
    """All that `check` finds; data.json has these fields."""

    options: dict[str, object]
    files: int
    images: int
    bad: tuple[Undecodable, ...]
    other_files: dict[str, int]  # left out, by kind
    bare_folders: tuple[str, ...]  # without images
    classes: dict[str, int]
    channels: dict[int, int]
    sizes: dict[str, int]
    conversions: dict[str, int]
    levels: int | None
    statistics: tuple[ChannelStatistics, ...]
    fingerprint: str | None  # as in training; None when the images cannot be used
    duplicates: Duplicates
    other_label: Duplicates  # those groups that have more than one label
    split: SplitFacts | None
    against: AgainstFacts | None
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()


# ---- finding ----


def check(config: DataConfig, against: str | None = None, full: bool = False) -> DataFacts:
    """Decode everything and find all problems of training with these options. Errors as of `read_contents`.

    `full` compares the sha256 of every file of a built set first: DataError, or UsageError for any other source.
    """
    check_share(config.held_out)
    if full:
        _check_files(config.data)
    if against is not None and against not in SOURCES:
        existing_path(against)  # before hours of decoding
    contents = read_contents(config)
    other = None if against is None else read_contents(replace(config, data=against))
    errors = list(_errors(contents, config))
    fingerprint = None if errors else fingerprint_of(contents, config)
    chosen = _held_out(contents, config, errors)
    facts = _facts(contents, other, chosen, config)
    problems = tuple(Problem(error.what, error.why, error.fix) for error in errors)
    return replace(facts, fingerprint=fingerprint, problems=problems, warnings=tuple(_warnings(facts)))


def _check_files(source: str) -> None:
    if source in SOURCES or not is_stored(existing_path(source)):
        raise UsageError("--full", f"{source} is no built set, so no sha256 of its files is known", "drop it")
    open_stored(existing_path(source)).images.records.verify()


def _errors(contents: Contents, config: DataConfig) -> Iterator[DataError]:
    """All errors of `load_images`, not only the first."""
    try:
        check_bad(contents.bad, len(contents.pictures) + len(contents.bad), config.on_bad_image)
    except DataError as error:
        yield error
    if contents.error is not None:
        yield contents.error
    if len({picture.size for picture in contents.pictures}) > 1:
        smallest = min(min(picture.size) for picture in contents.pictures)
        fix = f"pass --resize N to bring all to N x N (the smallest side here is {smallest})"
        yield DataError("images differ in size", "all images of a set are stacked to one tensor", fix)


def _held_out(contents: Contents, config: DataConfig, errors: list[DataError]) -> Tensor | None:
    """bool (N,) of the held-out side; None, with an error added, when there is none. Without classes there is no split."""
    if contents.error is not None:
        return None
    try:
        chosen = held_out_mask(contents.labels, config.held_out, config.split_seed)
    except DataError as error:
        errors.append(error)
        return None
    for side, count in (("held-out", int(chosen.sum())), ("training", int((~chosen).sum()))):
        if count < LEAST:
            what = f"the {side} side of the split has {count} image, a covariance needs {LEAST}"
            errors.append(DataError(what, "no distance can be measured", "use more images or another --held-out"))
    return chosen


def _facts(contents: Contents, other: Contents | None, chosen: Tensor | None, config: DataConfig) -> DataFacts:
    pictures, labels = contents.pictures, contents.labels.tolist()
    counts = torch.bincount(contents.labels, minlength=len(contents.classes)).tolist()
    groups = same_pixels(pictures)
    contradicting = [group for group in groups if len({labels[place] for place in group}) > 1]
    grey = sum(picture.channels == 1 for picture in pictures)
    return DataFacts(
        options=to_dict(config),
        files=len(pictures) + len(contents.bad),
        images=len(pictures),
        bad=contents.bad,
        other_files=dict(contents.left_out),
        bare_folders=contents.bare,
        classes=dict(zip(contents.classes, counts, strict=True)),
        channels={channels: count for channels, count in ((1, grey), (3, len(pictures) - grey)) if count},
        sizes=sizes(pictures),
        conversions=conversions(contents),
        levels=levels(pictures),
        statistics=channel_statistics(pictures),
        fingerprint=None,
        duplicates=duplicates(pictures, groups),
        other_label=duplicates(pictures, contradicting),
        split=None if chosen is None else _split_facts(contents, chosen),
        against=None if other is None else _against_facts(contents, other, chosen),
    )


def _side(contents: Contents, chosen: Tensor) -> list[Picture]:
    return [picture for picture, wanted in zip(contents.pictures, chosen.tolist(), strict=True) if wanted]


def _split_facts(contents: Contents, chosen: Tensor) -> SplitFacts:
    held_out, train = _side(contents, chosen), _side(contents, ~chosen)
    counts = [torch.bincount(contents.labels[side], minlength=len(contents.classes)) for side in (chosen, ~chosen)]
    one_sided = ((counts[0] == 0) != (counts[1] == 0)).tolist()
    names = tuple(name for name, alone in zip(contents.classes, one_sided, strict=True) if alone)
    untrained = tuple(name for name, count in zip(contents.classes, counts[1].tolist(), strict=True) if not count)
    return SplitFacts(len(train), len(held_out), names, untrained, shared(held_out, train))


def _against_facts(contents: Contents, other: Contents, chosen: Tensor | None) -> AgainstFacts:
    found = shared(contents.pictures, other.pictures)
    held_out = None if chosen is None else shared(_side(contents, chosen), other.pictures).count
    return AgainstFacts(other.source, len(other.pictures), len(other.bad), sizes(other.pictures), found, held_out)


# ---- warnings ----


def _warnings(facts: DataFacts) -> Iterator[str]:
    if facts.bad:
        yield f"{counted(len(facts.bad))} of {facts.files} cannot be decoded or used; the figures do not include them"
    yield from (f"left out: {line}" for line in left_out_lines(facts.other_files, facts.bare_folders))
    if any(note.startswith(LOSSY) for note in facts.conversions):
        yield "lossy files: their loss is part of the data; save samples as PNG, since JPEG would change their distance"
    yield from _copies_warnings(facts)
    if facts.split is not None:
        yield from _split_warnings(facts.split)
    if facts.against is not None:
        yield from _against_warnings(facts, facts.against)


def _copies_warnings(facts: DataFacts) -> Iterator[str]:
    if facts.duplicates.copies:
        yield f"{counted(facts.duplicates.copies)} with the pixels of another{_groups(facts.duplicates)}"
    if facts.other_label.groups:
        pictures = "picture has" if facts.other_label.groups == 1 else "pictures have"
        yield f"{facts.other_label.groups} {pictures} more than one label{_groups(facts.other_label)}"


def _split_warnings(split: SplitFacts) -> Iterator[str]:
    if split.leak.count:
        what = f"{split.leak.count} of {split.held_out} held-out images have the pixels of a training image"
        yield f"{what}{_pairs(split.leak)}: these are not unseen images; remove the copies"
    if split.held_out < FEW:
        what = f"{counted(split.held_out)} held out, fewer than {FEW}: the metric is bias-dominated"
        yield f"{what}; compare distances at this number of images only, and with the floor"
    for what, names in (
        ("classes on one side of the split only", split.one_sided),
        ("classes without training images, which are not sampled", split.untrained),
    ):
        if names:
            yield f"{what} ({len(names)}): {', '.join(names[:NAMED])}{', ...' if len(names) > NAMED else ''}"


def _against_warnings(facts: DataFacts, against: AgainstFacts) -> Iterator[str]:
    if against.bad:
        yield f"{counted(against.bad)} of {against.source} cannot be decoded or used, and were not compared"
    if against.shared.count:
        side = "" if against.held_out is None else f" ({against.held_out} held out)"
        same = f"{counted(against.shared.count)}{side} with the pixels of an image in {against.source}"
        yield f"{same}{_pairs(against.shared)}"
    if not facts.sizes.keys() & against.sizes.keys():
        yield f"no size occurs in both this source and {against.source}, so nothing can be equal: pass --resize N"


def _groups(found: Duplicates) -> str:
    return _listed([" = ".join(group[:NAMED]) for group in found.first], found.groups)


def _pairs(found: Shared) -> str:
    return _listed([f"{mine} = {other}" for mine, other in found.first], found.count)


def _listed(first: list[str], count: int) -> str:
    return f" ({'; '.join(first)}{'; ...' if count > len(first) else ''})"
