"""Every multistep solver as one integral.

With y = x / alpha, rho = sigma / alpha and a prime for the end of a step,

    y' = R y + sum_j w_j f_j + rho' sqrt(1 - kept^2) z,        w_j = int_rho^rho' L_j(u) dK,

where L_j is the Lagrange polynomial of the last evaluations in a variable u, f_j what they gave, and K a kernel:

    f           K(r)                   R                      solvers
    x0          phi(rho') / phi(r)     phi(rho') / phi(rho)   DPM-Solver++, UniPC, SA-Solver (u = log rho), ER-SDE (u = rho)
    eps         r                      1                      iPNDM (u = rho), DEIS (u = log rho or t)
    velocity    t, and x in place of y 1                      Adams-Bashforth (u = t)

phi = rho is the probability-flow ODE, rho^2 the reverse SDE, and with every phi whose psi = phi / rho does not decrease the
process has the same marginals (Xue et al. 2023, arXiv 2309.05019; Cui et al. 2023, arXiv 2309.06169): a step keeps the share
kept = psi(rho') / psi(rho) of the noise and draws the rest. sum_j w_j is 1 - R, rho' - rho or t' - t, so in x

    x' = carried x + gain mean + noise z,        mean = sum_j m_j f_j,        m_j = L_j(u') - int L_j' S du,        sum_j m_j = 1,

with S the share of K's rise that is behind: Gauss-Legendre nodes on panels of unit length in log rho integrate it to 1e-13 for
smooth K and u. The first steps have fewer values, so order 1, 2, ...; a step from or to pure noise (alpha = 0) is of order 1,
and the value there enters no other step.

A corrector of c values adds gain (mean of c values, the new one among them, - mean) once the predicted state is evaluated, which
the next step needs anyway. The predicted state carries its z into the corrected one: both have the same
draw. The grid's nodes are the predicted states; the last one is not corrected.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Literal

import numpy as np
import torch

from midway.samplers.exponential import weighted
from midway.samplers.recorder import FRESH_NOISE, Combination, Recorder
from midway.samplers.table import Table

Reads = Literal["x0", "eps", "velocity"]
Variable = Literal["t", "rho", "log rho"]
Array = np.ndarray
LogPsi = Callable[[Array], Array]
"""log psi of rho, not decreasing, up to a constant."""
Average = Callable[[Sequence[float], float], Sequence[float] | None]
"""(places in steps: 0 where the step starts, 1 where it ends; log(rho / rho')) -> weights of the mean, which sum to 1; None for
those of the integral."""

NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)


@dataclass(frozen=True)
class Method:
    """A setting of the formula: what is averaged, over how many values, as a polynomial in which variable."""

    reads: Reads
    variable: Variable
    order: int
    corrector: int = 0
    """Values of the corrector, the new one included; 0 for none."""
    lower_order_final: bool = False
    """Whether the last steps have order ..., 2, 1."""
    average: Average | None = None
    """Another rule than the integral."""


def ode(rho: Array) -> Array:
    """phi = rho."""
    return np.zeros_like(rho)


def middle(places: Sequence[float], h: float) -> list[float] | None:
    """Of two values, the line through them half a step ahead, as in DPM-Solver++(2M) and UniPC with B = 1 - e^-h."""
    return None if len(places) != 2 else [1 - 0.5 / places[1], 0.5 / places[1]]


def mean_weights(places: Sequence[float], moments: Sequence[float]) -> list[float]:
    """m_j with sum_j m_j q(places[j]) = the mean of q for polynomials q, of which `moments` are those of z^0, z^1, ..."""
    weights = []
    for j, own in enumerate(places):
        coefficients = [1.0]  # of L_j, lowest first
        for other in (*places[:j], *places[j + 1 :]):
            shifted, scaled = [0.0, *coefficients], [other * c for c in (*coefficients, 0.0)]
            coefficients = [(a - b) / (own - other) for a, b in zip(shifted, scaled, strict=True)]
        weights.append(math.fsum(c * m for c, m in zip(coefficients, moments, strict=False)))
    return weights


def coefficients(record: Recorder, reads: Reads, t: float, s: float, kept: float = 1.0) -> tuple[float, float, float]:
    """(carried, gain, noise) of a step from t to s. Of x0, alpha may be 0 at either end."""
    if reads == "velocity":
        return 1.0, s - t, 0.0
    if reads == "eps":
        return record.alpha(s) / record.alpha(t), record.alpha(s) * (record.rho(s) - record.rho(t)), 0.0
    sigma = record.sigma(s)
    carried = kept * sigma / record.sigma(t)
    return carried, record.alpha(s) - carried * record.alpha(t), sigma * math.sqrt(1 - kept**2)


def exponential_step(
    record: Recorder, x: Combination, x0: Combination, t: float, s: float, kept: float = 1.0
) -> Combination:
    """The step that is exact if x0 does not change, from x at t to s; it keeps this share of the noise. kept = 1 is DDIM."""
    carried, gain, noise = coefficients(record, "x0", t, s, kept)
    return carried * x + gain * x0 + noise * FRESH_NOISE


@dataclass(frozen=True)
class _Step:
    """A step from t to s: points are the values that it averages, newest first, each with its place in the variable."""

    record: Recorder
    method: Method
    psi: LogPsi
    t: float
    s: float
    gain: float
    points: list[tuple[float, Combination]]

    @cached_property
    def mean(self) -> Combination:
        """The predictor's."""
        return weighted(self.average(self.places), [value for _, value in self.points])

    def correction(self, new: Combination) -> Combination:
        """Corrected minus predicted state, for what the evaluation of the predicted state gave."""
        count, values = self.method.corrector - 1, [value for _, value in self.points]
        places = [*self.places[:1], 1.0, *self.places[1:count]]
        corrected = weighted(self.average(places), [*values[:1], new, *values[1:count]])
        return self.gain * (corrected - self.mean)

    @property
    def places(self) -> list[float]:
        """Of the values, in steps."""
        start = self.points[0][0]
        return [(u - start) / (self.place(self.s) - start) for u, _ in self.points]

    def average(self, places: Sequence[float]) -> Sequence[float]:
        h = self.record.log_rho(self.t) - self.record.log_rho(self.s)
        fixed = None if self.method.average is None else self.method.average(places, h)
        if len(places) == 1:
            return [1.0]
        return mean_weights(places, self.moments) if fixed is None else fixed

    def place(self, t: float) -> float:
        """The variable at t."""
        return place(self.record, self.method.variable, t)

    @cached_property
    def moments(self) -> list[float]:
        """Means of z^k under dK for k < 5: 1 - k int z^(k - 1) S dz, with z from 0 to 1 over the step."""
        edges = self.edges
        half, width = np.diff(edges)[:, None] / 2, edges[-1] - edges[0]
        u = np.concatenate([edges[:1], (edges[:-1, None] + half * (1 + NODES)).ravel(), edges[-1:]])
        kernel, z = self.kernel(u), (u[1:-1] - edges[0]) / width
        share = (kernel[1:-1] - kernel[0]) / (kernel[-1] - kernel[0]) * (half * WEIGHTS).ravel() / width
        return [1.0, *(1 - k * float(z ** (k - 1) @ share) for k in range(1, 5))]

    @property
    def edges(self) -> Array:
        """Of the panels, in the variable."""
        record, variable = self.record, self.method.variable
        h = abs(record.log_rho(self.t) - record.log_rho(self.s))
        panels = max(1, math.ceil(h)) if math.isfinite(h) else 1
        edges = np.linspace(self.place(self.t), self.place(self.s), panels + 1)
        if panels > 1 and variable != "log rho":
            rho = torch.from_numpy(np.geomspace(record.rho(self.t), record.rho(self.s), panels + 1))
            edges[1:-1] = (rho if variable == "rho" else record.schedule.time_of_rho(rho)).numpy()[1:-1]
        return edges

    def kernel(self, u: Array) -> Array:
        """K, of x0 relative to its end."""
        if self.method.reads == "velocity":
            return u
        rho = np.exp(u) if self.method.variable == "log rho" else u
        if self.method.variable == "t":
            rho = self.record.schedule.rho(torch.from_numpy(u)).numpy()
        if self.method.reads == "eps":
            return rho
        log_phi = np.log(rho) + self.psi(rho)
        return np.exp(log_phi[-1] - log_phi)


def place(record: Recorder, variable: Variable, t: float) -> float:
    """The variable at t."""
    return {"t": float, "rho": record.rho, "log rho": record.log_rho}[variable](t)


def multistep(
    record: Recorder,
    method: Method,
    analytic_first: bool = False,
    psis: Callable[[float], LogPsi] = lambda _: ode,
    **metadata: str,
) -> Table:
    """The table of a method. psis: of a step from t, log psi; for methods that read x0."""
    past: list[tuple[float, Combination]] = []
    step, steps, in_time = None, len(record.grid) - 1, method.reads == "velocity"
    for i, (t, s) in enumerate(pairwise(record.grid)):
        now = record.first(t, analytic_first)
        x, value, psi = now.x, getattr(now, method.reads), psis(t)
        if step is not None and method.corrector:
            x = x + step.correction(value)
        if in_time or record.alpha(t) > 0:
            past = [(place(record, method.variable, t), value), *past][: max(method.order, method.corrector - 1)]
        kept = share_kept(psi, record.rho(t), record.rho(s))
        points = past[: min(method.order, steps - i) if method.lower_order_final else method.order]
        alone = method.reads == "eps" and len(points) == 1  # no rho then, which may be large
        if not points or alone or not (in_time or record.alpha(s) > 0):
            step = None
            record.advance(exponential_step(record, x, now.x0, t, s, kept), s)
            continue
        carried, gain, noise = coefficients(record, method.reads, t, s, kept)
        step = _Step(record, method, psi, t, s, gain, points)
        record.advance(carried * x + gain * step.mean + noise * FRESH_NOISE, s)
    return record.table(**metadata)


def share_kept(psi: LogPsi, rho_t: float, rho_s: float) -> float:
    """psi(rho_s) / psi(rho_t)."""
    with np.errstate(divide="ignore"):  # log 0, at data
        start, end = psi(np.array([rho_t, rho_s]))
    return math.exp(end - start)
