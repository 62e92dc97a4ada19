"""Options from a JSON file as arguments of a function, of the types that it declares.

JSON has no types of its own: with `"attention": "no"` a network would have attention, and `"weight": "1e-4"` fails in training.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def check_arguments(function: Callable[..., Any], values: Mapping[str, Any], what: str) -> None:
    """ValueError for a value of `values` that is not of the type which `function` declares for the argument of that name."""
    declared = typing.get_type_hints(inspect.unwrap(function.__init__ if inspect.isclass(function) else function))
    for key, value in values.items():
        if key in declared and not fits(declared[key], value):
            wanted = declared[key].__name__ if isinstance(declared[key], type) else declared[key]
            raise ValueError(f"{key} is {value!r:.200}; {what} takes {wanted}")


def fits(declared: Any, value: Any) -> bool:
    """Whether a value from JSON is of a declared type; integers are numbers, truth values are not."""
    origin, arguments = typing.get_origin(declared) or declared, typing.get_args(declared)
    if origin in (types.UnionType, typing.Union):
        return any(fits(one, value) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(fits(kind, v) for kind in arguments[:1] for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    return isinstance(value, origin) if isinstance(origin, type) else True
