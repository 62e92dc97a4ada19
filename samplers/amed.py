"""AMED-Solver: one learned mean direction per step (Zhou et al. 2024, arXiv 2312.00094).

In the coordinates y = x / alpha, rho = sigma / alpha, where dy / d rho = eps on every schedule, a step from t to s is

    rho_m = rho_s^r rho_t^(1 - r)
    y_m   = y + (rho_m - rho_t) eps(y, rho_t)
    y_s   = y + c (rho_s - rho_t) eps(y_m, a rho_m)

and costs two evaluations. Its three numbers come in two forms. `Constants`: one (r, c, a) per step, which makes the solver a
plain table. `Predictor`: (r, c, a) per sample from the features of the evaluation at t, the one dynamic solver; about 9k
parameters as in the paper, but the pooled features replace the paper's 8x8 bottleneck, so any backbone serves, and the times
enter as log rho. r = sigmoid, c in [1 - scale_dir, 1 + scale_dir], a in [1 - scale_time, 1 + scale_time].

One difference from the authors' code: they divide x_m - D by the unscaled inner time; here eps is taken at a rho_m as written
above. The two are the same family, c there being c a here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from midway.samplers.grids import Grid
from midway.samplers.prediction import Field, Prediction, expand
from midway.samplers.schedule import Schedule
from midway.samplers.solvers import MeanDirection

GAIN = 10.0
"""Constants are stored divided by this: Adam moves every parameter by about the learning rate, and they have further to go
than the predictor's weights."""


@dataclass(frozen=True)
class AMEDConfig:
    """What may be learned, and how far from DPM-Solver-2 it may go."""

    scale_dir: float = 0.1
    """c in [1 - scale_dir, 1 + scale_dir]; 0 keeps c = 1."""
    scale_time: float = 0.1
    """a in [1 - scale_time, 1 + scale_time]; 0 keeps a = 1."""
    hidden: int = 128
    """Width of the predictor's feature layer."""

    def __post_init__(self) -> None:
        for name in ("scale_dir", "scale_time"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True)
class Directions:
    """r, c, a, each (B,): `MeanDirection` per sample."""

    r: Tensor
    c: Tensor
    a: Tensor


def squash(raw: Tensor, config: AMEDConfig) -> Directions:
    """raw (B, 3) -> Directions within the config's ranges; raw = 0 is DPM-Solver-2 (r = 1/2, c = a = 1)."""
    unit = torch.sigmoid(raw)
    return Directions(
        r=unit[:, 0],
        c=1 + config.scale_dir * (2 * unit[:, 1] - 1),
        a=1 + config.scale_time * (2 * unit[:, 2] - 1),
    )


class Constants(nn.Module):
    """(r, c, a) of every step as free numbers, the same for all samples."""

    def __init__(self, steps: int, config: AMEDConfig) -> None:
        super().__init__()
        self.config = config
        self.raw = nn.Parameter(torch.zeros(steps, 3))

    def forward(self, features: Tensor, step: Tensor, log_rho: Tensor) -> Directions:
        """features (B, F), unused; step int64 (B,), log_rho (B, 2), unused."""
        return squash(GAIN * self.raw[step], self.config)

    def values(self) -> tuple[MeanDirection, ...]:
        """One `MeanDirection` per step."""
        d = squash(GAIN * self.raw.detach().double(), self.config)
        return tuple(MeanDirection(*v) for v in zip(d.r.tolist(), d.c.tolist(), d.a.tolist(), strict=True))


