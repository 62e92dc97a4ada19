"""One cell of a sweep: sample its seeds part by part, look at them through the feature network, and sum up.

Parts are shared among processes by number and kept in the store, and so are the blocks that are measured of them; each is read in
the order of the seeds, so the numbers are the same bits for any number of processes, and after any number of kills.
"""

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.processes import ProcessInfo
from midway.gen.data.pictures import grid_png
from midway.gen.evaluation.metrics import Features, measure_metrics
from midway.gen.evaluation.sources import SampledBatch, SampleSource
from midway.gen.evaluation.store import CellStore, Part, cell_id, part_ranges, seeds_of
from midway.gen.features.reference import FeatureReference
from midway.gen.metrics.psnr_ssim import psnr

SHOWN = 8
"""Seeds shown in the sample grids."""
TIMES = ("solver", "decode", "features")
"""What a part's seconds are of."""


@dataclass(frozen=True)
class Seeds:
    """`blocks` disjoint blocks of n seeds from `first` on."""

    first: int
    n: int
    blocks: int

    @property
    def parts(self) -> list[tuple[int, int, int]]:
        """(block, first seed, seeds) of every part."""
        return part_ranges(self.first, self.n, self.blocks)

    @property
    def last(self) -> int:
        """The last seed."""
        return self.first + self.n * self.blocks - 1


@dataclass(frozen=True)
class FineSolution:
    """The fine solution of every seed, kept in the store as parts of the same seeds."""

    source: SampleSource
    seeds: Seeds
    store: CellStore
    process: ProcessInfo

    @property
    def identity(self) -> dict[str, Any]:
        """Of its parts."""
        return {"fine solution": self.source.identity, "first": self.seeds.first, "n": self.seeds.n}

    def make(self) -> None:
        """Make the parts of this process that are not there."""
        for number, (_, first, count) in self.process.mine(self.seeds.parts):
            if self.store.part(self.identity, number) is None:
                raw = self.source.sample(seeds_of(first, count))
                tensors = {"latents": raw.values, "images": self.source.images(raw)}
                self.store.write_part(self.identity, number, Part(tensors, {"nfe": raw.nfe}))

    def latents(self, most: int) -> Tensor:
        """The fine solution of the first seeds, at most so many."""
        found: list[Tensor] = []
        for number in range(len(self.seeds.parts)):
            part = self.store.part(self.identity, number)
            if part is None or sum(map(len, found)) >= most:
                break
            found.append(part.tensors["latents"])
        return torch.cat(found)[:most]

    def errors(self, number: int, latents: Tensor, images: Tensor) -> dict[str, Tensor]:
        """float64 (n,) twice: mean square distance of latents (n, C, h, w), and PSNR in dB of images, to the fine solution."""
        part = self.store.part(self.identity, number)
        if part is None:
            raise RuntimeError(f"the fine solution of part {number} is gone: run again")
        errors = (latents.double() - part.tensors["latents"].double()).square().flatten(1).mean(1)
        return {"errors": errors, "psnr": psnr(images, part.tensors["images"])}


@dataclass(frozen=True)
class EvaluationContext:
    """What every cell of a sweep is measured with."""

    reference: FeatureReference
    seeds: Seeds
    store: CellStore
    process: ProcessInfo
    metrics: tuple[str, ...] = ()
    """Beside the Fréchet distance, by their names in METRICS."""
    overlap: bool = False
    """Decode and look at a part while the next one is sampled."""
    timing: str = ""
    """What seconds depend on."""

    def identity(self, source: SampleSource, fine: "FineSolution | None" = None) -> dict[str, Any]:
        """Everything that the numbers of a cell depend on."""
        found = {
            "source": source.identity,
            "seeds": [self.seeds.first, self.seeds.n, self.seeds.blocks],
            "features": self.reference.features,
            "reference": self.reference.id,
            "root": self.reference.root,
            "metrics": sorted(self.metrics),
        }
        return found | ({"fine": fine.identity} if fine is not None else {})

    def record(self, source: SampleSource, fine: "FineSolution | None" = None) -> str:
        """Name of the cell's record in the store."""
        return cell_id(self.identity(source, fine))


def measure(source: SampleSource, context: EvaluationContext, fine: FineSolution | None = None) -> dict[str, Any]:
    """The numbers of one cell: from the store if it is finished, else measured. With `fine`, RMSE too."""
    identity = context.identity(source, fine)
    numbers = context.store.record(identity)
    context.process.wait()  # all have looked before the first process writes
    if numbers is None:
        _make_parts(source, context, identity, fine)
        context.process.wait()
        _make_blocks(context, identity)
        context.process.wait()
        if context.process.rank == 0:
            numbers, png = _summary(context, identity)
            context.store.finish(identity, numbers, png)
        context.process.wait()
        numbers = numbers or context.store.record(identity)
    assert numbers is not None
    return numbers


def picture(source: SampleSource, context: EvaluationContext, fine: FineSolution | None = None) -> bytes | None:
    """The PNG of a finished cell."""
    return context.store.png(context.identity(source, fine))


# ---- parts ----


