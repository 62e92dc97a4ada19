"""A table plus a small network that adds what no weighted sum of states and estimates can (after SpanLift, arXiv 2606.08672).

    x_{n+1} = row_n + alpha_{n+1} (1 - rho_{n+1} / rho_n) u g([x_n / s_n, D_n / u, (D_n - D_{n-1}) / u], log rho_n, log rho_{n+1})

with row_n the table's row, D_n its newest clean estimate (the analytic one in a row without an evaluation), u the standard
deviation of the data and s_n^2 = sigma_n^2 + u^2 alpha_n^2. The factor is that of the newest estimate in a first-order step, so g
corrects the clean estimate, in units of the data. One g serves all rows. Its last layer is zero at the start: then the sampler is
the table, bit for bit. A table whose weights were learned has no order, so a factor h^(p+1), which would keep one
(hypersolvers: Poli et al. 2020, arXiv 2007.09601), protects nothing here.

g is convolutional: 3x3 (or, as a control, 1x1) kernels into `width` channels, blocks of a depthwise kernel and two 1x1 layers
whose input is scaled and shifted by an embedding of both noise levels, and a kernel back. States without a grid, (D,), are an
image of one pixel, where g is dense and kernels are 1x1.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.samplers.prediction import Field
from midway.samplers.rows import Execution
from midway.samplers.schedule import Schedule
from midway.samplers.table import Table

OUTPUT = 0.1
"""Factor of g's last layer: Adam moves all weights of a layer by the learning rate at once, and what a learned table loses in the
first steps of a residual that starts at zero takes hundreds to come back."""
DEEPEST = 10.0
"""Bound of |log rho| as g reads it: pure noise is infinite."""


@dataclass(frozen=True)
class ResidualShape:
    """Sizes of g. ValueError for sizes that cannot be."""

    latent: tuple[int, ...]
    """(C, H, W), or (D,)."""
    kernel: int = 3
    width: int = 64
    blocks: int = 2

    def __post_init__(self) -> None:
        if (
            min(*self.latent, self.width, self.blocks) < 1
            or self.kernel not in (1, 3)
            or len(self.latent) not in (1, 3)
        ):
            raise ValueError(
                f"a residual needs states (C, H, W) or (D,), kernels of 1 or 3, and a width and blocks of 1 or more, got {self}"
            )


class Correction(Protocol):
    """What a row's correction is computed by: states (B, *) three times and two noise levels -> (B, *), in units of the data."""

    def __call__(self, state: Tensor, estimate: Tensor, change: Tensor, rho: float, rho_next: float) -> Tensor: ...


class Residual(nn.Module):
    """g. `unit` float32 () is u."""

    unit: Tensor

    def __init__(self, shape: ResidualShape) -> None:
        super().__init__()
        self.shape = shape
        channels, width = shape.latent[0], shape.width
        self.kernel = shape.kernel if len(shape.latent) == 3 else 1
        padding = self.kernel // 2
        self.register_buffer("unit", torch.ones(()))
        self.embed = nn.Sequential(nn.Linear(16, 32), nn.SiLU())
        self.first = nn.Conv2d(3 * channels, width, self.kernel, padding=padding)
        self.blocks = nn.ModuleList(_Block(width, self.kernel) for _ in range(shape.blocks))
        self.last = nn.Conv2d(width, channels, self.kernel, padding=padding)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(_bias(self.last))

    def forward(self, state: Tensor, estimate: Tensor, change: Tensor, rho: float, rho_next: float) -> Tensor:
        """`Correction`."""
        x = torch.cat([state, estimate, change], dim=1)
        x = x if x.dim() == 4 else x[:, :, None, None]
        times = self.embed(_embedding(rho, rho_next).to(self.first.weight))
        hidden = self.first(x.to(self.first.weight))
        for block in self.blocks:
            hidden = block(hidden, times)
        return (OUTPUT * self.last(F.silu(hidden))).to(state.dtype).view_as(state)


