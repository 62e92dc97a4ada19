"""Latents of a few images, written to a folder and read again whole."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.data.images import ImageData
from midway.gen.tokenizer.encoding import Encoding, encode
from midway.gen.tokenizer.latents import open_latents
from midway.gen.tokenizer.stored import Views
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class Whole:
    """Raw latents of images and, with `flip`, of mirrored ones, (N, D, h, w) each; labels, mean and std."""

    raw: Tensor
    mirrored: Tensor | None
    labels: Tensor
    mean: Tensor
    std: Tensor

    @property
    def standardised(self) -> Tensor:
        return (self.raw - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)


def read_whole(path: Path, data: ImageData, tokenizer: ImageTokenizer, flip: bool = False) -> Whole:
    """Of a finished folder."""
    found = open_latents(path, data, tokenizer, flip)
    views = found.records.read(torch.arange(len(found)))
    return Whole(views[:, 0], views[:, 1] if flip else None, found.labels, found.mean, found.std)


def encoded(tokenizer: ImageTokenizer, data: ImageData, batch_size: int | None = None, flip: bool = False) -> Whole:
    """What `encode` writes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "latents")
        encode(path, tokenizer, data, Encoding(Views(mirrored=flip), batch_size=batch_size))
        return read_whole(path, data, tokenizer, flip)
