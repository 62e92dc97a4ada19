"""What benchmarks share: lines of a table, how they are judged, printed and written; two steps measured side by side.

ms     process time of a step on one thread, both sides in turns in one process, lower decile of the turns (what else the
       machine does only adds); on a GPU the time between two CUDA events around the step, the GPU idle before, median
MiB    the most that one step has allocated at a time beyond what was there before: allocations and releases that torch's
       allocator reports to its profiler, temporaries inside of operations too. (A process's resident size would show
       neither what fits below its earlier peak nor what was given back.) Packing buffers of the BLAS are not torch's, on
       either side. On a GPU the peak of torch's allocator
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from midway.gen.core.environment import environment, hardware

UNTIMED_TURNS = 1
Step = Callable[[], dict[str, Tensor]]
"""Does the work once and returns what came out, by name."""


@dataclass(frozen=True)
class Result:
    """A line of the table: `ours` and `peer` in `unit`, lower being better; `held` when ours is within what the target asks."""

    name: str
    unit: str
    ours: float
    peer_name: str
    peer: float | None
    ratio: float | None
    """peer / ours."""
    target: str
    held: bool | None
    """None where there is no target."""
    operations: float | None = None
    """Full-tensor operations of a step, ours."""
    peer_operations: float | None = None


@dataclass(frozen=True)
class Measured(Result):
    """A line with what makes it believable."""

    differences: dict[str, float] = field(default_factory=dict)
    """Between the outputs of the two sides: of integers the share that differs, of all else the largest."""
    quartiles: tuple[float, float] | None = None
    """Of the ratios of neighbouring turns."""
    turns: int = 1


@dataclass(frozen=True)
class Comparison:
    """Two steps that do the same from the same state, and how many times less ours has to need, if that is judged."""

    name: str
    peer_name: str
    ours: Step
    peer: Step
    time: float | None = None
    memory: float | None = None
    tolerance: float = 1e-5
    """Largest difference of an output, relative for numbers beyond 1."""
    flips: float = 0.0
    """Largest share of integers that differ."""
    share: float = 1.0
    """How much of our work the peer does: its time is divided by it, and below 1 its memory is not compared."""


# ---- measuring ----


def process_seconds(work: Callable[[], object]) -> float:
    """Of this process, all threads."""
    start = time.process_time()
    work()
    return time.process_time() - start


def device_seconds(work: Callable[[], object]) -> float:
    """Between two CUDA events around the work, the GPU idle before; what the GPU waits for the host is part of it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `work` has allocated at a time, beyond what was there before."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    live: dict[int, int] = {}
    now = most = 0
    for address, size in allocations(work):
        # What is released without having been allocated in here was there before, and not counted.
        now += size if size > 0 else -live.pop(address, 0)
        live |= {address: size} if size > 0 else {}
        most = max(most, now)
    return most


