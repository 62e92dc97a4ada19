"""Pairs (noise, sample) of a trained model's own sampler, for a second rectified flow (Liu et al. 2022, arXiv 2209.03003).

A sampler takes noise n to the state x at the last time of its grid. With y = x / alpha, against rho = sigma / alpha, its first
state and its last are on every schedule

    y_max = sqrt(1 + rho_max^2) n        (`start_state`)        y_min = x / alpha(rho_min)

and the pair is the one whose line y = x0 + rho e goes through both:

    e = (y_max - y_min) / (rho_max - rho_min)         x0 = y_min - rho_min e

A training on the pair has the states alpha (x0 + rho e): the sampler's first state exactly, its last one exactly, and on `Linear`
a straight line between them with velocity e - x0, along which one step of Euler's method leads from the first to the last. (n in
place of e, and x in place of x0, would miss the first state of `Linear` by the share 1 / 81 of x.)
On the other schedules y is straight against rho, and DDIM in one step does the same.

Pairs lie in a folder of records: the last states x, and the class of each; the noise is a function of the seed. What pairs
depend on names the folder, so that those of another source, sampler, scale of guidance or draw are never used in their place.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, DivergedError, UsageError, raising
from midway.gen.core.files import DAMAGE
from midway.gen.core.processes import ProcessInfo, first_of_all
from midway.gen.core.ranges import BATCH, COUNT, SEED, STEPS, check_ranges
from midway.gen.core.text import echo
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.load import LEARNED, TrainedModel
from midway.gen.diffusion.samplers import SamplerConfig, fitting_nfe, make_samplers
from midway.gen.diffusion.sampling import labels_of, noise_of, sample_latents
from midway.gen.files.record_work import RecordWork, Span, write_records
from midway.gen.files.record_writer import RecordFormat
from midway.gen.files.records import Records, is_records, open_records, record_bytes
from midway.gen.progress.bar import Progress
from midway.gen.training.batches import LatentBatch
from midway.gen.training.interface import Items
from midway.samplers.gits import GITS
from midway.samplers.sampler import Sampler
from midway.samplers.schedule import Schedule
from midway.tokenizers.weights import check_tensors

KIND, PLAN = "pairs", "pairs.json"
IN_MEMORY = 256 << 20
"""Bytes of records that are kept in memory; more are read from the disk, batch by batch."""
REMAKE = "delete the folder: the same command draws the pairs again"


@dataclass(frozen=True)
class ReflowConfig:
    """A second rectified flow, on pairs (noise, sample) of a trained model's own sampler in place of images."""

    source: Path | None = None
    """Run directory of the latent model that draws the pairs; its tokenizer and images are those of this run."""
    pairs: int = 20000
    """How many pairs."""
    solver: str = "dpmpp3m"
    """Solver that draws them; one that draws noise of its own has no pairs."""
    grid: str = "logsnr"
    """Its time grid."""
    nfe: int = 24
    """Network evaluations of a pair, at guidance 1."""
    guidance: float = 1.0
    """Classifier-free guidance scale of the samples; the new model has it without guidance, and so at half the evaluations."""
    seed: int = 1 << 40
    """Seed of the first pair; the others follow. Far from those that are evaluated: no image is measured on its own noise."""
    batch_size: int = 256
    """Pairs that are drawn at once; changes them by rounding only."""
    folder: Path | None = None
    """Where the pairs lie, or are written if they are not there (default: pairs-<what they depend on> in the source run)."""

    def __post_init__(self) -> None:
        check_ranges(self, pairs=COUNT, nfe=STEPS, batch_size=BATCH, seed=SEED)


def pair_of(schedule: Schedule, ends: tuple[float, float], noise: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, e), each (B, *): the line through the first and the last state of a sampler.

    ends: first and last time of its grid on `schedule`; noise: standard normal (B, *), from which `start_state` made the
    first state; last: the last state (B, *).
    """
    times = torch.tensor(ends, dtype=torch.float64)
    return _line(tuple(schedule.rho(times).tolist()), schedule.alpha(times[1]).item(), noise, last)


def _line(rho: tuple[float, ...], alpha: float, noise: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    high, low = rho
    y = last / alpha
    e = (math.hypot(1, high) * noise - y) / (high - low)
    return y - low * e, e


# ---- what pairs depend on ----


@dataclass(frozen=True)
class PairSource:
    """A model and how pairs of it are drawn. UsageError for a sampler that does not exist, or that has no pairs."""

    trained: TrainedModel
    config: ReflowConfig
    draw: ClassDraw | None
    """How seeds draw classes."""

    @cached_property
    def settings(self) -> SamplerConfig:
        """Of the sampler."""
        own = self.config
        return SamplerConfig((own.grid,), guidance=own.guidance, batch_size=own.batch_size, draw=self.draw)

    @cached_property
    def sampler(self) -> Sampler:
        """Draws the samples."""
        solver, nfe, grid = self.config.solver, self.config.nfe, self.config.grid
        if solver in LEARNED:
            why, fix = "a learned solver has errors of its own, which would be learned again", "use dpmpp3m, or heun"
            raise UsageError(f"--reflow.solver {solver}", why, fix)
        found = make_samplers(self.trained, solver, nfe, self.settings)[grid]
        if found.table is None or found.table.stochastic:
            why = "it draws noise on the way, so that the first noise does not decide the sample"
            raise UsageError(f"--reflow.solver {solver}", why, "use one of an ODE, say dpmpp3m or heun")
        return found

    @property
    def fitting(self) -> int:
        """Passes through the networks that fitting the grid takes."""
        return fitting_nfe(self.trained, self.settings, self.sampler) if self.config.grid == GITS else 0

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What pairs depend on, and the line through their ends, as JSON."""
        times, schedule = torch.tensor(self.sampler.grid, dtype=torch.float64), self.trained.model.schedule
        return {
            "source": self.trained.hash,
            "decoder": self.trained.decoder_hash,
            "sampler": self.sampler.hash,
            "guidance": self.config.guidance,
            "labels": None if self.draw is None else self.draw.identity,
            "first": self.config.seed,
            "count": self.config.pairs,
            "rho": schedule.rho(times[[0, -1]]).tolist(),
            "alpha": schedule.alpha(times[-1]).item(),
        }

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the plan."""
        return hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where the pairs belong."""
        return self.config.folder or self.trained.run.path / f"pairs-{self.hash}"


