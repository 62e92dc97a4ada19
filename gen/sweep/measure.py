"""One measurement of a sweep: sample its seeds part by part, extract their features, and sum up.

Parts are shared among processes by number and written to the store, and so are the figures of each block; both are read in the
order of the seeds, so the numbers are the same bits for any number of processes, and after any number of kills.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from midway.gen.core.config import from_dict
from midway.gen.core.processes import ProcessInfo, at_work
from midway.gen.data.pictures import grid_png
from midway.gen.evaluation.metrics import Features
from midway.gen.evaluation.sources import SampledBatch, SampleSource
from midway.gen.evaluation.spaces import Spaces, distances_and_metrics, extract, key
from midway.gen.sweep.figures import Figures, SampleCosts, Seconds
from midway.gen.sweep.fine import FineSolution
from midway.gen.sweep.store import Cell, CellStore, Numbers, Part, Seeds, check_rows
from midway.gen.sweep.tally import Tally, Work

SHOWN, COLUMNS = 16, 4
"""Images of a sample grid, and of a row of it."""
TIMES = ("solver", "decode", "features")
"""What a part's seconds are of."""
COUNTED = ("token_evaluations", "head_nfe")
"""What sources count besides their evaluations, if they do."""


@dataclass(frozen=True)
class EvaluationContext:
    """What every measurement of a sweep is made with."""

    spaces: Spaces
    seeds: Seeds
    store: CellStore
    process: ProcessInfo
    metrics: tuple[str, ...] = ()
    """Beside the Fréchet distance, by their names in METRICS."""
    overlap: bool = False
    """Decode a part and extract its features while the next one is sampled."""
    timing: str = ""
    """What seconds depend on."""
    tally: Tally = field(default_factory=Tally)
    """Takes what was done."""

    def cell(self, source: SampleSource, fine: FineSolution | None = None) -> Cell:
        """The source's place in the store, named by everything that its numbers depend on."""
        identity = {
            "source": source.identity,
            "seeds": [self.seeds.first, self.seeds.n, self.seeds.blocks],
            "spaces": {space: [its.features, its.id, its.root] for space, its in self.spaces.items()},
            "metrics": sorted(self.metrics),
        }
        return self.store.cell(identity | ({"fine": fine.cell.identity} if fine is not None else {}))


def measure(source: SampleSource, context: EvaluationContext, fine: FineSolution | None = None) -> Cell:
    """The finished cell of a source, read from the store or measured now. With `fine`, RMSE too."""
    cell, process = context.cell(source, fine), context.process
    checks = Checks(context, fine)
    finished = cell.numbers() is not None
    process.wait()  # all have read before the first process writes
    if not finished:
        with at_work("sampling"):
            _sample(source, cell, context, fine)
        process.wait()
        with at_work("figures"):
            _sum_blocks(cell, context, checks)
        process.wait()
        if process.rank == 0:
            blocks = cell.parts(_block_places(context.seeds), checks.block)
            cell.finish(_summary(blocks), grid_png(blocks[0].tensors["shown"], columns=COLUMNS))
        process.wait()
    return cell


# ---- parts ----


@dataclass(frozen=True)
class Checks:
    """`Check` of the parts of a measurement."""

    context: EvaluationContext
    fine: FineSolution | None

    @property
    def _errors(self) -> tuple[str, ...]:
        return () if self.fine is None else ("errors", "psnr")

    def samples(self, number: int, part: Part) -> None:
        """Of a part of samples."""
        from_dict(SampleCosts, part.costs)
        names = (*map(key, self.context.spaces), "finite", *self._errors)
        check_rows(part, len(self.context.seeds.parts[number][1]), *names)

    def block(self, place: int, part: Part) -> None:
        """Of the figures of a block."""
        from_dict(Figures, part.costs)


def _sample(source: SampleSource, cell: Cell, context: EvaluationContext, fine: FineSolution | None) -> None:
    """Write the missing parts of this process."""
    with _worker(context.overlap) as run:
        for number, (_, seeds) in context.process.mine(context.seeds.parts):
            if cell.part(number, Checks(context, fine).samples) is None:
                context.tally.warm_up(source, seeds, context.spaces)
                batch = source.sample(seeds)
                run(lambda batch=batch, number=number: cell.write(number, _part(source, batch, number, context, fine)))


def _part(
    source: SampleSource, batch: SampledBatch, number: int, context: EvaluationContext, fine: FineSolution | None
) -> Part:
    """Decode a batch and extract its features."""
    clock = context.tally.clock
    begun = clock()
    images = source.images(batch)
    decoded = clock()
    found = extract(context.spaces, images)
    costs = {"nfe": batch.nfe, "solver": batch.seconds, "decode": decoded - begun, "timing": context.timing}
    costs["features"] = clock() - decoded
    costs |= {name: getattr(batch, name) for name in COUNTED if getattr(batch, name)}
    work = Work(round(batch.nfe * len(images)), len(images))
    context.tally.spend(work, batch.seconds, costs["decode"] + costs["features"])
    tensors = {"finite": batch.finite, **{key(space): its.features for space, its in found.items()}}
    if (logits := found[""].logits) is not None:
        tensors["logits"] = logits
    if fine is not None:
        tensors |= fine.errors(number, batch.values, images)
    if number == 0:
        tensors["shown"] = images[:SHOWN]
    return Part(tensors, costs)


