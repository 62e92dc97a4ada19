"""Files of solvers: safetensors whose header holds a format and JSON. What is read is what was written, or ValueError."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

Record = TypeVar("Record")

FILE_LIMIT = 1 << 30
"""Bytes of a saved solver. Tables have some kB, the largest predictors of numbers per sample some MB."""


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """A safetensors file, written completely or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(save(dict(tensors), dict(header)))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_header(path: Path) -> dict[str, str]:
    """The header of a safetensors file; ValueError for any other file."""
    return _read(path)[1]


def read_tensors(path: Path, form: str, what: str, keys: tuple[str, ...]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a file by `write_tensors` whose format is `form`, with these keys in its header.

    ValueError for any other, which is not `what`.
    """
    tensors, header = _read(path)
    if header.get("format") != form:
        raise ValueError(f"{path} is not {what} ({form}): its format is {header.get('format')!r}")
    missing = [key for key in keys if key not in header]
    if missing:
        raise ValueError(f"the header of {path} lacks {', '.join(missing)}")
    return tensors, header


def _regular(path: Path) -> Path:
    """`path`, if it is a regular file of at most `FILE_LIMIT` bytes; ValueError: pipes and devices never end."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file: give a file that a solver was saved to")
    if size > FILE_LIMIT:
        raise ValueError(f"{path} has {size:,} bytes, more than the limit of {FILE_LIMIT:,}: it is no solver")
    return path


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(_regular(path), framework="pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    """ValueError unless there are tensors of these names, dtypes and shapes, and no others."""
    found = {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()}
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            there, wanted = (_described(both.get(name)) for both in (found, expected))
            raise ValueError(f"'{name}' is {there}, not {wanted}")


def _described(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> str:
    return "absent" if tensor is None else f"{str(tensor[0]).removeprefix('torch.')} of shape {tensor[1]}"


def read_object(text: str, what: str) -> dict[str, Any]:
    """The JSON object in `text`; ValueError for any other text."""
    values = json.loads(text)
    if not isinstance(values, dict):
        raise ValueError(f"{what} is no JSON object: {text[:80]}")
    return values


def read_record(kind: type[Record], text: str, what: str) -> Record:
    """The dataclass of plain fields that a JSON object describes.

    ValueError for missing and unknown fields, for other types than the fields', and for numbers that are not finite.
    """
    values, types = read_object(text, what), get_type_hints(kind)
    needed = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # pyright: ignore[reportArgumentType]
    odd = [name for name in (*values, *needed) if name not in types or name not in values]
    if odd:
        raise ValueError(
            f"{what} has no field '{odd[0]}'" if odd[0] not in values else f"unknown field '{odd[0]}' of {what}"
        )
    for name, value in values.items():
        if types[name] is float and type(value) is int:
            values[name] = value = float(value)
        if type(value) is not types[name] or (type(value) is float and not math.isfinite(value)):
            raise ValueError(f"{name} of {what} is {value!r}, not {types[name].__name__}")
    return kind(**values)
