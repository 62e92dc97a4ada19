"""Every small damage to a JSON or YAML document: a key of another type or size, gone, or new; and texts that are none."""

import copy
from collections.abc import Iterator
from typing import Any

WRONG: tuple[Any, ...] = (None, [], "x", -1, 10**30, True, {"x": [1]})
MORE: tuple[Any, ...] = (*WRONG, 0, 0.5, 1e308, float("nan"), {}, ["x"], [[[]]], 10**400, "1e-3")
TEXTS: tuple[bytes, ...] = (
    *(b"", b"{", b"[]", b"3", b"null", b'"x"', b"{}", b"\0\1", b"\xff\xfe", b"- a\n- b\n"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000),
)
"""Contents of a file that holds no document of ours; the last ones are too deep and too long."""
Place = tuple[str | int, ...]


def places(document: Any, depth: int = 9, before: Place = ()) -> Iterator[Place]:
    """The way to every key of a document, down to `depth`; of a list to its first entry."""
    lists = list(enumerate(document))[:1] if isinstance(document, list) else []
    for key, value in document.items() if isinstance(document, dict) else lists:
        yield (*before, key)
        if depth > 1:
            yield from places(value, depth - 1, (*before, key))


def changed(document: Any, place: Place, *value: Any) -> Any:
    """A copy with another value at this place, or without it."""
    new = copy.deepcopy(document)
    target = new
    for key in place[:-1]:
        target = target[key]
    if value:
        target[place[-1]] = value[0]
    else:
        del target[place[-1]]
    return new


def mutations(document: Any, depth: int = 9, values: tuple[Any, ...] = WRONG) -> Iterator[tuple[str, Any]]:
    """Documents that differ in one key, each with a name of its change."""
    for place in places(document, depth):
        where = ".".join(map(str, place))
        yield f"no {where}", changed(document, place)
        for value in values:
            new = changed(document, place, value)
            if repr(new) != repr(document):
                yield f"{where} = {value!r:.20}", new
        if isinstance(place[-1], str):
            yield f"x{where}", changed(changed(document, place), (*place[:-1], f"x{place[-1]}"), 1)
