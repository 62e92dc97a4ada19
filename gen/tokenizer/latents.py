"""Encode a data set once: raw latents, labels and per-channel statistics, in one file that knows what it was made from.

    mean_d, std_d over all items and positions of channel d, in float64;      model sees (latent - mean) / std

With `flip` the left-right mirrored images are encoded too, since a mirrored latent is not the latent of a mirrored image; mean
and std are then those of both together.

A cache is keyed by the fingerprint of the images and the hash of the tokenizer's weights; any other pair refuses it.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.core.files import state_hash, write_atomically
from midway.gen.data.images import ImageData, to_float
from midway.tokenizers.tokenizer import ImageTokenizer

FORMAT = "midway-latents-1"


@dataclass(frozen=True)
class Latents:
    """raw float32 (N, D, h, w) before standardisation, labels int64 (N,), mean and std float32 (D,).

    mirrored: raw latents float32 (N, D, h, w) of the left-right mirrored images, if they were asked for.
    """

    raw: Tensor
    labels: Tensor
    mean: Tensor
    std: Tensor
    data_fingerprint: str
    tokenizer_hash: str
    mirrored: Tensor | None = None

    @property
    def standardised(self) -> Tensor:
        """float32 (N, D, h, w); with `standardised_mirrored`, zero mean and unit variance per channel."""
        return self._standardise(self.raw)

    @property
    def standardised_mirrored(self) -> Tensor | None:
        """float32 (N, D, h, w) of the mirrored images, None without them."""
        return None if self.mirrored is None else self._standardise(self.mirrored)

    def _standardise(self, raw: Tensor) -> Tensor:
        return (raw - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def tokenizer_hash(tokenizer: ImageTokenizer) -> str:
    """Hash of the weights and configuration, without the latent statistics, which are measured afterwards."""
    state = {name: value for name, value in tokenizer.state_dict().items() if not name.startswith("latent")}
    config = {key: value for key, value in tokenizer.config.items() if not key.startswith("_")}
    if config["foreign"] is None:  # tokenizers of before there were any keep their hashes, and so their caches and runs
        del config["foreign"]
    return state_hash(json.dumps(config, sort_keys=True), state)


@torch.no_grad()
def encode(tokenizer: ImageTokenizer, data: ImageData, batch_size: int = 512, flip: bool = False) -> Latents:
    """Encode every image once, in order; with `flip` its mirror image too."""
    tokenizer.eval()
    raw = _raw(tokenizer, data.images, batch_size)
    mirrored = _raw(tokenizer, data.images.flip(-1), batch_size) if flip else None
    channels = (raw if mirrored is None else torch.cat([raw, mirrored])).double().transpose(0, 1).flatten(1)
    return Latents(
        raw=raw,
        labels=data.labels,
        mean=channels.mean(1).float(),
        std=channels.std(1).float(),
        data_fingerprint=data.fingerprint,
        tokenizer_hash=tokenizer_hash(tokenizer),
        mirrored=mirrored,
    )


def _raw(tokenizer: ImageTokenizer, images: Tensor, batch_size: int) -> Tensor:
    """uint8 (N, C, H, W) -> raw latents float32 (N, D, h, w) on the CPU."""
    return torch.cat([tokenizer.raw_latents(to_float(p.to(tokenizer.device))).cpu() for p in images.split(batch_size)])


def save_latents(latents: Latents, path: Path) -> None:
    """One safetensors file, completely or not at all."""
    tensors = {"raw": latents.raw, "labels": latents.labels, "mean": latents.mean, "std": latents.std}
    if latents.mirrored is not None:
        tensors["mirrored"] = latents.mirrored
    header = {"format": FORMAT, "data": latents.data_fingerprint, "tokenizer": latents.tokenizer_hash}
    write_atomically(path, save({name: value.contiguous() for name, value in tensors.items()}, header))


def load_latents(path: Path, data: ImageData, tokenizer: ImageTokenizer, flip: bool = False) -> Latents:
    """The cache at `path`, with mirrored latents if `flip` and only then.

    DataError when it is missing, no cache, made from other images or another tokenizer, or lacks mirrored latents.
    """
    encoding = f"scripts/encode.py{' --flip' if flip else ''}"
    remake = f"make it again with {encoding} --overwrite"
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            names = [name for name in file.keys() if flip or name != "mirrored"]  # noqa: SIM118 (safe_open has no iter)
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise DataError(f"no latents at {path}", str(error), f"make them with {encoding}") from None
    if header.get("format") != FORMAT:
        raise DataError(f"{path} is not a latent cache", f"its format is {header.get('format')!r}", remake)
    wanted = {"data": data.fingerprint, "tokenizer": tokenizer_hash(tokenizer)}
    for key, value in wanted.items():
        if header[key] != value:
            raise DataError(f"{path} is stale", f"its {key} is {header[key][:12]}, this run's is {value[:12]}", remake)
    if flip and "mirrored" not in tensors:
        raise DataError(f"{path} has no latents of mirrored images", "it was made without --flip", remake)
    return Latents(**tensors, data_fingerprint=header["data"], tokenizer_hash=header["tokenizer"])


def cache_path(folder: Path, data: ImageData, tokenizer: ImageTokenizer, flip: bool = False) -> Path:
    """Where the latents of these images, with `flip` of their mirror images too, under this tokenizer belong."""
    name = f"latents-{data.fingerprint[:8]}-{tokenizer_hash(tokenizer)[:8]}{'-flip' if flip else ''}"
    return folder / f"{name}.safetensors"
