"""The ODE dx/dt = v with steps of its own choice: Dormand and Prince's Runge-Kutta method of order 5(4), by torchdiffeq.

It has a tolerance in place of a budget: evaluations are counted, not given. The steps are those of the whole batch, of which the
sample with the greatest error decides, so a sample depends on its batch within the tolerance.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.samplers.prediction import Field, expand
from midway.samplers.rows import NoiseSource
from midway.samplers.schedule import Schedule, fingerprint


@dataclass
class AdaptiveSampler:
    """A `Sampler` from `grid[0]` to `grid[-1]`, falling or rising; `evaluations`: the most that a run made per sample so far.

    rtol, atol: greatest error of a step, root mean square over a sample, relative to its states and absolute. ValueError for
    tolerances that are not positive, and for a start without noise, where the state does not determine eps.
    """

    schedule: Schedule
    grid: tuple[float, ...]
    rtol: float = 1e-5
    atol: float = 1e-5
    evaluations: int = 0
    nfe: int = 8
    """The least: two to choose the first step, six for it."""
    card: None = None
    table: None = None

    def __post_init__(self) -> None:
        if not (self.rtol > 0 and self.atol > 0):
            raise ValueError(f"rk45 needs positive tolerances, got rtol={self.rtol} and atol={self.atol}: try 1e-5")
        if not all(
            self.schedule.sigma(torch.tensor(t, dtype=torch.float64)) > 0 for t in (self.grid[0], self.grid[-1])
        ):
            raise ValueError("rk45 evaluates at both ends, which needs sigma > 0: end the grid at rho = 0.002")
        text = f"rk45 {fingerprint(self.schedule)} {self.grid[0]} {self.grid[-1]} {self.rtol} {self.atol}"
        self.hash = hashlib.sha256(text.encode()).hexdigest()[:12]

    def run(self, field: Field, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
        """x (B, *) at `grid[0]` -> (B, *) at `grid[-1]`. ImportError without torchdiffeq."""
        try:
            from torchdiffeq import odeint
        except ImportError as error:
            raise ImportError("rk45 needs torchdiffeq: pip install 'torchdiffeq>=0.2.5'") from error
        count, start, width = 0, self.grid[0], self.grid[-1] - self.grid[0]

        def slope(u: Tensor, x: Tensor) -> Tensor:
            nonlocal count
            count += 1
            times = (start + width * u).to(x.dtype).expand(len(x))
            found, (d_alpha, d_sigma) = field(x, times), self.schedule.rates(times)
            return (width * (expand(d_alpha, x) * found.x0 + expand(d_sigma, x) * found.eps)).to(x.dtype)

        way = torch.tensor([0.0, 1.0], dtype=torch.float64, device=x.device)
        # no step beyond the end: there may be no time there
        options = {"norm": worst_sample, "dtype": torch.float64, "step_t": way[1:]}
        states = odeint(slope, x, way, rtol=self.rtol, atol=self.atol, method="dopri5", options=options)
        self.evaluations = max(self.evaluations, count)
        return states[-1]  # pyright: ignore[reportReturnType]


def worst_sample(error: Tensor) -> Tensor:
    """The greatest root mean square of a sample (B, *)."""
    return error.reshape(len(error), -1).square().mean(1).sqrt().max()
