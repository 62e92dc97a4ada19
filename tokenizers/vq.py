"""Vector quantization with a codebook of running means (van den Oord et al. 2017, arXiv 1711.00937).

    k = argmin_k |z - e_k|^2 = argmax_k (z . e_k - |e_k|^2 / 2)        loss = beta mean((z - sg[e_k])^2)   ("commitment")

Codebook (app. A.1): per optimizer step, from all vectors seen since the last one, on all processes, n_k of them nearest
to code k and s_k their sum,

    N_k <- d N_k + (1 - d) n_k        m_k <- d m_k + (1 - d) s_k
    e_k = m_k / N'_k,   N'_k = (N_k + eps) / (N + K eps) N,   N = sum_k N_k          (Laplace smoothing)

starting from N_k = 1, m_k = e_k: with N_k = 0 the first step would throw unused codes to infinity.

Restart: a code with N_k < limit moves to a recent encoder vector x, with N_k = limit and m_k = limit x, where
limit = min(restart_threshold, n / (4 K)) and n is the number of vectors of the step: nothing may be asked to be hit more
often than a quarter of a perfectly even share, or small batches would restart the whole codebook for ever.

The vectors are drawn by priority, the largest first: ndtr(noise[:, 0]), uniform in (0, 1), where ndtr is the standard
normal distribution function and `noise` belongs to the sample.

`forward` only gathers statistics; `update` applies them. So gradient accumulation, activation checkpointing (which runs
forward twice) and several processes give the codebook of one large batch. A step that was skipped, or whose sums are
not finite, is forgotten.
"""

import random
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.base import (
    Quantized,
    Quantizer,
    check_channels,
    check_indices,
    check_noise,
    discrete,
    float32_island,
    straight_through,
)
from midway.tokenizers.clustering import kmeans, nearest_code
from midway.tokenizers.pending import Pending, distributed, in_backward, over_ranks, rank

Init = Literal["kmeans", "batch"]


