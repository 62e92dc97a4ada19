"""Damage to the tensors of a safetensors file that leaves it a well-formed one, by name; its header stays."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def first_float(tensors: Tensors) -> str:
    """The largest of the floating-point tensors."""
    return max((name for name in tensors if tensors[name].is_floating_point()), key=lambda name: tensors[name].numel())


def with_one(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """One floating-point tensor changed."""
    return lambda tensors: {**tensors, (name := first_float(tensors)): change(tensors[name]).contiguous()}


def with_all(kind: torch.dtype) -> Callable[[Tensors], Tensors]:
    """Every floating-point tensor of another type."""
    return lambda tensors: {name: v.to(kind) if v.is_floating_point() else v for name, v in tensors.items()}


def spoiled(value: float) -> Callable[[Tensor], Tensor]:
    """A tensor with this number in its last place."""

    def spoil(tensor: Tensor) -> Tensor:
        flat = tensor.clone().flatten()
        flat[-1] = value
        return flat.view(tensor.shape)

    return spoil


HALF = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
DAMAGES: dict[str, Callable[[Tensors], Tensors]] = {
    "no tensor": lambda tensors: {},
    "half the tensors": lambda tensors: {name: tensors[name] for name in sorted(tensors)[: len(tensors) // 2]},
    "one missing": lambda tensors: {name: v for name, v in tensors.items() if name != first_float(tensors)},
    "one too many": lambda tensors: {**tensors, "another.weight": torch.zeros(2)},
    "one renamed": lambda tensors: {
        f"x{name}" if name == first_float(tensors) else name: v for name, v in tensors.items()
    },
    "one longer": with_one(lambda v: torch.cat([v, v]) if v.dim() else v.expand(2)),
    "one flat": with_one(lambda v: v.flatten() if v.dim() != 1 else v[None]),
    "one of float64": with_one(lambda v: v.double()),
    "one of bfloat16": with_one(lambda v: v.bfloat16()),
    "one of int64": with_one(lambda v: v.long()),
    "one of bool": with_one(lambda v: v > 0),
    "all of float64": with_all(torch.float64),
    "all of int64": with_all(torch.int64),
    "NaN": with_one(spoiled(float("nan"))),
    "infinity": with_one(spoiled(float("inf"))),
}


def read(file: Path) -> tuple[Tensors, dict[str, str]]:
    """Tensors and header of a safetensors file."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}, opened.metadata() or {}  # noqa: SIM118


def damage(file: Path, name: str) -> None:
    """Replace a safetensors file by a damaged one."""
    tensors, header = read(file)
    save_file(DAMAGES[name](tensors), file, header)


def shard(file: Path) -> None:
    """Divide the file of `save_pretrained` into two and an index."""
    tensors, header = read(file)
    names = sorted(tensors)
    parts = {f"{file.stem}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for part, own in parts.items():
        save_file({name: tensors[name] for name in own}, file.with_name(part), header)
    index = {"metadata": {}, "weight_map": {name: part for part, own in parts.items() for name in own}}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
    file.unlink()
