"""AMED: a learned mean direction per step (Zhou et al. 2024, arXiv 2312.00094).

In the coordinates y = x / alpha, rho = sigma / alpha, where dy / d rho = eps on every schedule, AMED-Solver goes from t to s by

    rho_m = rho_s^r rho_t^(1 - r)
    y_m   = y + (rho_m - rho_t) eps(y, rho_t)
    y_s   = y + c (rho_s - rho_t) eps(y_m, a rho_m)

and costs two evaluations; AMED-Plugin has the same three numbers in the steps of another solver (plugin.py). Here is the
solver in its dynamic form, with (r, c, a) per sample; constants per step are a plain table, `plugin.plugin_table`.

Everything that there is one of per sample is float64 (noise levels, weights, times); states keep their dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from midway.samplers.fused import weighted_sum
from midway.samplers.grids import Grid
from midway.samplers.plugin import BASES, Base, Weights, begin
from midway.samplers.prediction import Field, Prediction, acting, expand
from midway.samplers.schedule import Schedule
from midway.samplers.step_parameters import StepParameters, StepRule


@dataclass(frozen=True)
class AMEDSolver:
    """All of a solver but its learned numbers. ValueError for an unknown base or a grid with an end at rho = 0 or infinity."""

    schedule: Schedule
    grid: Grid
    base: str = "none"
    """What AMED is plugged into, a name in `plugin.BASES`; none is AMED-Solver."""
    analytic_first: bool = False
    """The first slope is x / sqrt(alpha^2 + sigma^2) instead of an evaluation."""
    feature_dim: int = 0
    """Length of the features that the rule reads; 0 for constants."""
    analytic_history: bool = True
    """Whether later halves of a multistep base may weigh the analytic first slope, or it serves its own half alone."""

    def __post_init__(self) -> None:
        begin(self.schedule, self.grid, self.base)

    @property
    def steps(self) -> int:
        return len(self.grid) - 1

    @property
    def plugin(self) -> Base:
        """The base itself."""
        return BASES[self.base]

    def orders(self, step: int) -> tuple[int, int]:
        """Those of the two halves of a step."""
        return self.plugin.orders(step, self.steps, int(self.analytic_first and not self.analytic_history))


@dataclass(frozen=True)
class NoiseLevels:
    """t, alpha, rho of a grid's times (N + 1,) or of one time per sample (B,); float64."""

    t: Tensor
    alpha: Tensor
    rho: Tensor

    def take(self, index: Tensor) -> "NoiseLevels":
        """One time per sample: index int64 (B,)."""
        return NoiseLevels(self.t[index], self.alpha[index], self.rho[index])


def noise_levels(solver: AMEDSolver, device: torch.device) -> NoiseLevels:
    """The grid's, computed on the host."""
    t = torch.tensor(solver.grid, dtype=torch.float64)
    return NoiseLevels(*(v.to(device) for v in (t, solver.schedule.alpha(t), solver.schedule.rho(t))))


@dataclass(frozen=True)
class History:
    """Predictions that later steps may weigh, newest first: terms (B, *) each, and their rho float64 (B,)."""

    terms: tuple[Tensor, ...] = ()
    rhos: tuple[Tensor, ...] = ()

    def add(self, term: Tensor, rho: Tensor) -> "History":
        return History((term, *self.terms), (rho, *self.rhos))

    def detach(self) -> "History":
        return History(tuple(f.detach() for f in self.terms), tuple(r.detach() for r in self.rhos))


