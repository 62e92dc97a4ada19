"""From noise to tokens through an autoregressive flow, one token at a time or all at once, and what it costs.

    sequential   x_i = z_i exp(alpha(x_{<i})) + mu(x_{<i}),  i = 0 .. N - 1, each layer remembering its keys and values
    jacobi       x <- z exp(alpha(x)) + mu(x) for all i at once, from x = z, until nothing changes by more than a tolerance

Sweep k of the Jacobi iteration makes token k - 1 exact, whatever the others are, so that N sweeps are the sequential result and
usually far fewer come close (Song et al. 2021, arXiv 2002.03629). A sample that has converged is left alone, so that its sweeps,
and it itself, do not depend on the batch.

Guidance (Zhai et al. 2024, TarFlow, arXiv 2412.06329) extrapolates the outputs of every flow at every token:

    (mu, alpha)_i = (mu, alpha)_i(no class) + w_i ((mu, alpha)_i(class) - (mu, alpha)_i(no class))
    constant: w_i = w        linear: w_i = 1 + (w - 1) i / (N - 1), i in the flow's order

w = 1 is the class alone and w = 0 no class; their w is ours minus 1. Gaussian noise is removed by Tweedie's formula (Efron 2011),
x = y + sigma^2 grad ln p(y), which is the mean of the images that noise of standard deviation sigma could have turned into y.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from midway.gen.baselines.tarflow_blocks import AutoregressiveFlow

Method = Literal["sequential", "jacobi"]
Growth = Literal["constant", "linear"]
_LARGEST = 1e6  # a guess of the Jacobi iteration may overflow, and 0 times infinity would reach tokens that do not depend on it


@dataclass(frozen=True)
class Inversion:
    """How to invert a flow; see above."""

    method: Method = "sequential"
    tolerance: float = 1e-5
    """jacobi: the largest change of a sweep after which a sample has converged; 0 means N sweeps, or a fixed point."""
    guidance: float = 1.0
    growth: Growth = "constant"

    def __post_init__(self) -> None:
        for name, known in (("method", Method), ("growth", Growth)):
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of: {', '.join(get_args(known))}")
        if not 0 <= self.tolerance < float("inf"):
            raise ValueError(f"tolerance is {self.tolerance}; give a finite number that is not negative")
        if not abs(self.guidance) < float("inf"):
            raise ValueError(f"guidance is {self.guidance}; give a finite number, 1 for the class alone")

    @property
    def copies(self) -> int:
        """How often a token goes through a network: twice under guidance."""
        return 1 if self.guidance == 1 else 2


SEQUENTIAL = Inversion()


@dataclass(frozen=True)
class Cost:
    """What samples cost, counted at the networks. A network evaluation is one call of all flows, of one token or of N.

    Sequential sampling: N evaluations one after another, each of one token, so the arithmetic of 1 pass. Jacobi: sweeps, each a
    pass. Both twice under guidance. Denoising adds a pass forward and one backward, which count as two evaluations.
    """

    calls: Tensor
    """int64 (n, T): calls of each flow for each sample, in the order in which they are inverted."""
    tokens_per_call: float
    """Share of the tokens in a call: 1 / N or 1."""
    copies: int = 1
    denoising: int = 0

    @property
    def evaluations(self) -> Tensor:
        """float64 (n,): network evaluations of each sample."""
        return self.copies * self.calls.double().mean(1) + self.denoising

    @property
    def passes(self) -> Tensor:
        """float64 (n,): the same in forward passes over whole images, the measure of arithmetic."""
        return self.copies * self.tokens_per_call * self.calls.double().mean(1) + self.denoising


@dataclass(frozen=True)
class Guided:
    """The moments of a flow for labels (B,), under guidance if `weights` (N,) are given; `null` is the "no class" label."""

    flow: AutoregressiveFlow
    labels: Tensor | None
    null: int = 0
    weights: Tensor | None = None

    def moments(self, x: Tensor, rows: Tensor) -> Tensor:
        """(b, N, 2 D) of tokens x (b, N, D), which are samples `rows` (b,) of the batch."""
        labels = self._labels(rows)
        return self._mix(self.flow.moments(self._copied(x), labels), slice(None))

    def stepper(self, count: int) -> Callable[[Tensor | None], Tensor]:
        """A function from token i - 1, (B, D), None at first, to the moments (B, 2 D) of token i, for i = 0, 1, ..."""
        labels = self._labels(torch.arange(count))
        past = self.flow.no_past(count if self.weights is None else 2 * count)

        def step(last: Tensor | None) -> Tensor:
            i = past[0].length
            return self._mix(self.flow.next_moments(None if last is None else self._copied(last), labels, past), i)

        return step

    def _labels(self, rows: Tensor) -> Tensor | None:
        if self.labels is None:
            return None
        labels = self.labels[rows.to(self.labels.device)]
        return labels if self.weights is None else torch.cat([labels, torch.full_like(labels, self.null)])

    def _copied(self, x: Tensor) -> Tensor:
        return x if self.weights is None else torch.cat([x, x])

    def _mix(self, moments: Tensor, at: int | slice) -> Tensor:
        if self.weights is None:
            return moments
        known, unknown = moments.chunk(2)
        return unknown + self.weights[at, None] * (known - unknown)


def guided(flow: AutoregressiveFlow, labels: Tensor | None, null: int, how: Inversion) -> Guided:
    """The moments that `how` asks for. ValueError for guidance without labels."""
    if how.copies == 1:
        return Guided(flow, labels)
    if labels is None:
        raise ValueError(f"guidance {how.guidance} needs classes, and this model has none: use guidance 1")
    place = torch.linspace(0, 1, flow.tokens) if how.growth == "linear" else torch.ones(flow.tokens)
    return Guided(flow, labels, null, (1 + (how.guidance - 1) * place).to(flow.positions))


def invert(z: Tensor, moments: Guided, how: Inversion) -> tuple[Tensor, Tensor]:
    """Tokens x (B, N, D) of z (B, N, D), and the calls (B,) int64 of the network that each sample took."""
    flow = moments.flow
    x, calls = _sequential(flow.ordered(z), moments) if how.method == "sequential" else _jacobi(z, moments, how)
    return flow.ordered(x), calls


def _sequential(z: Tensor, moments: Guided) -> tuple[Tensor, Tensor]:
    step, x = moments.stepper(len(z)), []
    for z_i in z.unbind(1):
        x.append(_place(z_i, step(x[-1] if x else None)))
    return torch.stack(x, dim=1), torch.full((len(z),), len(x))


def _jacobi(z: Tensor, moments: Guided, how: Inversion) -> tuple[Tensor, Tensor]:
    z = moments.flow.ordered(z)
    x, calls = z.clone(), torch.zeros(len(z), dtype=torch.int64)
    rows = torch.arange(len(z), device=z.device)  # samples still changing
    for _ in range(z.shape[1]):
        guess = x[rows].nan_to_num(0.0).clamp(-_LARGEST, _LARGEST)
        better = _place(z[rows], moments.moments(guess, rows))
        change = (better - x[rows]).abs().amax((1, 2))
        x[rows] = better
        calls[rows.cpu()] += 1
        rows = rows[~(change <= how.tolerance)]  # not a number is no convergence
        if not len(rows):
            break
    return x, calls


def _place(z: Tensor, moments: Tensor) -> Tensor:
    """z exp(alpha) + mu."""
    mean, log_scale = moments.chunk(2, dim=-1)
    return z * log_scale.exp() + mean


def tweedie(y: Tensor, log_density: Callable[[Tensor], Tensor], sigma: float) -> Tensor:
    """E[x | y] = y + sigma^2 grad ln p(y) for y (B, *) = x + sigma eps, given ln p (B,)."""
    with torch.inference_mode(False), torch.enable_grad():
        noisy = y.detach().clone().requires_grad_()
        (slope,) = torch.autograd.grad(log_density(noisy).sum(), noisy)
    return y + sigma**2 * slope
