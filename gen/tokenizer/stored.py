"""What a folder of records has of every image of a data set, latents (latents.py) or codes (codes.py), and opening it.

A record holds the V views of one image, (V, ...): one or five windows of it (the centre of an image of the tokenizer's size is
the image), then, if there are mirrored views, the mirror images of these windows in the same order. The views are encoded one by
one, since a mirrored latent is not the latent of a mirrored image.

Which view a sample of a training step has is a function of (seed, step, global position). A folder is of the images of one
fingerprint and the tokenizer of one hash; with any other pair opening it fails. encoding.py writes such folders.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, raising
from midway.gen.core.files import DAMAGE, state_hash
from midway.gen.data.images import ImageData
from midway.gen.files.records import Records, open_records, record_bytes
from midway.gen.training.batches import Context
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.weights import check_tensors

IN_MEMORY = 256 << 20
"""Bytes of records that are kept in memory; more are read from the disk, batch by batch."""


@dataclass(frozen=True)
class Views:
    """Those of one image in a record: 1 window (the whole) or 5 (corners and centre), and whether each has its mirror image."""

    windows: int = 1
    mirrored: bool = False

    @property
    def count(self) -> int:
        """V."""
        return self.windows * (1 + self.mirrored)

    @property
    def flags(self) -> str:
        """As flags of midway encode, each after a space."""
        return " --crops 10" if self.windows > 1 else " --flip" * self.mirrored

    @property
    def suffix(self) -> str:
        """Of the name of a folder."""
        return "-crops10" if self.windows > 1 else "-flip" * self.mirrored

    def choose(self, context: Context, flip: bool) -> Tensor | None:
        """int64 (B,): the view of every sample, mirrored ones among them with `flip`; None if there is one to choose from."""
        chosen = None
        if self.windows > 1:
            chosen = (context.uniform("crop") * self.windows).long()
        if flip:
            mirror = self.windows * (context.uniform("flip") < 0.5).long()
            chosen = mirror if chosen is None else chosen + mirror
        return chosen


@dataclass(frozen=True)
class StoredViews:
    """All views (B, V, ...), as they are stored, and labels int64 (B,)."""

    views: Tensor
    labels: Tensor


class Kind(NamedTuple):
    """A kind of folder."""

    name: str
    """Of what is stored, in the manifest too: latents."""
    cache: str
    """The folder in words."""
    flags: str = ""
    """Of midway encode, after a space, with which it is made."""


@dataclass(frozen=True)
class Stored:
    """An opened folder: `labels` int64 (N,)."""

    records: Records
    views: Views
    labels: Tensor
    data_fingerprint: str
    tokenizer_hash: str
    kept: Tensor | None = field(default=None, kw_only=True)
    """All records, if they are few."""

    def __len__(self) -> int:
        return len(self.records)

    def read(self, items: Tensor) -> StoredViews:
        """The records int64 (B,) on the CPU. DataError naming a file that cannot be read or has changed."""
        stored = self.records.read(items) if self.kept is None else self.kept[items]
        return StoredViews(stored, self.labels[items])

    def chosen(self, batch: StoredViews, context: Context, flip: bool) -> Tensor:
        """One view of every sample (B, ...), chosen by its place in the training; on the batch's device."""
        chosen, device = self.views.choose(context, flip), batch.views.device
        return batch.views[:, 0] if chosen is None else batch.views[torch.arange(len(chosen), device=device), chosen]


Opened = TypeVar("Opened", bound=Stored)


def tokenizer_hash(tokenizer: ImageTokenizer) -> str:
    """Hash of the weights, the configuration and the tiles, without the latent statistics, which are measured afterwards."""
    state = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("latent")}
    config = {key: value for key, value in tokenizer.config.items() if not key.startswith("_")}
    if config["foreign"] is None:  # tokenizers of before there were any keep their hashes, and so their caches and runs
        del config["foreign"]
    if tokenizer.tiles is not None:  # latents of tiles are others, unless the network is local
        config["tiles"] = tokenizer.tiles
    return state_hash(json.dumps(config, sort_keys=True), state)


def open_stored(
    path: Path,
    kind: Kind,
    data: ImageData,
    tokenizer: ImageTokenizer,
    flip: bool,
    build: Callable[[Records], Opened],
    check: Callable[[Opened], None],
) -> Opened:
    """The folder at `path`, as `build` makes it of its records; with `flip` it needs mirrored views.

    DataError when it is missing, unfinished, of another kind, made from other images or another tokenizer, or damaged, where
    `build` and `check` raise ValueError.
    """
    encoding = f"midway encode{kind.flags}{' --flip' if flip else ''}"
    remake = f"make it again with {encoding} --overwrite"
    if not path.exists():
        raise DataError(f"no {kind.name} at {path}", "there is no such folder", f"make them with {encoding}")
    if not path.is_dir():
        why = f"it is a file: {kind.name} lie in a folder, and those of earlier versions are encoded again"
        raise DataError(f"{path} is not a {kind.cache}", why, f"make them with {encoding}")
    records = open_records(path, kind.name, remake)
    with raising(DataError, f"{path} is no whole {kind.cache}", remake, *DAMAGE):
        found = build(records)
    wanted = {"data": data.fingerprint, "tokenizer": tokenizer_hash(tokenizer)}
    for key, value in wanted.items():
        its = str(records.facts[key])
        if its != value:
            raise DataError(f"{path} is stale", f"its {key} is {its[:12]}, this run's is {value[:12]}", remake)
    if flip and not found.views.mirrored:
        raise DataError(f"{path} has no {kind.name} of mirrored images", "it was made without --flip", remake)
    with raising(DataError, f"{path} is no whole {kind.cache}", remake, *DAMAGE):
        if len(records) != len(data.images):
            raise ValueError(f"it has {len(records)} records, and there are {len(data.images)} images")
        check_tensors(records.tensors(), {"labels": data.labels, "crc": torch.empty(len(records), dtype=torch.int64)})
        if not torch.equal(found.labels, data.labels):
            raise ValueError("its labels are not those of the images")
        check(found)
    if len(records) * record_bytes(records.dtype, records.shape or ()) > IN_MEMORY:
        return found
    return replace(found, kept=records.read(torch.arange(len(records))))


def parts_of(records: Records, more: Mapping[str, type]) -> tuple[Records, Views, Tensor, str, str]:
    """The first arguments of `Stored`, by the facts of the manifest; ValueError if these are not all there, with `more`."""
    facts: Any = records.facts
    kinds = {"data": str, "tokenizer": str, "windows": int, "mirrored": bool, **more}
    if not isinstance(facts, dict):
        raise ValueError(f"facts of its manifest are {type(facts).__name__}, not dict")
    for name, kind in kinds.items():
        if type(facts.get(name)) is not kind:
            raise ValueError(f"{name} of its manifest is {facts.get(name)!r}, not {kind.__name__}")
    if facts["windows"] not in (1, 5):
        raise ValueError(f"windows of its manifest are {facts['windows']}, not 1 or 5")
    views = Views(facts["windows"], facts["mirrored"])
    return records, views, records.tensor("labels"), facts["data"], facts["tokenizer"]


def path_of(
    folder: Path, kind: Kind, data: ImageData, tokenizer: ImageTokenizer, views: Views, dtype: str = ""
) -> Path:
    """Where what is stored of these views of the images by this tokenizer belongs."""
    words = views.suffix + (f"-{dtype}" if dtype else "")
    return folder / f"{kind.name}-{data.fingerprint[:8]}-{tokenizer_hash(tokenizer)[:8]}{words}"
