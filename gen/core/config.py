"""Frozen dataclasses <-> plain dictionaries <-> YAML, strictly: an unknown key is an error that names the nearest known one."""

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from midway.gen.core.errors import UsageError, nearest, one_line, raising
from midway.gen.core.files import write_atomically

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are also written 1e-3; PyYAML by itself reads that as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)$"), list("-+.0123456789")
)


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dataclasses as plain YAML types (paths as strings, tuples as lists)."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[T], values: Any, where: str = "config") -> T:
    """The dataclass `cls` from what `to_dict` gave. UsageError for what does not fit.

    A missing key keeps its default, or has the value that its field's metadata calls "absent": what it meant before it existed.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} is not a mapping", f"it is {values!r}", "write it as `key: value` lines")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in names:
            raise UsageError(
                f"unknown key '{key}' in {where}", f"{cls.__name__} has no such field", nearest(str(key), names)
            )
    older = {f.name: f.metadata["absent"] for f in dataclasses.fields(cls) if "absent" in f.metadata}  # pyright: ignore
    typed = older | {key: _typed(hints[key], value, f"{where}.{key}") for key, value in values.items()}
    with raising(UsageError, f"{where} cannot be used", "correct the value"):
        return cls(**typed)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type: dataclass, optional, tuple, Path, Literal, or a plain scalar."""
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # pyright: ignore[reportArgumentType]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _typed(arguments[0], value, where)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _typed(next(a for a in arguments if a is not type(None)), value, where)
    if origin is typing.Literal:
        return _checked(value, value in arguments, where, f"one of {', '.join(map(repr, arguments))}")
    if origin is tuple:
        _checked(value, isinstance(value, list | tuple), where, "a list")
        return tuple(_typed(arguments[0], v, where) for v in value)
    if hint is Path:
        return Path(_checked(value, isinstance(value, str), where, "a path"))
    if hint is float:
        return float(_checked(value, isinstance(value, int | float) and not isinstance(value, bool), where, "a number"))
    if isinstance(hint, type):
        exact = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        return _checked(value, exact, where, f"of type {hint.__name__}")
    return value


def _checked(value: Any, fits: bool, where: str, wanted: str) -> Any:
    if not fits:
        raise UsageError(f"{where} cannot be {value!r}", f"it must be {wanted}", "correct the value")
    return value


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Readable YAML in the order of the fields, written completely or not at all. DiskError."""
    write_atomically(path, yaml.safe_dump(values, sort_keys=False, allow_unicode=True).encode())


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file; UsageError when it is missing or is not YAML."""
    try:
        return yaml.load(path.read_text(), Loader=_Loader)
    except FileNotFoundError:
        raise UsageError(f"no file {path}", "it was given as a configuration", "check the path") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not YAML", one_line(error), "correct the file") from None
