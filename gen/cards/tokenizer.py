"""A finished tokenizer as one folder to distribute: weights, configuration, and a README.md of facts.

run/tokenizer/    config.json, diffusion_pytorch_model.safetensors      read by ImageTokenizer.from_pretrained
                  README.md                                             a model card: YAML header, then tables

Everything in the card is measured, counted or set by a flag. Latent mean and std are part of the weights, so the folder is
enough to encode and decode.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from midway.gen.cards.parts import Rows, card, data_rows, environment_rows, shape_text, write_folder
from midway.gen.core.errors import DataError
from midway.gen.core.runs import Run
from midway.gen.core.text import markdown
from midway.gen.data.splits import DataConfig, Splits
from midway.tokenizers.base import bits_per_image
from midway.tokenizers.card import usage
from midway.tokenizers.hub import LICENSE
from midway.tokenizers.tokenizer import ImageTokenizer

FOLDER = "tokenizer"


def finish(run: Run, tokenizer: ImageTokenizer, text: str) -> Path:
    """Write run.path/tokenizer, weights and card; errors and path as `write_folder`."""
    return write_folder(run, FOLDER, tokenizer.write, text)


def tokenizer_card(
    tokenizer: ImageTokenizer,
    config: DataConfig,
    splits: Splits,
    quality: Mapping[str, float],
    weights: Rows,
    flip: bool = False,
    license: str = LICENSE,
) -> str:
    """The card of a tokenizer of these images; DataError if its latents have not been measured.

    quality: metrics on the held-out images, by name. weights: where they are from, such as `training_rows`. With `flip` the
    latent statistics are of mirrored images too.
    """
    kind, size = tokenizer.config["quantizer"]["type"], "x".join(map(str, tokenizer.image_shape[1:]))
    held_out = len(splits.held_out.images)
    measured = {"mean and std of": f"{len(splits.train.images) * (1 + flip)} training images, mirrored ones counted"}
    sections = {
        "Tokenizer": {**_tokenizer_rows(tokenizer), **measured},
        "Data": data_rows(config, splits.train, held_out),
        "Weights": weights,
        f"Quality on {held_out} held-out images": {k: f"{v:.6g}" for k, v in quality.items()},
        "Environment": environment_rows(),
    }
    title = f"Image tokenizer: {kind}, {size}, {markdown(splits.train.name)}"
    return card(title, license, ("image-tokenizer", kind), sections, usage(tokenizer.image_shape))


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
        "images": shape_text(tokenizer.image_shape),
        "latents": shape_text(tokenizer.latent_shape),
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


def _numbers(values: Tensor) -> str:
    return " ".join(f"{value:.6g}" for value in values.tolist())
