"""The result of a check of images as text, and as data.json with bad_files.txt beside it."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from midway.gen.core.errors import DataError, DiskError
from midway.gen.core.files import read_json, write_atomically
from midway.gen.core.text import printable
from midway.gen.data.check import DataFacts, Problem, SplitFacts
from midway.gen.files.decoding import Undecodable, counted, listed_counts

DATA_JSON, BAD_FILES = "data.json", "bad_files.txt"


# ---- text ----


def text(facts: DataFacts) -> str:
    """One fact a line, then every bad file, warnings and problems."""
    return "".join(f"{printable(f'{head:<13}{body}')}\n" for head, body in _lines(facts))


def _lines(facts: DataFacts) -> Iterator[tuple[str, str]]:
    yield "data", f"{facts.options['data']}: {counted(facts.images)}, {_channels(facts.channels)}"
    yield "sizes", listed_counts(facts.sizes)
    yield "classes", f"{len(facts.classes)}: {listed_counts(facts.classes)}{_extremes(facts.classes)}"
    yield from (("conversion", f"{counted(count)}: {note}") for note, count in facts.conversions.items())
    yield "levels", str(facts.levels or "none")
    for channel, of in enumerate(facts.statistics):
        levels = f"mean {of.mean_level:.4f}, std {of.std_level:.4f} of 255"
        yield f"channel {channel}", f"mean {of.mean:+.6f}, std {of.std:.6f} in [-1, 1]; {levels}"
    yield "fingerprint", facts.fingerprint or "none: these images cannot be used for training"
    yield "duplicates", f"{counted(facts.duplicates.copies)} with the pixels of another"
    yield "split", "none" if facts.split is None else _split(facts.split)
    if facts.against is not None:
        found = facts.against
        equal = f"{counted(found.shared.count)} here with the pixels of one of them"
        yield "against", f"{found.source}: {counted(found.images)}; {equal}"
    yield from (("bad", f"{item.name}: {item.reason}") for item in facts.bad)
    yield from (("warning", warning) for warning in facts.warnings)
    yield from (("problem", f"{problem.what}; {problem.fix}") for problem in facts.problems)


def _channels(counts: Mapping[int, int]) -> str:
    names = {1: "grey (1 channel)", 3: "RGB (3 channels)"}
    if len(counts) < 2:
        return "".join(names[channels] for channels in counts) or "none decoded"
    return ", ".join(f"{count} {names[channels]}" for channels, count in counts.items())


def _extremes(counts: Mapping[str, int]) -> str:
    return f"; {min(counts.values())} to {max(counts.values())} images each" if len(counts) > 1 else ""


def _split(split: SplitFacts) -> str:
    return f"{split.train} training, {split.held_out} held out, {split.leak.count} of these copies of training images"


# ---- files ----


def check_writable(directory: Path) -> None:
    """DiskError before hours of decoding rather than after; nothing is made yet."""
    there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = f"{there} is not a directory that can be written"
        raise DiskError(f"cannot write into {directory}", why, "choose another --out")


def write_data_report(directory: Path, facts: DataFacts) -> list[Path]:
    """data.json, and bad_files.txt if there are bad files (that of an earlier report goes if not); the paths. DiskError."""
    path, listing = directory / DATA_JSON, directory / BAD_FILES
    listed = _lists_bad_files(path)
    write_atomically(path, (json.dumps(asdict(facts), indent=2, allow_nan=False) + "\n").encode())
    if not facts.bad:
        if listed:
            listing.unlink(missing_ok=True)
        return [path]
    write_atomically(listing, "".join(map(_bad_line, facts.bad)).encode(errors="surrogateescape"))
    return [path, listing]


def _lists_bad_files(path: Path) -> bool:
    """Whether this is the data.json of images with bad files, which bad_files.txt beside it is of then."""
    try:
        return bool(read_json(path)["bad"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _bad_line(item: Undecodable) -> str:
    name = printable(item.name) if re.search(r"[\t\r\n]", item.name) else item.name  # else as the file system has it
    return f"{name}\t{printable(' '.join(item.reason.split()))}\n"


def error_of(source: str, problems: tuple[Problem, ...]) -> DataError:
    """All problems as the one error that the command ends with."""
    why = "; ".join(problem.what for problem in problems)
    return DataError(f"{source} cannot be used as it is", why, "; ".join(problem.fix for problem in problems))
