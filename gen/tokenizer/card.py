"""A finished tokenizer as one folder to distribute: weights, configuration, and a README.md of facts.

run/tokenizer/    config.json, diffusion_pytorch_model.safetensors      read by ImageTokenizer.from_pretrained
                  README.md                                             a model card: YAML header, then tables

Everything in the card is measured, counted or set by a flag. Latent mean and std are part of the weights, so the folder is
enough to encode and decode.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from midway.gen.core.environment import environment
from midway.gen.core.errors import DataError, DiskError
from midway.gen.core.files import clear_temporaries, replacing
from midway.gen.core.runs import Run
from midway.gen.data.splits import DataConfig, Splits
from midway.tokenizers.base import bits_per_image
from midway.tokenizers.tokenizer import ImageTokenizer

FOLDER = "tokenizer"


@dataclass(frozen=True)
class TokenizerFacts:
    """Facts of a tokenizer: `tokenizer_facts`. bits_per_image is None if it is continuous."""

    network: str
    quantizer: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    parameters: int
    bits_per_image: float | None
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]


@dataclass(frozen=True)
class DataFacts:
    """The images: `data_facts`. statistics_images is how many the latent mean and std are of, mirrored ones counted."""

    name: str
    fingerprint: str
    training_images: int
    held_out_images: int
    held_out_share: float
    split_seed: int
    statistics_images: int


@dataclass(frozen=True)
class TrainingFacts:
    """How it was trained. batch_size is the effective one; losses are named with their weights."""

    steps: int
    batch_size: int
    seed: int
    precision: str
    losses: tuple[str, ...]


@dataclass(frozen=True)
class CardFacts:
    """The content of a card. weights: averaged, newest or imported; training is None if they were imported, or are none."""

    tokenizer: TokenizerFacts
    data: DataFacts
    held_out: Mapping[str, float]
    """Metrics on the held-out images, by name."""
    weights: str
    training: TrainingFacts | None = None
    source: str = ""
    """Where imported weights are from."""
    environment: Mapping[str, Any] = field(default_factory=environment)


def tokenizer_facts(tokenizer: ImageTokenizer) -> TokenizerFacts:
    """The facts of `tokenizer`; DataError if its latents have not been measured."""
    if not bool(tokenizer.latents_measured):
        raise DataError(
            "this tokenizer's latents have not been measured",
            "their mean and std are needed to standardise them",
            "call set_latent_statistics(*latent_statistics(tokenizer, images)) first",
        )
    size = tokenizer.quantizer.codebook_size
    return TokenizerFacts(
        network=_network(tokenizer),
        quantizer=tokenizer.config["quantizer"],
        image_shape=tokenizer.image_shape,
        latent_shape=tokenizer.latent_shape,
        parameters=sum(p.numel() for p in tokenizer.parameters()),
        bits_per_image=None if size is None else bits_per_image(tokenizer.tokens * tokenizer.quantizer.groups, size),
        latent_mean=tuple(tokenizer.latent_mean.tolist()),
        latent_std=tuple(tokenizer.latent_std.tolist()),
    )


def _network(tokenizer: ImageTokenizer) -> str:
    if tokenizer.passes_through:
        return "none, pixels are the latents"
    imported = tokenizer.config.get("foreign")
    return f"{imported['class']} of diffusers" if imported else str(tokenizer.config["network"])


def data_facts(config: DataConfig, splits: Splits, flip: bool = False) -> DataFacts:
    """The facts of the images; latent statistics are of all training images, and of mirrored ones with `flip`."""
    count = len(splits.train.images)
    return DataFacts(
        name=splits.train.name,
        fingerprint=splits.train.fingerprint,
        training_images=count,
        held_out_images=len(splits.held_out.images),
        held_out_share=config.held_out,
        split_seed=config.split_seed,
        statistics_images=2 * count if flip else count,
    )


def finish(run: Run, tokenizer: ImageTokenizer, facts: CardFacts) -> Path:
    """Write run.path/tokenizer, weights and card, completely or not at all, in place of an older one; its path.

    DiskError if it cannot be written: then the older one is untouched.
    """
    final = run.path / FOLDER
    clear_temporaries(run.path)
    try:
        with replacing(final) as folder:
            tokenizer.save_pretrained(folder)
            write_card(folder, facts)
    except (OSError, SafetensorError, DiskError) as error:
        raise DiskError(f"{final} was not written", str(error), "free space and run again") from error
    return final


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write folder/README.md; its path."""
    path = folder / "README.md"
    path.write_text(card(facts))
    return path


