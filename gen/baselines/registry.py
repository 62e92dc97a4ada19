"""Baselines by kind, and loading of their runs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from midway.gen.baselines.base import CPU, KIND, Baseline
from midway.gen.baselines.flow import CouplingFlow
from midway.gen.baselines.tarflow import TarFlow
from midway.gen.baselines.vae import VAE
from midway.gen.core.config import from_file
from midway.gen.core.files import read_tensors, read_text, reading, state_hash
from midway.gen.core.ranges import check_classes
from midway.gen.core.runs import Run
from midway.gen.data.places import data_of
from midway.gen.data.splits import DataConfig
from midway.gen.progress.finished import progress_of, selected
from midway.tokenizers.weights import building, load_weights


@dataclass(frozen=True)
class Description:
    """model.json: from which a baseline is built; `config` is of the kind's own type."""

    kind: str
    config: dict[str, Any]
    image_shape: tuple[int, int, int]
    levels: int
    classes: int
    empty: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_classes(self.classes, self.empty)


BASELINES: dict[str, type[Baseline]] = {"vae": VAE, "flow": CouplingFlow, "tarflow": TarFlow}


@dataclass(frozen=True)
class TrainedBaseline:
    """A baseline with averaged weights, in eval mode and frozen, and the data it was trained on."""

    model: Baseline
    data: DataConfig
    hash: str
    run: Run
    weights: str
    """For reports: averaged or newest, and the optimizer step."""


def load_trained_baseline(path: Path, device: torch.device = CPU) -> TrainedBaseline:
    """The model of a baseline run, with its best weights if there are any, and its data; errors as `read_baseline`."""
    run = Run.open(path, KIND)
    folder = selected(run)
    model, digest = read_baseline(folder, device)
    averaged = "averaged" if _weights(folder).name == "ema.safetensors" else "newest"
    best = ", the best in validation" if folder.parent == run.best else ""
    progress = None if best else progress_of(run, folder)
    weights = f"{averaged}, {progress or folder.name.replace('-', ' ')}{best}"
    return TrainedBaseline(model, data_of(run), digest, run, weights)


def _weights(folder: Path) -> Path:
    averaged = folder / "ema.safetensors"
    return averaged if averaged.exists() else folder / "model.safetensors"


def read_baseline(folder: Path, device: torch.device = CPU) -> tuple[Baseline, str]:
    """The model of a checkpoint directory, averaged, in eval mode and frozen, and the hash of its description and weights.

    DataError for files that are missing or do not fit.
    """
    file, retrain = folder / "model.json", "train the model again with --overwrite"
    with reading(folder, retrain):
        text, (state, _) = read_text(file), read_tensors(_weights(folder))
        found = from_file(Description, json.loads(text), file, retrain)
        cls = BASELINES[found.kind]
        config = from_file(cls.config_type, found.config, file, retrain)
        with building(file, state):
            model = cls(config, found.image_shape, found.levels, found.classes)
            load_weights(model, state)
        model.empty = found.empty
    return model.to(device).eval().requires_grad_(False), state_hash(text, state)
