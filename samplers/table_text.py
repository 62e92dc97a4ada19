"""A table as text: what it is, and a line for each of its first rows."""

from collections.abc import Sequence

from midway.samplers.rows import Row

SHOWN = 12
"""Rows that are printed."""


def table_text(solver: str, nfe: int, schedule: str, grid: Sequence[float], rows: Sequence[Row]) -> str:
    """Name, evaluations, schedule and grid; of every row the time of its evaluation, - for none, and its non-zero weights.

    x are states and D predictions of x0, both by their number; z is fresh noise. At most `SHOWN` rows.
    """
    steps = f"{len(grid) - 1} step{'s' if len(grid) != 2 else ''} from t = {grid[0]:.4g} to {grid[-1]:.4g}"
    head = f"Table {solver}: NFE {nfe}, {schedule or 'any schedule'}, {steps}"
    lines = [("row", "evaluates at", "arrives at", "next state")]
    for i, row in enumerate(rows[:SHOWN]):
        time = "-" if row.time is None else f"{row.time:.5f}"
        lines.append((str(i), time, f"{row.arrival:.5f}", _sum(row) + _jump(row)))
    text = "\n".join(f"{a:>5}  {b:>12}  {c:>10}  {d}" for a, b, c, d in lines)
    more = len(rows) - SHOWN
    return f"{head}\n{text}" + (f"\n  ... {more} more row{'s' if more > 1 else ''}" if more > 0 else "")


def _jump(row: Row) -> str:
    """Where its evaluation jumps to."""
    return "" if row.to is None else f"   (jump to {row.to:.5f})"


def _sum(row: Row) -> str:
    terms = [
        f"{weight:+.4g} {kind}{j}" for kind, weights in _weights(row) for j, weight in enumerate(weights) if weight
    ]
    return " ".join([*terms, *([f"{row.noise:+.4g} z"] if row.noise else [])]) or "0"


def _weights(row: Row) -> tuple[tuple[str, Sequence[float]], ...]:
    return ("x", row.states), ("D", row.predictions)
