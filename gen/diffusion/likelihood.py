"""Likelihoods of diffusion and flow models: the probability-flow ODE as a continuous normalising flow, and bits per dimension.

Along dx/dt = v(x, t) = alpha' x0(x, t) + sigma' eps(x, t), from t_min > 0 (data) to T (noise),

    d ln p / dt = -div v        (Chen et al. 2018, arXiv 1806.07366, theorem 1; Song et al. 2021, arXiv 2011.13456, appendix D.2)
    div v = sum_i e_i^T (dv/dx) e_i                       exact: D vector-Jacobian products
          ~ 1/P sum_j z_j^T (dv/dx) z_j,  E z z^T = I     Hutchinson: P products (Grathwohl et al. 2019, arXiv 1810.01367)

The log-density is one more coordinate of the state, with velocity -div v, so a deterministic table on a rising grid integrates
it at its order. The coordinate is the log-density of u = x / c, c = sqrt(alpha^2 + sigma^2), nearly constant for unit variance:

    l' = -(div v - D c'/c),    l(t_min) = 0,    ln p(x) = ln N(u_T; 0, I) - l(T) - D ln c(t_min)

On every schedule u = cos(a) x0 + sin(a) eps with tan a = rho, so any field is a field of `Cosine` (`on_cosine`). Solvers given by
name run there, on every schedule, with the steps of `quadratic`, on which rk4 is the most accurate.

p is, up to the error of the table, the exact density of the model that samples from N(0, c^2 I) at T, as `start_state` does,
and stops at t_min: the density of alpha x0 + sigma eps, slightly noisy data; a sampler's last clean estimate has none.
The noise at T = 80 still contains about 1/80 of the data's mean m: |m| / 80 nats per sample, zero on average.

Bits per dimension of a pixel model: level k is the bin of width 2 / (L - 1) around its value in [-1, 1]. With x = (k + u) / L,

    pixel = (2 L x - L) / (L - 1),   z = (pixel - mean) / std,   ln p(x) = ln p(z) + D ln(2 L / (L - 1)) - sum ln std

where p(z) is the density of x_t / alpha = x0 + rho eps at rho_min, the same on every schedule. It is a valid bound, but a model
trained on the levels themselves puts its mass on them, not across their bins, and scores worse the better it fits them: train
on dequantised pixels, or choose rho_min near a quarter of a bin, 1 / (2 (L - 1) std).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from midway.gen.core import randomness
from midway.gen.core.errors import UsageError, nearest
from midway.gen.data import levels as grey
from midway.gen.diffusion.model import LatentModel
from midway.gen.training.batches import Context
from midway.samplers.grids import GRIDS, RHO_MAX, RHO_MIN, reversed_grid
from midway.samplers.guidance import scale_of
from midway.samplers.prediction import Field, Prediction, expand, solve
from midway.samplers.sample import sample
from midway.samplers.schedule import Cosine, Schedule, fingerprint
from midway.samplers.solvers import SOLVERS
from midway.samplers.table import Table
from midway.tokenizers.tokenizer import ImageTokenizer

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
    table: Table,
    x: Tensor,
    trace: Trace = "exact",
    probes: int = 1,
    ids: Tensor | None = None,
    probe: Probe = "rademacher",
    seed: int = 0,
) -> tuple[Tensor, Cost]:
    """ln p(x) in nats, float64 (B,), of x (B, *) at the first time of `table`, and its cost.

    table: deterministic, of this schedule, on a rising grid. The field is evaluated in the dtype of x; states and sums are
    float64. hutchinson: probes are functions of (seed, id) for int64 `ids` (B,), the same along the whole path.
    UsageError for tables, traces and fields without a density.
    """
    if scale_of(field) != 1:
        why = "a guided field is no probability flow: it changes the learned distribution"
        raise UsageError(f"a likelihood under guidance {scale_of(field)}", why, "use guidance 1")
    _check_table(table, schedule)
    with torch.inference_mode(False), torch.no_grad():  # inference tensors have no gradients
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
    """The field of the states (x, l), float64 (B, D + 1); `cost` counts its evaluations of `field`."""

    def __init__(
        self, field: Field, schedule: Schedule, x: Tensor, directions: Sequence[Tensor], weight: float
    ) -> None:
        self.field, self.schedule, self.like = field, schedule, x
        self.directions, self.weight = directions, weight
        self.cost = Cost(0, 0)

    def __call__(self, state: Tensor, t: Tensor) -> Prediction:
        """x0 and eps of a coordinate with this velocity, as tables combine them."""
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
        prediction = self.field(x, t.to(x.dtype))
        self.cost = Cost(self.cost.evaluations + 1, self.cost.products)
        d_alpha, d_sigma = (expand(rate, x) for rate in self.schedule.rates(t))
        return (d_alpha * prediction.x0.double() + d_sigma * prediction.eps.double()).flatten(1)

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
    """The vectors z of z^T (dv/dx) z, each float64 (B, D)."""
    count, dims = x.shape[0], math.prod(x.shape[1:])
    if trace not in get_args(Trace):
        raise UsageError(f"trace {trace!r}", "there is no such trace", nearest(trace, get_args(Trace)))
    if trace == "exact":
        return torch.eye(dims, dtype=torch.float64, device=x.device)[:, None].expand(-1, count, -1).unbind()
    if ids is None or ids.shape != (count,) or probes < 1:
        found = f"probes={probes}, ids {None if ids is None else tuple(ids.shape)} for {count} samples"
        raise UsageError(found, "probes are functions of a sample's id", "give probes >= 1 and one int64 id a sample")
    if probe not in get_args(Probe):
        raise UsageError(f"probe {probe!r}", "there is no such probe", nearest(probe, get_args(Probe)))
    ids = ids.to(x.device)
    if probe == "gaussian":
        return randomness.normal(seed, "probes", 0, ids, (probes, dims)).double().unbind(1)
    return (2 * randomness.keep(seed, "probes", 0, ids, (probes, dims), 0.5).double() - 1).unbind(1)


def _check_table(table: Table, schedule: Schedule) -> None:
    """UsageError unless it goes from data to noise, without fresh noise, on this schedule."""
    what = f"table '{table.solver}' gives no likelihood"
    if table.grid[0] >= table.grid[-1]:
        raise UsageError(what, "its grid falls, from noise to data", "build it on grids.reversed_grid(grid)")
    if table.stochastic:
        raise UsageError(what, "it draws noise", "use a deterministic solver: rk4, heun, dpmpp2m, ...")
    if table.schedule and table.schedule != fingerprint(schedule):
        why = f"its schedule is {table.schedule}, that of the field {fingerprint(schedule)}"
        raise UsageError(what, why, "build the table with the field's schedule")


# ---- bits per dimension of pixel models ----

EXACT_DIMS = 32
"""Values of an image up to which the exact trace is the default."""


@dataclass(frozen=True)
class LikelihoodConfig:
    """How `bits_per_dim` integrates."""

    solver: str = "rk4"
    """Solver of the ODE; it draws no noise."""
    steps: int = 20
    """Steps of that solver."""
    grid: str = "quadratic"
    """Its time grid."""
    rho_min: float = RHO_MIN
    """Noise level of the reported density, in standard deviations of the data."""
    trace: Trace | Literal["auto"] = "auto"
    """exact: a backward pass per value of an image; hutchinson: one per probe, unbiased; auto: exact up to 32 values."""
    probes: int = 4
    """hutchinson: probes of an image."""
    probe: Probe = "rademacher"
    """rademacher is exact for diagonal Jacobians, and its variance is never the larger one."""

    def trace_for(self, dims: int) -> Trace:
        """The trace for images of `dims` values."""
        return self.trace if self.trace != "auto" else "exact" if dims <= EXACT_DIMS else "hutchinson"


def bits_per_dim(
    model: LatentModel,
    tokenizer: ImageTokenizer,
    images: Tensor,
    labels: Tensor | None,
    levels: int,
    context: Context,
    config: LikelihoodConfig | None = None,
) -> tuple[Tensor, Cost]:
    """Bits per dimension, float64 (B,), an upper bound, of the levels of uint8 images (B, C, H, W) under a pixel model; the cost.

    A conditional model needs labels (B,). levels: levels_of() of the training images. One uniform u per value, and the probes,
    come from the context by sample. UsageError for a learned tokenizer, a model that jumps, invalid labels, and as
    `log_likelihood`; ValueError for values that are no levels.
    """
    config = config or LikelihoodConfig()
    _check_density(model, tokenizer)
    labels = _labels(model, labels, images)
    z, log_det = dequantised_latents(tokenizer, images, levels, context)
    table = cosine_table(model.schedule, config.solver, config.steps, config.grid, config.rho_min)
    alpha = COSINE.alpha(torch.tensor(table.grid[0], dtype=torch.float64)).item()
    nats, cost = log_likelihood(
        on_cosine(model.field(labels), model.schedule),
        COSINE,
        table,
        alpha * z,
        trace=config.trace_for(z[0].numel()),
        probes=config.probes,
        ids=context.sample_ids,
        probe=config.probe,
        seed=context.seed,
    )
    dims = z[0].numel()
    log_density = nats + dims * math.log(alpha) + log_det
    return grey.bits_per_dim(grey.dequantised_bound(log_density, dims, levels), dims), cost


def dequantised_latents(
    tokenizer: ImageTokenizer, images: Tensor, levels: int, context: Context
) -> tuple[Tensor, float]:
    """z (B, C, H, W) float32 of x = (k + u) / L, u from the context, and ln|det dz/dx|, the same for all images."""
    device = tokenizer.latent_std.device
    k = grey.to_levels(images, levels).to(device)
    u = context.uniform("dequantise 0", images.shape[1:]).to(device)
    x = grey.uniform_dequantise(k, u, levels)
    z = tokenizer.encode_latents((2 * levels * x - levels) / (levels - 1))
    shrinking = tokenizer.latent_std.double().log().sum().item() * math.prod(z.shape[2:])
    return z, z[0].numel() * math.log(2 * levels / (levels - 1)) - shrinking


def _check_density(model: LatentModel, tokenizer: ImageTokenizer) -> None:
    what, pixels = "this model has no bits per dimension", "midway train tokenizer digits-pixels"
    if not tokenizer.passes_through:
        why = "its tokenizer is learned, so its density is one of latents, not of pixels"
        raise UsageError(what, why, f"train a pixel model: {pixels}, then midway train latent on that tokenizer")
    if model.config.is_jump:
        raise UsageError(what, "its samples are made by jumps, which are no probability flow", "score a flow model")


def _labels(model: LatentModel, labels: Tensor | None, images: Tensor) -> Tensor:
    """int64 (B,) on the model's device."""
    device, count = next(model.parameters()).device, len(images)
    if not model.classes:
        return torch.zeros(count, dtype=torch.int64, device=device)
    if labels is None or labels.shape != (count,):
        found = "no labels" if labels is None else f"labels of shape {tuple(labels.shape)}"
        raise UsageError(f"{found} for {count} images", "the model is conditional", "give one label per image")
    if count and not 0 <= int(labels.min()) <= int(labels.max()) < model.classes:
        found = f"labels {int(labels.min())} to {int(labels.max())}"
        raise UsageError(found, f"the model has classes 0 to {model.classes - 1}", "use labels of its training data")
    return labels.clone().to(device)
