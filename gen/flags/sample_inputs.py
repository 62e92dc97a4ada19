"""What the flags of midway sample name: classes, images, noise and prompts."""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, nearest, one_line, raising
from midway.gen.core.files import read_bytes, read_tensors, reading
from midway.gen.core.text import echo, printable
from midway.gen.data.external import NPZ_DAMAGE, ReadingOptions, read_array, read_external
from midway.gen.data.images import load_images
from midway.gen.diffusion.sampling import labels_of
from midway.gen.files.decoding import IMAGE_LIMIT, Undecodable, decode, stack
from midway.gen.files.names import is_image
from midway.gen.files.records import is_records, open_records
from midway.gen.flags.cli import names
from midway.gen.flags.sample_flags import PromptFlags
from midway.gen.priors.decoding import Prompt
from midway.gen.priors.layout import REGIONS, CodeLayout, covered, region
from midway.gen.priors.load import TrainedPrior
from midway.gen.priors.sampling import encode_codes
from midway.gen.tokenizer.codes import KIND as CODES
from midway.gen.tokenizer.stored import parts_of, tokenizer_hash

CODES_LIMIT = 16 << 30
"""Bytes of codes in an NPZ: a million images of 1024 tokens have 8 GB."""

LabelOf = Callable[[Tensor], Tensor]
"""Seeds (B,) -> their classes, int64 (B,)."""


class Classed(Protocol):
    """A model of classes, 0 without; `empty` had no training image, `class_names` are () where they are not known."""

    classes: int
    empty: tuple[int, ...]
    class_names: tuple[str, ...]


# ---- classes ----


def chosen_labels(words: str, model: Classed) -> tuple[int, ...]:
    """The classes that --labels names, by number or name; a word that is a class's name is that class.

    UsageError for none, for a class that the model does not have, and for one that had no training image.
    """
    if not model.classes:
        raise UsageError(f"--labels {words}", "this model was trained without classes", "drop --labels")
    found = tuple(_label(word, words, model) for word in names(words))
    if not found:
        raise UsageError(f"--labels {words!r}", "it names no class", f"choose some of them: {numbered_classes(model)}")
    return found


def _label(word: str, words: str, model: Classed) -> int:
    if word in model.class_names:
        label = model.class_names.index(word)
    elif word.lstrip("-").isdecimal() and 0 <= int(word) < model.classes:
        label = int(word)
    else:
        numbers = f"the model has classes 0 to {model.classes - 1}"
        why = numbers if not model.class_names or word.lstrip("-").isdecimal() else f"'{word}' is none of its classes"
        known = [name for number, name in enumerate(model.class_names) if number not in model.empty]
        close = nearest(word, known) if known and not word.lstrip("-").isdecimal() else ""
        fix = close or f"choose one of them: {numbered_classes(model)}"
        raise UsageError(f"--labels {words}", why, fix)
    if label in model.empty:
        why, fix = (
            f"class {named(model, label)} had no training image",
            f"choose one of them: {numbered_classes(model)}",
        )
        raise UsageError(f"--labels {words}", why, fix)
    return label


def label_rule(labels: Sequence[int], model: Classed) -> LabelOf:
    """Seed s has number s mod N of N labels; without labels its own class."""
    if not labels:
        return lambda seeds: labels_of(seeds, model.classes, model.empty)
    listed = torch.tensor(labels)
    return lambda seeds: listed[seeds % len(listed)]


def numbered_classes(model: Classed) -> str:
    """`0: cat, 1: dog`: every class that --labels takes; numbers alone of a run that does not hold the names."""
    trained = [label for label in range(model.classes) if label not in model.empty]
    return ", ".join(named(model, label) for label in trained)


def named(model: Classed, label: int) -> str:
    """A class as its number and its name."""
    return f"{label}: {model.class_names[label]}" if model.class_names else str(label)


# ---- images ----


