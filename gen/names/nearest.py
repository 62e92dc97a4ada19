"""The name that is meant by another spelling, and suggestions where none is.

Two names are near by what their letters and digits share (`difflib`), after the table of `aliases.py`.
"""

import re
from collections.abc import Iterable
from difflib import SequenceMatcher

from midway.gen.names.aliases import NEAR, SAME

SHOWN = 8
"""Names of a suggestion."""
CLOSE = 0.5
"""Least likeness that is called near, between 0 and 1."""


def normal(name: str) -> str:
    """Lower case, letters and digits only; `++` is `pp`: `DPM++ 2M` is dpmpp2m."""
    return re.sub(r"[\W_]", "", name.casefold().replace("++", "pp"))


def canonical(name: str, choices: Iterable[str]) -> str | None:
    """The one of `choices` that `name` is another spelling of; None if there is none, or more than one."""
    known = list(choices)
    if name in known:
        return name
    wanted = normal(name)
    found = [choice for choice in known if wanted and normal(choice) == wanted]
    found = found or [choice for choice in known if wanted in SAME.get(choice, "").split()]
    return found[0] if len(found) == 1 else None


def ranked(name: str, choices: Iterable[str]) -> list[tuple[float, str]]:
    """The choices with their likeness to `name`, the nearest first, equal ones by the alphabet."""
    wanted = normal(name)
    table = NEAR.get(wanted, "").split()
    scored = [(_likeness(wanted, choice, table), choice) for choice in {*choices}]
    return sorted(scored, key=lambda pair: (-pair[0], pair[1]))


def _likeness(wanted: str, choice: str, table: list[str]) -> float:
    if choice in table:
        return 3 - table.index(choice) / len(table)
    own = normal(choice)
    if wanted and (wanted == own or wanted in SAME.get(choice, "").split()):
        return 2.0
    likeness = SequenceMatcher(None, wanted, own).ratio()
    part = normal(choice.rsplit(".", 1)[-1])  # of a flag with a prefix, its own name
    if len(part) > 2 and part != own:
        likeness = max(likeness, 0.95 * SequenceMatcher(None, wanted, part).ratio())
    if len(wanted) > 2 and own.startswith(wanted):
        likeness = max(likeness, 0.8 + likeness / 10)
    return likeness


def suggestion(name: str, choices: Iterable[str]) -> str:
    """`did you mean 'ddim'? choose one of: ddim, euler`: the nearest first, at most `SHOWN`; of more, those that are near."""
    found = ranked(name, choices)
    close = [choice for likeness, choice in found if likeness >= CLOSE]
    shown = [choice for _, choice in found] if len(found) <= SHOWN or not close else close
    more = len(found) - min(len(shown), SHOWN)
    listed = ", ".join(shown[:SHOWN]) + (f" and {more} more" if more else "")
    return f"did you mean '{close[0]}'? choose one of: {listed}" if close else f"choose one of: {listed}"
