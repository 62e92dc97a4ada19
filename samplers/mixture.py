"""The exact field of a mixture of Gaussians: a model whose network makes no error, so that what is left is the solver's.

Data p(x_0) = sum_k w_k N(m_k, S_k) with S_k = U_k diag(v_k) U_k^T give at noise level (alpha, sigma), with
z_k = U_k^T (x - alpha m_k) and d_k = alpha^2 v_k + sigma^2 elementwise,

    log p_k(x)  = log w_k - (sum z_k^2 / d_k + sum log d_k + D log 2 pi) / 2
    p(x_t = x)  = sum_k exp log p_k(x),        r = softmax_k log p_k(x)          the posterior of the component
    E[x_0 | x]  = sum_k r_k (m_k + U_k (alpha v_k / d_k) z_k)

S_k is diagonalised once, so an evaluation is two matrix products with all U_k at once.
"""

import functools
import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.samplers.prediction import Prediction, expand
from midway.samplers.schedule import Schedule


@dataclass(frozen=True, eq=False)
class Mixture:
    """K Gaussians in D dimensions: weights (K,), means (K, D), variances (K, D) along axes (K, D, D), whose columns are unit.

    ValueError for weights that are not positive or do not sum to 1, negative variances, and shapes that do not fit.
    """

    weights: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor

    def __post_init__(self) -> None:
        count, dim = self.means.shape
        shapes = tuple(self.weights.shape), tuple(self.variances.shape), tuple(self.axes.shape)
        if shapes != ((count,), (count, dim), (count, dim, dim)):
            raise ValueError(
                f"means {(count, dim)} need weights (K,), variances (K, D) and axes (K, D, D), got {shapes}"
            )
        total = float(self.weights.sum())
        if not (self.weights > 0).all() or not math.isclose(total, 1, rel_tol=1e-5):
            raise ValueError(f"weights must be positive and sum to 1, they sum to {total}")
        if not (self.variances >= 0).all():
            raise ValueError("a covariance has a negative eigenvalue: it is no covariance")

    @classmethod
    def of(cls, weights: Tensor, means: Tensor, covariances: Tensor) -> "Mixture":
        """From covariances (K, D, D), symmetric. ValueError as of the class, beyond rounding."""
        values, axes = torch.linalg.eigh(covariances)
        rounding = 1e-12 * values.abs().amax(1, keepdim=True)
        return cls(weights, means, torch.where(values.abs() < rounding, 0.0, values), axes)

    @property
    def dim(self) -> int:
        return self.means.shape[1]

    @functools.cached_property
    def mean(self) -> Tensor:
        """(D,)."""
        return self.weights @ self.means

    @functools.cached_property
    def covariance(self) -> Tensor:
        """(D, D): that within the components and that of their means."""
        within = torch.einsum("k,kir,kr,kjr->ij", self.weights, self.axes, self.variances, self.axes)
        off = self.means - self.mean
        return within + off.T @ (self.weights[:, None] * off)

    @functools.cached_property
    def hash(self) -> str:
        """12 hexadecimal digits of all numbers in float64."""
        parts = (self.weights, self.means, self.variances, self.axes)
        data = b"".join(part.detach().cpu().double().contiguous().numpy().tobytes() for part in parts)
        return hashlib.sha256(data).hexdigest()[:12]

    def to(self, like: Tensor) -> "Mixture":
        """With the dtype and on the device of `like`; made once for each."""
        return _converted(self, like.dtype, like.device)

    def sample(self, uniform: Tensor, normal: Tensor) -> Tensor:
        """(B, D) from uniform (B,) on (0, 1), which chooses the component, and standard normal (B, D) numbers."""
        chosen = torch.searchsorted(self.weights.cumsum(0), uniform.to(self.weights)).clamp(max=len(self.weights) - 1)
        scaled = self.variances[chosen].sqrt() * normal.to(self.means)
        return self.means[chosen] + torch.einsum("bij,bj->bi", self.axes[chosen], scaled)

    def log_density(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """log p(x_t = x) (B,) for x (B, D) at noise levels alpha, sigma, (B,) or (1,)."""
        return torch.logsumexp(_Level(self.to(x), alpha, sigma).log_joint(x)[0], dim=1)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """E[x_0 | x_t = x] (B, D) and the posterior of the component (B, K), for noise levels (B,) or (1,)."""
        return _Level(self.to(x), alpha, sigma).denoise(x)

    def field(self, schedule: Schedule) -> "MixtureField":
        """The exact model on a schedule."""
        return MixtureField(self, schedule)


@functools.lru_cache(maxsize=16)
def _converted(mixture: Mixture, dtype: torch.dtype, device: torch.device) -> Mixture:
    parts = (mixture.weights, mixture.means, mixture.variances, mixture.axes)
    return Mixture(*(part.to(device, dtype) for part in parts))


class _Level:
    """All that depends on the noise level alone, for alpha, sigma (B,) or (1,): one per sample, or one for all."""

    def __init__(self, mixture: Mixture, alpha: Tensor, sigma: Tensor) -> None:
        self.mixture = mixture
        self.alpha = alpha[:, None, None]  # (B or 1, 1, 1)
        total = self.alpha.square() * mixture.variances + sigma.square()[:, None, None]  # d, (B or 1, K, D)
        self.precision = 1 / total
        self.gain = self.alpha * mixture.variances * self.precision
        self.constant = mixture.weights.log() - (total.log().sum(-1) + mixture.dim * math.log(2 * math.pi)) / 2

    def log_joint(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p_k(x) (B, K) and z (B, K, D)."""
        across, centres = _products(self.mixture)
        z = (x @ across).unflatten(1, centres.shape) - self.alpha * centres
        return self.constant - (z.square() * self.precision).sum(-1) / 2, z

    def denoise(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As of the mixture."""
        across, _ = _products(self.mixture)
        log_joint, z = self.log_joint(x)
        posterior = torch.softmax(log_joint, dim=1)
        moved = (posterior[:, :, None] * (self.gain * z)).flatten(1)
        return posterior @ self.mixture.means + moved @ across.T, posterior


@functools.lru_cache(maxsize=16)
def _products(mixture: Mixture) -> tuple[Tensor, Tensor]:
    """All axes side by side (D, K D), and every mean on its own axes (K, D)."""
    return mixture.axes.movedim(0, 1).flatten(1), torch.einsum("kdr,kd->kr", mixture.axes, mixture.means)


@dataclass(frozen=True, eq=False)
class MixtureField:
    """The exact field; the features of a prediction are the posterior of the component (B, K)."""

    mixture: Mixture
    schedule: Schedule

    def __call__(self, x: Tensor, t: Tensor, /) -> Prediction:
        t = t[:1] if t.stride(0) == 0 else t  # expanded: one time for all samples, whose numbers are made once
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x0, posterior = self.mixture.denoise(x, alpha, sigma)
        return Prediction(x0, (x - expand(alpha, x) * x0) / expand(sigma, x), posterior)
