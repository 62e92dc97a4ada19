"""Samplers of average velocities: from one time to another in one evaluation.

A jump field predicts u(z_t, t, r) = (z_t - z_r) / (t - r), with z_r on the trajectory of dz/dt = v through z_t (Geng et al.
2025, arXiv 2505.13447, eq. 3). It satisfies

    u(z, t, t) = v(z, t)          u = v - (t - r) du/dt,   du/dt = (d_z u) v + d_t u          (eq. 6)

so an exact one reaches the end of the trajectory in one jump, and N jumps down any grid lead to the same end:

    jump           z_s = z_t - (t - s) u(z_t, t, s)
    consistency    z_s = (alpha_s / alpha_e) z_e + c xi,   z_e = z_t - (t - e) u(z_t, t, e),   e the end of the grid,
                   c^2 = sigma_s^2 - (alpha_s sigma_e / alpha_e)^2                            (last step: z_e)

`consistency` is multistep consistency sampling (Song et al. 2023, arXiv 2303.01469, algorithm 1), which draws fresh noise xi and
needs jumps to the end alone. Both are tables (table.py) with one evaluation a step, on every schedule.
"""

import math
from collections.abc import Callable
from itertools import pairwise

from midway.samplers.grids import Grid
from midway.samplers.recorder import FRESH_NOISE, Combination, Recorder
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table


def jump(schedule: Schedule, grid: Grid) -> Table:
    """A jump between each two times of a falling grid: one evaluation each. ValueError for any other grid."""
    record = _begin("jump", schedule, grid)
    for t, s in pairwise(grid):
        record.advance(_landing(record, t, s), s)
    return record.table()


def consistency(schedule: Schedule, grid: Grid) -> Table:
    """Jumps to the end of a falling grid, and back by fresh noise to its next time: one evaluation each. ValueError as `jump`."""
    record, end = _begin("consistency", schedule, grid), grid[-1]
    for t, s in pairwise(grid):
        landing = _landing(record, t, end)
        if s == end:
            record.advance(landing, s)
            continue
        scale = record.alpha(s) / record.alpha(end)
        left = math.sqrt(record.sigma(s) ** 2 - (scale * record.sigma(end)) ** 2)
        record.advance(scale * landing + left * FRESH_NOISE, s)
    return record.table()


JUMPS: dict[str, Callable[[Schedule, Grid], Table]] = {"jump": jump, "consistency": consistency}
"""By name, the samplers of models that were trained to jump."""


def _begin(name: str, schedule: Schedule, grid: Grid) -> Recorder:
    if list(grid) != sorted(grid, reverse=True):
        raise ValueError(f"'{name}' goes from noise to data, and the grid rises: an average velocity has no inverse")
    return Recorder(name, schedule, grid)


def _landing(record: Recorder, t: float, r: float) -> Combination:
    """Where the jump from the newest state at t to r arrives."""
    now = record.evaluate(t, r)
    return now.x + (r - t) * now.velocity
