"""Write the table of all solvers into docs/solvers.md, from the registry that the tests of orders read.

    python docs/solver_names.py

replaces the lines between `<!-- begin names -->` and `<!-- end names -->`.
"""

import sys
from pathlib import Path

from midway.samplers.solvers import SOLVERS, Solver

PAGE = Path(__file__).parent / "solvers.md"
BEGIN, END = "<!-- begin names -->", "<!-- end names -->"
HEAD = ("name", "order", "from exact history", "evaluations a step", "solves in", "from pure noise", "draws noise")


def line(name: str, solver: Solver) -> tuple[str, ...]:
    """The cells of one solver, under `HEAD`."""
    return (
        f"`{name}`",
        f"{solver.order} (weak)" if solver.stochastic else str(solver.order),
        "" if solver.history_order is None or solver.stochastic else str(solver.history_order),
        f"{solver.evaluations}{', the last 1' if solver.to_data else ''}",
        solver.coordinate,
        "yes" if solver.pure_noise else "no",
        "yes" if solver.stochastic else "",
    )


def table() -> str:
    """All solvers as Markdown, in the order of the registry."""
    rule = ("---", *("---:" for _ in HEAD[1:4]), *("---" for _ in HEAD[4:]))
    rows = [HEAD, rule, *(line(name, solver) for name, solver in SOLVERS.items())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def filled(text: str) -> str:
    """The page with its block rewritten; SystemExit if it has none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"the page needs one block '{BEGIN} ... {END}': add the two lines where the table belongs")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