def take_step(
    solver: AMEDSolver,
    field: Field,
    orders: tuple[int, int],
    start: NoiseLevels,
    end: NoiseLevels,
    x: Tensor,
    now: Prediction,
    history: History,
    directions: StepParameters,
) -> tuple[Tensor, History]:
    """x (B, *) at `start` with prediction `now` -> the state at `end`, and what the next step may weigh; one evaluation.

    orders: those of the two halves (`Base.orders`). start, end: one time per sample, which may differ between samples.
    """
    base, schedule = solver.plugin, solver.schedule
    history = history.add(base.read(now), start.rho)
    rho_m = (directions.r * end.rho.log() + (1 - directions.r) * start.rho.log()).exp()
    inner = schedule.time_of_rho(directions.a * rho_m)
    y = x / _as(start.alpha, x)
    y_m = _combine(base.halfway(history.rhos, rho_m, orders[0]), y, history.terms)
    middle = field(_as(schedule.alpha(inner), x) * y_m, inner.to(x.dtype))
    history = history.add(base.read(middle), rho_m)
    weights = base.arrival(history.rhos, end.rho, orders[1]).scaled(directions.c)
    y_s = _combine(weights, y if base.from_start else y_m, history.terms)
    return _as(end.alpha, x) * y_s, History(history.terms[: base.order - 1], history.rhos[: base.order - 1])


def _as(values: Tensor, x: Tensor) -> Tensor:
    """float64 (B,) -> x's dtype and number of dimensions."""
    return expand(values.to(x.dtype), x)


def _combine(weights: Weights, y: Tensor, terms: tuple[Tensor, ...]) -> Tensor:
    return weighted_sum((weights.kept, *weights.terms), (y, *terms[: len(weights.terms)]))  # older terms have no weight


def observe(solver: AMEDSolver, field: Field, at: NoiseLevels, step: int, x: Tensor) -> Prediction:
    """The prediction at grid time number `step`: an evaluation, or the analytic one if the solver begins so."""
    if step == 0 and solver.analytic_first:
        return analytic_prediction(x, at.alpha[0], at.rho[0], solver.feature_dim)
    return acting(field, solver.grid[step])(x, at.t[step].to(x.dtype).expand(x.shape[0]))


def analytic_prediction(x: Tensor, alpha: Tensor, rho: Tensor, feature_dim: int) -> Prediction:
    """The first step without an evaluation: eps = x / sqrt(alpha^2 + sigma^2), features all zero (paper, section 3.4).

    x0 = (x - sigma eps) / alpha is written without its cancellation at large rho.
    """
    norm = (1 + rho.square()).sqrt()
    eps = x / (alpha * norm).to(x.dtype)
    return Prediction(x / (alpha * norm * (norm + rho)).to(x.dtype), eps, x.new_zeros(x.shape[0], feature_dim))


def choose(rule: StepRule, start: NoiseLevels, end: NoiseLevels, step: Tensor, features: Tensor) -> StepParameters:
    """The rule's parameters of steps number `step` int64 (B,), given features (B, F)."""
    return rule(features, step, torch.stack([start.rho.log(), end.rho.log()], dim=1))


def nodes(solver: AMEDSolver, field: Field, rule: StepRule, x: Tensor, detached: bool = False) -> list[Tensor]:
    """The states at the grid's nodes, (B, *) each, the start included. Two evaluations a step, one less if the first is
    analytic.

    detached: every step starts from a state, history and features that carry no gradient, so that a state's gradient is that
    of the last step before it.
    """
    at, states, history = noise_levels(solver, x.device), [x], History()
    for i in range(solver.steps):
        x, step = states[-1], torch.full((x.shape[0],), i, device=x.device)
        if detached:
            x, history = x.detach(), history.detach()
        with torch.set_grad_enabled(torch.is_grad_enabled() and not detached):
            now = observe(solver, field, at, i, x)
        start, end = at.take(step), at.take(step + 1)
        directions = choose(rule, start, end, step, features_of(now, solver.feature_dim))
        orders = solver.orders(i)
        state, history = take_step(solver, field, orders, start, end, x, now, history, directions)
        states.append(state)
    return states


def features_of(prediction: Prediction, feature_dim: int) -> Tensor:
    """The network's features (B, feature_dim), empty for length 0; ValueError if it has none of that length."""
    if feature_dim == 0:
        return prediction.x0.new_zeros(prediction.x0.shape[0], 0)
    if prediction.features is None:
        raise ValueError(
            "the predictor reads the network's features, and this field gives none: learn constants instead"
        )
    if prediction.features.shape[1] != feature_dim:
        raise ValueError(
            f"the field gives {prediction.features.shape[1]} features, and the predictor was learned for {feature_dim}: "
            "it belongs to another model"
        )
    return prediction.features
