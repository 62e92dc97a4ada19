"""The card of a finished prior; its folder is that of a latent model (latent.py)."""

from collections.abc import Mapping

from midway.gen.cards.parts import Rows, card, data_rows, environment_rows, model_rows
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
    options = prior.config
    size = "x".join(map(str, tokenizer.image_shape[1:]))
    network = f"transformer, width {options.width}, depth {options.depth}"
    own = {"kind": options.kind, "network": network, "tokens": prior.layout.about}
    sections = {
        "Model": model_rows(prior, tokenizer, own),
        "Data": data_rows(config, train),
        "Weights": weights,
        "Figures": {key: f"{value:.6g}" for key, value in figures.items()},
        "Environment": environment_rows(),
    }
    tags = ("prior", options.kind, "image-generation")
    return card(f"Prior over codes: {options.kind}, {size}, {markdown(train.name)}", license, tags, sections, USAGE)
