"""One cell of a sweep: sample its seeds part by part, look at them through the feature network, and sum up.

Parts are shared among processes by number and kept in the store; the first process sums them up in the order of the seeds, so
the numbers are the same bits for any number of processes, and after any number of kills.
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

from midway.gen.cell_metrics import Seen, measure_metrics
from midway.gen.cell_store import CellStore, Part, cell_id, part_ranges, seeds_of
from midway.gen.measurer import Measurer
from midway.gen.pictures import grid_png
from midway.gen.reconstruction import psnr
from midway.gen.shard import Shard
from midway.gen.sources import Raw, Source

SHOWN = 8
"""Seeds shown in the sample grids."""


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
class Reference:
    """The fine solution of every seed, kept in the store as parts of the same seeds."""

    source: Source
    seeds: Seeds
    store: CellStore
    shard: Shard

    @property
    def identity(self) -> dict[str, Any]:
        """Of its parts."""
        return {"fine solution": self.source.identity, "first": self.seeds.first, "n": self.seeds.n}

    def make(self) -> None:
        """Make the parts of this process that are not there."""
        for number, (_, first, count) in self.shard.mine(self.seeds.parts):
            if self.store.part(self.identity, number) is None:
                raw = self.source.sample(seeds_of(first, count))
                tensors = {"latents": raw.values, "images": self.source.images(raw)}
                self.store.write_part(self.identity, number, Part(tensors, {"nfe": raw.nfe}))

    def errors(self, number: int, latents: Tensor, images: Tensor) -> dict[str, Tensor]:
        """float64 (n,) twice: mean square distance of latents (n, C, h, w), and PSNR in dB of images, to the fine solution."""
        part = self.store.part(self.identity, number)
        if part is None:
            raise RuntimeError(f"the fine solution of part {number} is gone: run again")
        errors = (latents.double() - part.tensors["latents"].double()).square().flatten(1).mean(1)
        return {"errors": errors, "psnr": psnr(images, part.tensors["images"])}


@dataclass(frozen=True)
class Bench:
    """What every cell of a sweep is measured with."""

    measurer: Measurer
    seeds: Seeds
    store: CellStore
    shard: Shard
    metrics: tuple[str, ...] = ()
    """Beside the Fréchet distance, by their names in METRICS."""
    overlap: bool = False
    """Decode and look at a part while the next one is sampled."""

    def identity(self, source: Source, fine: "Reference | None" = None) -> dict[str, Any]:
        """Everything that the numbers of a cell depend on."""
        found = {
            "source": source.identity,
            "seeds": [self.seeds.first, self.seeds.n, self.seeds.blocks],
            "features": self.measurer.features,
            "reference": self.measurer.reference_id,
            "root": self.measurer.root,
            "metrics": sorted(self.metrics),
        }
        return found | ({"fine": fine.identity} if fine is not None else {})

    def record(self, source: Source, fine: "Reference | None" = None) -> str:
        """Name of the cell's record in the store."""
        return cell_id(self.identity(source, fine))


def measure(source: Source, bench: Bench, fine: Reference | None = None) -> dict[str, Any]:
    """The numbers of one cell: from the store if it is finished, else measured. With `fine`, RMSE too."""
    identity = bench.identity(source, fine)
    numbers = bench.store.record(identity)
    bench.shard.wait()  # all have looked before the first process writes
    if numbers is None:
        _make_parts(source, bench, identity, fine)
        bench.shard.wait()
        if bench.shard.rank == 0:
            numbers, png = _summary(bench, identity)
            bench.store.finish(identity, numbers, png)
        bench.shard.wait()
        numbers = numbers or bench.store.record(identity)
    assert numbers is not None
    return numbers


def picture(source: Source, bench: Bench, fine: Reference | None = None) -> bytes | None:
    """The PNG of a finished cell."""
    return bench.store.png(bench.identity(source, fine))


# ---- parts ----


