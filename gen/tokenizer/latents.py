"""Encode a data set once: raw latents, labels and per-channel statistics, in one file keyed by images and tokenizer.

    model input = (latent - mean_d) / std_d,   over all items and positions of channel d

Mean and std are streamed in float64. Of n numbers with mean m and sum of squared deviations s, and n', m', s' more (Chan et al.
1983, equations 2.1 a and b):

    N = n + n'      M = m + (m' - m) n' / N      S = s + s' + (m' - m)^2 n n' / N      std = sqrt(S / (N - 1))

Unlike sums of squares they lose nothing where the mean is far from 0. With `flip` the left-right mirrored images are encoded too,
since a mirrored latent is not the latent of a mirrored image; mean and std are then those of both together.

A cache is keyed by the fingerprint of the images and the hash of the tokenizer's weights; with any other pair loading fails.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from midway.gen.core.errors import DataError, DivergedError, raising
from midway.gen.core.files import DAMAGE, read_tensors, state_hash, write_atomically
from midway.gen.data.images import ImageData, to_float
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.weights import check_tensors

FORMAT = "midway-latents-1"


@dataclass(frozen=True)
class Latents:
    """raw float32 (N, D, h, w) before standardisation, labels int64 (N,), mean and std float32 (D,).

    mirrored: raw latents float32 (N, D, h, w) of the left-right mirrored images, with `flip`.
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


class ChannelStatistics:
    """Mean and standard deviation of each of `dim` channels, in float64, batch by batch."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean, self.deviations = (torch.zeros(dim, dtype=torch.float64) for _ in range(2))

    def add(self, raw: Tensor) -> None:
        """raw (N, D, h, w) on the CPU."""
        if not raw.numel():
            return
        rows = raw.double().transpose(0, 1).flatten(1)
        new, share = rows.mean(1), rows.shape[1] / (self.count + rows.shape[1])
        self.deviations += (rows - new[:, None]).square().sum(1) + (new - self.mean).square() * self.count * share
        self.mean += (new - self.mean) * share
        self.count += rows.shape[1]

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and std (D,) float32; where all numbers are equal std is 0 but for rounding of the mean in float64."""
        return self.mean.float(), (self.deviations / max(self.count - 1, 1)).sqrt().float()


def give_statistics(tokenizer: ImageTokenizer, mean: Tensor, std: Tensor, images: Tensor) -> None:
    """`set_latent_statistics` of the latents of uint8 images (N, C, H, W).

    DivergedError if they are not finite. DataError for a channel that does not vary: of the images if one is constant there, or
    else of the latents.
    """
    try:
        tokenizer.set_latent_statistics(mean.to(tokenizer.device), std.to(tokenizer.device))
    except ValueError as error:
        what = "these latents cannot be standardised"
        if not bool((mean + std).isfinite().all()):
            fix = "its training diverged: train it again, at a lower --lr"
            raise DivergedError(what, f"the encoder's output is not finite: {error}", fix) from error
        constant = constant_channels(images)
        if not constant:
            fix = "train the tokenizer longer or with fewer channels of latents, or use other images"
            raise DataError(what, f"{error}, although every channel of the images varies", fix) from error
        fix = "use other images" if len(constant) == images.shape[1] else "use --channels 1, or other images"
        words = " and ".join(constant)
        why = f"{words} in every pixel of every image, and so the latents do not vary in every channel"
        raise DataError(what, why, f"{fix}; scripts/data.py check shows them") from error


def constant_channels(images: Tensor) -> list[str]:
    """The channels of uint8 images (N, C, H, W) with one value everywhere, in words: `channel 3 of 3 (blue) is 0`."""
    by_channel = images.transpose(0, 1).flatten(1)
    names = ("red", "green", "blue") if len(by_channel) == 3 else ("grey",) * len(by_channel)
    return [
        f"channel {i + 1} of {len(by_channel)} ({names[i]}) is {int(values[0])}"
        for i, values in enumerate(by_channel)
        if len(values) and bool((values == values[0]).all())
    ]