class VQ(Quantizer):
    """`codebook_size` codes of `dim` channels, moved by `update`, never by the gradient.

    `start` initialises the codebook. Without it the first *training* forward does, from that batch of rank 0 (other
    ranks receive it): then the codebook depends on how the batch is divided, and under torch.distributed every rank has
    to run its first training forward before its first update. The state is float32 buffers and travels in the
    checkpoint: `codebook` (K, D), `count` (K,), `total` (K, D), `step`, which counts updates, forgotten ones too (-1
    before initialisation).
    """

    codebook: Tensor
    count: Tensor
    total: Tensor
    step: Tensor

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
    ) -> None:
        super().__init__()
        _check(codebook_size, dim, commitment, decay, eps, init, restart_threshold)
        self.codebook_size = self._size = codebook_size
        self.noise_channels = 1
        self.dim = dim
        self.commitment, self.decay, self.eps = commitment, decay, eps
        self.init: Init = init
        self.restart_threshold = restart_threshold
        self.seed = seed
        start = torch.randn(codebook_size, dim, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("codebook", start)
        self.register_buffer("count", torch.ones(codebook_size))
        self.register_buffer("total", start.clone())
        self.register_buffer("step", torch.tensor(-1))
        self._pending: Pending | None = None
        self._host_step: int | None = None  # a copy of `step`, so that forward need not wait for the device
        self.register_load_state_dict_post_hook(_forget_host_step)

    @property
    def initialised(self) -> bool:
        """Whether the codebook has been initialised from data."""
        return self._step() >= 0

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, D, *S) -> codes; loss "commitment". Gradient to z: straight-through, and that of the commitment.

        `noise` (B, 1 or more, *S) decides, by its first channel, which vectors codes restart from; without it a generator
        of each rank does. A NaN in z makes the commitment loss NaN, and `update` learns nothing from that step.
        """
        latents = self.latents(z)
        if noise is not None:
            check_noise(noise[:, :1], latents[:, :1])
        rows = self._rows(latents)
        with float32_island(z):
            if self.training and not self.initialised:
                self.initialise(rows)
            flat = nearest_code(rows, self.codebook.float())
            self._gather(rows, flat, noise)
            indices = flat.view(z.shape[:1] + z.shape[2:])
            codes = self._lookup(indices)
            commitment = F.mse_loss(latents, codes)
            losses, loss = {"commitment": commitment}, self.commitment * commitment
            return discrete(straight_through(codes, latents), indices, losses, loss, self._size)

    def latents(self, z: Tensor) -> Tensor:
        check_channels(z, self.dim)
        return z.float()

    def snap(self, latents: Tensor) -> Tensor:
        return self._lookup(self.codes_to_indices(latents))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        check_indices(indices, self._size)
        return self._lookup(indices)

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """The nearest code's index. Of equal codes the lowest."""
        check_channels(codes, self.dim, "codes")
        with float32_island(codes):
            return nearest_code(self._rows(codes.float()), self.codebook.float()).view(
                codes.shape[:1] + codes.shape[2:]
            )

    def start(self, z: Tensor) -> None:
        """Initialise the codebook from z (B, D, *S), unless it is; give the same z on every rank."""
        if not self.initialised:
            with float32_island(z):
                self.initialise(self._rows(self.latents(z)))

    @torch.no_grad()
    def initialise(self, rows: Tensor) -> None:
        """Set the codebook from rank 0's encoder vectors `rows` (N, D). Every rank must call it together.

        Vectors that are not finite are left out. If none is finite, the codebook stays as it was drawn and counts as
        initialised: restarts will bring it to the data. ValueError if there are no vectors at all.
        """
        if rank() == 0:
            self.codebook.copy_(self._centres(rows))
        if distributed():
            dist.broadcast(self.codebook, src=0)
        self.total.copy_(self.codebook)
        self.count.fill_(1)
        self._set_step(0)

    @torch.no_grad()
    def update(self, kept: Tensor | None = None) -> None:
        """EMA and restarts from all that forward has gathered; without anything gathered, nothing changes.

        Where `kept` () is False, or the gathered sums are not finite on any rank, all of it is forgotten: codebook,
        count and total keep their bits. That is decided on the device, and every rank exchanges its statistics either
        way. Under torch.distributed every rank must call it, as often as the others.
        """
        if not self.initialised or (self._pending is None and not distributed()):
            return
        pending = self._pending or Pending(self._size, self.dim, self.codebook.device)
        self._pending = None
        sums, candidates = over_ranks(pending)
        vectors = sums[:, -1].sum()
        learned = sums.isfinite().all() & (vectors > 0)
        count = self.count.lerp(sums[:, -1], 1 - self.decay)
        total = self.total.lerp(sums[:, :-1], 1 - self.decay)
        limit = (vectors / (4 * self._size)).clamp(max=self.restart_threshold)
        _restart(count, total, candidates, limit)
        self._replace(count, total, learned if kept is None else learned & kept)
        self._set_step(self._step() + 1)

    def extra_repr(self) -> str:
        return f"codebook_size={self._size}, dim={self.dim}, commitment={self.commitment}, decay={self.decay}"

    def _lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codebook.float()).movedim(-1, 1)

    def _rows(self, latents: Tensor) -> Tensor:
        """(B, D, *S) -> (B * S, D), without gradient."""
        return latents.detach().movedim(1, -1).reshape(-1, self.dim)

    def _centres(self, rows: Tensor) -> Tensor:
        """The first codebook (K, D), from those of `rows` (N, D) that are finite; the present one if none is."""
        finite = rows[rows.isfinite().all(1)]
        if len(rows) and not len(finite):
            return self.codebook
        centres = kmeans(finite, self._size, 10 if self.init == "kmeans" else 0, self._generator(0))
        return torch.where(centres.isfinite().all(1, keepdim=True), centres, self.codebook)  # their sum may overflow

    def _gather(self, rows: Tensor, indices: Tensor, noise: Tensor | None) -> None:
        """Add one training batch to the pending statistics, once, even if checkpointing runs forward again."""
        if not (self.training and torch.is_grad_enabled()):
            return
        if self._pending is None:
            self._pending = Pending(self._size, self.dim, rows.device)
        if in_backward() and self._pending.has_seen(indices):
            return
        if noise is None:
            generator = self._generator(1 + len(self._pending.fingerprints))
            priorities = torch.rand(len(rows), generator=generator).to(rows.device)
        else:
            priorities = torch.special.ndtr(noise[:, 0].to(rows)).flatten()
        self._pending.add(rows, indices, priorities)

    def _replace(self, count: Tensor, total: Tensor, learned: Tensor) -> None:
        """Take over count (K,), total (K, D) and the codebook they make where `learned` () is True."""
        codebook = total / laplace(count, self.eps).unsqueeze(1)
        for buffer, value in ((self.count, count), (self.total, total), (self.codebook, codebook)):
            buffer.copy_(torch.where(learned, value, buffer))

    def _generator(self, purpose: int) -> torch.Generator:
        """A CPU generator that is a function of seed, rank, step and purpose, so that a resumed run draws the same."""
        key = f"{self.seed} {rank()} {self._step()} {purpose}"
        return torch.Generator().manual_seed(random.Random(key).getrandbits(63))

    def _step(self) -> int:
        if self._host_step is None:
            self._host_step = int(self.step.item())
        return self._host_step

    def _set_step(self, step: int) -> None:
        self.step.fill_(step)
        self._host_step = step


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


def _forget_host_step(module: nn.Module, incompatible_keys: object) -> None:
    assert isinstance(module, VQ)
    module._host_step = None


def _check(
    size: int, dim: int, commitment: float, decay: float, eps: float, init: str, restart_threshold: float
) -> None:
    if size < 1 or dim < 1:
        raise ValueError(f"codebook_size {size}, dim {dim}: both must be at least 1")
    if not 0 <= decay < 1:
        raise ValueError(f"decay is {decay}; give a number in [0, 1), 0.99 by default")
    if min(commitment, restart_threshold) < 0 or eps <= 0:
        raise ValueError(
            f"commitment {commitment} and restart_threshold {restart_threshold} must be >= 0, eps {eps} > 0"
        )
    if init not in get_args(Init):
        raise ValueError(f"init is {init!r}; choose 'kmeans' or 'batch'")
