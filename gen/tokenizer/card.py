"""A finished tokenizer as one folder to distribute: weights, configuration, and a README.md of facts.

run/tokenizer/    config.json, diffusion_pytorch_model.safetensors      read by ImageTokenizer.from_pretrained
                  README.md                                             a model card: YAML header, then tables

Everything in the card is measured, counted or set by a flag. Latent mean and std are part of the weights, so the folder is
enough to encode and decode.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from safetensors import SafetensorError
from torch import Tensor

from midway.gen.core.environment import environment
from midway.gen.core.errors import DataError, DiskError, raising
from midway.gen.core.files import clear_temporaries, replacing
from midway.gen.core.runs import Run
from midway.gen.core.text import markdown
from midway.gen.data.splits import DataConfig, Splits
from midway.gen.training.config import TrainConfig
from midway.tokenizers.base import bits_per_image
from midway.tokenizers.tokenizer import ImageTokenizer

FOLDER = "tokenizer"
USAGE = """\
import torch
from midway.tokenizers.tokenizer import ImageTokenizer
tokenizer = ImageTokenizer.from_pretrained(".").eval().requires_grad_(False)
latents = tokenizer.encode_latents(torch.zeros(1, {}))  # float32 images in [-1, 1] -> zero mean, unit variance
images = tokenizer.decode_latents(latents)"""
"""Python that loads the tokenizer in the current folder, encodes and decodes; {} is the shape of an image."""

Rows = Mapping[str, object]
"""A table of the card: a name and a value a row."""


def finish(run: Run, tokenizer: ImageTokenizer, card: ModelCard) -> Path:
    """Write run.path/tokenizer, weights and card, completely or not at all, in place of an older one; its path.

    DiskError if it cannot be written: then the older one is untouched.
    """
    final = run.path / FOLDER
    clear_temporaries(run.path)
    causes = (OSError, SafetensorError, DiskError)
    with (
        raising(DiskError, f"{final} was not written", "free space and run again", *causes),
        replacing(final) as folder,
    ):
        tokenizer.save_pretrained(folder)
        card.save(folder / "README.md")
    return final


def model_card(
    tokenizer: ImageTokenizer,
    config: DataConfig,
    splits: Splits,
    quality: Mapping[str, float],
    weights: Rows,
    flip: bool = False,
) -> ModelCard:
    """The card of a tokenizer of these images; DataError if its latents have not been measured.

    quality: metrics on the held-out images, by name. weights: where they are from, such as `training_rows`. With `flip` the
    latent statistics are of mirrored images too.
    """
    kind, size = tokenizer.config["quantizer"]["type"], "x".join(map(str, tokenizer.image_shape[1:]))
    data = _data_rows(config, splits)
    measured = {"mean and std of": f"{len(splits.train.images) * (1 + flip)} training images, mirrored ones counted"}
    sections = {
        "Tokenizer": {**_tokenizer_rows(tokenizer), **measured},
        "Data": data,
        "Weights": weights,
        f"Quality on {data['held-out images']} held-out images": {k: f"{v:.6g}" for k, v in quality.items()},
        "Environment": _environment_rows(),
    }
    header = ModelCardData(library_name="midway", tags=["image-tokenizer", kind])
    usage = USAGE.format(", ".join(map(str, tokenizer.image_shape)))
    parts = [
        f"---\n{header.to_yaml()}\n---",
        f"# Image tokenizer: {kind}, {size}, {markdown(splits.train.name)}",
        *(f"## {title}\n\n{_table(rows)}" for title, rows in sections.items()),
        f"## Loading, in this folder\n\n```python\n{usage}\n```",
        "## Licence\n\nweights: the licence of the data and of the trainer applies",
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def training_rows(weights: str, steps: int, config: TrainConfig, losses: Sequence[str], finished: bool = True) -> Rows:
    """How `weights` (averaged or newest) were trained; `losses` are named with their weights."""
    return {
        "weights": weights,
        "optimizer steps": steps if finished else f"{steps} of {config.steps}, not finished",
        "effective batch": config.batch_size,
        "seed": config.seed,
        "precision": "float32" if config.precision == "no" else config.precision,
        "losses": ", ".join(losses),
    }


def _tokenizer_rows(tokenizer: ImageTokenizer) -> Rows:
    if not bool(tokenizer.latents_measured):
        raise DataError(
            "this tokenizer's latents have not been measured",
            "their mean and std are needed to standardise them",
            "call set_latent_statistics(*latent_statistics(tokenizer, images)) first",
        )
    size, codes = tokenizer.quantizer.codebook_size, tokenizer.tokens * tokenizer.quantizer.groups
    return {
        "network": _network(tokenizer),
        "parameters": f"{sum(p.numel() for p in tokenizer.parameters()):,}",
        "images": _shape(tokenizer.image_shape),
        "latents": _shape(tokenizer.latent_shape),
        "quantizer": ", ".join(f"{key} {value}" for key, value in tokenizer.config["quantizer"].items()),
        "bits per image": "continuous" if size is None else f"{bits_per_image(codes, size):.6g}",
        "latent mean": _numbers(tokenizer.latent_mean),
        "latent std": _numbers(tokenizer.latent_std),
    }


def _network(tokenizer: ImageTokenizer) -> str:
    if tokenizer.passes_through:
        return "none, pixels are the latents"
    imported = tokenizer.config.get("foreign")
    return f"{imported['class']} of diffusers" if imported else str(tokenizer.config["network"])


def _data_rows(config: DataConfig, splits: Splits) -> Rows:
    return {
        "name": splits.train.name,
        "fingerprint of the training images": splits.train.fingerprint,
        "training images": len(splits.train.images),
        "held-out images": len(splits.held_out.images),
        "split": f"share {config.held_out:g} held out, seed {config.split_seed}",
    }


def _environment_rows() -> Rows:
    found = environment()
    return {**found, "packages": ", ".join(f"{name} {version}" for name, version in found["packages"].items())}


def _table(rows: Rows) -> str:
    lines = [f"| {markdown(key)} | {markdown(value)} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _shape(shape: tuple[int, int, int]) -> str:
    return f"{shape[0]} channels, {shape[1]}x{shape[2]}"


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:.6g}" for value in values.tolist())
