"""Tables before they are text: a `Column` is one figure of a row, a `Table` is what every renderer takes.

A report declares its columns; `columns_table` finds the entries and the best of each column. Adding a figure to a report is
adding one `Column`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any, Generic, Literal, TypeVar

from midway.gen.core.environment import command_line, environment, hardware

ABSENT = "–"
Row = TypeVar("Row")


def _versions() -> dict[str, str]:
    known = environment()
    return {**known["packages"], "git": known["git"]}


@dataclass(frozen=True)
class ReportContext:
    """What a reader needs to trust and repeat a report; all text is shown as given."""

    title: str
    model: str
    data: str
    command: str = field(default_factory=command_line)
    hardware: str = field(default_factory=hardware)
    versions: dict[str, str] = field(default_factory=_versions)
    seeds: str = ""
    notes: tuple[str, ...] = ()
    guidance: float = 1.0
    warnings: tuple[str, ...] = ()
    """About the models, each shown under the title of every output: `digits-dit: step 129 of 4000`."""

    @property
    def version_text(self) -> str:
        """`torch 2.9, ...`."""
        return ", ".join(f"{name} {version}" for name, version in self.versions.items())


@dataclass(frozen=True)
class Entry:
    """One place of a table: "3.21 ± 0.12", small print such as the grid's name, whether it is the best of its column.

    tied: its difference from the best is not significant; the best is tied with itself.
    """

    value: str
    small: str = ""
    best: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Line:
    """One row of a table: its name with small print, and an entry, or None, per column; `floor` sets it apart.

    group: the heading above it and the lines of the same after it; empty in tables without headings.
    """

    name: str
    entries: tuple[Entry | None, ...]
    small: str = ""
    floor: bool = False
    group: str = ""


@dataclass(frozen=True)
class Table:
    """A title, how to read it, headings (the first is that of the names), and lines."""

    title: str
    note: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def groups(self) -> list[tuple[str, list[Line]]]:
        """Lines that follow one another under the same heading."""
        return [(group, list(lines)) for group, lines in groupby(self.lines, lambda line: line.group)]

    @property
    def has_best(self) -> bool:
        """Whether any entry is marked as the best of its column."""
        return any(entry is not None and entry.best for line in self.lines for entry in line.entries)

    @property
    def has_ties(self) -> bool:
        """Whether any entry but a best one is tied with the best of its column."""
        return any(e is not None and e.tied and not e.best for line in self.lines for e in line.entries)


def number(value: float, std: float | None = None) -> str:
    """Three significant digits without an exponent, `± std` to the same decimals (more if std would read 0)."""
    if not math.isfinite(value):
        return "diverged"
    decimals = decimals_for(value, 3)
    if std is None or not math.isfinite(std):
        return f"{value:.{decimals}f}"
    decimals = max(decimals, decimals_for(std, 1)) if std > 0 else decimals
    return f"{value:.{decimals}f} ± {std:.{decimals}f}"


def decimals_for(value: float, digits: int) -> int:
    """Decimals that show `digits` significant digits of `value`; at most 6, so that 1e-12 reads as 0."""
    if value == 0:
        return digits - 1
    return min(max(digits - 1 - math.floor(math.log10(abs(value))), 0), 6)


@dataclass(frozen=True)
class Column(Generic[Row]):
    """One figure: its heading, its value in a row (None: absent), its text, which direction is better, small print."""

    head: str
    value: Callable[[Row], Any]
    write: Callable[[Any], str] = number
    better: Literal["low", "high", "neither"] = "neither"
    small: Callable[[Row], Any] = lambda _: ""

    def entries(self, rows: Sequence[Row]) -> list[Entry | None]:
        """One per row; all that are written like the best are best, if there are two or more."""
        values = [self.value(row) for row in rows]
        best = None
        if self.better != "neither":
            there = [v for v in values if v is not None and math.isfinite(v)]
            if len(there) > 1:
                best = self.write(min(there) if self.better == "low" else max(there))
        return [
            None if value is None else Entry(text := self.write(value), self.small(row) or "", text == best)
            for value, row in zip(values, rows, strict=True)
        ]


def columns_table(
    title: str, note: str, head: str, names: Sequence[str], rows: Sequence[Row], columns: Iterable[Column[Row]]
) -> Table:
    """A line per row and a column per figure; columns without any value are left out."""
    found = {column.head: column.entries(rows) for column in columns}
    found = {name: entries for name, entries in found.items() if any(entry is not None for entry in entries)}
    lines = (Line(name, tuple(entries[i] for entries in found.values())) for i, name in enumerate(names))
    return Table(title, note, (head, *found), tuple(lines))


def budget_table(
    title: str, note: str, entries: Mapping[tuple[str, int], Entry], small: Mapping[str, str] | None = None
) -> Table:
    """A line per solver, in the order of first appearance, with small print by its name, and a column per NFE."""
    nfes = sorted({nfe for _, nfe in entries})
    solvers = dict.fromkeys(solver for solver, _ in entries)
    lines = (Line(s, tuple(entries.get((s, nfe)) for nfe in nfes), (small or {}).get(s, "")) for s in solvers)
    return Table(title, note, ("solver", *(f"NFE {nfe}" for nfe in nfes)), tuple(lines))


def with_floor(table: Table, name: str, entries: Iterable[Entry | None]) -> Table:
    """The table with the floor as its last line."""
    return replace(table, lines=(*table.lines, Line(name, tuple(entries), floor=True)))


def joined(values: Iterable[object]) -> str:
    """The different values that there are, separated by commas."""
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in ("", None)))
