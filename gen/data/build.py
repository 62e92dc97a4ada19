"""Build a set on the disk from a source of images: one pass, parallel, in bounded memory, and on after a kill (stored.py).

Shards are written in order, each whole or not at all; those that are there are kept if the plan of the build is the same
(build_source.py), so a build that was ended and goes on gives the bytes of one that was not. Fingerprints of the set and of both
sides of its split are computed in the pass; after an interruption, or where images were left out, in a second one.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DiskError, UsageError, raising
from midway.gen.core.files import DAMAGE, file_hash, read_json, replaced_name, replacing, write_atomically
from midway.gen.core.locks import LOCK, claimed
from midway.gen.core.text import printable
from midway.gen.data.build_pass import SPACE, BuildPass, Coloured
from midway.gen.data.build_source import differences, open_source, plan_of
from midway.gen.data.pixels import PartFingerprints, in_parts
from midway.gen.data.splits import DataConfig, check_share, held_out_mask
from midway.gen.data.stored import FINGERPRINTS, KIND, NAMES, PLAN, Encoding, StoredImages, open_stored
from midway.gen.files.decoding import check_options, counted, stated
from midway.gen.files.file_set import check_bad
from midway.gen.files.record_writer import (
    ShardIndex,
    clear_unfinished,
    finish,
    merged,
)
from midway.gen.files.records import INDEX, MANIFEST, is_records

_OWN = re.compile(
    r"records-\d{5,}\.npy(\.index)?|" + "|".join(map(re.escape, (MANIFEST, INDEX, NAMES, FINGERPRINTS, PLAN, LOCK)))
)
"""Files of a built set, and of one that is not finished."""


# ---- the whole build ----


def build(
    config: DataConfig,
    out: Path,
    keep_encoded: bool = False,
    workers: int | None = None,
    overwrite: bool = False,
) -> bool:
    """Build the images of `config` into the folder `out`; False if they are there already.

    UsageError: something else is there, which `overwrite` deletes if it is another set. DataError: the source cannot be used.
    DiskError, after which the same call goes on.
    """
    check_options(config.channels, config.resize, config.on_bad_image)
    check_share(config.held_out)
    with open_source(config, keep_encoded) as source, claimed(out, "built"):
        plan = plan_of(source, config, keep_encoded)
        if not _begin(out, plan, overwrite):
            return False
        building = BuildPass(source, out, config.on_bad_image, keep_encoded, workers)
        building.first_shape(int(_begun(out).get("planes", 0)))
        while True:
            try:
                _build(building, config, plan)
                return True
            except Coloured:  # shards of pixels are written again, those of files are kept
                building.first_shape(3)
                _write_plan(out, plan, 3)


def _build(building: BuildPass, config: DataConfig, plan: Mapping[str, Any]) -> None:
    source, out, one = building.source, building.folder, building.shape.one
    sides = [(None, source.classes), *((marks, shown(source.classes)) for marks in _sides(source.labels, config))]
    building.hashes = PartFingerprints((len(source.names), *one), source.labels, sides)
    indices = building.shards()
    records = merged(out, KIND, building.form, indices)
    encoding = Encoding(config.channels, config.resize, one) if building.encoded else None
    images, labels = StoredImages(records, torch.arange(len(records)), encoding), records.tensor("label")
    facts = _facts(building, indices, plan)
    facts["fingerprints"] = _fingerprints(building.hashes, images, labels, source.classes, config)
    facts["names"] = _write_names(building)
    finish(records, facts)
    _tidy(out)


def shown(classes: Sequence[str]) -> tuple[str, ...]:
    """Names of classes as sides of a split have them."""
    return tuple(map(printable, classes))


def _sides(labels: Tensor, config: DataConfig) -> list[Tensor]:
    """bool (N,) of the training and of the held-out side; [] where there is no split."""
    try:
        held_out = held_out_mask(labels, config.held_out, config.split_seed)
    except DataError:
        return []
    return [~held_out, held_out]


def _fingerprints(
    hashes: PartFingerprints | None, images: StoredImages, labels: Tensor, classes: tuple[str, ...], config: DataConfig
) -> dict[str, str]:
    """By their keys, of all images and of both sides; `hashes` if all images went through them."""
    sides = [(None, classes), *((marks, shown(classes)) for marks in _sides(labels, config))]
    if hashes is None:
        hashes = PartFingerprints(images.shape, labels, sides)
        for part in in_parts(images):
            hashes.add(part)
    parts = [(images, labels, classes)]
    parts += [
        (images.at_places(marks.nonzero()[:, 0]), labels[marks], own) for marks, own in sides if marks is not None
    ]
    keys = [some.key(own, names) for some, own, names in parts]
    return dict(zip(keys, hashes.results(), strict=True))


def _facts(building: BuildPass, indices: Sequence[ShardIndex], plan: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest has beside the records: the same lines as of the source in memory."""
    source, notes, grey = building.source, Counter[str](), 0
    for index in indices:
        notes.update(index.facts["notes"])
        grey += index.facts["grey"]
    skipped = check_bad(building.bad, len(source.names), building.policy)
    kept = counted(len(source.names) - len(building.bad))
    lines = (*stated(notes, grey if building.shape.planes == 3 else 0), *(f"{kept}: {note}" for note in source.notes))
    return {
        "name": source.name,
        "classes": list(source.classes),
        "shape": list(building.shape.one),
        "conversions": [*lines, *skipped],
        "left_out": list(source.left_out),
        "plan": dict(plan),
    }


