"""The facts of a table: one contract for every solver of the registry, and what breaks it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mutate_tables import mutations
from oracles import gaussian, times_of, uneven_grid

from midway.samplers.grids import Grid, karras, logsnr
from midway.samplers.learned import LearnedTable
from midway.samplers.rows import Row
from midway.samplers.sample import sample
from midway.samplers.schedule import EDM, VP, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, er_sde, sa_solver
from midway.samplers.table import Table
from midway.samplers.table_facts import gain_and_clock, normal_form, summary, variance_ratios

SCHEDULES = [Linear(), VP(), EDM(sigma_max=5.0), Cosine()]
STRAIGHT = (Linear, EDM)
CASES = [
    (name, schedule)
    for name, solver in SOLVERS.items()
    for schedule in SCHEDULES
    if solver.coordinate == "rho" or isinstance(schedule, STRAIGHT)
]
"""Solvers in t are exact for a point mass where alpha and sigma are straight in t."""


def grid_of(schedule: Schedule, steps: int = 6) -> Grid:
    return uneven_grid(*times_of(schedule, 3.0, 0.1), steps)


def brute_force(table: Table, schedule: Schedule, std: float) -> float:
    """The end's variance of N(0, std^2), by the loop that samples, on unit vectors in place of the start and of every draw."""
    draws = iter(range(1, len(table.rows) + 1))

    def unit(x: torch.Tensor) -> torch.Tensor:
        fresh = torch.zeros_like(x)
        fresh[:, next(draws)] = 1
        return fresh

    time = torch.tensor([table.grid[0], table.grid[-1]], dtype=torch.float64)
    marginal = schedule.alpha(time) ** 2 * std**2 + schedule.sigma(time) ** 2
    x = torch.zeros(1, len(table.rows) + 1, dtype=torch.float64)
    x[:, 0] = marginal[0].sqrt()
    end = sample(gaussian(*[0.0] * (len(table.rows) + 1), std=std).field(schedule), table, x, unit)
    return (end.square().sum() / marginal[1]).item()


@pytest.mark.parametrize(("name", "schedule"), CASES, ids=[f"{n}-{type(s).__name__}" for n, s in CASES])
def test_every_solver_has_gain_and_clock_one_and_the_covariance_that_its_loop_has(
    name: str, schedule: Schedule
) -> None:
    """Inner stages included; a point mass keeps its variance, and another deviation is that of a brute-force run."""
    table = SOLVERS[name].build(schedule, grid_of(schedule))
    gain, clock = gain_and_clock(table, schedule)
    assert np.abs(gain - 1).max() < 1e-12
    assert np.abs(clock - 1).max() < 1e-12
    assert variance_ratios(table, schedule, 0.0) == pytest.approx(1, abs=1e-12)
    assert variance_ratios(table, schedule, 0.6)[-1] == pytest.approx(brute_force(table, schedule, 0.6), rel=1e-12)
    assert normal_form(table).equals(normal_form(table))


@pytest.mark.parametrize("name", list(SOLVERS))
def test_every_changed_weight_is_another_normal_form_and_another_gain_or_clock(name: str) -> None:
    table = SOLVERS[name].build(Linear(), grid_of(Linear()))
    form = normal_form(table)
    for place, changed in mutations(table):
        if place.endswith(("time", "arrival")):
            continue
        other = replace(table, rows=changed.rows, schedule="")  # of a known schedule, no such table can be made
        assert not form.equals(normal_form(other)), place
        assert max(np.abs(fact - 1).max() for fact in gain_and_clock(other, Linear())) > 1e-7, place


@pytest.mark.parametrize("build", [sa_solver, er_sde])
def test_the_process_of_order_one_is_exact_for_a_point_mass_and_for_many_steps(build: Callable[..., Table]) -> None:
    """Its variance ratio tends to 1 at order 1 on any deviation: the error is the estimate's, not the noise's."""
    options = (
        {"predictor": 1, "corrector": 0, "window": (0.0, 99.0)} if build is sa_solver else {"order": 1, "psi": "sde"}
    )
    errors = []
    for steps in (50, 100, 200):
        table = build(VP(), logsnr(VP(), steps, 20, 0.05), **options)
        assert variance_ratios(table, VP(), 0.0) == pytest.approx(1, abs=1e-10)
        errors.append(1 - variance_ratios(table, VP(), 0.5)[-1])
    assert np.log2(errors[:-1] / np.array(errors[1:])) == pytest.approx(1, abs=0.15)


