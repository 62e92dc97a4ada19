"""Time grids: (schedule, steps) -> `steps + 1` falling times, from noise to data.

All grids run between two noise-to-signal ratios, by default 80 and 0.002 (EDM's range, arXiv 2206.00364, Table 1),
so that every schedule and every spacing starts and ends at the same noise level. The end is not 0: a geometric inner node
would collapse there, and 0.002 is half of one grey level of 8-bit images.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from midway.samplers.schedule import VP, Schedule, Shifted

Grid = tuple[float, ...]
RHO_MAX = 80.0
RHO_MIN = 0.002


def _fractions(steps: int) -> Tensor:
    if steps < 1:
        raise ValueError(f"a grid needs at least 1 step, got {steps}: ask for more network evaluations")
    return torch.linspace(0, 1, steps + 1, dtype=torch.float64)


def _ends(schedule: Schedule, rho_max: float, rho_min: float) -> Tensor:
    """float64 (2,): the times of rho_max and rho_min."""
    if not 0 < rho_min < rho_max:
        raise ValueError(f"a grid needs 0 < rho_min < rho_max, got rho_min={rho_min}, rho_max={rho_max}")
    return schedule.time_of_rho(torch.tensor([rho_max, rho_min], dtype=torch.float64))


def is_grid(times: Sequence[float]) -> bool:
    """Whether these are at least two times within [0, 1] that fall all the way."""
    return len(times) > 1 and times[-1] >= 0 and times[0] <= 1 and all(a > b for a, b in pairwise(times))


def _as_grid(times: Tensor) -> Grid:
    """ValueError for times that are no grid: a schedule may end below rho_max, and steps may be too many to be told apart."""
    grid = tuple(times.tolist())
    if not is_grid(grid):
        raise ValueError(
            f"these {len(grid)} times do not fall all the way within [0, 1]: choose fewer steps, and noise levels that the "
            "schedule has"
        )
    return grid


def uniform(schedule: Schedule, steps: int, rho_max: float = RHO_MAX, rho_min: float = RHO_MIN) -> Grid:
    """Equal steps of t."""
    start, end = _ends(schedule, rho_max, rho_min)
    return _as_grid(start + (end - start) * _fractions(steps))


def logsnr(schedule: Schedule, steps: int, rho_max: float = RHO_MAX, rho_min: float = RHO_MIN) -> Grid:
    """Equal steps of logSNR (DPM-Solver, Lu et al. 2022, arXiv 2206.00927)."""
    _ends(schedule, rho_max, rho_min)
    log_rho = math.log(rho_max) + (math.log(rho_min) - math.log(rho_max)) * _fractions(steps)
    return _as_grid(schedule.time_of_rho(log_rho.exp()))


def karras(
    schedule: Schedule, steps: int, rho_max: float = RHO_MAX, rho_min: float = RHO_MIN, power: float = 7.0
) -> Grid:
    """Equal steps of rho^(1/7) (EDM, arXiv 2206.00364, eq. 5)."""
    _ends(schedule, rho_max, rho_min)
    if not 0 < power < math.inf:
        raise ValueError(f"the spacing of rho^(1/power) needs a positive power, got {power}")
    root = rho_max ** (1 / power) + (rho_min ** (1 / power) - rho_max ** (1 / power)) * _fractions(steps)
    return _as_grid(schedule.time_of_rho(root**power))


def shift(
    schedule: Schedule, steps: int, rho_max: float = RHO_MAX, rho_min: float = RHO_MIN, factor: float = 3.0
) -> Grid:
    """Equal steps of t on the schedule shifted by `factor` (SD3, arXiv 2403.03206, eq. 23): more steps at high noise."""
    shifted = Shifted(schedule, factor)
    start, end = _ends(shifted, rho_max, rho_min)
    return _as_grid(shifted.warp(start + (end - start) * _fractions(steps)))


def quadratic(schedule: Schedule, steps: int, rho_max: float = RHO_MAX, rho_min: float = RHO_MIN) -> Grid:
    """Equal steps of sqrt(t): DDIM's quadratic times (Song et al. 2021, arXiv 2010.02502, appendix D.2)."""
    start, end = _ends(schedule, rho_max, rho_min).sqrt()
    return _as_grid((start + (end - start) * _fractions(steps)).square())


def vp(schedule: Schedule, steps: int, rho_max: float = RHO_MAX, rho_min: float = RHO_MIN) -> Grid:
    """Equal steps of the time of `VP`, whatever the schedule: near the grid of AMED (arXiv 2312.00094, section 4.1)."""
    own = VP()
    start, end = _ends(own, rho_max, rho_min)
    times = start + (end - start) * _fractions(steps)
    return _as_grid(schedule.time_of_rho(own.rho(times)))


AYS_SD = (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029)
AYS_SDXL = (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029)


def align_your_steps(
    schedule: Schedule,
    steps: int,
    rho_max: float = RHO_MAX,
    rho_min: float = RHO_MIN,
    levels: Sequence[float] = AYS_SD,
) -> Grid:
    """The noise levels published for Stable Diffusion 1.5, or XL (Sabour et al. 2024, arXiv 2404.14507), or any list.

    Between two of them log rho is interpolated, for any number of steps. The ends are rho_max and rho_min, as of every grid;
    the list's are 14.615, and 0.029 in place of 0. ValueError for ends that leave no room for a level.
    """
    _ends(schedule, rho_max, rho_min)
    log_levels, place = torch.tensor(levels, dtype=torch.float64).log(), _fractions(steps) * (len(levels) - 1)
    before = place.floor().clamp(max=len(levels) - 2)
    log_rho = torch.lerp(log_levels[before.long()], log_levels[before.long() + 1], place - before)
    log_rho[0], log_rho[-1] = math.log(rho_max), math.log(rho_min)
    return _as_grid(schedule.time_of_rho(log_rho.exp()))


def to_data(grid: Grid) -> Grid:
    """The grid and one more step, to sigma = 0: where EDM's grids end (Karras et al. 2022, arXiv 2206.00364, eq. 5)."""
    return explicit((*grid, 0.0))


def reversed_grid(grid: Grid) -> Grid:
    """The same times from data to noise: a deterministic solver built on them encodes instead of sampling."""
    return grid[::-1]


def explicit(times: Sequence[float]) -> Grid:
    """A grid given as numbers: at least two, falling, within [0, 1]."""
    grid = tuple(float(t) for t in times)
    if not is_grid(grid):
        raise ValueError(f"a grid is at least two falling times within [0, 1], got {grid}")
    return grid


GRIDS: dict[str, Callable[..., Grid]] = {
    "uniform": uniform,
    "logsnr": logsnr,
    "karras": karras,
    "shift": shift,
    "quadratic": quadratic,
    "vp": vp,
}

NAMED: dict[str, Callable[..., Grid]] = {
    **GRIDS,
    "ays_sd": align_your_steps,
    "ays_sdxl": partial(align_your_steps, levels=AYS_SDXL),
}
"""Grids by name: those of `GRIDS`, which a choice of the best one tries, and those that were fitted to one published model."""


def named(name: str, schedule: Schedule, steps: int, *ends: float, trained: float = 1.0) -> Grid:
    """The grid of a name in `NAMED`; of a model whose noise levels were `trained` on a shift other than 1, `shift` has that."""
    own = {"factor": trained} if name == "shift" and trained != 1 else {}
    return NAMED[name](schedule, steps, *ends, **own)