@dataclass(frozen=True)
class InputImages:
    """uint8 (N, C, H, W) of the model's shape, in the order of their names, and the names of their classes, if they have some."""

    pixels: Tensor
    classes: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def labels(self, model: Classed) -> tuple[int, ...]:
        """The model's class of each image, by name; () unless all of them are the model's."""
        if not self.classes or not {*self.classes} <= {*model.class_names}:
            return ()
        return tuple(map(model.class_names.index, self.classes))


def read_images(source: str, shape: tuple[int, int, int], flag: str) -> InputImages:
    """A file, a folder, a zip, an NPZ, or a named source, in the model's channels, resized and cropped to its size.

    DataError for what cannot be read.
    """
    path, (channels, side, _) = Path(source).expanduser(), shape
    if path.is_file() and is_image(path.name):
        found = decode(path.name, lambda _: read_bytes(path, IMAGE_LIMIT), channels, side)
        if isinstance(found, Undecodable):
            raise DataError(f"{flag} {path} cannot be read", found.reason, "give an image, a folder or a zip of them")
        pixels, notes = stack([found], 1)
        return InputImages(torch.from_numpy(pixels), (), notes)
    if path.suffix.lower() == ".npz":
        external = read_external(path, ReadingOptions(channels, side))
        return InputImages(external.pixels, (), external.notes)
    data = load_images(source, channels=channels, resize=side)
    classes = tuple(data.classes[label] for label in data.labels.tolist()) if len(data.classes) > 1 else ()
    return InputImages(data.images[:], classes, tuple(map(printable, data.conversions)))


# ---- prompts ----


@dataclass(frozen=True)
class PromptInput:
    """What a prior completes, and the class of each image, () where they are not known."""

    prompt: Prompt
    labels: tuple[int, ...] = ()


def read_prompt(flags: PromptFlags, trained: TrainedPrior) -> PromptInput:
    """The tokens of --prompt, and which of them are kept.

    DataError for what cannot be read, codes of another tokenizer and codes that do not exist. UsageError for more tokens than
    the images have, all or none of them, and what a causal prior does not begin with.
    """
    source, layout = flags.prompt or "", trained.prior.layout
    codes = _read_codes(Path(source).expanduser())
    if codes is None:
        images = read_images(source, trained.tokenizer.image_shape, "--prompt")
        tokens, labels, there = encode_codes(trained, images.pixels), images.labels(trained.prior), None
        echo(*(f"--prompt: {note}" for note in images.notes))
    else:
        (tokens, there), labels = _tokens_of(codes, trained), codes.labels
    known = _kept(flags, trained, there)
    echo(f"--prompt: {len(tokens)} images, of which {int(known.sum())} of {layout.length} tokens are kept")
    return PromptInput(Prompt(tokens, known), labels)


