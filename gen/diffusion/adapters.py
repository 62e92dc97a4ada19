"""A latent model that is fine-tuned by adapters (gen/networks/adapters.py), and adapters as files that peft reads.

folder    adapter_config.json          peft's: rank r, lora_alpha, names of the layers; `revision` is the hash of the base
          adapter_model.safetensors    base_model.model.<layer>.lora_A.weight (r, in), .lora_B.weight (out, r)
          config.json                  what the model is with it: its classes

Adapted weights are W + lora_alpha / r B A. An adapter that started along the gradient is stored with its start subtracted, as one
of twice the rank. Where classes are new, the table of labels is stored beside, as peft does with `modules_to_save`.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from midway.gen.core.errors import DataError
from midway.gen.core.files import read_json, read_tensors, read_text, reading, state_hash
from midway.gen.core.runs import Run, kind_of
from midway.gen.data.places import data_of
from midway.gen.diffusion.load import TrainedModel, load_model, which_weights
from midway.gen.diffusion.model import LatentModel
from midway.gen.networks.adapters import AdapterConfig, Factors, LabelRows, adapt, layers_of
from midway.gen.progress.finished import progress_of
from midway.gen.training.batches import Context, LatentBatch
from midway.tokenizers.tokenizer import ImageTokenizer
from midway.tokenizers.weights import CONFIG

KIND = "adapter"
"""Of a run that trains one; also its folder in a checkpoint."""
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
LABELS = "network.label"
PREFIX = "base_model.model."
FACTOR = re.compile(re.escape(PREFIX) + r"(.+)\.lora_([AB])\.weight")
PLAIN = {"use_dora": False, "bias": "none", "rank_pattern": {}, "alpha_pattern": {}, "fan_in_fan_out": False}
"""Settings of peft with the only value that is read here."""


class AdaptedModel(LatentModel):
    """A latent model with the weights of `base`, which do not train, and adapters that do. Its state is that of the adapters.

    Its classes are `names`: of the base where they are called alike, else new ones, which begin as no class. ValueError for
    targets or a rank that the network has not.
    """

    def __init__(
        self, base: TrainedModel, config: AdapterConfig, names: tuple[str, ...], empty: tuple[int, ...] = ()
    ) -> None:
        super().__init__(base.model.config, base.model.latent_shape, len(names), empty, names)
        self.adapter, self.base = config, base.hash
        self.place = f"{base.run.path.resolve().name}@{base.run.checkpoint.name.removeprefix('step-')}"
        give_weights(self, base.model)
        self.requires_grad_(False)
        adapt(self.network, config)
        rows = rows_of(base.model, self.class_names) if self.classes else ()
        self.other_labels = rows != tuple(range(base.model.classes))
        """Whether its classes are others than those of the base, or in another order."""
        if None in rows:
            self.network.label = cast(nn.Embedding, LabelRows(base.model.network.label, rows))
        starts = {name for name, _ in self.named_buffers() if name.endswith((".start_A", ".start_B"))}
        self.own = starts | {name for name, p in self.named_parameters() if p.requires_grad}
        """Names of the tensors that are saved."""
        self.register_state_dict_post_hook(_keep_own)
        self.register_load_state_dict_post_hook(_miss_own)

    def start(self, batch: LatentBatch, context: Context) -> None:
        """Begin along the gradient of the loss of this batch, if the adapters start so."""
        layers = layers_of(self.network).values()
        if self.adapter.start == "zero":
            return
        weights = [layer.base.weight.requires_grad_() for layer in layers]
        with torch.enable_grad():
            gradients = torch.autograd.grad(self.loss(batch, context)[0], weights)
        for layer, gradient in zip(layers, gradients, strict=True):
            layer.base.weight.requires_grad_(False)
            layer.start(gradient)

    def rate_of(self, name: str) -> float:
        """The factor of the learning rate of this parameter."""
        return self.adapter.b_rate if ".lora_B." in name else super().rate_of(name)

    def learned(self, state: Mapping[str, Tensor]) -> "Adapter":
        """What is stored of a state of it, the newest or an average."""
        factors = {name: layer.factors(_inside(state, name)) for name, layer in layers_of(self).items()}
        label = self.network.label
        table = label.table(state[f"{LABELS}.new"]) if isinstance(label, LabelRows) else label.weight
        labels = table.detach().cpu() if self.other_labels else None
        return Adapter(factors, self.text, labels, self.base, self.place)


def _inside(state: Mapping[str, Tensor], module: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{module}."): value for n, value in state.items() if n.startswith(f"{module}.")}


def rows_of(base: LatentModel, names: tuple[str, ...]) -> tuple[int | None, ...]:
    """For each class its number in the base, None for a new one; by number where an old run has no names, but as many classes."""
    if not base.class_names and len(names) == base.classes:
        return tuple(range(base.classes))
    known = {name: label for label, name in enumerate(base.class_names)}
    return tuple(known.get(name) for name in names)


def give_weights(model: LatentModel, base: LatentModel) -> None:
    """Give a model of the same configuration the weights of `base`; its classes those of their names, or else of no class."""
    rows = rows_of(base, model.class_names) if model.classes else ()
    places = torch.tensor([base.classes if row is None else row for row in (*rows, None)])
    state = base.state_dict()
    model.load_state_dict(state | {f"{LABELS}.weight": state[f"{LABELS}.weight"][places]})


def _keep_own(model: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.removeprefix(prefix) not in cast(AdaptedModel, model).own]:
        del state[name]


def _miss_own(model: nn.Module, keys: Any) -> None:
    keys.missing_keys[:] = [name for name in keys.missing_keys if name in cast(AdaptedModel, model).own]


# ---- files ----


@dataclass(frozen=True)
class Adapter:
    """Factors by the name of the layer in the latent model, and what else changes."""

    factors: Mapping[str, Factors]
    text: str = ""
    """Description of the model with it; empty: that of its base."""
    labels: Tensor | None = None
    """The table of labels (classes + 1, W), where it is another."""
    base: str = ""
    """Hash of the model that it is for; empty of an adapter that names none."""
    place: str = field(default="", compare=False)
    """Where that model was, RUN@step."""

    @property
    def size(self) -> int:
        """Numbers that are stored."""
        return sum(each.a.numel() + each.b.numel() for each in self.factors.values()) + (
            0 if self.labels is None else self.labels.numel()
        )

    def save(self, folder: Path) -> None:
        """Write a folder. Its layers must have one rank and one scale."""
        folder.mkdir(exist_ok=True)
        tensors = {f"{PREFIX}{name}.lora_A.weight": each.a for name, each in self.factors.items()}
        tensors |= {f"{PREFIX}{name}.lora_B.weight": each.b for name, each in self.factors.items()}
        tensors |= {} if self.labels is None else {f"{PREFIX}{LABELS}.weight": self.labels}
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
            folder / WEIGHTS,
            {"format": "pt"},
        )
        (folder / SETTINGS).write_text(json.dumps(self._settings(), indent=2) + "\n", encoding="utf-8")
        (folder / CONFIG).write_text(self.text, encoding="utf-8")

    def _settings(self) -> dict[str, Any]:
        ranks, scales = {len(each.a) for each in self.factors.values()}, {each.scale for each in self.factors.values()}
        (rank,), (scale,) = ranks, scales
        return {
            "peft_type": "LORA",
            "base_model_name_or_path": self.place,
            "revision": self.base,
            "r": rank,
            "lora_alpha": scale * rank,
            "target_modules": list(self.factors),
            "modules_to_save": None if self.labels is None else [LABELS],
            "inference_mode": True,
            **{name: value for name, value in PLAIN.items() if value is not False},
        }

    @classmethod
    def load(cls, folder: Path) -> "Adapter":
        """A folder that `save` or peft wrote. DataError."""
        with reading(folder, "give a folder of an adapter (LoRA), as midway finetune and peft write it"):
            settings, (tensors, _) = dict(read_json(folder / SETTINGS)), read_tensors(folder / WEIGHTS)
            _check(settings)
            rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
            scale = alpha / (rank**0.5 if settings.get("use_rslora") else rank)
            labels = tensors.pop(f"{PREFIX}{LABELS}.weight", None)
            found = {name: FACTOR.fullmatch(name) for name in tensors}
            if other := [name for name, match in found.items() if match is None]:
                raise ValueError(f"{other[0]} is no factor of a layer")
            layers = dict.fromkeys(match[1] for match in found.values() if match is not None)
            factors = {name: Factors(*_pair(tensors, name), scale) for name in layers}
            text = read_text(folder / CONFIG) if (folder / CONFIG).exists() else ""
            place, base = (str(settings.get(name) or "") for name in ("base_model_name_or_path", "revision"))
        return cls(factors, text, labels, base, place)


def _check(settings: Mapping[str, Any]) -> None:
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {settings.get('peft_type')}, not LORA")
    for name, value in PLAIN.items():
        if settings.get(name, value) not in (value, None):
            raise ValueError(f"{name} is {settings[name]}, and only {value} is supported")


def _pair(tensors: Mapping[str, Tensor], layer: str) -> tuple[Tensor, Tensor]:
    a, b = (tensors[f"{PREFIX}{layer}.lora_{name}.weight"].float() for name in "AB")
    return a, b


# ---- merging ----


def merged(base: LatentModel, adapter: Adapter) -> LatentModel:
    """The latent model of the base's weights with the adapter's added. DataError or ValueError where it does not fit the base."""
    state = base.state_dict()
    for name, factors in adapter.factors.items():
        place = next((key for key in (f"{name}.weight", f"network.{name}.weight") if key in state), "")
        shape, own = tuple(state[place].shape) if place else "none", (len(factors.b), factors.a.shape[1])
        if shape != own:
            raise ValueError(f"it adds a matrix {own} to {name}, and the weight of the model there is {shape}")
        state[place] = state[place] + factors.product.to(state[place])
    if adapter.labels is not None:
        state[f"{LABELS}.weight"] = adapter.labels
    return LatentModel.built(adapter.text or base.text, state, Path(CONFIG), "get the whole folder again")


def folder_of(path: Path) -> tuple[Run | None, Path]:
    """The folder of an adapter: of a run that trained one, in its checkpoint; else the path itself, of no run."""
    if kind_of(path) != KIND:
        return None, path
    run = Run.open(path, KIND)
    return run, run.checkpoint / KIND


def load_adapted(model: Path, adapter: Path | None, device: torch.device) -> TrainedModel:
    """The model of a run, with an adapter of it added to its weights if there is one; the data are then those of the adapter.

    DataError for an adapter of another model.
    """
    base = load_model(model, device if adapter is None else torch.device("cpu"))
    if adapter is None:
        return base
    run, folder = folder_of(adapter)
    found = Adapter.load(folder)
    if found.base and found.base != base.hash:
        raise DataError(
            f"--adapter {adapter} is of another model than --model {model}",
            f"it was trained for {found.base}, and this one is {base.hash}",
            f"give the model that it was trained for, {found.place}",
        )
    with reading(folder, f"give an adapter of {model}"):
        whole = merged(base.model, found)
    return TrainedModel(
        model=whole.to(device).eval().requires_grad_(False),
        tokenizer=_on(base.tokenizer, device),
        data=base.data if run is None else data_of(run),
        hash=state_hash(whole.text, whole.state_dict()),
        run=base.run if run is None else run,
        weights=base.weights if run is None else f"{_weights(run)}, added to {base.run.place}",
    )


def _on(tokenizer: ImageTokenizer, device: torch.device) -> ImageTokenizer:
    nn.Module.to(tokenizer, device)  # diffusers' own `to` hides the signature
    return tokenizer


def _weights(run: Run) -> str:
    averaged = (run.checkpoint / "ema.safetensors").exists()
    return f"adapter {which_weights(run, averaged)}, {progress_of(run, run.checkpoint)}"
