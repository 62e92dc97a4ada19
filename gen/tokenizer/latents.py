"""The latents of a data set in a folder of records, read batch by batch: raw, with labels and per-channel statistics.

    model input = (latent - mean_d) / std_d,   over all images, views and positions of channel d

A record holds the V views of one image, (V, D, h, w): one or five windows of it (the centre of an image of the tokenizer's size
is the image), then, if there are mirrored views, the mirror images of these windows in the same order. The views are encoded one
by one, since a mirrored latent is not the latent of a mirrored image; mean and std are those of all of them together.

Which view a sample of a training step has is a function of (seed, step, global position). A folder is of the images of one
fingerprint and the tokenizer of one hash; with any other pair opening it fails. encoding.py writes such folders.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, raising
from midway.gen.core.files import DAMAGE, state_hash
from midway.gen.data.images import ImageData
from midway.gen.files.records import Records, open_records, record_bytes
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.interface import Items
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.weights import check_tensors

KIND = "latents"
IN_MEMORY = 256 << 20
"""Bytes of latents that are kept in memory; more are read from the disk, batch by batch."""


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
    """Raw latents of all views (B, V, D, h, w), as they are stored, and labels int64 (B,)."""

    views: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Latents:
    """An opened folder: `labels` int64 (N,), and `mean` and `std` float32 (D,) of the raw latents."""

    records: Records
    views: Views
    labels: Tensor
    mean: Tensor
    std: Tensor
    data_fingerprint: str
    tokenizer_hash: str
    kept: Tensor | None = None
    """All records, if they are few."""

    def __len__(self) -> int:
        return len(self.records)

    def read(self, items: Tensor) -> StoredViews:
        """The records int64 (B,) on the CPU. DataError naming a file that cannot be read or has changed."""
        stored = self.records.read(items) if self.kept is None else self.kept[items]
        return StoredViews(stored, self.labels[items])

    def standardised(self, batch: StoredViews, context: Context, flip: bool) -> LatentBatch:
        """One view of every sample, chosen by its place in the training, standardised in float32; on the batch's device."""
        chosen, device = self.views.choose(context, flip), batch.views.device
        rows = batch.views[:, 0] if chosen is None else batch.views[torch.arange(len(chosen), device=device), chosen]
        mean, std = (each.to(device).view(-1, 1, 1) for each in (self.mean, self.std))
        return LatentBatch((rows.float() - mean) / std, batch.labels)

    def items(self, flip: bool) -> Items:
        """For fit(), mirrored views among them with `flip`."""
        plain = self.records.dtype == "float32" and self.views.windows == 1  # all that there was in earlier versions
        form = "" if plain else f" in {self.records.dtype}, {self.views.windows} windows"
        fingerprint = f"{self.data_fingerprint} by {self.tokenizer_hash}{form}"
        return Items(self.read, len(self), fingerprint, partial(self.standardised, flip=flip))


def tokenizer_hash(tokenizer: ImageTokenizer) -> str:
    """Hash of the weights, the configuration and the tiles, without the latent statistics, which are measured afterwards."""
    state = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("latent")}
    config = {key: value for key, value in tokenizer.config.items() if not key.startswith("_")}
    if config["foreign"] is None:  # tokenizers of before there were any keep their hashes, and so their caches and runs
        del config["foreign"]
    if tokenizer.tiles is not None:  # latents of tiles are others, unless the network is local
        config["tiles"] = tokenizer.tiles
    return state_hash(json.dumps(config, sort_keys=True), state)


def open_latents(path: Path, data: ImageData, tokenizer: ImageTokenizer, flip: bool = False) -> Latents:
    """The folder at `path`; with `flip` it needs mirrored views.

    DataError when it is missing, unfinished, no folder of latents, made from other images or another tokenizer, or damaged.
    """
    encoding = f"midway encode{' --flip' if flip else ''}"
    remake = f"make it again with {encoding} --overwrite"
    if not path.exists():
        raise DataError(f"no latents at {path}", "there is no such folder", f"make them with {encoding}")
    if not path.is_dir():
        why = "it is a file: latents lie in a folder, and those of earlier versions are encoded again"
        raise DataError(f"{path} is not a latent cache", why, f"make them with {encoding}")
    records = open_records(path, KIND, remake)
    with raising(DataError, f"{path} is no whole latent cache", remake, *DAMAGE):
        latents = _opened(records, records.facts)
    wanted = {"data": data.fingerprint, "tokenizer": tokenizer_hash(tokenizer)}
    for key, value in wanted.items():
        found = str(records.facts[key])
        if found != value:
            raise DataError(f"{path} is stale", f"its {key} is {found[:12]}, this run's is {value[:12]}", remake)
    if flip and not latents.views.mirrored:
        raise DataError(f"{path} has no latents of mirrored images", "it was made without --flip", remake)
    with raising(DataError, f"{path} is no whole latent cache", remake, *DAMAGE):
        _check(latents, data, tokenizer)
    if len(records) * record_bytes(records.dtype, records.shape or ()) > IN_MEMORY:
        return latents
    return replace(latents, kept=records.read(torch.arange(len(records))))


def _opened(records: Records, facts: Mapping[str, Any]) -> Latents:
    """From the facts of the manifest; ValueError if they are not those of latents."""
    kinds = {"data": str, "tokenizer": str, "windows": int, "mirrored": bool, "mean": list, "std": list}
    if not isinstance(facts, dict):
        raise ValueError(f"facts of its manifest are {type(facts).__name__}, not dict")
    for name, kind in kinds.items():
        if type(facts.get(name)) is not kind:
            raise ValueError(f"{name} of its manifest is {facts.get(name)!r}, not {kind.__name__}")
    mean, std = (torch.tensor([float(value) for value in facts[name]]) for name in ("mean", "std"))
    if facts["windows"] not in (1, 5):
        raise ValueError(f"windows of its manifest are {facts['windows']}, not 1 or 5")
    views = Views(facts["windows"], facts["mirrored"])
    return Latents(records, views, records.tensor("labels"), mean, std, facts["data"], facts["tokenizer"])


def _check(latents: Latents, data: ImageData, tokenizer: ImageTokenizer) -> None:
    """ValueError unless the folder has the shape of this tokenizer's latents, and one record for each of these images."""
    records, channels = latents.records, torch.empty(tokenizer.latent_shape[0])
    if records.shape != (latents.views.count, *tokenizer.latent_shape):
        raise ValueError(f"its records are {records.shape}, not those of latents {tokenizer.latent_shape}")
    if len(records) != len(data.images):
        raise ValueError(f"it has {len(records)} records, and there are {len(data.images)} images")
    check_tensors(records.tensors(), {"labels": data.labels, "crc": torch.empty(len(records), dtype=torch.int64)})
    check_tensors({"mean": latents.mean, "std": latents.std}, {"mean": channels, "std": channels})
    if not torch.equal(latents.labels, data.labels):
        raise ValueError("its labels are not those of the images")


def cache_path(folder: Path, data: ImageData, tokenizer: ImageTokenizer, views: Views, dtype: str = "float32") -> Path:
    """Where the latents of these views of the images under this tokenizer belong."""
    words = ("-crops10" if views.windows > 1 else "-flip" * views.mirrored) + (
        f"-{dtype}" if dtype != "float32" else ""
    )
    return folder / f"latents-{data.fingerprint[:8]}-{tokenizer_hash(tokenizer)[:8]}{words}"
