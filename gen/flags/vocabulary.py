"""The names that values of flags come from: other spellings become the name that is recorded (`midway.gen.names`)."""

import os
import types
import typing
from collections.abc import Callable
from typing import Any

from midway.gen.core.errors import UsageError, nearest
from midway.gen.flags.fields import UNSET, Flag
from midway.gen.names.nearest import canonical


def _solvers() -> list[str]:
    from midway.gen.diffusion.load import LEARNED
    from midway.gen.diffusion.samplers import ADAPTIVE
    from midway.samplers.jumps import JUMPS
    from midway.samplers.solvers import SOLVERS

    return [*SOLVERS, ADAPTIVE, *JUMPS, *LEARNED]


def _grids() -> list[str]:
    from midway.samplers.gits import GITS
    from midway.samplers.grids import NAMED

    return [*NAMED, GITS]


def _features() -> list[str]:
    from midway.gen.features.open import NAMED

    return list(NAMED)


def _metrics() -> list[str]:
    from midway.gen.evaluation.metrics import METRICS

    return list(METRICS)


def _sources() -> list[str]:
    from midway.gen.data.sources import SOURCES

    return list(SOURCES)


NUMBERS: dict[Any, str] = {int: "a whole number", float: "a number"}
REGISTERED: dict[str, Callable[[], list[str]]] = {
    **dict.fromkeys(("solver", "solvers", "teacher", "learned"), _solvers),
    **dict.fromkeys(("grid", "grids", "teacher_grid"), _grids),
    "features": _features,
    "metrics": _metrics,
    **dict.fromkeys(("data", "against"), _sources),
}
"""By the field of a flag: the names that its text, or each part of its list with commas, may be. The command checks them."""


def words_of(hint: Any) -> tuple[str, ...]:
    """The words of a choice, also of one beside None or a number; () for other types."""
    if typing.get_origin(hint) is typing.Literal:
        return tuple(map(str, typing.get_args(hint)))
    parts = kinds_of(hint)
    return () if parts == [hint] else tuple(word for part in parts for word in words_of(part))


def kinds_of(hint: Any) -> list[Any]:
    """The types of a union but None, or the type itself."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return [part for part in (typing.get_args(hint) if union else (hint,)) if part is not type(None)]


def settled(flag: Flag, value: str) -> str:
    """The value by the names of this program; UsageError for a word that is none of a fixed choice."""
    words = words_of(flag.hint)
    if words:
        return _chosen(flag, value, words)
    _check_number(flag, value)
    if flag.last not in REGISTERED or os.path.exists(value):
        return value
    known = REGISTERED[flag.last]()
    return ",".join(part if os.path.exists(part) else canonical(part, known) or part for part in value.split(","))


def _check_number(flag: Flag, value: str) -> None:
    """UsageError where a number is meant, or a list of some, and this is none."""
    kinds = [typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind for kind in kinds_of(flag.hint)]
    if len(kinds) != 1 or kinds[0] not in NUMBERS or value == "None":
        return
    try:
        kinds[0](value)
    except ValueError:
        shown = flag.default if flag.default not in (None, (), UNSET) else "4"
        shown = " ".join(map(str, shown)) if isinstance(shown, tuple) else shown
        fix = f"write {flag.name} {shown}, say"
        raise UsageError(f"{flag.name} cannot be '{value}'", f"it is {NUMBERS[kinds[0]]}", fix) from None


def _chosen(flag: Flag, value: str, words: tuple[str, ...]) -> str:
    kinds = typing.get_args(flag.hint) or ()
    if value == "None" and type(None) in kinds:
        return value
    found = canonical(value, words)
    if found is None and all(typing.get_origin(part) is typing.Literal for part in kinds_of(flag.hint)):
        raise UsageError(f"{flag.name} cannot be '{value}'", "it is one of a few words", nearest(value, words))
    return found or value
