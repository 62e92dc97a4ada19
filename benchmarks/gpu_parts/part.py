"""What the parts of gpu.py share: their setting, rows as they are measured, and time by CUDA events.

A part is a module with `makers(setting)`: names and functions that yield rows. Of functions that fail, the row holds the reason;
the others still run.
"""

import contextlib
import importlib
import io
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from common import Measured, Result, device_seconds
from gpu_parts.watch import end_with_parent
from torch import Tensor

from midway.gen.core.errors import one_line

Work = Callable[[], object]
Maker = Callable[[], Iterable["Result | dict[str, Any]"]]
OURS = ("midway", "gpu_parts", "common", "oracles")
"""Modules that are missing only if something is wrong."""


class Skipped(Exception):
    """Something that a row needs is not on this machine."""


@dataclass(frozen=True)
class Setting:
    """What a part measures on, for about how many seconds, at which sizes; `folder` is removed afterwards."""

    device: torch.device
    seconds: float
    folder: Path
    tiny: bool = False
    """Sizes that show that everything runs, also on a CPU."""
    data: Path | None = None

    @property
    def cuda(self) -> bool:
        """Whether this is a GPU."""
        return self.device.type == "cuda"


# ---- rows ----


def rows_of(makers: dict[str, Maker]) -> Iterator[dict[str, Any]]:
    """All rows with their status: measured, skipped, failed."""
    for name, make in makers.items():
        try:
            for row in make():
                yield {"status": "measured", **(asdict(row) if isinstance(row, Result) else row)}
        except Exception as error:
            yield without(name, error)


def without(name: str, error: Exception) -> dict[str, Any]:
    """The row in place of one that could not be measured."""
    if isinstance(error, Skipped):
        return {"status": "skipped", "name": name, "reason": str(error)}
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] not in OURS:
        return {"status": "skipped", "name": name, "reason": f"the package {error.name} is not installed"}
    frames = traceback.extract_tb(error.__traceback__)
    where = "; ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-3:])
    return {"status": "failed", "name": name, "reason": f"{one_line(error)} ({where})"}


def run_part(name: str, setting: Setting, rows: Path) -> int:
    """Measure one part and append its rows to a file, unjudged at tiny sizes; 0, whatever the rows are."""
    end_with_parent()
    with rows.open("a") as file:
        try:
            makers = importlib.import_module(f"gpu_parts.{name}").makers(setting)
        except Exception as error:
            write(file, without(name, error))
            return 0
        with contextlib.redirect_stdout(sys.stderr):
            for row in rows_of(makers):
                write(file, {**row, "target": "", "held": None} if setting.tiny and "held" in row else row)
    return 0


def write(file: TextIO | io.StringIO, row: dict[str, Any]) -> None:
    """One line, at once."""
    file.write(json.dumps(row, default=str) + "\n")
    file.flush()


# ---- time ----


def wall_seconds(work: Work) -> float:
    """On a CPU."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def turns(
    sides: Mapping[str, Work], setting: Setting, seconds: float, warm_up: int = 3, least: int = 5, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds a call of every side, in turns for about `seconds`, `least` times at least and 200 at most.

    `calls` of a side are timed together: more than one for what takes less than the host needs to start it.
    """
    clock = device_seconds if setting.cuda else wall_seconds

    def many(work: Work) -> None:
        for _ in range(calls):
            work()

    for work in sides.values():
        for _ in range(warm_up):
            work()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    begun = time.perf_counter()
    least, most = (2, 2) if setting.tiny else (least, 200)
    done = 0
    while done < least or (time.perf_counter() - begun < seconds and done < most):
        for name, work in sides.items():
            taken[name].append(clock(lambda work=work: many(work)) / calls)
        done += 1
    return taken


def significant(value: float) -> float:
    """Five digits."""
    return float(f"{value:.5g}")


def value_row(name: str, unit: str, value: float) -> Result:
    """A figure without a peer."""
    return Result(name, unit, significant(value), "", None, None, "", None)


def compared(
    name: str, unit: str, ours: float, peer_name: str, peer: float, target: float | None = None, **facts: Any
) -> Measured:
    """Two figures of which the lower is better; the ratio is peer / ours, judged if there is a target for it."""
    ratio = peer / ours if ours else float("inf")
    words, held = ("", None) if target is None else (f"peer / ours >= {target:g}", ratio >= target)
    return Measured(
        name, unit, significant(ours), peer_name, significant(peer), significant(ratio), words, held, **facts
    )


def time_rows(
    name: str,
    taken: dict[str, list[float]],
    differences: dict[str, dict[str, float]] | None = None,
    target: dict[str, float] | None = None,
) -> Iterator[Measured]:
    """The first side beside each of the others: medians in ms, and the quartiles of the ratios of neighbouring turns."""
    (ours, own), *peers = taken.items()
    for peer, theirs in peers:
        low, _, high = statistics.quantiles([b / a for a, b in zip(own, theirs, strict=True)], n=4)
        yield compared(
            f"{name}, {ours}",
            "ms",
            1e3 * statistics.median(own),
            peer,
            1e3 * statistics.median(theirs),
            (target or {}).get(peer),
            quartiles=(significant(low), significant(high)),
            differences=(differences or {}).get(peer, {}),
            turns=len(own),
        )


def relative(value: Tensor, reference: Tensor) -> float:
    """|value - reference| / |reference| in float64; NaN stays NaN."""
    value, reference = value.double().to(reference.device), reference.double()
    return ((value - reference).norm() / reference.norm()).item()
