"""What the flags of midway evaluate name of priors over codes: --priors, and a prior as --model."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.data.pixels import Images
from midway.gen.data.splits import DataConfig, Splits
from midway.gen.evaluation.other_sources import PriorSource
from midway.gen.evaluation.spaces import Spaces
from midway.gen.flags.cli import names, numbers
from midway.gen.flags.evaluation_flags import EvaluateTask
from midway.gen.flags.evaluation_reference import alike, draw_of
from midway.gen.priors.load import TrainedPrior, load_prior
from midway.gen.priors.rules import HeadFlags, draw_warnings, rules_of
from midway.gen.report.notes import prior_notes
from midway.gen.sweep.jobs import Job, SweepConfig
from midway.gen.sweep.priors import (
    PriorPlan,
    check_prior_images,
    description_of,
    how_drawn,
    other_ceilings,
    prior_jobs,
    through_codes,
)
from midway.tokenizers.tokenizer import ImageTokenizer


@dataclass(frozen=True)
class Priors:
    """Those of a sweep by the names of their runs, first the one that is --model, `main`, if it is one."""

    task: EvaluateTask
    named: dict[str, TrainedPrior]
    main: TrainedPrior | None
    _jobs: list[Job] = field(default_factory=list)

    @classmethod
    def opened(cls, task: EvaluateTask, main: TrainedPrior | None, data: DataConfig, device: torch.device) -> "Priors":
        """With their tokenizers, in tiles if --tile has them. UsageError for one twice; other errors as of `alike`."""
        found = alike("--priors", task.priors, lambda path: load_prior(path, device), data)
        for its in found.values():
            task.apply_tiles(its.tokenizer)
        every = [*([] if main is None else [(Path(main.run.place).resolve().name, main)]), *found.items()]
        if len({its.hash for _, its in every}) < len(every) or len(dict(every)) < len(every):
            raise UsageError("two of these priors are the same", "rows would repeat", "name every prior once")
        return cls(task, dict(every), main)

    @property
    def first(self) -> TrainedPrior:
        """The first of them."""
        return next(iter(self.named.values()))

    @property
    def reconstruct(self) -> Callable[[Tensor], Tensor | None]:
        """uint8 images (n, C, H, W) -> what the first one's decoder makes of their codes."""
        return through_codes(self.named)

    def check_images(self, reference: Images) -> None:
        """DataError as `check_prior_images`."""
        for its in self.named.values():
            check_prior_images(its, reference)

    def jobs(self, splits: Splits, config: SweepConfig) -> list[Job]:
        """Every rule of every prior at every budget; errors as of `prior_jobs`."""
        kinds = {its.prior.config.kind for its in self.named.values()}
        if self.named and self.task.head != HeadFlags() and "continuous" not in kinds:
            why = "only continuous priors have a diffusion head, and there is none"
            raise UsageError("--head-solver, --head-nfe or --head-grid", why, "drop it")
        for name, its in self.named.items() if not self._jobs else ():
            plan, draw = self._plan(its), draw_of(self.task, splits, its.prior.classes, its.prior.empty)
            self._jobs.extend(prior_jobs(name, its, plan, config, draw))
        return self._jobs

    def _plan(self, trained: TrainedPrior) -> PriorPlan:
        task = self.task
        options, skip = task.draw_options, task.skip_unreachable
        if trained is not self.main:
            flags = ("--prior-rules", "--prior-nfe", "--prior-decay")
            budgets = None if task.prior_nfe is None else numbers(task.prior_nfe, flags[1])
            rules, decay = names(task.prior_rules or "halton"), task.prior_decay or ""
            return PriorPlan(rules, budgets, decay, options, flags, skip=skip, head=task.head)
        rules, decays = () if task.solvers in (None, "all") else names(task.solvers), names(task.grids or "")
        if len(decays) > 1:
            why = "the exact solution chooses among grids, and samples of a prior, which are draws, have none"
            raise UsageError(f"--grids {task.grids} on {task.model}", why, "name one of cosine, arccos, linear")
        rules = rules or rules_of(trained.prior)
        budgets = None if task.nfe is None else numbers(task.nfe, "--nfe")
        decay = decays[0] if decays else ""
        flags = ("--solvers", "--nfe", "--grids")
        return PriorPlan(rules, budgets, decay, options, flags, shared=False, skip=skip, head=task.head)

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of settings by which they draw something other than one may expect."""
        sources = [job.source for job in self._jobs if isinstance(job.source, PriorSource)]
        found = [line for its in sources for line in draw_warnings(its.trained.prior, [its.sampling.decoding])]
        return tuple(dict.fromkeys(found))

    def lines(self, tokenizer: ImageTokenizer | None, held_out: Images, spaces: Spaces) -> Iterator[str]:
        """Notes of a report, and the ceilings of tokenizers other than the one of its model, or of the first prior."""
        yield from self.warnings
        described = {name: f"{description_of(its)}; {how_drawn(its, self._jobs)}" for name, its in self.named.items()}
        yield from prior_notes(described, [*other_ceilings(self.named, tokenizer, held_out, spaces)])