def card(facts: CardFacts) -> str:
    """The text of a model card."""
    kind = facts.tokenizer.quantizer["type"]
    header = {"library_name": "midway", "tags": ["image-tokenizer", kind]}
    sections = {
        "Tokenizer": _tokenizer_rows(facts.tokenizer, facts.data),
        "Data": _data_rows(facts.data),
        "Weights": _weight_rows(facts),
        f"Quality on {facts.data.held_out_images} held-out images": {k: f"{v:.6g}" for k, v in facts.held_out.items()},
        "Environment": _environment_rows(facts.environment),
    }
    size = "x".join(map(str, facts.tokenizer.image_shape[1:]))
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        f"# Image tokenizer: {kind}, {size}, {_cell(facts.data.name)}",
        *(f"## {title}\n\n{_table(rows)}" for title, rows in sections.items()),
        f"## Loading, in this folder\n\n```python\n{usage_lines(facts.tokenizer)}\n```",
        "## Licence\n\nweights: the licence of the data and of the trainer applies",
    ]
    return "\n\n".join(parts) + "\n"


def usage_lines(facts: TokenizerFacts) -> str:
    """Five lines of Python that load the tokenizer in the current folder, encode and decode."""
    shape = ", ".join(map(str, facts.image_shape))
    return f"""\
import torch
from midway.tokenizers.tokenizer import ImageTokenizer
tokenizer = ImageTokenizer.from_pretrained(".").eval().requires_grad_(False)
latents = tokenizer.encode_latents(torch.zeros(1, {shape}))  # float32 images in [-1, 1] -> zero mean, unit variance
images = tokenizer.decode_latents(latents)"""


def _tokenizer_rows(facts: TokenizerFacts, data: DataFacts) -> dict[str, str]:
    bits = facts.bits_per_image
    return {
        "network": facts.network,
        "parameters": f"{facts.parameters:,}",
        "images": _shape(facts.image_shape),
        "latents": _shape(facts.latent_shape),
        "quantizer": ", ".join(f"{key} {value}" for key, value in facts.quantizer.items()),
        "bits per image": "continuous" if bits is None else f"{bits:.6g}",
        "latent mean": _numbers(facts.latent_mean),
        "latent std": _numbers(facts.latent_std),
        "mean and std of": f"{data.statistics_images} training images, mirrored ones counted",
    }


def _data_rows(facts: DataFacts) -> dict[str, str]:
    return {
        "name": facts.name,
        "fingerprint of the training images": facts.fingerprint,
        "training images": str(facts.training_images),
        "held-out images": str(facts.held_out_images),
        "split": f"share {facts.held_out_share:g} held out, seed {facts.split_seed}",
    }


def _weight_rows(facts: CardFacts) -> dict[str, str]:
    training = facts.training
    rows = {"weights": facts.weights, **({"source": facts.source} if facts.source else {})}
    if training is None:
        return rows
    return rows | {
        "optimizer steps": str(training.steps),
        "effective batch": str(training.batch_size),
        "seed": str(training.seed),
        "precision": "float32" if training.precision == "no" else training.precision,
        "losses": ", ".join(training.losses),
    }


def _environment_rows(environment: Mapping[str, Any]) -> dict[str, str]:
    packages = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return {**{key: str(value) for key, value in environment.items() if key != "packages"}, "packages": packages}


def _table(rows: Mapping[str, str]) -> str:
    lines = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(text: str) -> str:
    """One line that a table can hold."""
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} channels, {shape[1]}x{shape[2]}"


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.6g}" for value in values)