# ---- drawing ----


def draw_pairs(source: PairSource, process: ProcessInfo | None = None) -> "Pairs":
    """The pairs, drawn together with the other processes if they are not there; an interrupted call is gone on with.

    UsageError where the folder has other files, or is being written; DivergedError for samples that are not finite; DataError for
    pairs in the folder that are of another source or damaged; DiskError.
    """
    folder, config = source.folder, source.config
    if not first_of_all(is_records(folder, KIND)):
        form = RecordFormat("float32", source.trained.model.latent_shape)
        plan, words = {**source.plan, "batch": config.batch_size}, (("drawing pairs", "written"), "pairs", REMAKE)
        write_records(
            RecordWork(folder, KIND, form, config.pairs, config.batch_size, PLAN, plan, *words),
            process or ProcessInfo(),
            lambda span, progress: _Draws(source, span, progress),
            lambda indices: {"evaluations": source.fitting + sum(index.facts["evaluations"] for index in indices)},
        )
        echo(f"pairs {(config.pairs, *source.trained.model.latent_shape)} in {folder}")
    return open_pairs(source)


@dataclass
class _Draws:
    """The samples of a shard; `facts` counts evaluations of the networks."""

    source: PairSource
    span: Span
    progress: Progress
    facts: dict[str, Any] = field(default_factory=lambda: {"evaluations": 0})

    def __iter__(self) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        (first, end), source = self.span, self.source
        model, sampling, size = source.trained.model, source.settings.sampling(), source.config.batch_size
        for start in range(first, end, size):
            seeds = torch.arange(start, min(start + size, end)) + source.config.seed
            labels = labels_of(seeds, model.classes, model.empty, source.draw)
            samples = sample_latents(source.trained, source.sampler, seeds, sampling, labels)
            if not bool(samples.latents.isfinite().all()):
                why = f"one of the seeds {int(seeds[0])} to {int(seeds[-1])} is not finite"
                raise DivergedError(
                    "these pairs cannot be trained on", why, "raise --reflow.nfe, or lower --reflow.guidance"
                )
            self.facts["evaluations"] += round(samples.nfe * len(seeds))
            yield samples.latents.float(), {"labels": labels}
            self.progress.advance(len(seeds))


# ---- reading ----


@dataclass(frozen=True)
class Pairs:
    """Drawn pairs, read by index from the disk; `labels` int64 (N,)."""

    records: Records
    labels: Tensor
    facts: Mapping[str, Any]
    """The plan, and evaluations."""
    kept: Tensor | None = None
    """All records, if they are few."""

    def __len__(self) -> int:
        return len(self.records)

    @property
    def evaluations(self) -> int:
        """Passes of samples through networks that drawing them took."""
        return self.facts["evaluations"]

    def read(self, items: Tensor) -> LatentBatch:
        """The pairs int64 (B,): x0 as `latents` and e as `noise`, on the CPU. DataError naming a file that has changed."""
        last = self.records.read(items) if self.kept is None else self.kept[items]
        noise = noise_of(items + self.facts["first"], last.shape[1:])
        x0, e = _line(tuple(self.facts["rho"]), self.facts["alpha"], noise, last)
        return LatentBatch(x0, self.labels[items], e)

    def items(self, fingerprint: str) -> Items:
        """For fit(); `fingerprint` is that of the images."""
        known = json.dumps({name: self.facts[name] for name in sorted(self.facts) if name != "batch"}, sort_keys=True)
        own = hashlib.sha256(known.encode()).hexdigest()[:12]
        return Items(self.read, len(self), f"{fingerprint} pairs {own} by {self.facts['decoder']}")


def open_pairs(source: PairSource) -> Pairs:
    """The pairs of this source that were drawn. DataError when they are missing, of another source, or damaged."""
    folder = source.folder
    records = open_records(folder, KIND, REMAKE)
    for key, value in source.plan.items():
        found = records.facts.get(key)
        if found != value:
            own = f"their {key} is {found}, and this command's is {value}"
            raise DataError(f"{folder} has pairs of another source", own, "give another --reflow.folder")
    with raising(DataError, f"{folder} is no whole folder of pairs", REMAKE, *DAMAGE):
        labels = records.tensor("labels")
        if records.shape != source.trained.model.latent_shape or len(records) != source.config.pairs:
            raise ValueError(f"it has {len(records)} records {records.shape}")
        whole = torch.empty(len(records), dtype=torch.int64)
        check_tensors(records.tensors(), {"labels": whole, "crc": whole})
        if type(records.facts.get("evaluations")) is not int:
            raise ValueError(f"evaluations of its manifest are {records.facts.get('evaluations')!r}")
    few = len(records) * record_bytes(records.dtype, records.shape or ()) <= IN_MEMORY
    return Pairs(records, labels, records.facts, records.read(torch.arange(len(records))) if few else None)
