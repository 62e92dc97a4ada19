"""A finished latent model as one folder to distribute, with its tokenizer and a README.md of facts; a prior's is alike.

run/model/    config.json, diffusion_pytorch_model.safetensors      read by LatentModel.from_pretrained
              tokenizer/                                            read by ImageTokenizer.from_pretrained
              README.md                                             the card
"""

from collections.abc import Mapping
from pathlib import Path

from midway.gen.cards.parts import Rows, card, data_rows, environment_rows, model_rows, shape_text, write_folder
from midway.gen.core.runs import Run
from midway.gen.core.text import markdown
from midway.gen.data.images import ImageData
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.adapters import Adapter
from midway.gen.diffusion.description import DescribedModel
from midway.gen.diffusion.model import LatentModel
from midway.tokenizers.hub import LICENSE
from midway.tokenizers.tokenizer import ImageTokenizer

FOLDER = "model"
ADAPTER_USAGE = """\
from pathlib import Path
from midway import LatentModel
from midway.gen.diffusion.adapters import Adapter, merged
model = merged(LatentModel.from_pretrained("base"), Adapter.load(Path()))"""
"""Python that adds the adapter of the current folder to the weights of its base."""


def finish_model(run: Run, model: DescribedModel, tokenizer: ImageTokenizer, text: str) -> Path:
    """Write run.path/model, weights, tokenizer and card; errors and path as `write_folder`."""

    def write(folder: Path) -> None:
        model.write(folder)
        tokenizer.save_pretrained(folder / "tokenizer")

    return write_folder(run, FOLDER, write, text)


def model_card(
    model: LatentModel,
    tokenizer: ImageTokenizer,
    config: DataConfig,
    train: ImageData,
    weights: Rows,
    figures: Mapping[str, float],
    license: str = LICENSE,
) -> str:
    """The card of a latent model of these images; `figures` by name, `weights` as of `training_rows`. UsageError as `card`."""
    options, name = model.config, markdown(train.name)
    size = "x".join(map(str, tokenizer.image_shape[1:]))
    own = {
        "network": options.size.about,
        "schedule": options.schedule,
        "target": options.target,
        **({"objective": options.objective} if options.is_jump else {}),
        **({"guidance in training": f"up to {options.jump.guidance:g}"} if options.jump.guidance > 1 else {}),
        "latents": shape_text(model.latent_shape),
    }
    sections = {
        "Model": model_rows(model, tokenizer, own),
        "Data": data_rows(config, train),
        "Weights": weights,
        "Figures": {key: f"{value:.6g}" for key, value in figures.items()},
        "Environment": environment_rows(),
    }
    tags = ("latent-model", options.schedule, "image-generation")
    return card(f"Latent model: {options.schedule}, {size}, {name}", license, tags, sections, options.usage)


def adapter_card(
    adapter: Adapter, model: LatentModel, config: DataConfig, train: ImageData, weights: Rows, license: str = LICENSE
) -> str:
    """The card of an adapter trained on these images, `model` with it. UsageError as `card`."""
    own = {
        "base": f"{adapter.place}, hash {adapter.base}",
        "layers": len(adapter.factors),
        "parameters": f"{adapter.size:,}",
        "classes": model.classes or "none",
    }
    sections = {"Adapter": own, "Data": data_rows(config, train), "Weights": weights, "Environment": environment_rows()}
    tags = ("latent-model", "lora", "image-generation")
    return card(f"Adapter of {markdown(adapter.place)}: {markdown(train.name)}", license, tags, sections, ADAPTER_USAGE)
