"""AMED's step with a learned amount of fresh noise before it (AdaSDE: Wang et al. 2025, arXiv 2510.23285).

In the coordinates y = x / alpha, rho = sigma / alpha a step from t to t' has three rows, with z fresh noise and D the clean
estimate:

    T   = (1 + g) rho_t                 Y   = y + sqrt(T^2 - rho_t^2) z                      no evaluation; not in the first step
    s   = rho_t'^r T^(1 - r)            Y_s = Y + (s - T) (Y - D(Y, T)) / T
                                        y'  = Y + c (rho_t' - T) (Y_s - D(Y_s, k s)) / (k s)

The first row turns the distribution at rho_t into that at T, of any data. r, c, k and g are constants of a step, so the solver
is a plain table; with g = 0 it is `amed`, and with r = 1/2, c = k = 1 too it is `dpm2`. Two evaluations a step, one
less if the first slope is the analytic one.

sqrt(g) is learned, with a sign that does not matter: the noise rho_t sqrt(g (2 + g)) has an infinite derivative in g at 0, and is
smooth in sqrt(g). The authors divide the last slope by s instead of k s, a factor that c has as well.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from midway.samplers.card import SolverCard
from midway.samplers.grids import Grid, is_grid
from midway.samplers.learned import time_of_angle
from midway.samplers.plugin import begin
from midway.samplers.prediction import Field
from midway.samplers.recorder import FRESH_NOISE
from midway.samplers.rows import NoiseSource
from midway.samplers.schedule import Schedule
from midway.samplers.step_parameters import GAIN, AMEDConfig, StepParameters, squash
from midway.samplers.table import NOISY as NAME
from midway.samplers.table import Table


@dataclass(frozen=True)
class NoiseRange:
    """What the constants of a step may be."""

    limit: float = 0.02
    """The largest g, as published."""
    amed: AMEDConfig = field(default_factory=AMEDConfig)
    """Ranges of c and k."""

    def __post_init__(self) -> None:
        if not 0 <= self.limit <= 1:
            raise ValueError(
                f"limit must be in [0, 1], got {self.limit}: g raises the noise level by this part at most"
            )


class LearnedNoise(nn.Module):
    """The constants of N steps on `grid`: raw (N, 3) of r, c, k and noise (N,) of sqrt(g). All zero is `dpm2`.

    ValueError for a grid that does not fall or has an end at rho = 0 or infinity, and where noise could lead back beyond a
    step's start.
    """

    def __init__(
        self, schedule: Schedule, grid: Grid, analytic_first: bool = False, ranges: NoiseRange | None = None
    ) -> None:
        super().__init__()
        if not is_grid(grid):
            raise ValueError(f"{NAME} goes from noise to data: it needs a falling grid within [0, 1], got {grid}")
        begin(schedule, grid, "none", NAME)
        self.schedule, self.grid, self.analytic_first = schedule, grid, analytic_first
        self.ranges = ranges or NoiseRange()
        rho = self.rho().tolist()
        back = [i for i, (before, after) in enumerate(pairwise(rho[:-1])) if after * (1 + self.ranges.limit) > before]
        if back:
            raise ValueError(
                f"step {back[0]} of {len(grid) - 1} divides rho by {rho[back[0]] / rho[back[0] + 1]:.3g}, and noise may "
                f"multiply it by {1 + self.ranges.limit:g}: take fewer steps, or a smaller limit of g"
            )
        self.raw = nn.Parameter(torch.zeros(len(grid) - 1, 3))
        self.noise = nn.Parameter(torch.zeros(len(grid) - 1))

    @property
    def nfe(self) -> int:
        """Evaluations of the field per sample."""
        return 2 * (len(self.grid) - 1) - self.analytic_first

    def rho(self) -> Tensor:
        """float64 (N + 1,), falling."""
        return self.schedule.rho(torch.tensor(self.grid, dtype=torch.float64))

    def begin_with(self, share: float) -> None:
        """Set g of every step but the first to `share` in [0, 1) of its limit: at g = 0 its mean gradient is 0, by symmetry."""
        with torch.no_grad():
            self.noise.fill_(torch.atanh(torch.tensor(share, dtype=torch.float64).sqrt()).item() / GAIN)

    def constants(self) -> StepParameters:
        """r, c and k of every step, float64 (N,) each."""
        return squash(GAIN * self.raw, self.ranges.amed)

    def roots(self) -> Tensor:
        """sqrt(g) with its sign, float64 (N,); 0 in the first step, where all is noise already."""
        roots = self.ranges.limit**0.5 * torch.tanh(GAIN * self.noise.double())
        return torch.cat([torch.zeros_like(roots[:1]), roots[1:]])

    def noise_scales(self) -> Tensor:
        """sqrt((1 + g)^2 - 1) with the sign of the root, float64 (N,): the deviation of fresh noise as a part of rho."""
        roots = self.roots()
        return roots * (2 + roots.square()).sqrt()

    @torch.no_grad()
    def table(self, metadata: Mapping[str, str] | None = None) -> Table:
        """The solver as plain numbers, for `sample`. ValueError when a parameter is not finite."""
        record = begin(self.schedule, self.grid, "none", NAME)
        constants, roots, scales = self.constants(), self.roots().tolist(), self.noise_scales().tolist()
        for i, (t, to) in enumerate(pairwise(self.grid)):
            r, c, k = (values[i].item() for values in (constants.r, constants.c, constants.a))
            top, end = record.rho(t), record.rho(to)
            if roots[i] != 0:
                std = top * abs(scales[i])
                top *= 1 + roots[i] ** 2
                t, y = record.time_of_rho(top), record.x / record.alpha(t)
                record.advance(record.alpha(t) * (y + std * FRESH_NOISE), t, node=False)
            now = record.first(t, self.analytic_first)
            y, s = now.x / record.alpha(t), end**r * top ** (1 - r)
            inner = record.time_of_rho(k * s)
            record.advance(record.alpha(inner) * (y + (s - top) * now.eps), inner, node=False)
            record.advance(record.alpha(to) * (y + c * (end - top) * record.evaluate(inner).eps), to)
        return record.table(**dict(metadata or {}))

    def export(self, card: SolverCard) -> Table:
        """The table with its card."""
        return self.table({"card": json.dumps(asdict(card))})


def states(
    model: Field, learned: LearnedNoise, x: Tensor, noise: NoiseSource, first: int = 0, last: int | None = None
) -> list[Tensor]:
    """The states at the grid's nodes from number `first`, where x (B, *) lives, to `last`, x included; differentiable.

    `noise` is called once per step but the grid's first, also where g = 0.
    """
    schedule, roots, scales, constants = learned.schedule, learned.roots(), learned.noise_scales(), learned.constants()
    rho, found = learned.rho(), [x]
    alpha = schedule.alpha(torch.tensor(learned.grid, dtype=torch.float64))
    for i in range(first, len(rho) - 1 if last is None else last):
        r, c, k = constants.r[i], constants.c[i], constants.a[i]
        y, top = found[-1] / alpha[i].to(x), rho[i]
        if i > 0:
            y = y + (top * scales[i]).to(x) * noise(x)
            top = top * (1 + roots[i].square())
        analytic = i == 0 and learned.analytic_first
        slope = y / (1 + top.square()).sqrt().to(x) if analytic else _slope(model, schedule, y, top)
        s = (r * rho[i + 1].log() + (1 - r) * top.log()).exp()
        middle = _slope(model, schedule, y + (s - top).to(x) * slope, k * s)
        found.append(alpha[i + 1].to(x) * (y + (c * (rho[i + 1] - top)).to(x) * middle))
    return found


def _slope(model: Field, schedule: Schedule, y: Tensor, rho: Tensor) -> Tensor:
    """eps at y = x / alpha (B, *) and the noise level rho ()."""
    t = time_of_angle(schedule, torch.atan(rho)[None])[0]
    return model(schedule.alpha(t).to(y) * y, t.to(y).expand(y.shape[0])).eps
