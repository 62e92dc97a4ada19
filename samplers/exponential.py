"""What solver builders share: recorders that have checked their grid, and weighted sums."""

from collections.abc import Sequence

from midway.samplers.grids import Grid
from midway.samplers.recorder import Combination, Recorder
from midway.samplers.schedule import Schedule

ZERO = Combination({})


def begin(solver: str, schedule: Schedule, grid: Grid) -> Recorder:
    """A recorder; ValueError for a grid that starts without noise, where the state does not determine eps."""
    record = Recorder(solver, schedule, grid)
    if not record.sigma(grid[0]) > 0:
        raise ValueError(
            f"{solver} cannot start where sigma = 0, because eps = (x - alpha x0) / sigma: start the grid at rho = 0.002"
        )
    return record


def begin_falling(solver: str, schedule: Schedule, grid: Grid) -> Recorder:
    """`begin` for solvers that add noise; ValueError for a rising grid."""
    if grid[0] < grid[-1]:
        raise ValueError(f"{solver} draws noise and only goes from noise to data: use a falling grid, or eta = 0")
    return begin(solver, schedule, grid)


def begin_in_rho(solver: str, schedule: Schedule, grid: Grid) -> Recorder:
    """`begin` for solvers that need a finite rho at both ends of every step."""
    record = begin(solver, schedule, grid)
    for end, t in (("start", grid[0]), ("end", grid[-1])):
        if record.alpha(t) <= 0:
            raise ValueError(
                f"{solver} works with rho = sigma / alpha, which is infinite at the grid's {end}: {end} at rho = 80"
            )
    return record


def need_noise_at_the_end(record: Recorder) -> None:
    """ValueError for a grid that ends without noise: for solvers that evaluate there, or use log rho."""
    if not record.sigma(record.grid[-1]) > 0:
        raise ValueError(f"{record.solver} needs sigma > 0 at the grid's end: end the grid at rho = 0.002")


def check_order(solver: str, order: int, highest: int) -> None:
    """ValueError for an order that there is not."""
    if not 1 <= order <= highest:
        raise ValueError(f"{solver} has orders 1 to {highest}, got {order}")


def weighted(weights: Sequence[float], values: Sequence[Combination]) -> Combination:
    """sum_j weights[j] values[j]."""
    total = ZERO
    for weight, value in zip(weights, values, strict=True):
        total = total + weight * value
    return total