class Predictor(nn.Module):
    """(r, c, a) per sample from pooled features (B, F) and the step's two noise levels (paper, section 3.3).

    The output layer starts at zero beside the constants of each step, so learning starts at DPM-Solver-2 and finds the
    constants first.
    """

    def __init__(self, feature_dim: int, steps: int, config: AMEDConfig) -> None:
        super().__init__()
        self.config, self.feature_dim = config, feature_dim
        self.encode = nn.Sequential(nn.Linear(feature_dim, config.hidden), nn.SiLU(), nn.Linear(config.hidden, 4))
        self.times = nn.Sequential(nn.Linear(8, 8), nn.SiLU())
        self.heads = nn.Linear(20, 3, bias=False)
        self.raw = nn.Parameter(torch.zeros(steps, 3))
        nn.init.zeros_(self.heads.weight)

    def forward(self, features: Tensor, step: Tensor, log_rho: Tensor) -> Directions:
        """features (B, F); step int64 (B,); log_rho (B, 2) at t and s."""
        frequencies = 2.0 ** torch.arange(-2, 2, device=log_rho.device)
        angles = log_rho[:, :, None] * frequencies  # (B, 2, 4)
        times = self.times(torch.cat([angles.cos(), angles.sin()], dim=-1)).flatten(1)
        sample = self.heads(torch.cat([self.encode(features), times], dim=1))
        return squash(GAIN * self.raw[step] + sample, self.config)


@dataclass(frozen=True)
class Levels:
    """A grid's float32 schedule values on the device: t, alpha, rho, each (N + 1,)."""

    t: Tensor
    alpha: Tensor
    rho: Tensor


def levels(schedule: Schedule, grid: Grid, device: torch.device) -> Levels:
    """Computed in float64 on the host, then rounded once."""
    t = torch.tensor(grid, dtype=torch.float64)
    return Levels(*(v.float().to(device) for v in (t, schedule.alpha(t), schedule.rho(t))))


def mean_direction_step(
    field: Field, schedule: Schedule, at: Levels, step: Tensor, x: Tensor, eps: Tensor, directions: Directions
) -> Tensor:
    """x (B, *) at grid time step[b] with slope eps (B, *) -> the state at grid time step[b] + 1; one evaluation.

    step: int64 (B,), which may differ between samples.
    """
    alpha, rho = at.alpha[step], at.rho[step]
    alpha_s, rho_s = at.alpha[step + 1], at.rho[step + 1]
    rho_m = (directions.r * rho_s.log() + (1 - directions.r) * rho.log()).exp()
    inner = schedule.time_of_rho(directions.a * rho_m)
    y = x / expand(alpha, x)
    y_m = y + expand(rho_m - rho, x) * eps
    eps_m = field(expand(schedule.alpha(inner), x) * y_m, inner).eps
    return expand(alpha_s, x) * (y + expand(directions.c * (rho_s - rho), x) * eps_m)


def analytic_prediction(x: Tensor, alpha: Tensor, rho: Tensor, feature_dim: int) -> Prediction:
    """The first step without an evaluation: eps = x / sqrt(alpha^2 + sigma^2), features all zero (paper, section 3.4)."""
    norm = alpha * (1 + rho.square()).sqrt()
    eps = x / norm
    return Prediction((x - alpha * rho * eps) / alpha, eps, x.new_zeros(x.shape[0], feature_dim))


DirectionRule = Callable[[Tensor, Tensor, Tensor], Directions]
"""(features (B, F), step (B,), log_rho (B, 2)) -> Directions: a `Constants` or a `Predictor`."""


def nodes(
    field: Field,
    schedule: Schedule,
    grid: Grid,
    directions: DirectionRule,
    x: Tensor,
    analytic_first: bool = False,
    feature_dim: int = 1,
) -> list[Tensor]:
    """The states at the grid's nodes, (B, *) each, the start included. Two evaluations a step, one less if the first is
    analytic."""
    at = levels(schedule, grid, x.device)
    states = [x]
    for i in range(len(grid) - 1):
        step = torch.full((x.shape[0],), i, device=x.device)
        if i == 0 and analytic_first:
            now = analytic_prediction(x, at.alpha[0], at.rho[0], feature_dim)
        else:
            now = field(states[-1], at.t[i].expand(x.shape[0]))
        features = features_of(now, feature_dim)
        log_rho = at.rho[i : i + 2].log().expand(x.shape[0], 2)
        chosen = directions(features, step, log_rho)
        states.append(mean_direction_step(field, schedule, at, step, states[-1], now.eps, chosen))
    return states


def features_of(prediction: Prediction, feature_dim: int) -> Tensor:
    """The network's features, or zeros for a network that has none (enough for constants)."""
    if prediction.features is not None:
        return prediction.features.float()
    return prediction.x0.new_zeros(prediction.x0.shape[0], feature_dim).float()