def _write_names(building: BuildPass) -> str:
    """The names of the images in the set, one a line; the sha256 of the file. DiskError."""
    path, left = building.folder / NAMES, {item.name for item in building.bad}
    lines = (f"{json.dumps(name)}\n" for name in building.source.names if name not in left)
    with raising(DiskError, f"cannot write {path}", SPACE, OSError), replacing(path) as temporary:
        _write_lines(temporary, lines)
    return file_hash(path)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(lines)


# ---- the folder ----


def _begin(out: Path, plan: dict[str, Any], overwrite: bool) -> bool:
    """Make the folder ready to write missing shards; False if all is there."""
    names = {path.name: replaced_name(path) for path in out.iterdir() if path.name != LOCK}
    there = {name for name, replaced in names.items() if replaced is None}  # without what a killed build was writing
    foreign = sorted(own for name, replaced in names.items() if not _OWN.fullmatch(own := replaced or name))
    if foreign or (is_records(out) and not is_records(out, KIND)):
        why = f"it holds {foreign[0] if foreign else MANIFEST}, which is of something else"
        raise UsageError(f"{out} is no set of images", why, "choose another --out")
    finished, begun = is_records(out, KIND), PLAN in there
    if there and not overwrite:
        other = differences(plan, open_stored(out).plan if finished else _begun(out).get("plan"))
        if other:
            kind = "another set" if finished else "the beginning of another set" if begun else "what is left of a set"
            fix = "choose another --out, or pass --overwrite to delete it"
            raise UsageError(f"{out} already holds {kind} of images", f"other than then: {', '.join(other)}", fix)
        if finished:
            _tidy(out)
            return False
    with raising(DiskError, f"{out} cannot be emptied", "empty it by hand, or choose another --out", OSError):
        clear_unfinished(out)
        if not begun or overwrite:
            for path in sorted(out.iterdir(), key=lambda path: path.name != MANIFEST):  # without it nothing is read
                if path.name != LOCK:
                    path.unlink()
    if not begun or overwrite:
        _write_plan(out, plan, 0)
    return True


def _tidy(out: Path) -> None:
    """Remove from a finished set what only its build needed."""
    with raising(DiskError, f"{out} cannot be written", "permit writing", OSError):
        clear_unfinished(out)
        (out / PLAN).unlink(missing_ok=True)


def _write_plan(out: Path, plan: dict[str, Any], planes: int) -> None:
    write_atomically(out / PLAN, (json.dumps({"plan": plan, "planes": planes}, indent=1) + "\n").encode())


def _begun(out: Path) -> dict[str, Any]:
    """The file of `_write_plan`; {} if it cannot be read."""
    try:
        return dict(read_json(out / PLAN))
    except DAMAGE:
        return {}
