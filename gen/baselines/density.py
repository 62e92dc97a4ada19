"""Baselines with a density of dequantised images: likelihood bounds, and the map to the range of their networks.

With x = (k + u) / L in (0, 1)^D for levels k and u from q(u | k), S draws of u give

    ln P(k) >= E ln (1/S) sum_s exp(ln p(x_s) - ln q(u_s | k)) - D ln L
                                 (S = 1: Ho et al. 2019, arXiv 1902.00275, equation 8; S > 1: Burda et al. 2016, arXiv 1509.00519)

Networks read y = entry(x): "logit" (levels.py), "symmetric" y = 2 x - 1, or "unit" y = x. The Jacobian of the entry is included
in ln p(x), so bounds of different entries can be compared.
"""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from midway.gen.baselines.base import Baseline
from midway.gen.data.images import to_float
from midway.gen.data.levels import dequantised_bound, from_levels, inverse_logit, logit_transform, uniform_dequantise
from midway.gen.training.batches import Context

AFFINE = {"symmetric": (2, -1), "unit": (1, 0)}
"""Slope and offset of y(x)."""


class DensityBaseline(Baseline):
    """A baseline with a density. `config` has the fields `draws` (S above), `entry` and `logit_margin`."""

    @abstractmethod
    def log_density(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """ln p(x) (B,) of x (B, C, H, W) in (0, 1), with labels (B,) on the model's device if conditional."""

    def dequantise(self, k: Tensor, context: Context, draw: int) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) in (0, 1) and ln q(u | k) (B,) of levels k; uniform by default."""
        u = self.uniform(context, draw)
        return uniform_dequantise(k, u, self.levels), u.new_zeros(len(k), dtype=self.dtype)

    def uniform(self, context: Context, draw: int) -> Tensor:
        """Uniform noise (B, C, H, W) on (0, 1), one draw for each sample of the context."""
        return context.uniform(f"dequantise {draw}", self.image_shape).to(self.device)

    def bound(self, k: Tensor, labels: Tensor | None, context: Context, draw: int = 0) -> Tensor:
        """Nats (B,): the bound of one draw of u for levels k."""
        x, log_q = self.dequantise(k, context, draw)
        return dequantised_bound(self.log_density(x, labels) - log_q, self.dims, self.levels)

    @torch.no_grad()
    def log_likelihood(self, images: Tensor, labels: Tensor | None, context: Context) -> Tensor:
        """Nats (B,) float64: the bound of `config.draws` draws."""
        k, labels = self.levels_in(images), self.labels_in(labels, len(images))
        draws = [self.bound(k, labels, context, draw).double() for draw in range(self.config.draws)]
        return torch.stack(draws).logsumexp(0) - math.log(len(draws))

    def enter(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y of x in (0, 1), and ln|det dy/dx| (B,), in the dtype of the weights."""
        if self.config.entry == "logit":
            y, log_det = logit_transform(x, self.config.logit_margin)
            return y.to(self.dtype), log_det.to(self.dtype)
        slope, offset = AFFINE[self.config.entry]
        y = (slope * x + offset).to(self.dtype)
        return y, y.new_full((len(y),), self.dims * math.log(slope))

    def leave(self, y: Tensor) -> Tensor:
        """x of y."""
        if self.config.entry == "logit":
            return inverse_logit(y, self.config.logit_margin)
        slope, offset = AFFINE[self.config.entry]
        return (y - offset) / slope

    def images_of(self, x: Tensor) -> Tensor:
        """Float images in [-1, 1]: the level of the bin (k / L, (k + 1) / L) that contains each value of x."""
        k = (x * self.levels).floor().clamp(0, self.levels - 1).long()
        return to_float(from_levels(k, self.levels))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype


def check_margin(logit_margin: float) -> None:
    """ValueError for a margin outside [0, 0.5)."""
    if not 0 <= logit_margin < 0.5:
        raise ValueError(f"logit_margin is {logit_margin}; give a number in [0, 0.5), 0.05 by default")


def finite(samples: Tensor) -> Tensor:
    """The samples; ValueError if a value is not finite."""
    if not bool(samples.isfinite().all()):
        raise ValueError("samples are not finite: the weights are damaged or diverged, use an earlier checkpoint")
    return samples
