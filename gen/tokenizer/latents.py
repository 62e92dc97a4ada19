"""The latents of a data set in a folder of records (stored.py): raw, with labels and per-channel statistics.

    model input = (latent - mean_d) / std_d,   over all images, views and positions of channel d

Mean and std are those of all views together.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.data.images import ImageData
from midway.gen.files.records import Records
from midway.gen.tokenizer.stored import Kind, Stored, StoredViews, Views, open_stored, parts_of, path_of
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.interface import Items
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.weights import check_tensors

KIND = Kind("latents", "latent cache")


@dataclass(frozen=True)
class Latents(Stored):
    """An opened folder; records are raw latents (V, D, h, w), `mean` and `std` float32 (D,) theirs."""

    mean: Tensor
    std: Tensor

    def standardised(self, batch: StoredViews, context: Context, flip: bool) -> LatentBatch:
        """One view of every sample, chosen by its place in the training, standardised in float32; on the batch's device."""
        rows = self.chosen(batch, context, flip)
        mean, std = (each.to(rows.device).view(-1, 1, 1) for each in (self.mean, self.std))
        return LatentBatch((rows.float() - mean) / std, batch.labels)

    def items(self, flip: bool) -> Items:
        """For fit(), mirrored views among them with `flip`."""
        plain = self.records.dtype == "float32" and self.views.windows == 1  # all that there was in earlier versions
        form = "" if plain else f" in {self.records.dtype}, {self.views.windows} windows"
        fingerprint = f"{self.data_fingerprint} by {self.tokenizer_hash}{form}"
        return Items(self.read, len(self), fingerprint, partial(self.standardised, flip=flip))


def open_latents(path: Path, data: ImageData, tokenizer: ImageTokenizer, flip: bool = False) -> Latents:
    """The folder at `path`; with `flip` it needs mirrored views. DataError as `open_stored`."""
    return open_stored(path, KIND, data, tokenizer, flip, _opened, partial(_check, tokenizer=tokenizer))


def _opened(records: Records) -> Latents:
    """From the facts of the manifest; ValueError if they are not those of latents."""
    found = parts_of(records, {"mean": list, "std": list})
    mean, std = (torch.tensor([float(value) for value in records.facts[name]]) for name in ("mean", "std"))
    return Latents(*found, mean, std)


def _check(latents: Latents, tokenizer: ImageTokenizer) -> None:
    """ValueError unless the folder has the shape of this tokenizer's latents."""
    channels = torch.empty(tokenizer.latent_shape[0])
    if latents.records.shape != (latents.views.count, *tokenizer.latent_shape):
        raise ValueError(f"its records are {latents.records.shape}, not those of latents {tokenizer.latent_shape}")
    check_tensors({"mean": latents.mean, "std": latents.std}, {"mean": channels, "std": channels})


def cache_path(folder: Path, data: ImageData, tokenizer: ImageTokenizer, views: Views, dtype: str = "float32") -> Path:
    """Where the latents of these views of the images under this tokenizer belong."""
    return path_of(folder, KIND, data, tokenizer, views, dtype if dtype != "float32" else "")
