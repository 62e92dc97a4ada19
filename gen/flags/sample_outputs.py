"""Where midway sample writes: a grid, or single images in a folder, a zip or an NPZ, by one process or several."""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from midway.gen.core.errors import DivergedError, UsageError
from midway.gen.core.locks import remove
from midway.gen.core.processes import ProcessInfo, launched, raised_by_all
from midway.gen.core.signals import stop_note
from midway.gen.core.text import echo
from midway.gen.data.pictures import check_own, is_of, save_grid
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.sample_folder import PARTS, SampleFolder
from midway.gen.diffusion.sampling import SamplingConfig, Start, decode, sample_batches
from midway.gen.files.names import EXTENSIONS
from midway.gen.flags.sample_inputs import Classed, LabelOf
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.sampling import CodeSampling, code_batches, decode_codes
from midway.gen.progress.bar import Progress
from midway.samplers.sampler import Sampler

Kind = Literal["grid", "archive", "folder", "noise"]
OTHERS = (*EXTENSIONS, ".tar", ".gz", ".tgz", ".npy", ".pt", ".safetensors")
"""Endings of files that are not written."""


def kind_of(out: Path, inverts: bool) -> Kind:
    """What --out is. UsageError for a file of another format, and for a grid or noise by several processes."""
    ending = out.suffix.lower()
    kinds: dict[str, Kind] = {".png": "grid", ".zip": "archive", ".npz": "archive"}
    if inverts and ending != ".safetensors":
        raise UsageError(
            f"--out {out}", "--invert writes noise, as safetensors", "give a name that ends in .safetensors"
        )
    if not inverts and ending not in kinds and ending in OTHERS:
        fix = "give a name that ends in .png, .zip or .npz, or a folder"
        raise UsageError(f"--out {out}", "a grid is a PNG; single images go into a folder, a zip or an NPZ", fix)
    kind = "noise" if inverts else kinds.get(ending, "folder")
    if kind in ("grid", "noise") and launched()[1] > 1:
        fix = "start one process, or give a folder, a .zip or an .npz, which processes share"
        raise UsageError(f"--out {out} with {launched()[1]} processes", "each would make all of it", fix)
    return kind


@dataclass(frozen=True)
class Made:
    """uint8 images (B, C, H, W) of a batch, evaluations of one, seconds of sampling all of them.

    Of a prior tokens that went through its trunk, of a continuous one evaluations of the head for a token.
    """

    images: Tensor
    nfe: float
    seconds: float
    token_evaluations: float = 0.0
    head_nfe: float = 0.0


Make = Callable[[Iterable[tuple[Tensor, Tensor]]], Iterator[Made]]
"""Batches of seeds (B,) and labels (B,) -> their images, one batch at a time. DivergedError."""


def by_sampler(trained: TrainedModel, sampler: Sampler, sampling: SamplingConfig, start: Start | None) -> Make:
    """Images of a latent model."""

    def make(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Made]:
        for samples in sample_batches(trained, sampler, batches, sampling, start):
            check_finite(samples.latents)
            yield Made(decode(trained, samples.latents), samples.nfe, samples.seconds)

    return make


def by_prior(trained: TrainedPrior, sampling: CodeSampling) -> Make:
    """Images of a prior over codes."""

    def make(batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Made]:
        for samples in code_batches(trained, batches, sampling):
            if not bool(samples.finite.all()):
                fix = "train the prior again, with less --lr or with --precision no"
                raise DivergedError("sampling diverged", "the prior's laws stopped being finite", fix)
            images = decode_codes(trained, samples.tokens)
            yield Made(images, samples.nfe, samples.seconds, samples.token_evaluations, samples.head_nfe)

    return make


@dataclass(frozen=True)
class Drawing:
    """What is drawn: one image for each seed, of this model's classes."""

    make: Make
    model: Classed
    seeds: Tensor
    batch_size: int
    label_of: LabelOf
    settings: dict[str, Any]
    """JSON of everything that the images depend on beside their seeds."""


@dataclass(frozen=True)
class Drawn:
    """How many images were drawn, evaluations of one, seconds of sampling, and of a prior the other counts of `Made`."""

    images: int
    nfe: float
    seconds: float
    token_evaluations: float = 0.0
    head_nfe: float = 0.0

    @classmethod
    def of(cls, made: Iterable[Made]) -> "Drawn":
        """Of all batches."""
        count, seconds, counts = 0, 0.0, [0.0, 0.0, 0.0]
        for its in made:
            size = len(its.images)
            count, seconds = count + size, seconds + its.seconds
            own = (its.nfe, its.token_evaluations, its.head_nfe)
            counts = [total + value * size for total, value in zip(counts, own, strict=True)]
        nfe, passed, head = (total / max(count, 1) for total in counts)
        return cls(count, nfe, seconds, passed, head)


def draw_grid(drawing: Drawing, out: Path) -> Drawn:
    """Write a PNG of all images in rows. DivergedError, DiskError."""
    made = list(drawing.make((some, drawing.label_of(some)) for some in drawing.seeds.split(drawing.batch_size)))
    images = torch.cat([its.images for its in made])
    save_grid(out, images, columns=math.ceil(math.sqrt(len(drawing.seeds))))
    return Drawn.of(made)


def draw_set(drawing: Drawing, out: Path, kind: Kind, process: ProcessInfo) -> Drawn:
    """Write the images that are missing, this process its share, then what is made of them.

    UsageError for a folder or a file of anything else, DivergedError, DiskError.
    """
    model = drawing.model
    place = out if kind == "folder" else out.with_name(out.name + PARTS)
    folder = SampleFolder(place, drawing.settings, model.classes, model.class_names)
    about, first = folder.about(drawing.seeds), process.rank == 0
    if kind == "archive" and is_of(out, about):
        made = Drawn(0, 0.0, 0.0)
        if first and os.path.lexists(place):
            with folder.claimed():
                remove(place)
        return made
    with ExitStack() as stack:
        with raised_by_all():
            if first:
                if kind == "archive":
                    check_own(out, about)
                stack.enter_context(folder.claimed())
        stop_note(f"finished images are in {place}; the same command draws the others")
        made = _draw_missing(drawing, folder, process)
        process.wait()
        with raised_by_all():
            if first and kind == "archive":
                folder.pack(out, drawing.seeds, drawing.label_of(drawing.seeds))
                remove(place)
            elif first:
                folder.finish()
    return made


def _draw_missing(drawing: Drawing, folder: SampleFolder, process: ProcessInfo) -> Drawn:
    """Draw the batches of this process of which an image is missing: whole, so that no image depends on what was there."""
    batches = [part for _, part in process.mine(drawing.seeds.split(drawing.batch_size))]
    todo = [(some, labels) for some in batches if folder.missing(some, labels := drawing.label_of(some))]
    there = sum(map(len, batches)) - sum(len(some) for some, _ in todo)
    if there and process.rank == 0:
        echo(f"{there} images are there already")
    with Progress("drawing", sum(map(len, batches)), "images", done=there) as progress:

        def written() -> Iterator[Made]:
            for (some, labels), made in zip(todo, drawing.make(todo), strict=True):
                folder.write(some, labels, made.images)
                progress.advance(len(some))
                yield made

        return Drawn.of(written())


def check_finite(latents: Tensor) -> None:
    """DivergedError for latents that are not finite."""
    if not bool(torch.isfinite(latents).all()):
        fix = "use more --nfe or less --guidance"
        raise DivergedError("sampling diverged", "the latents stopped being finite", fix)
