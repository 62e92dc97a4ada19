"""The discretised logistic mixture: probabilities of L levels (Salimans et al. 2017, arXiv 1701.05517, eq. 2).

Level k is x_k = 2k / (L - 1) - 1, and its bin reaches to e_k = x_k - 1 / (L - 1) below and e_{k+1} above, the lowest bin to
minus and the highest to plus infinity. Component m, with F the logistic distribution function 1 / (1 + exp(-t)):

    P_m(k) = F(b) - F(a),   a = (e_k - mu_m) / s_m (-inf for k = 0),   b = (e_{k+1} - mu_m) / s_m (inf for k = L - 1)
    P(k) = sum_m pi_m P_m(k)

Written without the cancellation of the difference, and so without a constant that keeps its logarithm finite:

    ln(F(b) - F(a)) = -softplus(-b) - softplus(a) + ln(1 - exp(a - b))

The first term is absent for k = L - 1, the second for k = 0, and the third for both. Each value of an image has a mixture of
its own, and given its parameters all are independent (PixelCNN++ instead lets the colours of a pixel depend on each other).

ln s has the floor ln(1 / (L - 1)) - 2.5, where a bin about its own mean has all but 1e-5 of the probability: below, a level
could only become less likely. Its ceiling 10 is flat: it keeps exp(-ln s), and with it the third term, from underflow.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

PARAMETERS = 3
"""Numbers of a component: logit, mean, log scale."""
_FLOOR = -2.5
_CEILING = 10.0
_FIRST_LOG_SCALE = -1.5


@dataclass(frozen=True)
class LogisticMixture:
    """M components for every value of images (B, C, H, W): `logits` ln pi + constant, `means`, `log_scales`, (B, M, C, H, W)."""

    logits: Tensor
    means: Tensor
    log_scales: Tensor
    levels: int

    @staticmethod
    def of(parameters: Tensor, channels: int, levels: int) -> "LogisticMixture":
        """From a network's output (B, 3 M C, H, W), in float32 or better.

        An output of zeros is M equal components with means spread evenly over [-1, 1] and log scale -1.5.
        """
        full = parameters if parameters.dtype == torch.float64 else parameters.float()
        logits, means, log_scales = full.unflatten(1, (PARAMETERS, -1, channels)).unbind(1)
        mixtures = logits.shape[1]
        spread = (2 * torch.arange(mixtures, device=means.device) + 1) / mixtures - 1
        means = means + spread.to(means).view(-1, 1, 1, 1)
        return LogisticMixture(logits, means, log_scales + _FIRST_LOG_SCALE, levels)

    def log_prob(self, k: Tensor) -> Tensor:
        """ln P(k) of int64 levels k (B, C, H, W), of the same shape."""
        lower, upper = self._below(k), self._below(k + 1)
        width = 2 / (self.levels - 1) * torch.exp(-self._log_scales)
        inner = -F.softplus(-upper) - F.softplus(lower) + torch.log(-torch.expm1(-width))
        k = k[:, None]
        top, bottom = k == self.levels - 1, k == 0
        each = torch.where(bottom, -F.softplus(-upper), torch.where(top, -F.softplus(lower), inner))
        return torch.logsumexp(self.logits.log_softmax(1) + each, dim=1)

    def mean(self) -> Tensor:
        """Expected x_k (B, C, H, W), exactly: -1 + 2 / (L - 1) sum_{k >= 1} P(level >= k)."""
        weights = self.logits.softmax(1)
        total = torch.zeros_like(weights[:, 0])
        for k in range(1, self.levels):
            total += (weights * torch.sigmoid(-self._below(torch.tensor(k, device=total.device)))).sum(1)
        return 2 / (self.levels - 1) * total - 1

    @property
    def _log_scales(self) -> Tensor:
        return self.log_scales.clamp(_FLOOR - math.log(self.levels - 1), _CEILING)

    def _below(self, k: Tensor) -> Tensor:
        """(e_k - mu) / s: where the lower edge of level k (B, C, H, W) or () lies in every component."""
        edge = (2 * k.to(self.means.dtype) - 1) / (self.levels - 1) - 1
        edge = edge[:, None] if k.dim() else edge
        return (edge - self.means) * torch.exp(-self._log_scales)
