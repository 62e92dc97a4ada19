"""The card of a finished prior; its folder is that of a latent model (latent.py)."""

from collections.abc import Mapping

from midway.gen.cards.parts import Rows, card, data_rows, environment_rows, shape_text
from midway.gen.core.text import markdown
from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig
from midway.gen.priors.prior import USAGE, Prior
from midway.tokenizers.hub import LICENSE
from midway.tokenizers.tokenizer import ImageTokenizer


def prior_card(
    prior: Prior,
    tokenizer: ImageTokenizer,
    config: DataConfig,
    train: ImageData,
    weights: Rows,
    figures: Mapping[str, float],
    license: str = LICENSE,
) -> str:
    """The card of a prior of these images; `figures` by name, `weights` as of `training_rows`. UsageError as `card`."""
    options, layout = prior.config, prior.layout
    size = "x".join(map(str, tokenizer.image_shape[1:]))
    sections = {
        "Model": {
            "hash": prior.hash,
            "parameters": f"{sum(p.numel() for p in prior.parameters()):,}",
            "kind": options.kind,
            "network": f"transformer, width {options.width}, depth {options.depth}",
            "tokens": layout.about,
            "images": shape_text(tokenizer.image_shape),
            "tokenizer": ", ".join(f"{key} {value}" for key, value in tokenizer.config["quantizer"].items()),
            "classes": prior.classes or "none",
            **({"class names": ", ".join(prior.class_names)} if 0 < len(prior.class_names) <= 20 else {}),
        },
        "Data": data_rows(config, train),
        "Weights": weights,
        "Figures": {key: f"{value:.6g}" for key, value in figures.items()},
        "Environment": environment_rows(),
    }
    tags = ("prior", options.kind, "image-generation")
    return card(f"Prior over codes: {options.kind}, {size}, {markdown(train.name)}", license, tags, sections, USAGE)
