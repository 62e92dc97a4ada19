"""The likelihood of a diffusion or flow model: its probability-flow ODE read as a continuous normalising flow.

Along dx/dt = v(x, t) = alpha' x0(x, t) + sigma' eps(x, t), from t_min > 0 (data) to T (noise),

    d ln p / dt = -div v        (Chen et al. 2018, arXiv 1806.07366, theorem 1; Song et al. 2021, arXiv 2011.13456, appendix D.2)
    div v = sum_i e_i^T (dv/dx) e_i                       exact: D vector-Jacobian products
          ~ 1/P sum_j z_j^T (dv/dx) z_j,  E z z^T = I     Hutchinson: P products (Grathwohl et al. 2019, arXiv 1810.01367)

The log-density is one more coordinate of the state, whose velocity is -div v. So every deterministic table of samplers/, built on
a rising grid, carries it along, at its order. The coordinate is the log-density of u = x / c, c = sqrt(alpha^2 + sigma^2), which
for data of unit variance hardly changes:

    l' = -(div v - D c'/c),    l(t_min) = 0,    ln p(x) = ln N(u_T; 0, I) - l(T) - D ln c(t_min)

On every schedule u = cos(a) x0 + sin(a) eps with tan a = rho, so any field is one of `Cosine` (`on_cosine`). Solvers that are
only named run there, whatever the schedule, on steps of `quadratic`, of which rk4 makes the most.

p is, but for the error of the table, the exact density of the model that samples from N(0, c^2 I) at T, as `start_state` does,
and stops at t_min. That is the density of alpha x0 + sigma eps, slightly noised data; a sampler's last clean estimate has none.
Of the data's own mean m the noise at T = 80 still shows about 1/80: |m| / 80 nats a sample, nothing on average.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.errors import UsageError, nearest
from midway.samplers.grids import GRIDS, RHO_MAX, RHO_MIN, reversed_grid
from midway.samplers.guidance import scale_of
from midway.samplers.prediction import Field, Prediction, expand, solve
from midway.samplers.sample import sample
from midway.samplers.schedule import Cosine, Schedule
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table, fingerprint

Trace = Literal["exact", "hutchinson"]
Probe = Literal["rademacher", "gaussian"]
COSINE = Cosine()


@dataclass(frozen=True)
class Cost:
    """Per sample: forward evaluations of the field, and vector-Jacobian products (backward passes) through them."""

    evaluations: int
    products: int


def log_likelihood(
    field: Field,
    schedule: Schedule,
    table: Table | tuple[str, int],
    x: Tensor,
    trace: Trace = "exact",
    probes: int = 1,
    ids: Tensor | None = None,
    probe: Probe = "rademacher",
    seed: int = 0,
) -> tuple[Tensor, Cost]:
    """ln p(x) in nats, float64 (B,), of x (B, *) at the first time of `table`, and what it cost.

    table: a deterministic one of this schedule on a rising grid; or (solver, steps), from rho = 0.002, by `cosine_table`. The
    field sees states in the dtype of x; the states themselves and all sums are float64. hutchinson: probes are functions of
    (seed, id) for int64 `ids` (B,), the same along the whole path. UsageError for tables, traces and fields without a density.
    """
    _check_unguided(field)
    if not isinstance(table, Table):
        c = _scale(schedule, schedule.time_of_rho(torch.tensor(RHO_MIN, dtype=torch.float64)).item())
        carried, table = on_cosine(field, schedule), cosine_table(schedule, *table)
        nats, cost = log_likelihood(carried, COSINE, table, x / c, trace, probes, ids, probe, seed)
        return nats - math.prod(x.shape[1:]) * math.log(c), cost
    _check_table(table, schedule)
    with torch.inference_mode(False), torch.no_grad():  # tensors of inference mode can have no gradients
        directions = _directions(trace, x, probes, ids, probe, seed)
        carried = _WithDensity(field, schedule, x, directions, 1.0 if trace == "exact" else 1 / probes)
        state = sample(carried, table, torch.cat([x.double().flatten(1), x.new_zeros(len(x), 1).double()], dim=1))
        start, end = (_scale(schedule, t) for t in (table.grid[0], table.grid[-1]))
        u, change, dims = state[:, :-1] / end, state[:, -1], state.shape[1] - 1
        log_normal = -0.5 * u.square().sum(1) - 0.5 * dims * math.log(2 * math.pi)
        return log_normal - change - dims * math.log(start), carried.cost


def on_cosine(field: Field, schedule: Schedule) -> Field:
    """The same predictions as a field of `Cosine`, whose state is x / c."""

    def predict(u: Tensor, t: Tensor) -> Prediction:
        time = schedule.time_of_rho(COSINE.rho(t.double()))
        c = torch.hypot(schedule.alpha(time), schedule.sigma(time))
        return field(u * expand(c.to(u.dtype), u), time.to(u.dtype))

    return predict


def cosine_table(
    schedule: Schedule, solver: str, steps: int, grid: str = "quadratic", rho_min: float = RHO_MIN
) -> Table:
    """The table of `Cosine` from data, at noise level rho_min, to noise: rho = 80, or less where `schedule` ends earlier.

    UsageError for unknown and stochastic solvers and unknown grids.
    """
    if solver not in SOLVERS or SOLVERS[solver].stochastic:
        known = [name for name, entry in SOLVERS.items() if not entry.stochastic]
        raise UsageError(f"solver {solver!r}", "a likelihood needs a deterministic solver", nearest(solver, known))
    if grid not in GRIDS:
        raise UsageError(f"grid {grid!r}", "there is no such grid", nearest(grid, GRIDS))
    rho_max = min(RHO_MAX, schedule.rho(torch.ones((), dtype=torch.float64)).item())
    return SOLVERS[solver].build(COSINE, reversed_grid(GRIDS[grid](COSINE, steps, rho_max, rho_min)))


def _scale(schedule: Schedule, time: float) -> float:
    """c = sqrt(alpha^2 + sigma^2)."""
    t = torch.tensor(time, dtype=torch.float64)
    return torch.hypot(schedule.alpha(t), schedule.sigma(t)).item()


class _WithDensity:
    """The field of the states (x, l), float64 (B, D + 1); `cost` counts what it asks of `field`."""

    def __init__(
        self, field: Field, schedule: Schedule, x: Tensor, directions: Sequence[Tensor], weight: float
    ) -> None:
        self.field, self.schedule, self.like = field, schedule, x
        self.directions, self.weight = directions, weight
        self.cost = Cost(0, 0)

    def __call__(self, state: Tensor, t: Tensor) -> Prediction:
        """In terms of x0 and eps, which tables weigh, like any coordinate that moves at this velocity."""
        with torch.enable_grad(), torch.autocast(state.device.type, enabled=False):
            x = state[:, :-1].to(self.like.dtype).reshape(self.like.shape).requires_grad_()
            v = self._velocity(x, t)
            divergence = self._divergence(v, x)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        d_alpha, d_sigma = self.schedule.rates(t)
        growth = (alpha * d_alpha + sigma * d_sigma) / (alpha.square() + sigma.square())
        change = v.shape[1] * growth - divergence
        return solve(torch.cat([v.detach(), change[:, None]], dim=1), "velocity", state, t, self.schedule)

    def _velocity(self, x: Tensor, t: Tensor) -> Tensor:
        """float64 (B, D)."""
        said = self.field(x, t.to(x.dtype))
        self.cost = Cost(self.cost.evaluations + 1, self.cost.products)
        d_alpha, d_sigma = (expand(rate, x) for rate in self.schedule.rates(t))
        return (d_alpha * said.x0.double() + d_sigma * said.eps.double()).flatten(1)

    def _divergence(self, v: Tensor, x: Tensor) -> Tensor:
        """float64 (B,)."""
        if not v.requires_grad:
            raise UsageError("the field cannot be differentiated", "its output has no gradient", "drop its no_grad")
        total = torch.zeros_like(v[:, 0])
        for left, direction in zip(reversed(range(len(self.directions))), self.directions, strict=True):
            (product,) = torch.autograd.grad(v, x, direction, retain_graph=left > 0)
            total = total + (direction * product.flatten(1)).sum(1)
        self.cost = Cost(self.cost.evaluations, self.cost.products + len(self.directions))
        return self.weight * total.detach()


def _directions(trace: Trace, x: Tensor, probes: int, ids: Tensor | None, probe: Probe, seed: int) -> Sequence[Tensor]:
    """What the Jacobian is multiplied by on both sides, each float64 (B, D)."""
    count, dims = x.shape[0], math.prod(x.shape[1:])
    if trace not in get_args(Trace):
        raise UsageError(f"trace {trace!r}", "there is no such trace", nearest(trace, get_args(Trace)))
    if trace == "exact":
        return torch.eye(dims, dtype=torch.float64, device=x.device)[:, None].expand(-1, count, -1).unbind()
    if ids is None or ids.shape != (count,) or probes < 1:
        found = f"probes={probes}, ids {'missing' if ids is None else tuple(ids.shape)} for {count} samples"
        raise UsageError(found, "probes are functions of a sample's id", "give probes >= 1 and one int64 id a sample")
    if probe not in get_args(Probe):
        raise UsageError(f"probe {probe!r}", "there is no such probe", nearest(probe, get_args(Probe)))
    ids = ids.to(x.device)
    if probe == "gaussian":
        return randomness.normal(seed, "probes", 0, ids, (probes, dims)).double().unbind(1)
    return (2 * randomness.keep(seed, "probes", 0, ids, (probes, dims), 0.5).double() - 1).unbind(1)


def _check_unguided(field: Field) -> None:
    if scale_of(field) != 1:
        why = "a guided field is the flow of no data: it sharpens what the model has learned"
        raise UsageError(f"a likelihood under guidance {scale_of(field)}", why, "use guidance 1")


def _check_table(table: Table, schedule: Schedule) -> None:
    """UsageError unless it goes from data to noise, without fresh noise, on this schedule."""
    what = f"table '{table.solver}' gives no likelihood"
    if table.grid[0] >= table.grid[-1]:
        raise UsageError(what, "its grid falls, from noise to data", "build it on grids.reversed_grid(grid)")
    if table.stochastic:
        raise UsageError(what, "it draws noise", "use a deterministic solver: rk4, heun, dpmpp2m, ...")
    if table.schedule and table.schedule != fingerprint(schedule):
        why = f"it was made for {table.schedule}, the field is of {fingerprint(schedule)}"
        raise UsageError(what, why, "build the table with the field's schedule")
