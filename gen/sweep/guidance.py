"""The guidance of each solver at every cost, chosen on seeds that are not scored.

Candidates are no guidance and every scale in every interval of noise levels, by the missing class and by a weaker model if
there is one, on every grid. The figure is the Fréchet distance to the data on seeds of their own: the scored distance of the best
of many candidates would be too good, the more so the more there are. A scale changes what an exact solution is: there is none.

A budget is what the solver spends; what a candidate costs is counted as it is sampled: two passes within its interval, one
outside. Of each solver the best candidate at every cost is scored, unless a cheaper one is as good.
"""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from midway.gen.core.config import from_dict
from midway.gen.core.errors import UsageError
from midway.gen.core.processes import at_work
from midway.gen.diffusion.model import EVERYWHERE
from midway.gen.evaluation.sources import EvaluatedModel
from midway.gen.evaluation.spaces import extract
from midway.gen.metrics.jackknife import GROUPS, jackknife
from midway.gen.progress.bar import Progress
from midway.gen.sweep.jobs import Job, Plan, SweepConfig, solver_jobs
from midway.gen.sweep.measure import EvaluationContext
from midway.gen.sweep.store import Cell, Part, Seeds
from midway.gen.sweep.tally import Work
from midway.samplers.solvers import SOLVERS

UNGUIDED = "w 1"
ERROR_DIM = 512
"""A jackknife takes ten more distances, which take longer than sampling where features have many dimensions."""
Key = tuple[str, int, str, str]
"""(solver, budget, guidance in words, grid)."""


@dataclass(frozen=True)
class Tried:
    """A candidate on the seeds of choice: the distance, None if it diverged, evaluations of an image, the distance's error."""

    figure: float | None
    nfe: float
    error: float = 0.0
    """Standard error by a jackknife; 0 where it is not known, of features of more than `ERROR_DIM` dimensions."""

    @property
    def rank(self) -> float:
        """The distance, infinite if it diverged."""
        return math.inf if self.figure is None else self.figure


@dataclass(frozen=True)
class GuidanceChoice:
    """What was chosen, by which figures."""

    figures: dict[Key, Tried]
    chosen: frozenset[Key]
    seeds: Seeds

    @property
    def evaluations(self) -> int:
        """Passes through networks that the search took."""
        return round(sum(its.nfe for its in self.figures.values()) * self.seeds.n)

    def of(self, jobs: Iterable[Job]) -> list[Job]:
        """The jobs without the candidates that were not chosen."""
        return [job for job in jobs if not job.guidance or key_of(job) in self.chosen]


def key_of(job: Job) -> Key:
    """Of a candidate."""
    return (job.solver, job.nfe, job.guidance, job.grid)


# ---- candidates ----


def searched_jobs(model: EvaluatedModel, config: SweepConfig) -> list[Job]:
    """Every candidate of every solver at every budget; errors as of `solver_jobs`.

    A learned solver takes part with the guidance that it was learned at; UsageError where that is not among the candidates.
    """
    plain = tuple(solver for solver in config.solvers if solver in SOLVERS)
    learned = [(solver, nfe) for solver in config.solvers if solver not in SOLVERS for nfe in config.nfe]
    found, failed = list[Job](), dict[tuple[str, int], UsageError]()
    for words, one in guided(model, config).items():
        made = solver_jobs(model, replace(one, solvers=plain)) if plain else []
        for solver, nfe in learned:
            try:
                made += solver_jobs(model, replace(one, solvers=(solver,), nfe=(nfe,)))
            except UsageError as error:
                failed[solver, nfe] = error
        found += [replace(job, guidance=words) for job in made]
    there = {(job.solver, job.nfe) for job in found}
    for pair, error in failed.items():
        if pair not in there:
            raise error
    return found


def guided(model: EvaluatedModel, config: SweepConfig) -> dict[str, SweepConfig]:
    """The configuration of every candidate by its guidance in words.

    UsageError where there is nothing to guide; with a weaker model the missing class takes part if the model was trained for it.
    """
    search = config.search
    assert search is not None
    found, guides = dict[str, SweepConfig](), (None,) if search.weak is None else (None, search.weak)
    for scale in search.scales:
        for interval in search.intervals if scale != 1 else (EVERYWHERE,):
            for weak in guides if scale != 1 else (None,):
                one = replace(config, guidance=scale, interval=interval, weak=weak)
                try:
                    model.check_guidance(one)
                except UsageError:
                    if weak is None and search.weak is not None:
                        continue
                    raise
                found[_words(one)] = one
    return found


def _words(config: SweepConfig) -> str:
    """`w 2 at 0.3 to 5 by digits-weak`."""
    low, high = config.interval
    within = "" if config.interval == EVERYWHERE else f" at {low:g} to {high:g}"
    return f"w {config.guidance:g}{within}" + (
        "" if config.weak is None else f" by {config.weak.run.path.resolve().name}"
    )