def test_the_page_of_solvers_has_the_variances_that_few_steps_leave() -> None:
    """The table of docs/solvers.md: of N(0, 0.25) on VP, grid logsnr."""
    page = (Path(__file__).parents[2] / "docs" / "solvers.md").read_text()
    _, _, block = page.partition("by `variance_ratios`; 1 is exact:\n\n")
    head, _, *lines = (line.strip("| ").split(" | ") for line in block.partition("\n\n")[0].splitlines())
    assert {line[0].split("`")[1] for line in lines} == {
        "ddim",
        *(n for n, solver in SOLVERS.items() if solver.stochastic),
    }
    for name, *printed in lines:
        build = SOLVERS[name.split("`")[1]].build
        got = [variance_ratios(build(VP(), logsnr(VP(), int(n))), VP(), 0.5)[-1] for n in head[1:]]
        assert [float(each) for each in printed] == pytest.approx(got, abs=0.0051), name


# ---- normal form ----


def gauged(table: Table, shifts: int = 12) -> Table:
    """Another table of the same sampler: a row without noise is 0 when its state is taken off, and may be added to later rows."""
    generator, rows = torch.Generator().manual_seed(0), list(table.rows)
    for _ in range(shifts):
        n, j = sorted(torch.randperm(len(rows), generator=generator)[:2].tolist(), reverse=True)
        row, source, w = rows[n], rows[j], torch.randn((), generator=generator, dtype=torch.float64).item()
        states = [*row.states]
        states[j + 1] += w
        for i, weight in enumerate(source.states):
            states[i] -= w * weight
        predictions = [*row.predictions]
        for i, weight in enumerate(source.predictions):
            predictions[i] -= w * weight
        rows[n] = Row(row.time, row.arrival, tuple(states), tuple(predictions), row.noise)
    return replace(table, rows=tuple(rows), schedule="")


@pytest.mark.parametrize("name", ["ab4", "unipc3", "rk4", "deis_t3"])
def test_weights_on_past_states_are_a_gauge_that_the_normal_form_does_not_see(name: str) -> None:
    table = SOLVERS[name].build(Linear(), grid_of(Linear()))
    other = gauged(table)
    assert (
        max(
            abs(a - b)
            for r, q in zip(table.rows, other.rows, strict=True)
            for a, b in zip(r.states, q.states, strict=True)
        )
        > 0.1
    )
    assert normal_form(table).equals(normal_form(other), tolerance=1e-9)
    x = torch.ones(1, 2, dtype=torch.float64)
    field = gaussian(0.4, -0.7, std=0.5).field(Linear())
    torch.testing.assert_close(sample(field, other, x), sample(field, table, x), rtol=0, atol=1e-9)


def test_another_solver_grid_or_time_of_evaluation_is_another_normal_form() -> None:
    tables = [
        SOLVERS[name].build(VP(), grid_of(VP())) for name in ("dpmpp2m", "dpmpp3m", "unipc2", "deis3", "heun", "ddpm")
    ]
    tables.append(SOLVERS["dpmpp2m"].build(VP(), karras(VP(), 6)))
    later = replace(tables[0].rows[3], time=0.9 * tables[0].grid[3])
    tables.append(replace(tables[0], rows=(*tables[0].rows[:3], later, *tables[0].rows[4:]), schedule=""))
    forms = [normal_form(table) for table in tables]
    assert not any(a.equals(b) for i, a in enumerate(forms) for b in forms[:i])
    alias = SOLVERS["dpmpp1m"].build(VP(), grid_of(VP()))
    assert normal_form(alias).equals(normal_form(SOLVERS["ddim"].build(VP(), grid_of(VP()))))


# ---- learned tables ----


def test_a_learned_table_shows_its_gain_clock_and_variance() -> None:
    learned = LearnedTable(VP(), logsnr(VP(), 4))
    assert summary(learned.table(), VP()).startswith(
        "gain 1 to 1, clock 1 to 1 (1 for a fixed solver), variance of data N(0, 1) "
    )
    with torch.no_grad():
        learned.predictions[2, 1] = 0.2
        learned.states[3, 3] = -0.1
    gain, clock = gain_and_clock(learned.table(), VP())
    assert gain[3] == pytest.approx(1.2, abs=1e-6)
    assert clock[4] == pytest.approx(1 - 0.1 * VP().sigma(torch.tensor(learned.table().grid[3])).item(), abs=1e-6)
    assert f"gain {gain.min():.3g} to {gain.max():.3g}" in summary(learned.table(), VP())
