"""The interface of all quantizers: a map from encoder output z to codes, with an exact inverse from indices.

    codes = snap(latents(z))          indices in {0, ..., K - 1}          codes == indices_to_codes(indices), bit for bit
    d codes / d z = d latents / d z   the straight-through estimator (Bengio et al. 2013, arXiv 1308.3432)

Shapes: z (B, in_dim, *S), codes and latents (B, dim, *S), indices (B, *S); channels come first, always. A quantizer with G codes
per position has indices (B, *S, G).

Training: `start(z)` once before the first step; then per micro-batch `out = quantizer(z)` and `quantizer.observe(out)`, and per
optimizer step, after it, `quantizer.update()`. forward itself changes nothing, so activation checkpointing and torch.compile may
run it any number of times; `observe` belongs outside of whatever they recompute.

Statistics of one batch of indices, p_k = count_k / sum of counts:

    usage = share of codes with count_k > 0      perplexity = exp(-sum_k p_k ln p_k)      bits per image = length G log2 K
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from midway.tokenizers.precision import Convert, of_same_dtype

MAX_COUNTED = 2**20  # beyond this many codes a histogram per batch would cost more than the quantizer


@dataclass(frozen=True)
class Observation:
    """The vectors of one micro-batch that a codebook learns from, without a gradient.

    rows: (N, D) float32, the latents. indices: (N,) int64, their codes. priorities: (N,) float32, uniform in [0, 1], by which
    restarts choose among them; None: drawn by `observe`.
    """

    rows: Tensor
    indices: Tensor
    priorities: Tensor | None


@dataclass(frozen=True)
class Channel:
    """What a channel of z starts as, before any training: principal component `component` of the patches, from 0, times a number.

    The number makes the standard deviation `std`; with None it is one number for all such channels, so that distances between z
    are those between patches up to a factor. std 0: the constant `mean`. The components of all channels that are `balanced` are
    rotated first such that their variances are equal.
    """

    component: int
    std: float | None = 1.0
    mean: float = 0.0
    balanced: bool = False


@dataclass(frozen=True)
class Quantized:
    """Result of a quantizer for one batch.

    codes: (B, D, *S) float32, straight-through: those of `indices`, except where dropout changes them in training.
    indices: (B, *S) or (B, *S, G) int64; (B, 0) if the quantizer is continuous.
    losses: unweighted float32 scalars by name. loss: their weighted sum, zero if there is none or no sample; with a graph to z
    always, and not finite if z is not.
    counts: (K,) int64 histogram of `indices`, (G, K) with several groups, or None for continuous quantizers and K > 2**20.
    observation: input of `observe` for a codebook that learns from vectors. parts: results of the quantizers inside this one.
    """

    codes: Tensor
    indices: Tensor
    losses: dict[str, Tensor]
    loss: Tensor
    counts: Tensor | None
    observation: Observation | None = None
    parts: "tuple[Quantized, ...]" = ()


class Quantizer(nn.Module, ABC):
    """Base of all quantizers. `dim` is the number of channels of a code; `codebook_size` is None if it is continuous."""

    dim: int
    codebook_size: int | None
    groups: int = 1
    """Number of codes per spatial position, each out of `codebook_size`; if more than one, the last axis of the indices."""
    noise_channels: int = 0
    """Number of channels of the noise that `forward` takes."""

    @property
    def in_dim(self) -> int:
        """Channels of z."""
        return self.dim

    def start_channels(self) -> list[Channel]:
        """What every channel of z should start as: by default the first components with standard deviation 1."""
        return [Channel(i) for i in range(self.in_dim)]

    @abstractmethod
    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """Quantize z (B, in_dim, *S).

        `noise` (B, noise_channels, *S), standard normal, makes every random number per sample a function of the caller's
        seeds: KL's posterior, which vectors a codebook restarts from, FSQ's noise dropout and the stages of a residual
        quantizer. The last two need it in training. A quantizer without random numbers ignores it.
        """

    @abstractmethod
    def latents(self, z: Tensor) -> Tensor:
        """The continuous value before snapping: z (B, in_dim, *S) -> (B, D, *S) float32."""

    @abstractmethod
    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest code to each point of latent space, (B, D, *S) -> (B, D, *S), and its indices (B, *S) int64.

        No gradient if discrete. Of latents(z) they are those of `forward`, bit for bit.
        """

    @abstractmethod
    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """(B, *S) int64 -> (B, D, *S) float32. ValueError if an index is outside {0, ..., K - 1}."""

    def encode(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Codes and indices of z (B, in_dim, *S), those of `forward` but for dropout and KL's draw; no losses, no noise."""
        return self.nearest(self.latents(z))

    def snap(self, latents: Tensor) -> Tensor:
        """The nearest code to each point of latent space: (B, D, *S) -> (B, D, *S); no gradient if discrete."""
        return self.nearest(latents)[0]

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        """(B, D, *S) -> (B, *S) int64, the exact inverse of `indices_to_codes`. (`nearest` takes any point.)

        ValueError if a vector is no code, bit for bit, or if codes that differ are equal in the dtype of `codes`.
        """
        name = type(self).__name__
        if not codes.is_floating_point() or not self.distinct_in(codes.dtype):
            raise ValueError(
                f"codes are {codes.dtype}, in which codes of {name} may be rounded to one another: "
                "keep codes in float32, or the indices that encode and forward return"
            )
        indices = self._search(codes.float())
        if not torch.equal(self.indices_to_codes(indices).to(codes.dtype), codes):
            raise ValueError(
                f"some vectors are not codes of {name}, bit for bit: they were rounded, cut by dropout, made by another codebook "
                "or on another device, or are a sum whose summands were not found. Keep the indices that encode and forward "
                "return; nearest gives the nearest codes of any points"
            )
        return indices

    def distinct_in(self, dtype: torch.dtype) -> bool:
        """Whether every code rounded to the floating-point `dtype` is still nearest to itself."""
        return torch.finfo(dtype).bits >= 32

    def _search(self, codes: Tensor) -> Tensor:
        """Indices of codes (B, D, *S) float32, which may turn out to be no codes."""
        return self.nearest(codes)[1]

    def tokens(self, height: int, width: int) -> int:
        """Number of positions with a token of a (height, width) grid of latents."""
        return height * width

    def cover(self, z: Tensor) -> None:
        """Spread codes that do not start from data over z (B, in_dim, *S): before `start`, of principal components only."""

    def start(self, z: Tensor) -> None:
        """Initialise codebooks from z (B, in_dim, *S), once, before the first step, on every process."""

    def observe(self, quantized: Quantized) -> None:
        """Add one training micro-batch to the statistics for the next `update`; `quantized` is what `forward` returned for it."""

    def _apply(self, fn: Convert, recurse: bool = True) -> Self:
        """`.to()`, also of a parent: codebooks and statistics follow devices and stay in float32."""
        return super()._apply(of_same_dtype(fn), recurse)

    def update(self, step_ok: Tensor | None = None) -> None:
        """Apply the statistics: call once per optimizer step, after it, on every process.

        `step_ok`, a bool () on this module's device and equal on every process, is False if the step was skipped: then nothing
        observed since the last update is learned. It is never read on the host, which would wait.
        """


class Composite(Quantizer):
    """Base of quantizers that consist of others."""

    @property
    @abstractmethod
    def members(self) -> list[Quantizer]:
        """The quantizers inside, in the order of `Quantized.parts`, the same on every process."""

    def observe(self, quantized: Quantized) -> None:
        for member, part in zip(self.members, quantized.parts, strict=True):
            member.observe(part)

    def update(self, step_ok: Tensor | None = None) -> None:
        for member in self.members:
            member.update(step_ok)

    def distinct_in(self, dtype: torch.dtype) -> bool:
        return all(member.distinct_in(dtype) for member in self.members)


class _StraightThrough(torch.autograd.Function):
    """Forward: `value`, bit for bit. Backward: the identity to `carrier`. (`carrier + (value - carrier)` rounds.)"""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor, carrier: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def straight_through(value: Tensor, carrier: Tensor) -> Tensor:
    """`value` exactly, with the gradient of `carrier` (same shape)."""
    return _StraightThrough.apply(value.detach(), carrier)  # type: ignore[no-any-return]


def float32_island(z: Tensor) -> torch.autocast:
    """Context without autocast on z's device: in bfloat16 neighbouring codes collide."""
    kind = "cpu" if z.is_meta else z.device.type  # tensors without numbers are computed under no autocast
    return torch.autocast(device_type=kind, enabled=False)


def distributed() -> bool:
    """Whether there is a process group now: it may be made after the quantizer."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """This process's rank, 0 without a process group."""
    return dist.get_rank() if distributed() else 0


def discrete(
    codes: Tensor,
    indices: Tensor,
    losses: dict[str, Tensor],
    loss: Tensor,
    size: int,
    observation: Observation | None = None,
) -> Quantized:
    """A `Quantized` with the histogram of its indices; `loss` includes `zero_of(z)`."""
    counts = histogram(indices, size) if size <= MAX_COUNTED else None
    return Quantized(codes, indices, losses, loss, counts, observation)


def zero_of(z: Tensor) -> Tensor:
    """0, with a gradient of 0 to z; NaN if z is not finite. Codes are finite whatever z is, and training must notice."""
    return (z.float() * 0).sum()


def histogram(indices: Tensor, size: int) -> Tensor:
    """How often each of `size` indices occurs: (size,) int64. (bincount would synchronise a GPU.)"""
    flat = indices.reshape(-1)
    return torch.zeros(size, dtype=torch.int64, device=flat.device).scatter_add_(0, flat, torch.ones_like(flat))


def usage(counts: Tensor) -> float:
    """Share of codes hit at least once, in [0, 1]; counts (K,) or (G, K)."""
    return (counts > 0).double().mean().item()


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of the counts (K,), in [1, K]: the number of equally used codes with that entropy.

    Of counts (G, K) the mean over groups.
    """
    total = counts.double().sum(-1, keepdim=True)
    if not bool((total > 0).all()):
        raise ValueError(
            f"counts sum to {total.flatten().tolist()}; count at least one batch before asking for perplexity"
        )
    return torch.special.entr(counts.double() / total).sum(-1).exp().mean().item()


def bits_per_image(length: int, codebook_size: int) -> float:
    """length log2 K: the capacity of `length` tokens, in bits."""
    if length < 1 or codebook_size < 1:
        raise ValueError(f"length {length}, codebook size {codebook_size}: both must be at least 1")
    return length * math.log2(codebook_size)
