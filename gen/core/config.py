"""Frozen dataclasses <-> plain dictionaries <-> YAML and JSON, strictly: every key is known, every value of its type.

An unknown key is an error that names the nearest known one. Flags and files that people write raise UsageError, what a run left
DataError.
"""

import contextlib
import dataclasses
import math
import re
import reprlib
import sys
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml

from midway.gen.core.errors import DataError, UsageError, nearest, one_line, raising, remedy
from midway.gen.core.files import read_json, read_text, reading, write_atomically

T = TypeVar("T")
PER_CALL = {"per call": True}
"""Metadata of a field that concerns one call alone (`field(default=False, metadata=PER_CALL)`): never recorded, nor read back."""
RECORDED_AS = "recorded as"
"""Metadata of a text field that may be a path: the function whose result `to_record` stores."""

YAML_LIMIT = 1 << 20
"""Bytes of a configuration. Those that are written here have 2 kB; PyYAML takes ten seconds for this many."""


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are also written 1e-3, which PyYAML by itself reads as a string; without aliases.

    Ten lines of aliases to aliases stand for a billion values.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases are not read: write the value again", problem_mark=mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """YAML that `_Loader` reads."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_POWER = re.compile(r"^[-+]?(\d{1,6}|\d+\.\d*|\.\d+)[eE][-+]?\d{1,3}$")
"""A number like 1e-3, and no hash of hexadecimal digits that looks like one."""
for _kind in (_Loader, _Dumper):  # the one reads it as a number, the other quotes a text that looks like it
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", _POWER, list("-+.0123456789"))


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dataclasses as plain YAML types (paths as strings, tuples as lists), without the fields of one call."""
    return {f.name: _plain(getattr(config, f.name)) for f in dataclasses.fields(config) if not _is_per_call(f)}


def to_record(config: Any) -> dict[str, Any]:
    """`to_dict` as a run stores it: every path is absolute, so that the run can be used from any directory."""
    return {f.name: _recorded(getattr(config, f.name), f) for f in dataclasses.fields(config) if not _is_per_call(f)}


def _recorded(value: Any, field: dataclasses.Field[Any]) -> Any:
    if dataclasses.is_dataclass(value):
        return to_record(value)
    if isinstance(value, tuple | list):
        return [_recorded(v, field) for v in value]
    if isinstance(value, str) and RECORDED_AS in field.metadata:
        return field.metadata[RECORDED_AS](value)
    return str(absolute(value)) if isinstance(value, Path) else _plain(value)


def absolute(path: Path) -> Path:
    """The path from the root of the file system; links stay, except where `..` follows one."""
    path = path.expanduser()
    return path.resolve() if ".." in path.parts else path.absolute()


def absolute_if_there(text: str) -> str:
    """A text that may be a path: absolute if something is there, else as it is."""
    return str(absolute(Path(text))) if text and Path(text).expanduser().exists() else text


def _is_per_call(field: dataclasses.Field[Any]) -> bool:
    return PER_CALL.items() <= field.metadata.items()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_dict(cls: type[T], values: Any, where: str = "config") -> T:
    """The dataclass `cls` from what `to_dict` gave; missing keys keep their defaults. UsageError for what does not fit.

    Fields of one call keep their defaults too: files of earlier versions hold them. A field whose metadata has an entry "absent"
    takes that where its key is missing: what files of earlier versions mean.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} is not a mapping", f"it is {_short(values)}", "write it as `key: value` lines")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in fields:
            raise UsageError(
                f"unknown key '{key}' in {where}", f"{cls.__name__} has no such field", nearest(str(key), fields)
            )
    missing = [name for name, f in fields.items() if name not in values and _is_needed(f)]
    if missing:
        raise UsageError(f"{where} lacks '{missing[0]}'", f"{cls.__name__} has no default for it", "add the key")
    absent = {key: field.metadata["absent"] for key, field in fields.items() if "absent" in field.metadata}
    recorded = {key: value for key, value in values.items() if not _is_per_call(fields[key])}
    typed = absent | {key: _typed(hints[key], value, f"{where}.{key}") for key, value in recorded.items()}
    with raising(UsageError, f"{where} cannot be used", "correct the value", ValueError, TypeError, ArithmeticError):
        return cls(**typed)