def _make_parts(source: Source, bench: Bench, identity: dict[str, Any], fine: Reference | None) -> None:
    with _worker(bench.overlap) as run:
        for number, (_, first, count) in bench.shard.mine(bench.seeds.parts):
            if bench.store.part(identity, number) is None:
                raw = source.sample(seeds_of(first, count))
                run(lambda raw=raw, number=number: _keep(source, raw, number, bench, identity, fine))


def look(measurer: Measurer, images: Tensor) -> Seen:
    """Features and logits of uint8 images, on the CPU."""
    found = measurer.network.activations(images)
    return Seen(found.features.cpu(), None if found.logits is None else found.logits.cpu())


def _keep(
    source: Source, raw: Raw, number: int, bench: Bench, identity: dict[str, Any], fine: Reference | None
) -> None:
    """Decode, look, and write a part."""
    begun = time.perf_counter()
    images = source.images(raw)
    decoded = time.perf_counter()
    seen = look(bench.measurer, images)
    costs = {"nfe": raw.nfe, "solver": raw.seconds, "decode": decoded - begun}
    costs["features"] = time.perf_counter() - decoded
    tensors = {"features": seen.features, "finite": raw.finite}
    if seen.logits is not None:
        tensors["logits"] = seen.logits
    if fine is not None:
        tensors |= fine.errors(number, raw.values, images)
    if number == 0:
        tensors["shown"] = images[:SHOWN]
    bench.store.write_part(identity, number, Part(tensors, costs))


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


def _summary(bench: Bench, identity: dict[str, Any]) -> tuple[dict[str, Any], bytes | None]:
    """Numbers of all parts, in the order of the seeds, and a picture of the first."""
    parts = [bench.store.part(identity, number) for number in range(len(bench.seeds.parts))]
    assert all(part is not None for part in parts)
    found = [part for part in parts if part is not None]
    blocks = [block for block, _, _ in bench.seeds.parts]
    nonfinite = sum(int((~part.tensors["finite"]).sum()) for part in found)
    seen = [_block(list(_of(found, blocks, block))) for block in range(bench.seeds.blocks)]
    numbers: dict[str, Any] = {
        "nfe": _whole([part.costs["nfe"] for part in found]),
        "distances": [None if nonfinite else bench.measurer.distance_of(block.features) for block in seen],
        "nonfinite": nonfinite,
        "metrics": {} if nonfinite else measure_metrics(bench.metrics, seen, bench.measurer),
        "rmse": _rmse(found),
        "psnr": torch.cat([part.tensors["psnr"] for part in found]).mean().item()
        if "psnr" in found[0].tensors
        else None,
        "seconds": {
            name: round(sum(part.costs[name] for part in found), 4) for name in ("solver", "decode", "features")
        },
    }
    return numbers, grid_png(found[0].tensors["shown"], columns=SHOWN // 2)


def _of(parts: list[Part], blocks: list[int], block: int) -> Iterator[Part]:
    return (part for part, its in zip(parts, blocks, strict=True) if its == block)


def _block(parts: list[Part]) -> Seen:
    """The features of a block, in the order of its seeds."""
    logits = torch.cat([part.tensors["logits"] for part in parts]) if "logits" in parts[0].tensors else None
    return Seen(torch.cat([part.tensors["features"] for part in parts]), logits)


def _rmse(parts: list[Part]) -> float | None:
    if "errors" not in parts[0].tensors:
        return None
    mean = torch.cat([part.tensors["errors"] for part in parts]).mean().item()
    return math.sqrt(mean) if math.isfinite(mean) else None


def _whole(counts: list[float]) -> int:
    """Evaluations per sample as a whole number; guided evaluations run the network twice."""
    if len(set(counts)) != 1 or counts[0] != int(counts[0]):
        raise RuntimeError(
            f"{sorted(set(counts))} evaluations per sample were counted; a fixed-step solver must make one whole number"
        )
    return int(counts[0])
