"""Weights of other projects from their files: safetensors, or a pickle of torch of which tensors alone are read.

A pickle is read by torch.load(weights_only=True), which runs no code of the file: plain values, tensors, and argparse.Namespace,
which training scripts store beside their weights. Tensors stay on the disk until they are used, where the file's format has that.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, one_line
from midway.gen.core.files import DAMAGE, WEIGHTS_LIMIT, read_json, read_tensors, reading, regular_file
from midway.gen.foreign.layouts import LayoutName

AVERAGES = ("ema", "model", "state_dict")
"""Keys of a checkpoint of a training under which its weights are, the best first."""
PREFIXES = ("module.", "_orig_mod.")
"""What parallel and compiled training put before names."""
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
CONFIG = "config.json"
SAFE = (
    "convert it to safetensors in the project it is from, where you trust the file: "
    "safetensors.torch.save_file(torch.load(FILE)['ema'], 'weights.safetensors')"
)


def weights_file(path: Path) -> Path:
    """The file of weights at `path`: itself, or of a folder the one that diffusers writes. DataError without one."""
    if not path.is_dir():
        return path
    found = [path / name for name in WEIGHTS if (path / name).exists()]
    if not found:
        why = f"it has neither {WEIGHTS[0]} nor {WEIGHTS[1]}"
        raise DataError(
            f"{path} holds no weights", why, "give the file itself, or the folder `transformer` of a pipeline"
        )
    return found[0]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors by name, on the CPU, those of the average where a checkpoint has one. DataError for any other file."""
    try:
        if path.suffix == ".safetensors":
            return without_prefixes(read_tensors(path)[0])
        return without_prefixes(_tensors(_load(regular_file(path, WEIGHTS_LIMIT))))
    except Exception as error:  # of a pickle, anything; `DAMAGE` is most of it
        if not isinstance(error, (*DAMAGE, EOFError)) and "Unpickling" not in type(error).__name__:
            raise
        raise DataError(f"{path} cannot be read as weights", one_line(error), SAFE) from error


def _load(path: Path) -> Any:
    """RuntimeError, OSError or an unpickling error for what is not tensors and plain values."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
        return torch.load(path, map_location="cpu", weights_only=True)  # of before torch 1.6, which has one stream


def _tensors(found: Any) -> dict[str, Tensor]:
    """ValueError for anything but a mapping of names to tensors, also under one of `AVERAGES`."""
    for key in AVERAGES:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
            break
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"it holds no tensors by name, at its top or under one of {', '.join(AVERAGES)}")
    return {str(name): value for name, value in found.items()}


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same without what wraps of a network put before every name."""
    for prefix in (*PREFIXES, *PREFIXES):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def read_statistics(path: Path) -> tuple[Tensor, Tensor]:
    """float32 (C,) each: the tensors `mean` and `std` of a file, of any shape of C numbers. DataError for any other file."""
    found = read_weights(path)
    if not {"mean", "std"} <= found.keys():
        why = f"it has {', '.join(sorted(found)[:3])}, not mean and std"
        raise DataError(
            f"{path} holds no statistics of latents", why, "give latents_stats.pt, or such tensors as safetensors"
        )
    return found["mean"].flatten().float(), found["std"].flatten().float()


def settings_of(path: Path, layout: LayoutName) -> dict[str, Any]:
    """config.json beside a file of diffusers; {} where there is none, and of the other layouts. DataError for a damaged one."""
    file = path.parent / CONFIG
    if layout != "diffusers" or not file.exists():
        return {}
    with reading(file, "get the folder `transformer` of the pipeline again"):
        return dict(read_json(file))