class _Block(nn.Module):
    """x + MLP(modulated RMS norm of depthwise(x)), each position by itself but for the depthwise kernel."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, kernel, padding=kernel // 2, groups=width)
        self.modulation = nn.Linear(32, 2 * width)
        self.up, self.down = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor, times: Tensor) -> Tensor:
        scale, shift = self.modulation(times)[:, None, None].chunk(2)
        hidden = self.depthwise(x)
        hidden = hidden * (hidden.square().mean(1, keepdim=True) + 1e-6).rsqrt()
        return x + self.down(F.silu(self.up(hidden * (1 + scale) + shift)))


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _embedding(rho: float, rho_next: float) -> Tensor:
    """(16,): sines and cosines of both log noise levels."""
    levels = [_log(rho), _log(rho_next)]
    angles = [level * 2.0**power for level in levels for power in range(-2, 2)]
    return torch.tensor([*map(math.cos, angles), *map(math.sin, angles)])


def _log(rho: float) -> float:
    return max(-DEEPEST, min(DEEPEST, math.log(rho))) if 0 < rho < math.inf else math.copysign(DEEPEST, rho - 1)


def parameter_count(module: nn.Module) -> int:
    """Numbers that are learned."""
    return sum(parameter.numel() for parameter in module.parameters())


def pointwise(shape: ResidualShape) -> ResidualShape:
    """The control: 1x1 kernels, and the width whose number of parameters is nearest to that of `shape`."""
    wanted = parameter_count(Residual(shape))
    widths = [ResidualShape(shape.latent, 1, width, shape.blocks) for width in range(shape.width, 2 * shape.width + 64)]
    return min(widths, key=lambda one: abs(parameter_count(Residual(one)) - wanted))


@dataclass(frozen=True)
class Step:
    """One row of a sampler with corrections: the new state, and what was added to the table's (B, *); the clean estimate."""

    state: Tensor
    added: Tensor
    estimate: Tensor


def factors(schedule: Schedule, grid: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """Of every row: alpha_n, sigma_n, rho_n and alpha_{n+1} (1 - rho_{n+1} / rho_n), finite also at pure noise."""
    t = torch.tensor(grid, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    factor = alpha[1:] - sigma[1:] * alpha[:-1] / sigma[:-1]
    return list(zip(alpha.tolist(), sigma.tolist(), schedule.rho(t).tolist(), [*factor.tolist(), 0.0], strict=True))


def steps(
    field: Field, base: Table, g: Correction, unit: float | Tensor, x: Tensor, schedule: Schedule
) -> Iterator[Step]:
    """Every row from x (B, *) at the grid's start, differentiable. The base has one row per step, as learned tables have."""
    coefficients, values = base.evaluations(field, x)
    levels, execution = factors(schedule, base.grid), Execution(base.rows_for(coefficients), x)
    previous: Tensor | None = None
    for (alpha, sigma, rho, factor), (_, _, rho_next, _) in pairwise(levels):
        number, state = execution.rows[execution.row].evaluation, execution.state
        if number is None:
            norm = math.hypot(alpha, sigma)
            value, estimate = None, state * (alpha / (norm * (norm + sigma)))
        else:
            value, (p, q) = values[number](state).to(state.dtype), coefficients[number]
            estimate = q * value if p == 0 else torch.add(q * value, state, alpha=p)
        change = torch.zeros_like(estimate) if previous is None else estimate - previous
        scale = (sigma**2 + (unit * alpha) ** 2) ** 0.5
        added = factor * unit * g(state / scale, estimate / unit, change / unit, rho, rho_next)
        execution.advance(value)
        execution.buffers[execution.row] = execution.state + added
        previous = estimate
        yield Step(execution.state, added, estimate)


def out_of_span(added: Tensor, basis: Sequence[Tensor]) -> Tensor:
    """(B,) in [0, 1]: the share of the energy of `added` (B, *) that no combination of the `basis` tensors (B, *) has, sample by
    sample: |a - B (B^T B)^+ B^T a|^2 / |a|^2, in float64; 0 where nothing was added."""
    columns = torch.stack([tensor.flatten(1) for tensor in basis], dim=2).double()
    columns = columns / columns.norm(dim=1, keepdim=True).clamp(min=1e-300)
    wanted = added.flatten(1).double()
    gram = columns.mT @ columns
    weights = torch.linalg.pinv(gram, hermitian=True, rtol=1e-12) @ (columns.mT @ wanted[:, :, None])
    left = wanted - (columns @ weights)[:, :, 0]
    energy = wanted.square().sum(1)
    return torch.where(energy > 0, left.square().sum(1) / energy.clamp(min=1e-300), 0.0)


def span_shares(found: Sequence[Step], x: Tensor) -> float:
    """Of all that was added to the states from x, the share of energy outside the span of x and the clean estimates so far."""
    outside, total = 0.0, 0.0
    for n, step in enumerate(found):
        energy = step.added.flatten(1).double().square().sum(1)
        outside += (out_of_span(step.added, [x, *(s.estimate for s in found[: n + 1])]) * energy).sum().item()
        total += energy.sum().item()
    return outside / total if total else 0.0
