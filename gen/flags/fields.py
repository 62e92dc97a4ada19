"""The flags of a task: its fields and those of the dataclasses in it, by the names that config.yaml has and that are typed.

`train.steps` of the file is the flag --steps, where the group has no prefix of its own, and `model.width` is --model.width.
A dataclass with `shorthands` has further flags, which stand for several of its fields.
"""

import ast
import dataclasses
import functools
import inspect
import textwrap
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tyro

UNSET = tyro.MISSING
"""The default of a flag that must be given."""


@dataclass(frozen=True)
class Flag:
    """One flag."""

    path: str
    """Its name in config.yaml, with dots."""
    name: str
    """As it is typed; of an argument without a flag, its name."""
    hint: Any
    """Type of the value."""
    default: Any
    text: str
    """The docstring of the field, in one line."""
    aliases: tuple[str, ...] = ()
    positional: bool = False
    stands_for: Mapping[str, Mapping[str, Any]] | None = None
    """Of a flag that is no field itself: by its value those of fields beside it."""

    @property
    def last(self) -> str:
        """The name of the field."""
        return self.path.rsplit(".", 1)[-1]

    @property
    def negative(self) -> str | None:
        """The flag that turns a switch off."""
        if self.hint is not bool:
            return None
        *groups, own = self.name.removeprefix("--").split(".")
        return "--" + ".".join((*groups, f"no-{own}"))


def flags_of(task: type, default: Any = None, path: str = "", typed: str = "") -> Iterator[Flag]:
    """The flags of a dataclass in the order of its fields; `default` is an object of it, or None for those of the class."""
    hints = typing.get_type_hints(task, include_extras=True)
    for field in dataclasses.fields(task):
        hint, marks = _plain(hints[field.name])
        if tyro.conf.Suppress in marks:
            continue
        value = _default(field) if default is None else getattr(default, field.name)
        given, spelled = _settings(marks)
        own = field.name.replace("_", "-") if given is None else given
        if dataclasses.is_dataclass(hint):
            inner = f"{typed}{own}." if own else typed
            value = None if value is UNSET else value
            yield from flags_of(typing.cast(type, hint), value, f"{path}{field.name}.", inner)
        else:
            alone = tyro.conf.Positional in marks
            name = own if alone else f"--{typed}{own}"
            yield Flag(path + field.name, name, hint, value, text_of(task, field.name), spelled, alone)
    for name, (text, values) in getattr(task, "shorthands", {}).items():
        hint = typing.Literal[tuple(values)]
        yield Flag(path + name, f"--{typed}{name}", hint, None, text, stands_for=values)


def _plain(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """A type without what is noted on it, and the notes."""
    if typing.get_origin(hint) is typing.Annotated:
        inner, *marks = typing.get_args(hint)
        return inner, tuple(marks)
    return hint, ()


def _settings(marks: tuple[Any, ...]) -> tuple[str | None, tuple[str, ...]]:
    """Name and aliases that `tyro.conf.arg` gives a field."""
    settings = [mark for mark in marks if hasattr(mark, "aliases")]
    name = next((mark.name for mark in settings if mark.name is not None), None)
    return name, tuple(alias for mark in settings for alias in mark.aliases or ())


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return field.default
    return UNSET if field.default_factory is dataclasses.MISSING else field.default_factory()


def text_of(task: type, name: str) -> str:
    """The docstring of a field, in one line: of the class nearest to `task` that has one; empty without any."""
    return next((texts[name] for cls in task.__mro__ if name in (texts := _texts(cls))), "")


@functools.cache
def _texts(cls: type) -> dict[str, str]:
    """The strings that stand behind the fields of a class."""
    if not dataclasses.is_dataclass(cls):
        return {}
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    found = dict[str, str]()
    for line, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = ast.literal_eval(after.value) if isinstance(after, ast.Expr) else None
            found |= {line.target.id: " ".join(text.split())} if isinstance(text, str) else {}
    return found
