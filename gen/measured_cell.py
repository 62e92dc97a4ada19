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
    """Numbers of all parts, in the order of the seeds, and a picture of the first; one block is in memory at a time."""
    blocks = [_block(bench, identity, block) for block in range(bench.seeds.blocks)]
    nonfinite = sum(block.nonfinite for block in blocks)
    errors = [block.errors for block in blocks if block.errors is not None]
    quality = [block.psnr for block in blocks if block.psnr is not None]
    numbers: dict[str, Any] = {
        "nfe": _whole([nfe for block in blocks for nfe in block.nfe]),
        "distances": [None if nonfinite else block.distance for block in blocks],
        "nonfinite": nonfinite,
        "metrics": {} if nonfinite else {name: [block.metrics[name] for block in blocks] for name in blocks[0].metrics},
        "rmse": _rmse(torch.cat(errors)) if errors else None,
        "psnr": torch.cat(quality).mean().item() if quality and not nonfinite else None,
        "seconds": {name: round(sum(block.seconds[name] for block in blocks), 4) for name in TIMES},
    }
    return numbers, grid_png(blocks[0].shown, columns=SHOWN // 2)


@dataclass(frozen=True)
class _Block:
    """What a cell's record takes from one block: `errors` and `psnr` of each sample, None without a fine solution."""

    distance: float | None
    metrics: dict[str, float]
    nonfinite: int
    nfe: list[float]
    seconds: dict[str, float]
    errors: Tensor | None
    psnr: Tensor | None
    shown: Tensor


def _block(bench: Bench, identity: dict[str, Any], block: int) -> _Block:
    """Read the parts of one block and measure it."""
    numbers = [number for number, (its, _, _) in enumerate(bench.seeds.parts) if its == block]
    parts = [part for number in numbers if (part := bench.store.part(identity, number)) is not None]
    assert len(parts) == len(numbers)

    def all_of(name: str) -> Tensor | None:
        return torch.cat([part.tensors[name] for part in parts]) if name in parts[0].tensors else None

    features, finite = all_of("features"), all_of("finite")
    assert features is not None and finite is not None
    seen, sound = Seen(features, all_of("logits")), bool(finite.all())
    return _Block(
        distance=bench.measurer.distance_of(features) if sound else None,
        metrics=measure_metrics(bench.metrics, seen, bench.measurer) if sound else {},
        nonfinite=int((~finite).sum()),
        nfe=[part.costs["nfe"] for part in parts],
        seconds={name: sum(part.costs[name] for part in parts) for name in TIMES},
        errors=all_of("errors"),
        psnr=all_of("psnr"),
        shown=parts[0].tensors.get("shown", torch.empty(0)),
    )


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