def parts_of(words: str) -> tuple[float, str]:
    """The scale, and the rest of the words, which is empty without an interval and another model."""
    _, scale, *rest = words.split(" ", 2)
    return float(scale), "".join(rest)


def searched_plan(model: EvaluatedModel, config: SweepConfig) -> Plan:
    """Everything of a model whose guidance is chosen; errors as of `searched_jobs`."""
    return Plan(searched_jobs(model, config), model=model.facts, reconstruct=model.reconstruct)


# ---- the choice ----


def choose_guidance(plan: Plan, context: EvaluationContext, seeds: Seeds) -> GuidanceChoice:
    """The candidates of least distance to the data; figures are kept in the store."""
    jobs, tally = [job for job in plan.jobs if job.guidance], context.tally
    with at_work("choosing guidance"):
        mine = context.process.mine(jobs)
        with Progress("choosing guidance: candidate", len(mine), left=tally.left) as progress:
            for _, job in mine:
                tally.name(progress, f"{job.named}, {job.guidance}", 0)
                if _tried(job, context, seeds) is None:
                    _try(job, context, seeds)
                progress.advance()
        context.process.wait()
    found = stored_choice(jobs, context, seeds)
    if found is None:
        raise RuntimeError("figures of the choice of guidance are gone: run again")
    return found


def stored_choice(jobs: Sequence[Job], context: EvaluationContext, seeds: Seeds) -> GuidanceChoice | None:
    """The choice among these jobs, None unless the figures of all candidates are in the store."""
    tried = {key_of(job): _tried(job, context, seeds) for job in jobs if job.guidance}
    figures = {key: its for key, its in tried.items() if its is not None}
    return GuidanceChoice(figures, best_of(figures), seeds) if len(figures) == len(tried) else None


def best_of(figures: dict[Key, Tried]) -> frozenset[Key]:
    """Of every solver the best at every cost, where nothing cheaper is as good; the first of equals."""
    found = list[Key]()
    for solver in dict.fromkeys(solver for solver, *_ in figures):
        least = math.inf
        own = [key for key in figures if key[0] == solver]
        for key in sorted(own, key=lambda key: (figures[key].nfe, figures[key].rank)):
            if figures[key].rank < least:
                found.append(key)
                least = figures[key].rank
        if least == math.inf:  # all diverged
            found.append(own[0])
    return frozenset(found)


def tried_cell(job: Job, context: EvaluationContext, seeds: Seeds) -> Cell:
    """Where the figure of a candidate is."""
    space = context.spaces[""]
    named = {"seeds": [seeds.first, seeds.n], "space": [space.features, space.id, space.root]}
    return context.store.cell({"guidance choice": job.source.identity, **named})


def _tried(job: Job, context: EvaluationContext, seeds: Seeds) -> Tried | None:
    part = tried_cell(job, context, seeds).part(0, _check)
    return None if part is None else from_dict(Tried, part.costs)


def _check(_: int, part: Part) -> None:
    from_dict(Tried, part.costs)


def _try(job: Job, context: EvaluationContext, seeds: Seeds) -> None:
    """Write the candidate's figure."""
    spaces, clock, seen = {"": context.spaces[""]}, context.tally.clock, list[Tensor]()
    nfe, finite = 0.0, True
    for _, some in seeds.parts:
        batch, begun = job.source.sample(some), clock()
        seen.append(extract(spaces, job.source.images(batch))[""].features)
        nfe, finite = nfe + batch.nfe * len(some), finite and bool(batch.finite.all())
        context.tally.spend(Work(round(batch.nfe * len(some)), len(some)), batch.seconds, clock() - begun)
    figure, error = _distance(torch.cat(seen), context) if finite else (None, 0.0)
    tried_cell(job, context, seeds).write(0, Part({}, {"figure": figure, "nfe": nfe / seeds.n, "error": error}))


def _distance(features: Tensor, context: EvaluationContext) -> tuple[float | None, float]:
    """With its error."""
    with warnings.catch_warnings():  # of few images: all candidates have the same
        warnings.simplefilter("ignore", UserWarning)
        measure = context.spaces[""].distance_of
        found = measure(features)
        if not math.isfinite(found):
            return None, 0.0
        few = len(features) < 2 * GROUPS or features.shape[1] > ERROR_DIM
        return found, 0.0 if few else jackknife(measure, features)


def in_order(keys: Sequence[Key]) -> list[tuple[str, int]]:
    """Every (solver, budget), in the order of measurement."""
    return list(dict.fromkeys((solver, nfe) for solver, nfe, _, _ in keys))
