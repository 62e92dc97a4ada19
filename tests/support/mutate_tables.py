"""Mutation check of solver tables: every non-zero number of every builder's table is multiplied by 1.01, and must be noticed.

    python tests/support/mutate_tables.py

What notices is never a comparison with the unchanged table, but three properties that every correct table has:

    time       a row evaluates at the time at which its state lives, and its nodes live at the grid's times
    straight   where the slope does not change (a point mass for solvers in rho, constant velocity for solvers in t), every state
               of the table, inner stages too, lies on the exact line
    variance   noise adds what the coefficients have taken away: a point mass has the variance sigma^2 at every state

`Table` has checks of its own (table_checks.py), and must not accept a changed number either.

Exit status 1 if a mutation escapes one of the two, or an unchanged table fails.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from midway.samplers.rows import Row
from midway.samplers.schedule import VP, Linear, Schedule
from midway.samplers.solvers import SOLVERS, Solver
from midway.samplers.table import Table

FACTOR = 1.01
TOLERANCE = 1e-9
RHO = (3.0, 2.2, 1.0, 0.8, 0.3, 0.2)


@dataclass(frozen=True)
class Numbers:
    """A table without checks."""

    grid: tuple[float, ...]
    nodes: tuple[int, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Line:
    """The exact states of one problem: x(t) = value of (alpha, sigma) or t, and the network's x0 on it."""

    states: list[float]
    predictions: list[float]


def _numbers(schedule: Schedule, times: list[float]) -> tuple[list[float], list[float]]:
    t = torch.tensor(times, dtype=torch.float64)
    return schedule.alpha(t).tolist(), schedule.sigma(t).tolist()


def _point_mass(schedule: Schedule, arrivals: list[float], point: float, noise: float) -> Line:
    """x = alpha point + sigma noise and x0 = point."""
    alpha, sigma = _numbers(schedule, arrivals)
    return Line([a * point + s * noise for a, s in zip(alpha, sigma, strict=True)], [point] * len(arrivals))


def _constant_velocity(schedule: Schedule, arrivals: list[float], start: float, velocity: float) -> Line:
    """x = start + velocity t, and the x0 that has this velocity there."""
    t = torch.tensor(arrivals, dtype=torch.float64)
    alpha, sigma, (d_alpha, d_sigma) = schedule.alpha(t), schedule.sigma(t), schedule.rates(t)
    x = start + velocity * t
    x0 = (sigma * velocity - d_sigma * x) / (d_alpha * sigma - d_sigma * alpha)
    return Line(x.tolist(), x0.tolist())


def _arrivals(table: Numbers) -> list[float]:
    return [table.grid[0], *(row.arrival for row in table.rows)]


def lives_where_it_is_evaluated(table: Numbers) -> bool:
    """Evaluation times are the states' times, and nodes are at the grid's."""
    arrivals = _arrivals(table)
    evaluated = all(row.time is None or row.time == arrivals[i] for i, row in enumerate(table.rows))
    return evaluated and [arrivals[node] for node in table.nodes] == list(table.grid)


def stays_on_the_line(table: Numbers, schedule: Schedule, solver: Solver) -> bool:
    """Every row, fed with exact states and predictions, forms the exact next state (its mean, if it draws noise)."""
    lines = _point_mass if solver.coordinate == "rho" and not solver.stochastic else _constant_velocity
    problems = [(0.7, -0.4), (-0.3, 1.1)]
    if solver.stochastic:  # the mean of a point mass: the noise decays by itself, see `keeps_the_variance`
        lines, problems = _point_mass, [(0.7, 0.0)]
    for problem in problems:
        line = lines(schedule, _arrivals(table), *problem)
        evaluated = [line.predictions[i] for i, row in enumerate(table.rows) if row.time is not None]
        for i, row in enumerate(table.rows):
            got = sum(w * x for w, x in zip(row.states, line.states, strict=False))
            got += sum(w * d for w, d in zip(row.predictions, evaluated, strict=False))
            if abs(got - line.states[i + 1]) > TOLERANCE:
                return False
    return True


def keeps_the_variance(table: Numbers, schedule: Schedule) -> bool:
    """A point mass at 0 has x0 = 0, so a state's variance is weight^2 sigma^2 + noise^2, and must be the next sigma^2."""
    _, sigma = _numbers(schedule, _arrivals(table))
    for i, row in enumerate(table.rows):
        variance = (row.states[-1] * sigma[i]) ** 2 + row.noise**2
        if any(row.states[:-1]) or abs(variance - sigma[i + 1] ** 2) > TOLERANCE:
            return False
    return True


def holds(table: Numbers, schedule: Schedule, solver: Solver) -> bool:
    """All properties that this solver's tables must have."""
    if not lives_where_it_is_evaluated(table) or not stays_on_the_line(table, schedule, solver):
        return False
    return not solver.stochastic or keeps_the_variance(table, schedule)


def _scaled(values: tuple[float, ...], j: int) -> tuple[float, ...]:
    return (*values[:j], values[j] * FACTOR, *values[j + 1 :])


def _mutated_rows(row: Row) -> Iterator[tuple[str, Row]]:
    for j, weight in enumerate(row.states):
        if weight:
            yield f"states[{j}]", replace(row, states=_scaled(row.states, j))
    for j, weight in enumerate(row.predictions):
        if weight:
            yield f"predictions[{j}]", replace(row, predictions=_scaled(row.predictions, j))
    if row.noise:
        yield "noise", replace(row, noise=row.noise * FACTOR)
    if row.time:
        yield "time", replace(row, time=row.time * FACTOR)
    yield "arrival", replace(row, arrival=row.arrival * FACTOR)


def mutations(table: Table) -> Iterator[tuple[str, Numbers]]:
    """(place, numbers) for every non-zero number of the table."""
    for i, row in enumerate(table.rows):
        for place, changed in _mutated_rows(row):
            rows = (*table.rows[:i], changed, *table.rows[i + 1 :])
            yield f"row {i} {place}", Numbers(table.grid, table.nodes, rows)


def is_accepted(table: Table, numbers: Numbers) -> bool:
    """Whether `Table` can have these numbers in place of its own."""
    try:
        replace(table, rows=numbers.rows)
    except ValueError:
        return False
    return True


def check(name: str, schedule: Schedule) -> tuple[int, list[str]]:
    """(number of mutations, the places of those that one of both missed); ValueError if the unchanged table fails."""
    solver = SOLVERS[name]
    grid = tuple(schedule.time_of_rho(torch.tensor(RHO, dtype=torch.float64)).tolist())
    table = solver.build(schedule, grid)
    if not holds(Numbers(table.grid, table.nodes, table.rows), schedule, solver):
        raise ValueError(f"the table of {name} on {schedule} does not have the properties that it must have")
    changed = list(mutations(table))
    escaped = [place for place, broken in changed if holds(broken, schedule, solver)]
    return len(changed), escaped + [f"{place} in Table" for place, broken in changed if is_accepted(table, broken)]


def main() -> int:
    """Check every builder on two schedules and print what was noticed."""
    total, escaped = 0, 0
    for name in SOLVERS:
        for schedule in (Linear(), VP()):
            count, missed = check(name, schedule)
            total, escaped = total + count, escaped + len(missed)
            note = f"   ESCAPED: {', '.join(missed)}" if missed else ""
            print(f"{name:12s} {type(schedule).__name__:7s} {count - len(missed):4d} of {count:4d} noticed{note}")
    print(f"{total - escaped} of {total} mutations noticed")
    return int(escaped > 0)


if __name__ == "__main__":
    sys.exit(main())