def _kept(flags: PromptFlags, trained: TrainedPrior, there: Tensor | None) -> Tensor:
    """bool (L,): what the flags name, or by default what is `there`, or half."""
    length, count = trained.prior.layout.length, flags.prompt_tokens
    what = f"--prompt on {trained.run.place}"
    if count is not None and count >= length:
        why = f"its images have {length} tokens, of which at least one is drawn"
        raise UsageError(f"--prompt-tokens {count} on {trained.run.place}", why, f"give 1 to {length - 1}")
    if flags.prompt_region is not None:
        what, known = (
            f"--prompt-region {flags.prompt_region} on {trained.run.place}",
            _region(flags.prompt_region, trained),
        )
    elif count is None and there is not None and not bool(there.all()):
        known = there
    else:
        known = torch.arange(length) < (count or max(length // 2, 1))
    kept, fix = int(known.sum()), "keep others, say with --prompt-tokens"
    if there is not None and bool((known & ~there).any()):
        raise UsageError(what, f"{int((known & ~there).sum())} of the {kept} tokens to keep are -1, not there", fix)
    if not 1 <= kept < length:
        raise UsageError(what, f"it keeps {kept} of {length} tokens, and at least one is kept and one drawn", fix)
    if trained.prior.config.kind == "causal" and not bool(known[:kept].all()):
        why = "a causal prior draws row by row, and what is kept is not the beginning"
        raise UsageError(what, why, "use --prompt-tokens, --prompt-region top, or a masked prior")
    return known


def _region(name: str, trained: TrainedPrior) -> Tensor:
    if name in REGIONS:
        return region(trained.prior.layout, name)
    if not Path(name).expanduser().is_file():
        why, fix = "it is no region and no picture", f"use one of {', '.join(REGIONS)}"
        raise UsageError(f"--prompt-region {name}", why, fix)
    mask = read_images(name, (1, *trained.tokenizer.image_shape[1:]), "--prompt-region").pixels[0, 0] > 127
    return covered(trained.prior.layout, mask)


class _Codes(NamedTuple):
    """Indices (N, *S), -1 where they are missing; the hash of their tokenizer, "" if it is not known; and classes."""

    indices: Tensor
    tokenizer: str
    path: Path
    labels: tuple[int, ...] = ()


def _read_codes(path: Path) -> _Codes | None:
    """Of a file or folder of codes, None of anything else. DataError."""
    remedy = "give whole numbers (N, *S), as encode_indices of the tokenizer makes them, by the name `codes`"
    if is_records(path, CODES.name):
        records = open_records(path, CODES.name, "encode again with midway encode --kind codes --overwrite")
        with reading(path, records.remake):
            _, _, labels, _, tokenizer = parts_of(records, {})
        return _Codes(records.read(torch.arange(len(records)))[:, 0], tokenizer, path, tuple(labels.tolist()))
    if path.suffix.lower() == ".safetensors":
        with reading(path, remedy):
            tensors, header = read_tensors(path)
            return _Codes(_whole(tensors["codes"]), header.get("tokenizer", ""), path)
    if path.suffix.lower() != ".npz" or not path.is_file():
        return None
    with (
        raising(DataError, f"{path} cannot be read", remedy, *NPZ_DAMAGE, why=one_line),
        zipfile.ZipFile(path) as arrays,
    ):
        if "codes.npy" not in arrays.namelist():
            return None
        named = "tokenizer.npy" in arrays.namelist()
        tokenizer = str(read_array(arrays, "tokenizer", CODES_LIMIT)) if named else ""
        return _Codes(_whole(torch.from_numpy(read_array(arrays, "codes", CODES_LIMIT))), tokenizer, path)


def _whole(codes: Tensor) -> Tensor:
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool or not codes.numel():
        raise ValueError(
            f"codes are {codes.dtype} of shape {tuple(codes.shape)}, and should be whole numbers of 1 or more images"
        )
    return codes.long()


def _tokens_of(codes: _Codes, trained: TrainedPrior) -> tuple[Tensor, Tensor]:
    """Tokens (N, L, D), and where the codes of all images are there, bool (L,). DataError."""
    layout, own = trained.prior.layout, tokenizer_hash(trained.tokenizer)
    if not isinstance(layout, CodeLayout):
        why = "they are codes, and the tokens of this prior are continuous"
        raise DataError(f"--prompt {codes.path} on {trained.run.place}", why, "give images")
    if codes.tokenizer not in ("", own):
        why = f"they are of tokenizer {codes.tokenizer[:12]}, and this prior's is {own}"
        raise DataError(
            f"--prompt {codes.path} on {trained.run.place}", why, "encode the images with the prior's tokenizer"
        )
    with raising(DataError, f"--prompt {codes.path}", "give codes of the tokenizer of this prior"):
        missing = codes.indices == -1
        tokens = layout.tokens(codes.indices.masked_fill(missing, 0))
        where = missing.view(len(tokens), layout.length, -1).any(-1)
        if not bool((where == where[0]).all()):
            raise ValueError("codes are -1 at other places in one image than in another")
    return tokens, ~where[0]