def _is_needed(field: dataclasses.Field[Any]) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def from_file(cls: type[T], values: Any, path: Path, fix: str, part: str = "") -> T:
    """`from_dict` of what a run left in this file, or in a part of it; DataError, with this `fix`, for what does not fit."""
    try:
        return from_dict(cls, values, part or path.name)
    except UsageError as error:
        raise DataError(f"{path} cannot be used", f"{error.what}: {error.why}", fix) from error


def read_as(cls: type[T], path: Path, fix: str) -> T:
    """The object in a JSON file as the dataclass `cls`; DataError, with this `fix`, for anything else."""
    with reading(path, fix):
        values = read_json(path)
    return from_file(cls, values, path, fix)


def _typed(hint: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type: dataclass, optional, tuple, dict, Path, Literal, or a plain scalar; a number is no NaN."""
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, where)  # pyright: ignore[reportArgumentType]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return _typed(arguments[0], value, where)
    if origin in (types.UnionType, typing.Union):
        return _one_of(arguments, value, where)
    if origin is typing.Literal:
        return _checked(value, value in arguments, where, f"one of {', '.join(map(repr, arguments))}")
    if origin is tuple:
        return _tuple(arguments, value, where)
    if origin is dict:
        _checked(value, isinstance(value, dict) and all(isinstance(key, str) for key in value), where, "a mapping")
        return {key: _typed(arguments[1], v, f"{where}.{key}") for key, v in value.items()}
    if hint is Path:
        return Path(_checked(value, isinstance(value, str), where, "a path"))
    if hint is float:
        return float(_checked(value, _is_number(value), where, "a number"))
    if isinstance(hint, type):
        exact = isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
        return _checked(value, exact, where, f"of type {hint.__name__}")
    return value


def _one_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """`value` as the first type that takes it, None if that is one of them; the error is that of the last."""
    if value is None and type(None) in kinds:
        return None
    *others, last = (kind for kind in kinds if kind is not type(None))
    for kind in others:
        with contextlib.suppress(UsageError):
            return _typed(kind, value, where)
    return _typed(last, value, where)


def _tuple(kinds: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    """A list as a tuple of values of one type, `kinds` = (type, ...), or of as many as there are types."""
    any_length = kinds[1:] == (Ellipsis,)
    _checked(value, isinstance(value, list | tuple), where, "a list")
    _checked(value, any_length or len(value) == len(kinds), where, f"a list of {len(kinds)}")
    each = kinds[:1] * len(value) if any_length else kinds
    return tuple(_typed(kind, v, f"{where}.{i}") for i, (kind, v) in enumerate(zip(each, value, strict=True)))


def _is_number(value: Any) -> bool:
    """Whether float64 has it; NaN is no number, infinity is."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max if isinstance(value, int) else not math.isnan(value)


def _checked(value: Any, fits: bool, where: str, wanted: str) -> Any:
    if not fits:
        raise UsageError(f"{where} cannot be {_short(value)}", f"it must be {wanted}", "correct the value")
    return value


def _short(value: Any) -> str:
    """The value as Python writes it, cut where it is long or deep."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = cut.maxlong = 100
    return cut.repr(value)


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Readable YAML in the order of the fields, written completely or not at all. DiskError."""
    write_atomically(path, yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True).encode())


def read_yaml(path: Path) -> Any:
    """The contents of a YAML file; UsageError when it is missing, cannot be read to its end or is not YAML."""
    try:
        return yaml.load(read_text(path, YAML_LIMIT), Loader=_Loader)
    except FileNotFoundError:
        raise UsageError(f"no file {path}", "it was given as a configuration", "check the path") from None
    except OSError as error:
        raise UsageError(
            f"{path} cannot be read", one_line(error), remedy(error, "give the config.yaml of a run")
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates, long numbers, other encodings
        raise UsageError(f"{path} is not YAML", one_line(error), "correct the file") from None
