"""What a sweep will cost, counted before it begins.

Network evaluations are passes of one image through the network: NFE x images, at most twice that with guidance. An image that
was decoded passes through every feature network.
"""

from dataclasses import dataclass

from midway.gen.evaluation.records import PRIOR, SOLVER
from midway.gen.sweep.choice import candidates_of, choice_cell, groups
from midway.gen.sweep.fine import FineSolution, StoredSolution
from midway.gen.sweep.guidance import stored_choice, tried_cell
from midway.gen.sweep.jobs import Job, Plan, SweepConfig
from midway.gen.sweep.measure import EvaluationContext
from midway.gen.sweep.store import Cell
from midway.gen.sweep.tally import Work


@dataclass(frozen=True)
class Forecast:
    """What is missing in the store, of how many cells."""

    cells: int
    stored: int
    blocks: str
    """Images of a cell, in words."""
    measured: Work
    exact: Work
    choice: Work
    networks: int
    """Feature networks."""
    guided: bool
    undecided: bool = False
    """Whether the choice of guidance, which may leave out cells, is still to be made."""

    @property
    def work(self) -> Work:
        """All of it."""
        return self.measured + self.exact + self.choice

    def __str__(self) -> str:
        cells = f"{'at most ' * self.undecided}{self.cells} cell{'s' * (self.cells != 1)}"
        what = f"{cells} of {self.blocks}, {self.stored} of them stored already"
        if not (self.work.evaluations or self.work.images):
            return f"{what}: nothing is left to sample"
        parts = {"cells": self.measured, "exact solution": self.exact, "choice": self.choice}
        shares = ", ".join(f"{name} {its.evaluations:,}" for name, its in parts.items() if its.evaluations)
        most = "at most " * self.guided
        images = f"{self.work.images:,} images through {self.networks} feature network{'s' * (self.networks != 1)}"
        return f"{what}: {most}{self.work.evaluations:,} network evaluations ({shares or 'none'}), {images}"


def forecast(
    plan: Plan,
    context: EvaluationContext,
    config: SweepConfig,
    solution: FineSolution | None,
    choosing: FineSolution | None,
) -> Forecast:
    """Of a plan with these exact solutions of the scored seeds and of those of the choice; None where there is none."""
    passes = 1 if config.guidance == 1 and config.search is None else 2
    each, exact, choice = config.n * config.blocks, Work(), Work()
    if choosing is not None:
        choice = _missing(choosing, config.exact_nfe * passes)
        for job in candidates_of(plan):
            if not choice_cell(job, choosing).has_part(0):
                choice += Work(job.nfe * passes * config.choice, config.choice * job.stochastic)
    decided = None if config.search is None else stored_choice(plan.jobs, context, config.choice_seeds)
    jobs = plan.jobs if decided is None else decided.of(plan.jobs)
    for job in plan.jobs if config.search is not None else ():
        if job.guidance and not tried_cell(job, context, config.choice_seeds).has_part(0):
            choice += Work(job.nfe * passes * config.choice, config.choice)
    if solution is not None:
        exact = _missing(solution, config.exact_nfe * passes)
        if not context.cell(StoredSolution(solution)).is_finished:
            exact += Work(0, each, config.blocks)
    others = [[job] for job in jobs if not job.nfe]
    missing = [
        group
        for group in (*groups(jobs).values(), *others)
        if not any(_cell(job, context, solution).is_finished for job in group)
    ]
    evaluations = sum(group[0].nfe * (passes if group[0].kind in (SOLVER, PRIOR) else 1) for group in missing) * each
    measured = Work(evaluations, len(missing) * each, len(missing) * config.blocks)
    cells, undecided = len(groups(jobs)) + len(others), config.search is not None and decided is None
    blocks = f"{config.blocks} x {config.n:,} images"
    return Forecast(
        cells, cells - len(missing), blocks, measured, exact, choice, len(context.spaces), passes > 1, undecided
    )


def _cell(job: Job, context: EvaluationContext, solution: FineSolution | None) -> Cell:
    return context.cell(job.source, solution if job.kind == SOLVER else None)


def _missing(fine: FineSolution, nfe: int) -> Work:
    """Of an exact solution, what is not stored."""
    count = sum(len(seeds) for number, (_, seeds) in enumerate(fine.seeds.parts) if not fine.cell.has_part(number))
    return Work(count * nfe, count)
