"""All solvers at all budgets on one ground: the grid of each chosen by RMSE on seeds that are not scored, then scored alone."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch

from midway.gen.core import randomness
from midway.gen.core.processes import one_thread
from midway.gen.core.ranges import COUNT, SEED, STEPS, check_flag_ranges
from midway.gen.diffusion.field import start_state
from midway.gen.progress.bar import Progress, busy
from midway.gen.proving.learning import Teaching, teach
from midway.gen.proving.model import Block, Figures, MixtureModel, exact_error, figures, make_block
from midway.samplers.gits import GITS, WarmUp, fitted_grid, warm_up
from midway.samplers.grids import GRIDS, RHO_MAX
from midway.samplers.sampler import Sampler
from midway.samplers.solvers import SOLVERS, Solver, ddim
from midway.samplers.table import Table

FLOOR, EXACT_ROW = "floor", "exact"


@dataclass(frozen=True)
class ContestConfig:
    """How much is measured."""

    nfe: tuple[int, ...] = (3, 4, 5, 6, 7, 8, 9, 10)
    n: int = 1024
    """Seeds of a block."""
    blocks: int = 4
    choosing: int = 256
    """Seeds, after the scored ones, that choose the grids."""
    exact_steps: int = 128
    """Steps of the exact solution; its error is that to one of twice the steps."""
    first_seed: int = 0

    def __post_init__(self) -> None:
        check_flag_ranges(self, nfe=STEPS, n=(2, COUNT[1]), blocks=(1, 1000), choosing=(2, COUNT[1]))
        check_flag_ranges(self, exact_steps=STEPS, first_seed=SEED)


@dataclass(frozen=True)
class Cell:
    """A solver at one budget: figures of every block, by the names of `Figures`; absent ones have no meaning for it."""

    solver: str
    nfe: int
    grid: str
    analytic_first: bool
    training_nfe: int
    blocks: dict[str, tuple[float, ...]]

    def mean(self, name: str) -> float | None:
        """Over the blocks; None if absent."""
        values = self.blocks.get(name)
        return None if not values else sum(values) / len(values)

    def error(self, name: str) -> float | None:
        """Standard error of the mean; None of one block."""
        values = self.blocks.get(name, ())
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


@dataclass(frozen=True, eq=False)
class Contest:
    """A ground's model with its seeds, solved exactly."""

    model: MixtureModel
    config: ContestConfig
    teaching: Teaching = field(default_factory=Teaching)

    @cached_property
    def scored(self) -> list[Block]:
        config = self.config
        firsts = (config.first_seed + config.n * number for number in range(config.blocks))
        return [make_block(self.model, first, config.n, config.exact_steps) for first in firsts]

    @cached_property
    def unscored(self) -> Block:
        """The seeds that choose grids."""
        config = self.config
        first = config.first_seed + config.n * config.blocks
        return make_block(self.model, first, config.choosing, config.exact_steps)

    @cached_property
    def exact_error(self) -> float:
        """RMSE of the exact solution to one of twice the steps, on the unscored seeds."""
        return exact_error(self.model, self.unscored, self.config.exact_steps)

    @cached_property
    def _warm(self) -> WarmUp:
        """What `gits` is fitted to, of noise of its own."""
        schedule = self.model.schedule
        noise = randomness.normal(0, GITS, 0, torch.arange(64), self.model.latent_shape)
        start = schedule.time_of_rho(torch.tensor(RHO_MAX, dtype=torch.float64)).item()
        return warm_up(self.model.exact_field, schedule, start_state(schedule, start, noise))

    def prepare(self) -> None:
        """Compute what all cells share."""
        _ = self.scored, self.unscored, self._warm, self.model.truth, [block.statistics for block in self.scored]

    def tables(self, entry: Solver, steps: int, analytic: bool = False) -> dict[str, Table]:
        """A solver's tables of this many steps on all grids, `gits` included."""
        schedule, warm = self.model.schedule, self._warm
        build = partial(entry.on, schedule, analytic_first=analytic)
        tables = {name: build(make(schedule, steps)) for name, make in GRIDS.items()}
        if steps < len(warm.grid):
            silent = partial(ddim, schedule) if entry.stochastic else build
            tables[GITS] = build(fitted_grid(warm, self.model.exact_field, steps, silent))
        return tables

    def reference_cells(self) -> list[Cell]:
        """Floor: fresh data in place of samples. Exact: the exact solution."""
        floor = [figures(self.model, block, self.model.draw(block.seeds)) for block in self.scored]
        exact = [figures(self.model, block, block.exact) for block in self.scored]
        return [
            Cell(FLOOR, 0, "", False, 0, by_name(floor, "to_exact", "to_data")),
            Cell(EXACT_ROW, 0, "", False, 0, by_name(exact, "to_data")),
        ]

    def cell(self, name: str, nfe: int, shared: dict[Any, Any]) -> Cell | None:
        """A solver, learned if it is none of the registry, at one budget; None where it cannot make that."""
        return self.solver_cell(name, nfe) if name in SOLVERS else self.learned_cell(name, nfe, shared)

    def solver_cell(self, name: str, nfe: int) -> Cell | None:
        """A solver of the registry on its best grid."""
        entry = SOLVERS[name]
        step_count = _steps(entry, nfe)
        if step_count is None:
            return None
        steps, analytic = step_count
        tables = self.tables(entry, steps, analytic)
        grid = self._best(tables, entry.stochastic)
        return self._scored(name, tables[grid], grid, analytic, 0, entry.stochastic)

    def learned_cell(self, name: str, nfe: int, shared: dict[Any, Any]) -> Cell | None:
        """A learned solver; `shared` as of `teach`."""
        try:
            taught = teach(self.model, name, nfe, self.unscored, self.teaching, shared)
        except ValueError:
            return None
        card = taught.sampler.card
        assert card is not None
        table = taught.sampler.table
        noisy = table is not None and table.stochastic
        return self._scored(name, taught.sampler, taught.grid, card.analytic_first, card.training_nfe, noisy)

    def _best(self, tables: dict[str, Table], stochastic: bool) -> str:
        """The grid of least RMSE on the unscored seeds; of solvers that draw noise, of least distance to the data."""
        found = {
            grid: figures(self.model, self.unscored, self.model.run(table, self.unscored.seeds))
            for grid, table in tables.items()
        }
        return min(found, key=lambda grid: found[grid].to_data if stochastic else found[grid].rmse)

    def _scored(self, name: str, sampler: Sampler, grid: str, analytic: bool, training: int, stochastic: bool) -> Cell:
        found = [figures(self.model, block, self.model.run(sampler, block.seeds)) for block in self.scored]
        names = ("to_exact", "to_data") if stochastic else ("rmse", "to_exact", "to_data")
        return Cell(name, sampler.nfe, grid, analytic, training, by_name(found, *names))


