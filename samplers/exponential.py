"""What the solvers that integrate with an exponential weight share.

With rho = sigma / alpha, y = x / alpha and lambda = -log rho, the probability-flow ODE is, on every schedule,

    dy / d rho = eps                                             (y changes only by the noise estimate)
    x_s = sigma_s / sigma_t x + sigma_s int e^lambda x0 d lambda     (the same, solved for a given x0)

If eps or x0 does not change, both give `exponential_step`, which is DDIM. An Adams method replaces the slope by the polynomial
through its last values. In units of the step, z in [0, 1], that needs weights w_j with

    sum_j w_j f(z_j) = int_0^1 e^(rate z) f(z) dz       for every polynomial f of degree below their number,

rate = 0 for time or rho as the variable, the step's width for log rho or lambda.
"""

import math
from collections.abc import Sequence

from midway.samplers.grids import Grid
from midway.samplers.recorder import Combination, Recorder, Symbols
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


def begin_in_rho(solver: str, schedule: Schedule, grid: Grid) -> Recorder:
    """`begin` for solvers that need a finite rho at both ends of every step."""
    record = begin(solver, schedule, grid)
    for end, t in (("start", grid[0]), ("end", grid[-1])):
        if record.alpha(t) <= 0:
            raise ValueError(
                f"{solver} works with rho = sigma / alpha, which is infinite at the grid's {end}: {end} at rho = 80"
            )
    return record


def log_rho(record: Recorder, t: float) -> float:
    """log(sigma / alpha): infinite at pure noise, minus infinite at data."""
    rho = record.rho(t)
    return math.log(rho) if rho > 0 else -math.inf


def need_noise_at_the_end(record: Recorder) -> None:
    """ValueError for a grid that ends without noise: for solvers that evaluate there, or use log rho."""
    if not record.sigma(record.grid[-1]) > 0:
        raise ValueError(f"{record.solver} needs sigma > 0 at the grid's end: end the grid at rho = 0.002")


def exponential_step(record: Recorder, now: Symbols, t: float, s: float) -> Combination:
    """The step that is exact if x0 does not change: alpha_s x0 + sigma_s eps, written without division by alpha."""
    ratio = record.sigma(s) / record.sigma(t)
    if not any(kind == "D" for kind, _ in now.x0.weights):  # an analytic direction holds eps, not x0
        return record.alpha(s) * now.x0 + record.sigma(s) * now.eps
    return ratio * now.x + (record.alpha(s) - ratio * record.alpha(t)) * now.x0


def weighted(weights: Sequence[float], values: Sequence[Combination]) -> Combination:
    """sum_j weights[j] values[j]."""
    total = ZERO
    for weight, value in zip(weights, values, strict=True):
        total = total + weight * value
    return total


def exponential_moments(rate: float, count: int) -> list[float]:
    """[int_0^1 e^(rate z) z^k dz for k < count]; by series for small rates, where the recurrence cancels."""
    if abs(rate) < 1:
        return [sum(rate**n / (math.factorial(n) * (n + k + 1)) for n in range(20)) for k in range(count)]
    moments = [math.expm1(rate) / rate]
    for k in range(1, count):
        moments.append((math.exp(rate) - k * moments[-1]) / rate)
    return moments


def _lagrange(places: Sequence[float], j: int) -> list[float]:
    """Coefficients, lowest first, of the polynomial that is 1 at places[j] and 0 at the others."""
    coefficients = [1.0]
    for place in (*places[:j], *places[j + 1 :]):
        shifted, scaled = [0.0, *coefficients], [place * c for c in (*coefficients, 0.0)]
        coefficients = [(a - b) / (places[j] - place) for a, b in zip(shifted, scaled, strict=True)]
    return coefficients


def adams_weights(places: Sequence[float], rate: float = 0.0) -> list[float]:
    """w_j with sum_j w_j f(places[j]) = int_0^1 e^(rate z) f(z) dz for polynomials f of degree < len(places).

    places: distinct, in units of the step: 0 where it starts, 1 where it ends, negative before.
    """
    moments = exponential_moments(rate, len(places))
    return [sum(c * m for c, m in zip(_lagrange(places, j), moments, strict=True)) for j in range(len(places))]
