"""Pipelines of diffusers, read from a saved folder: a `unet` and a `scheduler`, and a `vqvae` or `vae` if it is latent.

    model_index.json                     classes; those below are supported, any other raises DataError
    unet/                                UNet2DModel: the network, with class labels if it has num_class_embeds
    scheduler/scheduler_config.json      the forward process and the target (samplers/interop.py); its sampler is not used
    vqvae/, vae/                         VQModel, AutoencoderKL: images = decode(latents / scaling_factor)

Weights are safetensors alone; nothing is fetched, and no code of a folder is run.

Samples come from our solvers, on tables built for the model's own schedule. A seed gives the noise and the class that it gives
for our own models; evaluations are counted at the network.
"""

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from midway.gen.core.errors import DataError, UsageError, nearest, one_line
from midway.gen.core.files import DAMAGE, read_json, state_hash
from midway.gen.data.images import to_uint8
from midway.gen.diffusion.load import CPU, LEARNED
from midway.gen.diffusion.model import start_state
from midway.gen.diffusion.samplers import SamplerConfig, build_table, check_guidance
from midway.gen.diffusion.sampling import SamplingConfig, SeededNoise, drawn, labels_of, noise_of
from midway.gen.evaluation.sources import LATENT_LIMIT, Config, SampledBatch
from midway.samplers.denoisers import field_from_diffusers
from midway.samplers.grids import GRIDS
from midway.samplers.interop import parametrisation_of, trained_range
from midway.samplers.prediction import NetworkField
from midway.samplers.sample import ForwardCounter
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import SOLVERS
from midway.tokenizers.pretrained import read_diffusers

NETWORK = "UNet2DModel"
DECODERS = {"vqvae": "VQModel", "vae": "AutoencoderKL"}
SUPPORTED = (
    f"a folder saved by save_pretrained with a unet ({NETWORK}), a scheduler, and at most one of: "
    f"{', '.join(f'{name} ({kind})' for name, kind in DECODERS.items())}"
)
MOST_TIMESTEPS = 1 << 20
DECODED = 64
"""Latents decoded at once."""


