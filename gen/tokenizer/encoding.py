"""Encode a data set into a folder of records (stored.py), by one process or several, and on after a kill (record_work.py):
latents here, codes in codes.py.

    latents.json     the plan: images, tokenizer, views, dtype, batch

The moments of all batches are merged in their order, so that mean and std do not depend on who made which.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import sqrt
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DivergedError, UsageError
from midway.gen.core.files import read_json
from midway.gen.core.locks import empty
from midway.gen.core.processes import ProcessInfo, first_of_all
from midway.gen.core.text import echo
from midway.gen.data.images import ImageData, to_float
from midway.gen.data.pixels import Images
from midway.gen.files.record_work import RecordWork, write_records
from midway.gen.files.record_writer import RecordFormat, ShardIndex
from midway.gen.files.records import DTYPES, is_records
from midway.gen.progress.bar import Progress, reported
from midway.gen.tokenizer.latents import KIND
from midway.gen.tokenizer.statistics import ChannelMoments, give_statistics, merged
from midway.gen.tokenizer.stored import Views, tokenizer_hash
from midway.tokenizers.memory import images_at_once
from midway.tokenizers.tokenizer import ImageTokenizer

PLAN = "latents.json"
FLOAT16_MOST = 6e4
"""Above it float16 is near its end, 65504."""

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Encoding:
    """What is stored of every image, and how many images are encoded at once."""

    views: Views = field(default_factory=Views)
    dtype: Dtype = "float32"
    batch_size: int | None = None
    """None: by the memory of the machine of the first process."""


@dataclass(frozen=True)
class Form:
    """What becomes of a view of images, and how it is stored."""

    kind: str
    """Of the folder."""
    plan_file: str
    dtype: str
    shape: tuple[int, ...]
    """Of a view of one image."""
    make: Callable[[Tensor, dict[str, Any]], Tensor]
    """float32 images (B, C, H, W) on the tokenizer's device -> (B, *shape) of `dtype` on the CPU; adds to facts of the shard."""
    facts: tuple[str, ...] = ()
    """Names of these facts, lists that are empty at first."""
    finish: Callable[[list[ShardIndex]], dict[str, Any]] = lambda _: {}
    """What the manifest has beside the plan."""


def encode(
    folder: Path,
    tokenizer: ImageTokenizer,
    data: ImageData,
    encoding: Encoding,
    process: ProcessInfo | None = None,
    overwrite: bool = False,
) -> None:
    """Write the folder, together with the other processes; what an interrupted call of the same plan has written is kept.

    A finished folder is left as it is, unless `overwrite`. UsageError where the folder has other files or is being written by
    another command; DataError for values that the dtype does not hold and channels that do not vary, DivergedError for values
    that are not finite, DiskError.
    """
    form = Form(
        KIND.name,
        PLAN,
        encoding.dtype,
        tokenizer.latent_shape,
        lambda images, facts: _stored(tokenizer.raw_latents(images).cpu(), encoding.dtype, facts),
        ("moments", "squares", "errors"),
        lambda indices: _facts(folder, indices, tokenizer, data),
    )
    write_views(folder, tokenizer, data, encoding, form, process or ProcessInfo(), overwrite)


def write_views(
    folder: Path,
    tokenizer: ImageTokenizer,
    data: ImageData,
    encoding: Encoding,
    form: Form,
    process: ProcessInfo,
    overwrite: bool,
) -> None:
    """`encode`, for any form; of `encoding` the views and the batch size are read."""
    check_large_enough(tokenizer, data, encoding.views)
    if first_of_all(is_records(folder, form.kind)) and not overwrite:
        return
    views = encoding.views
    size = encoding.batch_size or _begun(folder, tokenizer, data, views, form) or images_at_once(tokenizer)
    size, shape = first_of_all(size), (views.count, *form.shape)
    plan, words = _plan(tokenizer, data, views, form, size), (("encoding", "encoded"), "images", "encode again")
    count = len(data.images)
    write_records(
        RecordWork(folder, form.kind, RecordFormat(form.dtype, shape), count, size, form.plan_file, plan, *words),
        process,
        lambda span, progress: _Batches(tokenizer, data, views, form, size, span, progress),
        form.finish,
    )
    if process.rank == 0:
        echo(f"{form.kind} {(count, *shape)}, {form.dtype}")


def check_large_enough(tokenizer: ImageTokenizer, data: ImageData, views: Views) -> None:
    """UsageError for five windows of images that are no larger than what the tokenizer takes."""
    side = tokenizer.image_shape[-1]
    height, width = images_of(data, views).shape[2:]
    if views.windows > 1 and min(height, width) <= side:
        raise UsageError(
            "--crops 10",
            f"the images are {width}x{height}, and so is their only window of {side}x{side}",
            "train the tokenizer with --crop on larger images, or use --flip",
        )


def images_of(data: ImageData, views: Views) -> Images:
    """The images of which views are windows."""
    return data.images if data.whole is None or views.windows == 1 else data.whole