@contextmanager
def _worker(overlap: bool) -> Iterator[Callable[[Callable[[], None]], None]]:
    """Runs what it is given: at once, or in a thread, one behind the caller."""
    if not overlap:
        yield lambda task: task()
        return
    pending: list[Future[None]] = []

    def later(task: Callable[[], None]) -> None:
        while pending:
            pending.pop().result()  # its error, if any; and never more than one part waits
        pending.append(pool.submit(task))

    with ThreadPoolExecutor(1) as pool:
        yield later
        while pending:
            pending.pop().result()


# ---- blocks ----


def _block_places(seeds: Seeds) -> range:
    """The numbers in the store of the figures of blocks, after all parts of samples."""
    return range(len(seeds.parts), len(seeds.parts) + seeds.blocks)


def _sum_blocks(cell: Cell, context: EvaluationContext, checks: Checks) -> None:
    """Write the missing blocks of this process: at 50,000 images a block takes minutes, and so would the wait of the others."""
    for block, place in context.process.mine(_block_places(context.seeds)):
        if cell.part(place, checks.block) is None:
            numbers, begun = (
                [n for n, (its, _) in enumerate(context.seeds.parts) if its == block],
                context.tally.clock(),
            )
            cell.write(place, _block(numbers, cell.parts(numbers, checks.samples), context, checks.fine))
            context.tally.spend(Work(blocks=1), 0.0, 0.0, context.tally.clock() - begun)


def _block(
    numbers: Sequence[int], parts: Sequence[Part], context: EvaluationContext, fine: FineSolution | None
) -> Part:
    """The figures of one block from its parts, errors among them if there was a fine solution, and its first images."""
    found = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors if name != "shown"}
    features = {space: Features(found[key(space)], None if space else found.get("logits")) for space in context.spaces}
    finite = bool(found["finite"].all())
    figures = distances_and_metrics(context.metrics, features, context.spaces) if finite else {}
    if fine is not None and finite:
        figures |= fine.distances(numbers, features) | _errors(found["errors"], found["psnr"])
    costs = {
        "distance": figures.pop("distance", None),
        "metrics": figures,
        "nonfinite": int((~found["finite"]).sum()),
        "nfe": [part.costs["nfe"] for part in parts],
        "seconds": {name: sum(part.costs[name] for part in parts) for name in TIMES},
        "timing": [part.costs["timing"] for part in parts],
        **{name: [part.costs.get(name, 0.0) for part in parts] for name in COUNTED},
    }
    return Part({"shown": parts[0].tensors.get("shown", torch.empty(0))}, costs)


def _errors(errors: Tensor, quality: Tensor) -> dict[str, float]:
    """RMSE and mean PSNR of square errors and PSNR (n,); none where the fine solution diverged."""
    mean = errors.mean().item()
    return {"rmse": math.sqrt(mean), "psnr": quality.mean().item()} if math.isfinite(mean) else {}


def _summary(blocks: Sequence[Part]) -> Numbers:
    """Numbers of all blocks, in the order of the seeds."""
    figures = [block.costs for block in blocks]
    nonfinite = sum(its["nonfinite"] for its in figures)
    kept = [its["metrics"].keys() for its in figures]
    names = () if nonfinite else [name for name in kept[0] if all(name in its for its in kept)]
    return Numbers(
        nfe=_whole([nfe for its in figures for nfe in its["nfe"]]),
        distances=tuple(None if nonfinite else its["distance"] for its in figures),
        nonfinite=nonfinite,
        metrics={name: tuple(its["metrics"][name] for its in figures) for name in names},
        seconds=Seconds(**{name: round(sum(its["seconds"][name] for its in figures), 4) for name in TIMES}),
        block_seconds=tuple(Seconds(**{name: round(its["seconds"][name], 4) for name in TIMES}) for its in figures),
        timing=" + ".join(dict.fromkeys(line for its in figures for line in its["timing"])),
        token_evaluations=_whole([count for its in figures for count in its.get("token_evaluations", [0.0])]),
        head_nfe=max((round(count, 6) for its in figures for count in its.get("head_nfe", [0.0])), default=0.0),
    )


def _whole(counts: list[float]) -> int:
    """Evaluations per sample as a whole number; guided evaluations run the network twice."""
    if len(set(counts)) != 1 or counts[0] != int(counts[0]):
        raise RuntimeError(
            f"{sorted(set(counts))} per sample were counted; a fixed number of evaluations must make one whole number"
        )
    return int(counts[0])