@dataclass(frozen=True)
class DiffusersModel:
    """A pipeline's network and decoder, in eval mode and frozen, and the config of its scheduler."""

    network: nn.Module
    decoder: nn.Module | None
    scheduler: dict[str, Any]
    shape: tuple[int, int, int]
    """Of a state, (C, h, w)."""
    classes: int
    hash: str
    """12 hexadecimal digits of all weights and configurations."""
    path: Path
    schedule: Schedule
    empty: tuple[int, ...] = ()
    """No class is known to have had no training image."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    def field(self, labels: Tensor) -> NetworkField:
        """What solvers see, for labels (B,), which an unconditional model ignores."""
        given = {"class_labels": labels.to(self.device)} if self.classes else {}
        return field_from_diffusers(self.network, self.scheduler, given)

    @property
    def description(self) -> str:
        """The model in a line."""
        count = sum(value.numel() for value in self.network.parameters())
        latent = "" if self.decoder is None else f" in latents of {type(self.decoder).__name__}"
        lowest = trained_range(self.schedule)[1]
        return (
            f"diffusers {self.path.name} ({self.hash}): {NETWORK} of {count:,} parameters{latent}, {self.schedule!r}, "
            f"sampled down to sigma / alpha = {lowest:.3g}"
        )

    def check_guidance(self, config: SamplerConfig) -> None:
        """UsageError for any: these models have no missing class."""
        check_guidance(config, None)

    def within(self, config: Config) -> Config:
        """The same with grids that stay on noise levels that the model was trained on."""
        highest, lowest = trained_range(self.schedule)
        return replace(config, rho_max=min(config.rho_max, highest), rho_min=max(config.rho_min, lowest))

    def samplers(self, solver: str, nfe: int, config: SamplerConfig) -> dict[str, Sampler]:
        """One table per grid; UsageError for what such a model cannot have."""
        self.check_guidance(config)
        _check(solver, config)
        config = self.within(config)
        return {grid: build_table(self.schedule, solver, nfe, config, grid) for grid in config.grids}

    def source(self, sampler: Sampler, sampling: SamplingConfig) -> "DiffusersSource":
        """Samples by this sampler."""
        return DiffusersSource(self, sampler, sampling)

    def fitting_nfe(self, config: SamplerConfig) -> int:
        """None of its grids is fitted."""
        del config
        return 0

    def check_images(self, reference: Tensor) -> None:
        """DataError unless the model makes images of the shape of a reference (N, C, H, W)."""
        made = tuple(self.decode(torch.zeros(1, *self.shape)).shape[1:])
        if made != tuple(reference.shape[1:]):
            raise DataError(
                f"{self.path} makes images of shape {made} (C, H, W)",
                f"the reference has {tuple(reference.shape[1:])}",
                f"name the images it imitates: --data, with --resize {made[1]} and --channels {made[0]} if need be",
            )

    @torch.no_grad()
    def decode(self, values: Tensor) -> Tensor:
        """States float32 (n, C, h, w) on the CPU -> uint8 images on the CPU."""
        if self.decoder is None:
            return to_uint8(values.nan_to_num())
        latents = values.nan_to_num().clamp(-LATENT_LIMIT, LATENT_LIMIT)
        return torch.cat([self._decoded(part) for part in latents.split(DECODED)])

    def _decoded(self, latents: Tensor) -> Tensor:
        decoder: Any = self.decoder
        images = decoder.decode(latents.to(self.device) / decoder.config.scaling_factor).sample
        return to_uint8(images.nan_to_num()).cpu()


# ---- files ----


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


# ---- samples ----


@dataclass(frozen=True)
class DiffusersSource:
    """Samples of a diffusers model by one sampler."""

    model: DiffusersModel
    sampler: Sampler
    sampling: SamplingConfig

    @property
    def identity(self) -> dict[str, Any]:
        """Weights, configurations, sampler, precision, and how classes are drawn."""
        own = {"diffusers": self.model.hash, "plan": self.sampler.hash, "precision": self.sampling.precision}
        return own | drawn(self.sampling.draw)

    @torch.no_grad()
    def sample(self, seeds: Tensor) -> SampledBatch:
        """States float32 (n, C, h, w), of noise that is a function of the seed."""
        model, begun = self.model, time.perf_counter()
        bf16 = torch.autocast(model.device.type, torch.bfloat16, enabled=self.sampling.precision == "bf16")
        with ForwardCounter(model.network) as counter, bf16:
            parts = [self._solved(some) for some in seeds.split(self.sampling.batch_size)]
        return SampledBatch(torch.cat(parts), counter.evaluations / len(seeds), time.perf_counter() - begun)

    def _solved(self, seeds: Tensor) -> Tensor:
        model = self.model
        x = start_state(model.schedule, self.sampler.grid[0], noise_of(seeds, model.shape).to(model.device))
        labels = labels_of(seeds, model.classes, draw=self.sampling.draw)
        return self.sampler.run(model.field(labels), x, SeededNoise(seeds)).cpu()

    def images(self, raw: SampledBatch) -> Tensor:
        """Decoded, or in 256 levels."""
        return self.model.decode(raw.values)


def _check(solver: str, config: SamplerConfig) -> None:
    for grid in config.grids:
        if grid not in GRIDS:
            raise UsageError(f"grid '{grid}' with --diffusers", "its grids are functions alone", nearest(grid, GRIDS))
    if solver not in SOLVERS:
        why = "it is learned for a model of ours" if solver in LEARNED else "it is not in the registry"
        raise UsageError(f"solver '{solver}' with --diffusers", why, nearest(solver, SOLVERS))
    if config.eta and solver != "ddim":
        raise UsageError(f"--eta {config.eta} with {solver}", "only ddim has that parameter", "drop --eta")