def views_of(images: Tensor, views: Views, side: int) -> Iterator[Tensor]:
    """The views of images (B, C, H, W), each (B, C, side, side), in the order of a record.

    Five windows: the corners, in reading order, and the centre, whose first row is (H - side) // 2.
    """
    height, width = images.shape[2:]
    bottom, right = height - side, width - side
    places = [(0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2)]
    windows = [images]
    if views.windows > 1:
        windows = [images[:, :, top : top + side, left : left + side] for top, left in places]
    yield from windows
    if views.mirrored:
        yield from (window.flip(-1) for window in windows)


def latent_statistics(
    tokenizer: ImageTokenizer, images: Images, batch_size: int | None = None, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """uint8 images (N, C, H, W) -> mean and std (D,) float32 on the CPU, those of `encode`, without keeping latents.

    `batch_size` by memory if it is None. The tokenizer is in eval mode afterwards.
    """
    tokenizer.eval()
    views, dim = Views(mirrored=flip), tokenizer.latent_shape[0]
    size = batch_size or images_at_once(tokenizer)
    each = reported(images.split(size), "mean and deviation of latents:", len(images))
    parts = (tokenizer.raw_latents(images).cpu() for part in each for images in _floats(tokenizer, part, views))
    with torch.no_grad():
        return merged(map(ChannelMoments.of, parts), dim).result()


def _floats(tokenizer: ImageTokenizer, images: Tensor, views: Views) -> Iterator[Tensor]:
    """Each view of uint8 images, float32 on the tokenizer's device."""
    for view in views_of(images, views, tokenizer.image_shape[-1]):
        yield to_float(view.to(tokenizer.device))


# ---- the plan ----


def _plan(tokenizer: ImageTokenizer, data: ImageData, views: Views, form: Form, batch: int) -> dict[str, Any]:
    return {
        "data": data.fingerprint,
        "tokenizer": tokenizer_hash(tokenizer),
        "windows": views.windows,
        "mirrored": views.mirrored,
        "dtype": form.dtype,
        "batch": batch,
    }


def _begun(folder: Path, tokenizer: ImageTokenizer, data: ImageData, views: Views, form: Form) -> int | None:
    """The batch of the same plan in an unfinished folder: another machine may have begun it."""
    try:
        found = read_json(folder / form.plan_file)
        return found["batch"] if found == _plan(tokenizer, data, views, form, found["batch"]) else None
    except (OSError, ValueError, LookupError, TypeError):
        return None


# ---- shards ----


class _Batches:
    """The batches of a shard, for write_shard; `facts` is filled on the way."""

    def __init__(
        self,
        tokenizer: ImageTokenizer,
        data: ImageData,
        views: Views,
        form: Form,
        size: int,
        span: tuple[int, int],
        progress: Progress,
    ) -> None:
        self.progress = progress
        self.tokenizer, self.data, self.views, self.form = tokenizer.eval(), data, views, form
        self.size, self.span = size, span
        self.facts: dict[str, Any] = {name: [] for name in form.facts}

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        (first, end), images = self.span, images_of(self.data, self.views)
        for start in range(first, end, self.size):
            part = slice(start, min(start + self.size, end))
            views = _floats(self.tokenizer, images[part], self.views)
            made = [self.form.make(view, self.facts) for view in views]
            yield torch.stack(made, dim=1), {"labels": self.data.labels[part]}
            self.progress.advance(part.stop - part.start)


# ---- latents ----


def _stored(raw: Tensor, dtype: Dtype, facts: dict[str, Any]) -> Tensor:
    """Latents in the dtype of the folder, whose moments and rounding errors are noted."""
    if not bool(raw.isfinite().all()):
        what, why = "these latents cannot be standardised", "the encoder's output is not finite"
        raise DivergedError(what, why, "its training diverged: train it again, at a lower --lr")
    if dtype == "float16" and raw.numel() and raw.abs().max() >= FLOAT16_MOST:
        why = f"one of these is {float(raw.abs().max()):.4g}, and float16 holds numbers below {FLOAT16_MOST:g}"
        raise DataError("--dtype float16 does not hold these latents", why, "use --dtype bfloat16 or float32")
    stored = raw.to(DTYPES[dtype])
    facts["moments"].append(ChannelMoments.of(stored.float()).to_json())
    if dtype != "float32":
        facts["squares"].append(float(raw.double().square().sum()))
        facts["errors"].append(float((stored.double() - raw.double()).square().sum()))
    return stored


def _facts(folder: Path, indices: list[ShardIndex], tokenizer: ImageTokenizer, data: ImageData) -> dict[str, Any]:
    """Merge the moments, and check them: latents that do not vary leave an empty folder."""
    each = (ChannelMoments.from_json(part) for index in indices for part in index.facts["moments"])
    mean, std = merged(each, tokenizer.latent_shape[0]).result()
    try:
        give_statistics(tokenizer, mean, std, data.images)
    except Exception:
        empty(folder)  # nobody can train on these
        raise
    return {"mean": mean.tolist(), "std": std.tolist(), **_rounding(indices)}


def _rounding(indices: list[ShardIndex]) -> dict[str, float]:
    """The relative RMS error of a dtype narrower than float32."""
    squares, errors = (sum(v for index in indices for v in index.facts[name]) for name in ("squares", "errors"))
    return {"rms_error": sqrt(errors / squares)} if squares else {}