def latent_statistics(
    tokenizer: ImageTokenizer, images: Tensor, batch_size: int | None = None, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) -> mean and std (D,) float32 on the CPU, those of `encode`, without keeping latents."""
    statistics = ChannelStatistics(tokenizer.latent_shape[0])
    for parts in _raw(tokenizer, images, batch_size, flip):
        for part in parts:
            statistics.add(part)
    return statistics.result()


def encode(tokenizer: ImageTokenizer, data: ImageData, batch_size: int | None = None, flip: bool = False) -> Latents:
    """Encode every image once, in order; with `flip` its mirror image too."""
    statistics, batches = ChannelStatistics(tokenizer.latent_shape[0]), []
    for parts in _raw(tokenizer, data.images, batch_size, flip):
        for part in parts:
            statistics.add(part)
        batches.append(parts)
    raw, *mirrored = (torch.cat(parts) for parts in zip(*batches, strict=True))
    mean, std = statistics.result()
    return Latents(
        raw=raw,
        labels=data.labels,
        mean=mean,
        std=std,
        data_fingerprint=data.fingerprint,
        tokenizer_hash=tokenizer_hash(tokenizer),
        mirrored=mirrored[0] if mirrored else None,
    )


@torch.no_grad()
def _raw(tokenizer: ImageTokenizer, images: Tensor, batch_size: int | None, flip: bool) -> Iterator[tuple[Tensor, ...]]:
    """Of each batch of uint8 images the raw latents float32 (n, D, h, w) on the CPU; with `flip` those of its mirror images too.

    The tokenizer is in eval mode afterwards."""
    tokenizer.eval()
    for part in images.split(batch_size or images_at_once(tokenizer)):
        seen = (part, part.flip(-1)) if flip else (part,)
        yield tuple(tokenizer.raw_latents(to_float(each.to(tokenizer.device))).cpu() for each in seen)


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
    with raising(DataError, f"no latents at {path}", f"make them with {encoding}", *DAMAGE):
        tensors, header = read_tensors(path)
    if header.get("format") != FORMAT:
        raise DataError(f"{path} is not a latent cache", f"its format is {header.get('format')!r}", remake)
    wanted = {"data": data.fingerprint, "tokenizer": tokenizer_hash(tokenizer)}
    for key, value in wanted.items():
        found = header.get(key, "")
        if found != value:
            raise DataError(f"{path} is stale", f"its {key} is {found[:12]}, this run's is {value[:12]}", remake)
    if flip and "mirrored" not in tensors:
        raise DataError(f"{path} has no latents of mirrored images", "it was made without --flip", remake)
    own = {name: tensor for name, tensor in tensors.items() if flip or name != "mirrored"}
    with raising(DataError, f"{path} is no whole latent cache", remake):
        check_tensors(own, _layout(data, tokenizer, flip))
        if not torch.equal(own["labels"], data.labels):
            raise ValueError("its labels are not those of the images")
    return Latents(**own, data_fingerprint=header["data"], tokenizer_hash=header["tokenizer"])


def _layout(data: ImageData, tokenizer: ImageTokenizer, flip: bool) -> dict[str, Tensor]:
    """Names, shapes and types of the tensors of a cache, without numbers."""
    raw = torch.empty(len(data.images), *tokenizer.latent_shape, device="meta")
    mean = torch.empty(tokenizer.latent_shape[0], device="meta")
    return {"raw": raw, "labels": data.labels, "mean": mean, "std": mean, **({"mirrored": raw} if flip else {})}


def is_latent_cache(path: Path) -> bool:
    """Whether this file was written by `save_latents`."""
    try:
        return read_tensors(path)[1].get("format", "").startswith("midway-latents")
    except (OSError, SafetensorError):
        return False


def cache_path(folder: Path, data: ImageData, tokenizer: ImageTokenizer, flip: bool = False) -> Path:
    """Where the latents of these images, with `flip` of their mirror images too, under this tokenizer belong."""
    name = f"latents-{data.fingerprint[:8]}-{tokenizer_hash(tokenizer)[:8]}{'-flip' if flip else ''}"
    return folder / f"{name}.safetensors"