def by_name(found: list[Figures], *names: str) -> dict[str, tuple[float, ...]]:
    """Figures of blocks as one tuple for each name."""
    return {name: tuple(getattr(one, name) for one in found) for name in names}


def _steps(entry: Solver, nfe: int) -> tuple[int, bool] | None:
    """Steps of this budget, and whether the first is analytic, which it is only where no other way leads there."""
    for analytic in (False, True):
        try:
            steps = entry.steps(nfe, analytic)
        except ValueError:
            continue
        if steps:
            return steps, analytic
    return None


def run_contest(
    contest: Contest,
    solvers: Sequence[str],
    learned: Sequence[str],
    note: Callable[[str, int], object],
    workers: int = 1,
) -> list[Cell]:
    """All cells, the floor and the exact row first. note: called with the name of each solver and its number of budgets.

    workers: cells measured at a time, each by a thread that torch leaves to one core; results do not depend on it.
    """
    with busy("solving the ground exactly"):
        shared, (floor, exact) = dict[Any, Any](), contest.reference_cells()
        contest.prepare()

    cells, every, budgets = [floor, exact], (*solvers, *learned), contest.config.nfe
    with (
        one_thread(),
        ThreadPoolExecutor(workers) as pool,
        Progress("measuring", len(every) * len(budgets), "cells") as progress,
    ):

        def measured(name: str, nfe: int) -> Cell | None:
            cell = contest.cell(name, nfe, shared)
            progress.advance()
            return cell

        try:
            waiting = {name: [pool.submit(measured, name, nfe) for nfe in budgets] for name in every}
            for name, ones in waiting.items():
                made = [cell for one in ones if (cell := one.result()) is not None]
                note(name, len(made))
                cells += made
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return cells