def allocations(work: Callable[[], object]) -> list[tuple[int, int]]:
    """(address, bytes) of all that `work` allocates on the CPU, in order; bytes are negative where memory is released."""
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    with tempfile.TemporaryDirectory() as folder, _silent():
        trace = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(trace))
        events = [e for e in json.loads(trace.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return [(e["args"]["Addr"], e["args"]["Bytes"]) for e in sorted(events, key=lambda e: e["ts"])]


@contextmanager
def _silent() -> Iterator[None]:
    """The profiler writes to the standard error of the process between the lines of the table."""
    stderr = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def differences(ours: dict[str, Tensor], peer: dict[str, Tensor]) -> dict[str, float]:
    """By name; ValueError unless both sides tell the same things in the same shapes."""
    shapes = [{name: tuple(value.shape) for name, value in side.items()} for side in (ours, peer)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the sides tell different things: {shapes[0]} and {shapes[1]}")
    return {name: _difference(ours[name].detach(), peer[name].detach()) for name in ours}


def _difference(ours: Tensor, peer: Tensor) -> float:
    if not ours.is_floating_point():
        return (ours != peer).double().mean().item()
    return ((ours - peer).abs() / peer.abs().clamp(min=1)).max().item()


def checked(comparison: Comparison) -> dict[str, float]:
    """The differences after one step of both sides. ValueError if they do not do the same."""
    ours, peer = comparison.ours(), comparison.peer()
    found = differences(ours, peer)
    for name, value in found.items():
        most = comparison.tolerance if ours[name].is_floating_point() else comparison.flips
        if not value <= most:
            raise ValueError(f"{comparison.name}: {name} differ from {comparison.peer_name} by {value:g} > {most:g}")
    return found


def take_turns(
    comparison: Comparison, seconds: float, least: int, clock: Callable[[Callable[[], object]], float]
) -> list[tuple[float, float]]:
    """Seconds of both sides in turns, for about `seconds`; `least` times at least, at most 200 times."""
    pairs: list[tuple[float, float]] = []
    begun = time.perf_counter()
    while len(pairs) < UNTIMED_TURNS + least or (
        time.perf_counter() - begun < seconds and len(pairs) < UNTIMED_TURNS + 200
    ):
        pairs.append((clock(comparison.ours), clock(comparison.peer)))
    return pairs[UNTIMED_TURNS:]


def measure(comparison: Comparison, seconds: float, least: int, device: torch.device) -> Iterator[Measured]:
    """Check, then the line of time and, where both sides do all the work, that of memory. What a GPU needs is not judged."""
    found = checked(comparison)
    if device.type == "cuda":
        comparison = replace(comparison, name=f"{comparison.name}, GPU", time=None, memory=None)
    clock, decile = (device_seconds, 4) if device.type == "cuda" else (process_seconds, 0)
    yield time_row(comparison, found, take_turns(comparison, seconds, least, clock), decile)
    if comparison.share == 1:
        ours, peer = (peak_bytes(side, device) / 2**20 for side in (comparison.ours, comparison.peer))
        name = f"{comparison.name}, memory"
        yield judged(name, "MiB", ours, comparison.peer_name, peer, comparison.memory, differences=found)


def time_row(
    comparison: Comparison, found: dict[str, float], pairs: list[tuple[float, float]], decile: int = 0
) -> Measured:
    """A decile of both sides, from 0 for the lowest; 4 is the median."""
    ours, peer = (
        statistics.quantiles(side, n=10, method="inclusive")[decile] * 1e3 for side in zip(*pairs, strict=True)
    )
    low, _, high = statistics.quantiles([p / o / comparison.share for o, p in pairs], n=4, method="inclusive")
    facts = {"differences": found, "quartiles": (round(low, 2), round(high, 2)), "turns": len(pairs)}
    return judged(comparison.name, "ms", ours, comparison.peer_name, peer / comparison.share, comparison.time, **facts)


def judged(
    name: str, unit: str, ours: float, peer_name: str, peer: float, least: float | None, **facts: Any
) -> Measured:
    """A line whose target is peer / ours >= `least`."""
    ratio = peer / ours
    target, held = ("", None) if least is None else (f"peer / ours >= {least:g}", ratio >= least)
    return Measured(name, unit, round(ours, 4), peer_name, round(peer, 4), round(ratio, 2), target, held, **facts)


# ---- the table ----


def line(row: Result, width: int = 48) -> str:
    """One line of the printed table."""
    peer = "" if row.peer is None else f"{row.peer:10.2f}"
    ratio = "" if row.ratio is None else f"{row.ratio:7.2f}"
    counts = "" if row.operations is None else f"{row.operations:g} / {row.peer_operations:g}"
    held = {True: "yes", False: "NO", None: "-"}[row.held]
    named = f"{row.name} beside {row.peer_name}" if row.peer_name else row.name
    return (
        f"{named:{width}s} {row.ours:10.4g} {peer:>10s} {ratio:>7s} {row.unit:8s} {held:4s} {row.target:36s} {counts}"
    )


def printed(makers: Iterable[Callable[[], Iterable[Result]]], width: int = 48, last_column: str = "") -> list[Result]:
    """All rows, each printed as soon as it is there."""
    print(f"{'name':{width}s} {'ours':>10s} {'peer':>10s} {'ratio':>7s} {'unit':8s} held target{'':31s} {last_column}")
    rows = []
    for make in makers:
        for row in make():
            rows.append(row)
            print(line(row, width), flush=True)
    return rows


def conclude(rows: list[Result], out: Path, device: str, **more: Any) -> int:
    """Write the JSON; the exit code, 1 when a target was missed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {"device": device, "hardware": hardware(), "environment": environment(), **more}
    out.write_text(json.dumps({**report, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")
    print(f"wrote {out}")
    return 1 if any(row.held is False for row in rows) else 0