def _make_parts(
    source: SampleSource, context: EvaluationContext, identity: dict[str, Any], fine: FineSolution | None
) -> None:
    with _worker(context.overlap) as run:
        for number, (_, first, count) in context.process.mine(context.seeds.parts):
            if context.store.part(identity, number) is None:
                raw = source.sample(seeds_of(first, count))
                run(lambda raw=raw, number=number: _keep(source, raw, number, context, identity, fine))


def extract_features(reference: FeatureReference, images: Tensor) -> Features:
    """Features and logits of uint8 images, on the CPU."""
    found = reference.network.activations(images)
    return Features(found.features.cpu(), None if found.logits is None else found.logits.cpu())


def _keep(
    source: SampleSource,
    raw: SampledBatch,
    number: int,
    context: EvaluationContext,
    identity: dict[str, Any],
    fine: FineSolution | None,
) -> None:
    """Decode, look, and write a part."""
    begun = time.perf_counter()
    images = source.images(raw)
    decoded = time.perf_counter()
    seen = extract_features(context.reference, images)
    costs = {"nfe": raw.nfe, "solver": raw.seconds, "decode": decoded - begun, "timing": context.timing}
    costs["features"] = time.perf_counter() - decoded
    tensors = {"features": seen.features, "finite": raw.finite}
    if seen.logits is not None:
        tensors["logits"] = seen.logits
    if fine is not None:
        tensors |= fine.errors(number, raw.values, images)
    if number == 0:
        tensors["shown"] = images[:SHOWN]
    context.store.write_part(identity, number, Part(tensors, costs))


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


# ---- summing up ----


def _make_blocks(context: EvaluationContext, identity: dict[str, Any]) -> None:
    """Measure the blocks of this process: at 50,000 images a block takes minutes, and so would the wait of the others."""
    for block, _ in context.process.mine(range(context.seeds.blocks)):
        if context.store.part(identity, _place(context, block)) is None:
            context.store.write_part(identity, _place(context, block), _block(context, identity, block))


def _place(context: EvaluationContext, block: int) -> int:
    """The number of a block's figures in the store, after all parts of samples."""
    return len(context.seeds.parts) + block


def _block(context: EvaluationContext, identity: dict[str, Any], block: int) -> Part:
    """The figures of one block from its parts; `errors` and `psnr` of each sample, if there was a fine solution."""
    numbers = [number for number, (its, _, _) in enumerate(context.seeds.parts) if its == block]
    parts = [part for number in numbers if (part := context.store.part(identity, number)) is not None]
    if len(parts) < len(numbers):
        raise RuntimeError(f"parts of block {block} are gone: run again")
    found = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors if name != "shown"}
    seen, sound = Features(found["features"], found.get("logits")), bool(found["finite"].all())
    figures = {
        "distance": context.reference.distance_of(seen.features) if sound else None,
        "metrics": measure_metrics(context.metrics, seen, context.reference) if sound else {},
        "nonfinite": int((~found["finite"]).sum()),
        "nfe": [part.costs["nfe"] for part in parts],
        "seconds": {name: sum(part.costs[name] for part in parts) for name in TIMES},
        "timing": [part.costs["timing"] for part in parts],
    }
    kept = {name: found[name] for name in ("errors", "psnr") if name in found}
    return Part(kept | {"shown": parts[0].tensors.get("shown", torch.empty(0))}, figures)


def _summary(context: EvaluationContext, identity: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    """Numbers of all blocks, in the order of the seeds, and a picture of the first."""
    blocks = [context.store.part(identity, _place(context, block)) for block in range(context.seeds.blocks)]
    found = [block for block in blocks if block is not None]
    if len(found) < len(blocks):
        raise RuntimeError("the figures of a block are gone: run again")
    figures = [block.costs for block in found]
    nonfinite = sum(its["nonfinite"] for its in figures)
    errors = [block.tensors["errors"] for block in found if "errors" in block.tensors]
    quality = [block.tensors["psnr"] for block in found if "psnr" in block.tensors]
    numbers: dict[str, Any] = {
        "nfe": _whole([nfe for its in figures for nfe in its["nfe"]]),
        "distances": [None if nonfinite else its["distance"] for its in figures],
        "nonfinite": nonfinite,
        "metrics": {}
        if nonfinite
        else {name: [its["metrics"][name] for its in figures] for name in figures[0]["metrics"]},
        "rmse": _rmse(torch.cat(errors)) if errors else None,
        "psnr": torch.cat(quality).mean().item() if quality and not nonfinite else None,
        "seconds": {name: round(sum(its["seconds"][name] for its in figures), 4) for name in TIMES},
        "timing": " + ".join(dict.fromkeys(line for its in figures for line in its["timing"])),
    }
    return numbers, grid_png(found[0].tensors["shown"], columns=SHOWN // 2)


def _rmse(errors: Tensor) -> float | None:
    mean = errors.mean().item()
    return math.sqrt(mean) if math.isfinite(mean) else None


def _whole(counts: list[float]) -> int:
    """Evaluations per sample as a whole number; guided evaluations run the network twice."""
    if len(set(counts)) != 1 or counts[0] != int(counts[0]):
        raise RuntimeError(
            f"{sorted(set(counts))} evaluations per sample were counted; a fixed-step solver must make one whole number"
        )
    return int(counts[0])
