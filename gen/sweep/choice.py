"""The grid of each solver and budget, chosen on seeds that are not scored.

The figure is the RMSE to the exact solution; of solvers that draw noise on the way, which end elsewhere by design, the Fréchet
distance to the exact solution's images. A grid that is chosen by the scored figure itself makes that figure too good, the more
so the more grids there are; and scoring one grid of three costs a third.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.gen.core.config import from_dict
from midway.gen.core.processes import at_work
from midway.gen.evaluation.metrics import Features
from midway.gen.evaluation.records import TO_EXACT
from midway.gen.evaluation.spaces import extract
from midway.gen.progress.bar import Progress
from midway.gen.sweep.fine import FineSolution, square_errors
from midway.gen.sweep.jobs import Job, Plan
from midway.gen.sweep.store import Cell, Check, Part, check_rows
from midway.gen.sweep.tally import Work

Key = tuple[str, str, int]
"""(solver, grid, budget)."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, by which figures."""

    figures: dict[Key, float]
    """The figure of every candidate, infinite of those that diverged."""
    chosen: frozenset[Key]
    seeds: str
    exact_error: float
    """RMSE of the exact solution to that of twice the evaluations, on these seeds; NaN where it diverged."""

    def of(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs without the grids that were not chosen."""
        return [job for job in jobs if key_of(job) in self.chosen or key_of(job) not in self.figures]


def key_of(job: Job) -> Key:
    """Of a candidate."""
    return (job.solver, job.grid, job.nfe)


@dataclass(frozen=True)
class Figure:
    """Of a candidate on the seeds of choice; None if it diverged."""

    figure: float | None


def candidates_of(plan: Plan) -> list[Job]:
    """All jobs of solvers and budgets that have several grids, after the exact solution at twice its evaluations."""
    assert plan.finer is not None
    exact = Job("", "", plan.finer, 2 * plan.exact_nfe)
    return [exact, *(job for group in groups(plan.jobs).values() if len(group) > 1 for job in group)]


def choose_grids(plan: Plan, fine: FineSolution) -> Choice:
    """The grid of least figure for every solver and budget that has several; `fine` is the exact solution of the seeds of choice.

    The figures are kept in the store of `fine`, as the error of the exact solution is.
    """
    exact, *_ = candidates = candidates_of(plan)
    with at_work("choosing grids"):
        mine = fine.process.mine(candidates)
        with Progress("choosing grids: candidate", len(mine), left=fine.tally.left) as progress:
            progress.at("the exact solution of other seeds")
            fine.make()
            fine.process.wait()
            for _, job in mine:
                named = (
                    f"{job.solver} on {job.grid} at NFE {job.nfe}" if job.solver else "the error of the exact solution"
                )
                fine.tally.name(progress, named, 0)
                _measure(job, fine)
                progress.advance()
        fine.process.wait()
    figures = {key_of(job): _figure(job, fine) for job in candidates}
    error = figures.pop(key_of(exact))
    best = [min(group, key=lambda job: figures[key_of(job)]) for group in groups(plan.jobs).values() if len(group) > 1]
    return Choice(figures, frozenset(map(key_of, best)), str(fine.seeds), error if math.isfinite(error) else math.nan)


def groups(jobs: Sequence[Job]) -> dict[tuple[str, int, str], list[Job]]:
    """Candidates by solver, budget and guidance, each on its grids."""
    found: dict[tuple[str, int, str], list[Job]] = {}
    for job in jobs:
        if job.nfe:
            found.setdefault((job.solver, job.nfe, job.guidance), []).append(job)
    return found


def choice_cell(job: Job, fine: FineSolution) -> Cell:
    """Where the figure of a candidate is."""
    return fine.store.cell({"choice": job.source.identity, "fine": fine.cell.identity, "noise": job.stochastic})


def _check(count: int) -> Check:
    """`Check` of the figure of so many seeds."""

    def check(number: int, part: Part) -> None:
        from_dict(Figure, part.costs)
        check_rows(part, count, "errors")

    return check


def _measure(job: Job, fine: FineSolution) -> None:
    """Write the candidate's figure, and its square errors float64 (n,), unless they are there."""
    cell, check = choice_cell(job, fine), _check(fine.seeds.n)
    if cell.part(0, check) is not None:
        return
    errors, seen = list[Tensor](), list[Tensor]()
    for number, (_, seeds) in enumerate(fine.seeds.parts):
        batch, begun = job.source.sample(seeds), fine.tally.clock()
        errors.append(square_errors(batch.values, fine.part(number).tensors["latents"]))
        if job.stochastic:
            seen.append(extract({"": fine.spaces[""]}, job.source.images(batch))[""].features)
        work = Work(round(batch.nfe * len(seeds)), len(seeds) * job.stochastic)
        fine.tally.spend(work, batch.seconds, fine.tally.clock() - begun if job.stochastic else 0.0)
    mean = torch.cat(errors).mean().item()
    value = math.sqrt(mean) if math.isfinite(mean) else None
    if job.stochastic and value is not None:
        found = fine.distances(range(len(fine.seeds.parts)), {"": Features(torch.cat(seen), None)})
        value = found.get(TO_EXACT)
    cell.write(0, Part({"errors": torch.cat(errors)}, {"figure": value}))


def _figure(job: Job, fine: FineSolution) -> float:
    """What was measured; infinite of a candidate that diverged."""
    (part,) = choice_cell(job, fine).parts([0], _check(fine.seeds.n))
    value = from_dict(Figure, part.costs).figure
    return math.inf if value is None else value
