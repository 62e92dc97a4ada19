"""Saved pipelines of diffusers, read from their folders (diffusers.py has what is measured of them).

    model_index.json                     classes; those below are supported, any other raises DataError
    unet/                                UNet2DModel: the network, with class labels if it has num_class_embeds
    scheduler/scheduler_config.json      the forward process and the target (samplers/interop.py); its sampler is not used
    vqvae/, vae/                         VQModel, AutoencoderKL: images = decode(latents / scaling_factor)

Weights are safetensors alone; nothing is fetched, and no code of a folder is run.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from midway.gen.core.errors import DataError, one_line
from midway.gen.core.files import DAMAGE, read_json, state_hash
from midway.gen.diffusion.load import CPU
from midway.gen.evaluation.diffusers import NETWORK, DiffusersModel
from midway.samplers.interop import parametrisation_of
from midway.tokenizers.pretrained import read_diffusers

DECODERS = {"vqvae": "VQModel", "vae": "AutoencoderKL"}
SUPPORTED = (
    f"a folder saved by save_pretrained with a unet ({NETWORK}), a scheduler, and at most one of: "
    f"{', '.join(f'{name} ({kind})' for name, kind in DECODERS.items())}"
)
MOST_TIMESTEPS = 1 << 20


def load_diffusers(path: Path, device: torch.device = CPU) -> DiffusersModel:
    """The model of a pipeline's folder; DataError for another kind of pipeline, pickled weights, or files that do not fit."""
    parts = _parts(path)
    scheduler = _json(path / "scheduler" / "scheduler_config.json")
    steps = scheduler.get("num_train_timesteps", 1000)
    if type(steps) is not int or not 1 <= steps <= MOST_TIMESTEPS:
        raise _unsupported(path, f"its scheduler has {steps!r:.100} timesteps")
    try:
        schedule = parametrisation_of(scheduler).schedule
    except DAMAGE as error:
        raise _unsupported(path, f"its scheduler is not known here: {error}") from None
    shape, classes = _interface(path, _json(path / "unet" / "config.json"))
    network = _read(path / "unet", NETWORK, device)
    name = next((name for name in DECODERS if name in parts), None)
    decoder = None if name is None else _read(path / name, DECODERS[name], device)
    scale = 1.0 if decoder is None else _own(decoder)["scaling_factor"]
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise _unsupported(path, f"its {name} has the scaling_factor {scale!r:.100}")
    states = {f"unet.{key}": value for key, value in network.state_dict().items()}
    states |= {} if decoder is None else {f"decoder.{key}": value for key, value in decoder.state_dict().items()}
    configs = [_own(part) for part in (network, decoder) if part is not None]
    process = {name: value for name, value in scheduler.items() if name != "_diffusers_version"}
    digest = state_hash(json.dumps([configs, process], sort_keys=True, default=str), states)
    return DiffusersModel(network, decoder, scheduler, shape, classes, digest, path, schedule)


def _unsupported(path: Path, why: str) -> DataError:
    return DataError(f"{path} cannot be measured", why, f"give {SUPPORTED}")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        raise _unsupported(path.parent, f"{path.name}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise _unsupported(path.parent, f"{path.name} is not an object")
    return found


def _parts(path: Path) -> set[str]:
    """Names of the components, each of a class that is known here."""
    index = _json(path / "model_index.json")
    known = {"unet": NETWORK, **DECODERS}
    found = {name: its for name, its in index.items() if not name.startswith("_") and its not in (None, [None, None])}
    for name, its in found.items():
        if not isinstance(its, list) or len(its) != 2:
            continue  # an option of the pipeline
        if name != "scheduler" and (name not in known or its != ["diffusers", known[name]]):
            raise _unsupported(
                path, f"{index.get('_class_name', 'its pipeline')} has {name}: {' '.join(map(str, its))}"
            )
    if "unet" not in found or "scheduler" not in found or len(set(DECODERS) & set(found)) > 1:
        raise _unsupported(path, f"it has the components {', '.join(found) or 'none'}")
    return set(found)


def _read(folder: Path, name: str, device: torch.device) -> nn.Module:
    """A model of this class in float32, from safetensors that hold it exactly."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.autoencoders.vq_model import VQModel
    from diffusers.models.unets.unet_2d import UNet2DModel

    kind = {NETWORK: UNet2DModel, "VQModel": VQModel, "AutoencoderKL": AutoencoderKL}[name]
    named = _json(folder / "config.json").get("_class_name")
    if named != name:
        raise _unsupported(folder, f"its configuration is of class {named}, not {name}")
    try:
        model = read_diffusers(kind, folder)
    except (OSError, SafetensorError, ValueError) as error:
        raise _unsupported(folder, str(error)) from None
    return nn.Module.to(model, device).eval().requires_grad_(False)


def _own(model: nn.Module) -> dict[str, Any]:
    """A model's configuration without its path and version."""
    config: Any = model.config
    return {name: value for name, value in dict(config).items() if not name.startswith("_")}


def _interface(path: Path, config: dict[str, Any]) -> tuple[tuple[int, int, int], int]:
    """The shape of a state, and the number of classes."""
    size, kind = config.get("sample_size"), config.get("class_embed_type")
    if size is None:
        raise _unsupported(path, "the configuration of its unet does not say its sample_size")
    if kind is not None:
        raise _unsupported(path, f"its unet has class_embed_type {kind!r}, not class labels")
    height, width = (
        (size, size) if isinstance(size, int) else size if isinstance(size, list) and len(size) == 2 else (0, 0)
    )
    shape, classes = (config.get("in_channels", 3), height, width), config.get("num_class_embeds") or 0
    if not all(type(value) is int and value > 0 for value in shape) or type(classes) is not int or classes < 0:
        raise _unsupported(
            path, f"its unet has states of shape {shape} and {classes} classes, which are no numbers of any"
        )
    return shape, classes
