"""Vector quantization with a codebook of running means (van den Oord et al. 2017, arXiv 1711.00937).

    k = argmin_k |z - e_k|^2 = argmax_k (z . e_k - |e_k|^2 / 2)        loss = beta mean((z - sg[e_k])^2)   ("commitment")

Codebook (app. A.1): per optimizer step, from all vectors seen since the last one, on all processes, n_k of them nearest
to code k and s_k their sum,

    N_k <- d N_k + (1 - d) n_k        m_k <- d m_k + (1 - d) s_k
    e_k = m_k / N'_k,   N'_k = (N_k + eps) / (N + K eps) N,   N = sum_k N_k          (Laplace smoothing)

starting from N_k = 1, m_k = e_k: with N_k = 0 the first step would throw unused codes to infinity.

Restart: a code with N_k < limit moves to a recent encoder vector x, with N_k = limit and m_k = limit x, where
limit = min(restart_threshold, n / (4 K)) and n is the number of vectors of the step: a code need not be hit more often than a
quarter of a perfectly even share, or small batches would restart the whole codebook for ever. The vectors are those of the
largest priority (`Observation`).

With `normalize` vectors and codes have length 1 (codebook.py): s_k sums unit vectors, e_k = m_k / |m_k|, and the start is
spherical k-means.

Statistics are gathered by `observe` and applied by `update`, so gradient accumulation and several processes give the codebook of
one large batch. A step that was skipped, or whose sums are not finite, is discarded.
"""

import torch
from torch import Tensor

from midway.tokenizers.codebook import Gradient
from midway.tokenizers.data_codebook import DataCodebook, Init
from midway.tokenizers.rotation import unit


class VQ(DataCodebook):
    """`codebook_size` codes of `dim` channels, moved by `update`, never by the gradient.

    The state is float32 buffers and travels in the checkpoint: `codebook` (K, D), `count` N (K,), `total` m (K, D), `step`. For
    `normalize`, `gradient`, `entropy_weight` and `entropy_temperature` see codebook.py.
    """

    learns_by_gradient = False
    count: Tensor
    total: Tensor

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float = 0.25,
        decay: float = 0.99,
        eps: float = 1e-5,
        init: Init = "kmeans",
        restart_threshold: float = 1.0,
        seed: int = 0,
        normalize: bool = False,
        gradient: Gradient = "straight_through",
        entropy_weight: float = 0.0,
        entropy_temperature: float = 0.01,
    ) -> None:
        _check(decay, eps, restart_threshold)
        super().__init__(codebook_size, dim, commitment, normalize, gradient, entropy_weight, entropy_temperature)
        self.noise_channels = 1
        self.decay, self.eps = decay, eps
        self.restart_threshold = restart_threshold
        start = self._first_codes(init, seed)
        self.register_buffer("codebook", start)
        self.register_buffer("count", torch.ones(codebook_size, dtype=torch.float32))
        self.register_buffer("total", start.clone())
        self.register_buffer("step", torch.tensor(-1))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, decay={self.decay}"

    def _begin(self) -> None:
        self.total.copy_(self.codebook)
        self.count.fill_(1)

    def _learn(self, sums: Tensor, candidates: Tensor, learned: Tensor) -> None:
        count = self.count.lerp(sums[:, -1], 1 - self.decay)
        total = self.total.lerp(sums[:, :-1], 1 - self.decay)
        limit = (sums[:, -1].sum() / (4 * self._size)).clamp(max=self.restart_threshold)
        _restart(count, total, candidates, limit)
        means = total / laplace(count, self.eps).unsqueeze(1)
        codebook = unit(means) if self.normalize else means
        for buffer, value in ((self.count, count), (self.total, total), (self.codebook, codebook)):
            buffer.copy_(torch.where(learned, value, buffer))


def _restart(count: Tensor, total: Tensor, candidates: Tensor, limit: Tensor) -> None:
    """In place: move the least used codes, where they are below `limit`, to candidates (R, D + 1), best first."""
    least = count.argsort(stable=True)[: len(candidates)]
    dead = (count[least] < limit) & (candidates[:, -1] >= 0)
    count[least] = torch.where(dead, limit, count[least])
    total[least] = torch.where(dead.unsqueeze(1), limit * candidates[:, :-1], total[least])


def laplace(count: Tensor, eps: float) -> Tensor:
    """(N_k + eps) / (N + K eps) N, (K,): positive, the same sum."""
    total = count.sum()
    return (count + eps) / (total + len(count) * eps) * total


def _check(decay: float, eps: float, restart_threshold: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; give a number in [0, 1), 0.99 by default")
    if not (restart_threshold >= 0 and eps > 0):
        raise ValueError(f"restart_threshold {restart_threshold} must be >= 0, eps {eps} > 0")
