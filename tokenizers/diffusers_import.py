"""Autoencoders of diffusers become tokenizers: the same networks, the same codes, in our artefact.

    AutoencoderKL -> quantizer "kl"      AutoencoderTiny -> "identity"      VQModel -> "vq_gradient" with its codebook

Networks: diffusers_networks.py. Weights are read from safetensors alone, by diffusers, which also renames those of old files.

Published statistics of latents, as far as the configuration has any, standardise ours:

    AutoencoderKL     mean = latents_mean, std = latents_std, per channel; without these as below
    KL, Tiny          mean = shift_factor (0), std = 1 / scaling_factor
    VQModel           none: its scaling_factor is a default that was taken over from KL, and codes of std 1 are not scaled

They belong to the images the autoencoder was trained on, and a scale over all channels is not a standard deviation of each:
measuring raw_latents on the images at hand is better, and then replaces them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from midway.tokenizers.codebook import Codebook
from midway.tokenizers.diffusers_networks import CLASSES, describe, diffusers_class, interface_of, networks_of
from midway.tokenizers.pretrained import read_diffusers
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.weights import CONFIG, line, local_folder, read_object


def import_tokenizer(source: str | Path | nn.Module, image_size: int, subfolder: str | None = None) -> ImageTokenizer:
    """A tokenizer with the networks and weights of a diffusers AutoencoderKL, AutoencoderTiny or VQModel; in eval mode, float32.

    `source`: a directory with config.json and safetensors, a Hub id, or the model itself, which is copied; `subfolder` of it
    ("vae" in pipelines). The networks are convolutional, so `image_size` is free, but a multiple of their downsampling.

    Latents have the published statistics (above), if any. For a VQModel decode_latents snaps, as its `decode` does.

    ValueError: nothing there, pickled weights, another class, other weights than its own, a network or size that cannot be run.
    """
    model = source if isinstance(source, nn.Module) else read_model(source, subfolder)
    name, config = type(model).__name__, getattr(model, "config", {})
    if name not in CLASSES:
        raise ValueError(f"the model is of class {name}; choose one of: {', '.join(CLASSES)}")
    diffusers_config = describe(name, config)
    interface = interface_of(diffusers_config)
    if image_size < 1 or image_size % interface.downsample:
        raise ValueError(
            f"image_size is {image_size}; this {name} makes sides {interface.downsample} times smaller: give a multiple of it"
        )
    tokenizer = ImageTokenizer(
        in_channels=interface.in_channels,
        image_size=image_size,
        downsample=interface.downsample,
        quantizer=interface.quantizer,
        network="diffusers",
        foreign=diffusers_config,
    )
    _copy_weights(model, tokenizer)
    published = published_statistics(diffusers_config)
    if published is not None:
        tokenizer.set_latent_statistics(*published)
    return tokenizer.eval()


def read_model(source: str | Path, subfolder: str | None = None) -> nn.Module:
    """The diffusers model at `source` in float32, from safetensors that hold it exactly; ValueError as `import_tokenizer`."""
    place = f"{source}/{subfolder}" if subfolder else str(source)
    try:
        folder = local_folder(source, subfolder)
        name = read_object(folder / CONFIG).get("_class_name")
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} has no configuration ({line(error)}): {_REMEDY}") from error
    if name not in CLASSES:
        raise ValueError(f"{place} has a model of class {name!r}; choose one of: {', '.join(CLASSES)}")
    try:
        return read_diffusers(diffusers_class(name), folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{place} cannot be read ({line(error)}): {_REMEDY}") from error


def published_statistics(diffusers_config: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Mean and std (D,) of latents by a diffusers configuration; None if it has neither."""
    scale, shift = diffusers_config.get("scaling_factor"), diffusers_config.get("shift_factor")
    mean, std = diffusers_config.get("latents_mean"), diffusers_config.get("latents_std")
    if diffusers_config["class"] == "VQModel":
        return None
    if mean is not None and std is not None:
        return torch.tensor(mean, dtype=torch.float32), torch.tensor(std, dtype=torch.float32)
    if not scale:
        return None
    channels = interface_of(diffusers_config).quantizer["dim"]
    return torch.full((channels,), float(shift or 0)), torch.full((channels,), 1 / scale)


_REMEDY = (
    "give a directory with config.json and diffusion_pytorch_model.safetensors, or a Hub id, which needs a network"
)


@torch.no_grad()
def _copy_weights(model: nn.Module, tokenizer: ImageTokenizer) -> None:
    """The weights of a diffusers model into a tokenizer with the same networks."""
    for theirs, ours in zip(networks_of(model), (tokenizer.encoder, tokenizer.decoder), strict=True):
        ours.load_state_dict(theirs.state_dict())
    quantizer = tokenizer.quantizer
    if isinstance(quantizer, Codebook):
        codes: Tensor = model.get_parameter("quantize.embedding.weight")
        # step 0, or the first training batch would choose the codes anew
        quantizer.load_state_dict({**quantizer.state_dict(), "codebook": codes, "step": torch.tensor(0)})
