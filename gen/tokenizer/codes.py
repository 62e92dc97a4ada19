"""The codes of a data set in a folder of records (stored.py): integers with labels, for priors.

codes.json     the plan: images, tokenizer, views, dtype, batch
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DivergedError, UsageError, raising
from midway.gen.core.processes import ProcessInfo
from midway.gen.data.images import ImageData, to_float
from midway.gen.data.pixels import Images
from midway.gen.files.records import Records
from midway.gen.tokenizer.encoding import Encoding, Form, write_views
from midway.gen.tokenizer.stored import Kind, Stored, StoredViews, Views, open_stored, parts_of, path_of
from midway.gen.training.batches import CodeBatch, Context
from midway.gen.training.interface import Items
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.tokenizer import ImageTokenizer

KIND = Kind("codes", "cache of codes", " --kind codes")
PLAN = "codes.json"


class Layout(Protocol):
    """How codes are a sequence of tokens (gen/priors/layout.py)."""

    def tokens(self, indices: Tensor) -> Tensor:
        """int64 (B, *S) -> (B, L, D). ValueError for codes that do not exist."""
        ...


@dataclass(frozen=True)
class Codes(Stored):
    """An opened folder; records are codes (V, *S)."""

    def tokens(self, items: Tensor, layout: Layout) -> StoredViews:
        """All views of the records int64 (B,), as tokens int64 (B, V, L, D). DataError as `read`, and for codes out of range."""
        found = self.read(items)
        with raising(
            DataError, f"{self.records.folder} has codes that this tokenizer does not have", self.records.remake
        ):
            tokens = layout.tokens(found.views.flatten(0, 1))
        return StoredViews(tokens.unflatten(0, found.views.shape[:2]), found.labels)

    def batch(self, found: StoredViews, context: Context, flip: bool) -> CodeBatch:
        """One view of every sample, chosen by its place in the training; on the device of `found`."""
        return CodeBatch(self.chosen(found, context, flip), found.labels)

    def items(self, layout: Layout, flip: bool) -> Items:
        """For fit(), mirrored views among them with `flip`."""
        fingerprint = f"{self.data_fingerprint} by {self.tokenizer_hash}, codes of {self.views.windows} window(s)"
        return Items(partial(self.tokens, layout=layout), len(self), fingerprint, partial(self.batch, flip=flip))


def encode_codes(
    folder: Path,
    tokenizer: ImageTokenizer,
    data: ImageData,
    views: Views,
    batch_size: int | None = None,
    process: ProcessInfo | None = None,
    overwrite: bool = False,
) -> None:
    """Write the folder; as `encode`, for codes. UsageError for a tokenizer without any, DivergedError, DiskError."""
    check_codes(tokenizer)
    form = Form(
        KIND.name, PLAN, code_dtype(tokenizer), index_shape(tokenizer), lambda images, _: codes_of(tokenizer, images)
    )
    encoding = Encoding(views, batch_size=batch_size)
    write_views(folder, tokenizer, data, encoding, form, process or ProcessInfo(), overwrite)


def check_codes(tokenizer: ImageTokenizer) -> None:
    """UsageError for a tokenizer without codes."""
    if tokenizer.quantizer.codebook_size is None:
        kind = tokenizer.config["quantizer"]["type"]
        raise UsageError(
            f"the tokenizer has no codes: its quantizer is {kind}",
            "it is continuous, and priors are laws of codes",
            "give a tokenizer of fsq, vq, lfq, bsq, residual, grouped or two_level",
        )


def code_dtype(tokenizer: ImageTokenizer) -> str:
    """int32, where it has all codes."""
    return "int32" if (tokenizer.quantizer.codebook_size or 0) <= 2**31 else "int64"


def index_shape(tokenizer: ImageTokenizer) -> tuple[int, ...]:
    """Of the codes of an image, as `encode_indices` gives them."""
    _, height, width = tokenizer.latent_shape
    places = (height, width) if tokenizer.tokens == height * width else (tokenizer.tokens,)
    return (*places, tokenizer.quantizer.groups) if tokenizer.quantizer.groups > 1 else places


@torch.no_grad()
def codes_of(tokenizer: ImageTokenizer, images: Tensor) -> Tensor:
    """float images (B, C, H, W) on the tokenizer's device -> codes (B, *S) on the CPU, int32 if it has all of them.

    DivergedError for an encoder whose output is not finite.
    """
    with raising(DivergedError, "these images have no codes", "train the tokenizer again, at a lower --lr"):
        found = tokenizer.encode_indices(images)
    return found.to(torch.int32 if code_dtype(tokenizer) == "int32" else torch.int64).cpu()


def all_codes(tokenizer: ImageTokenizer, images: Images) -> Tensor:
    """uint8 images (N, C, H, W) -> codes (N, *S) on the CPU; the tokenizer is in eval mode afterwards. Errors as `codes_of`."""
    tokenizer.eval()
    parts = images.split(images_at_once(tokenizer))
    return torch.cat([codes_of(tokenizer, to_float(part.to(tokenizer.device))) for part in parts])


def open_codes(path: Path, data: ImageData, tokenizer: ImageTokenizer, flip: bool = False) -> Codes:
    """The folder at `path`; with `flip` it needs mirrored views. DataError as `open_stored`; UsageError as `encode_codes`."""
    check_codes(tokenizer)
    return open_stored(path, KIND, data, tokenizer, flip, _opened, partial(_check, tokenizer=tokenizer))


def _opened(records: Records) -> Codes:
    return Codes(*parts_of(records, {}))


def _check(codes: Codes, tokenizer: ImageTokenizer) -> None:
    """ValueError unless the folder has the shape of this tokenizer's codes."""
    shape = (codes.views.count, *index_shape(tokenizer))
    if codes.records.shape != shape or codes.records.dtype != code_dtype(tokenizer):
        raise ValueError(f"its records are {codes.records.dtype} {codes.records.shape}, not codes {shape}")


def codes_path(folder: Path, data: ImageData, tokenizer: ImageTokenizer, views: Views) -> Path:
    """Where the codes of these views of the images under this tokenizer belong."""
    return path_of(folder, KIND, data, tokenizer, views)
