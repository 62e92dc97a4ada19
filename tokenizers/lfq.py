"""Quantizers without a codebook: each channel is rounded to one of two values by its sign.

    bit_i = 1 if latent_i >= 0 else 0      code_i = +-a      index = sum_i bit_i 2^i, int64: the first channel is the lowest bit

LFQ (Yu et al. 2023, arXiv 2310.05737)     latents = z           a = 1
BSQ (Zhao et al. 2024, arXiv 2406.07548)   latents = z / |z|     a = 1 / sqrt(d): codes and latents are unit vectors

Both need the entropy loss, or most codes go unused. The soft assignment of latents u to codes is one of independent bits,

    p(c | u) ~ exp(-tau |u - c|^2)         p(bit_i = 1 | u) = sigmoid(4 tau a u_i)         tau = `inverse_temperature`

(for unit vectors this is exp(2 tau c . u): the same family as the paper's for BSQ, where tau is that of its published code), and

    "entropy_sample" = E[H(p | u)]         small if the bits are sure
    "entropy_batch"  = H(E p)              large if all codes are used alike; exact up to 20 bits, or by groups (entropy.py)
    "commitment"     = mean((u - sg[code])^2) over all numbers of u

    loss = commitment "commitment" + entropy_weight ("entropy_sample" - diversity_gamma "entropy_batch")

A term whose weight is 0 is not computed and has no entry in `losses`. In training under torch.distributed both entropies are
those of the samples of all processes together, so every process must run forward as often; the commitment, like every other
loss, is each process's own mean. Entropies of micro-batches are not added up: each is its own batch. Zero is rounded up (LFQ's
paper: down). Other code may count the last channel as the lowest bit; such indices are the same bits reversed. There is no
state. A NaN counts as -a, and makes the losses NaN.
"""

import torch
from torch import Tensor

from midway.tokenizers.base import Quantized, Quantizer, discrete, float32_island, straight_through, zero_of
from midway.tokenizers.checks import check_channels, check_finite, check_indices
from midway.tokenizers.entropy import batch_entropy, check_group, sample_entropy
from midway.tokenizers.rotation import unit

MAX_BITS = 62  # half of int64, so that a few indices more, such as a mask, still fit


class LFQ(Quantizer):
    """Codes {-1, 1}^bits of unbounded latents. Weights and tau by default as in Open-MAGVIT2.

    bits: 1 to 62, one a channel. Weights are finite and >= 0, inverse_temperature > 0. `entropy_group`: bits in a group of the
    batch entropy, at most 20; None for all at once, which is exact. float32 inside, whatever the caller's autocast.
    """

    amplitude: float = 1.0
    """a: codes are +a or -a in every channel."""

    def __init__(
        self,
        bits: int,
        commitment: float = 0.25,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        inverse_temperature: float = 100.0,
        entropy_group: int | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(bits, int) or not 1 <= bits <= MAX_BITS:
            raise ValueError(f"bits is {bits!r}; give an integer from 1 to {MAX_BITS}, that indices fit into int64")
        weights = {"commitment": commitment, "entropy_weight": entropy_weight, "diversity_gamma": diversity_gamma}
        for name, weight in weights.items():
            check_finite(name, weight, ", 0 to leave the term out")
        hint = ": 100 for sure bits, 1 for soft ones"
        check_finite("inverse_temperature", inverse_temperature, hint, positive=True)
        if entropy_group is not None or (entropy_weight and diversity_gamma):
            check_group(bits, entropy_group)
        self.dim = bits
        self.codebook_size = self._size = 2**bits
        self.commitment, self.entropy_weight, self.diversity_gamma = commitment, entropy_weight, diversity_gamma
        self.inverse_temperature = inverse_temperature
        self.entropy_group = entropy_group

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, bits, *S) -> codes, and the losses above. Gradient: that of `latents`, and of the losses; `noise` is ignored."""
        with float32_island(z):
            latents = self.latents(z)
            bits = latents.detach() >= 0
            codes = self.bits_to_codes(bits)
            losses, loss = self._losses(latents, codes)
            codes, loss = straight_through(codes, latents), loss + zero_of(z)
            return discrete(codes, self.bits_to_indices(bits), losses, loss, self._size)

    def latents(self, z: Tensor) -> Tensor:
        """z itself in float32."""
        check_channels(z, self.dim)
        return z.float()

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        check_channels(latents, self.dim, "latents")
        bits = latents >= 0
        return self.bits_to_codes(bits), self.bits_to_indices(bits)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self.bits_to_codes(self.indices_to_bits(indices))

    def distinct_in(self, dtype: torch.dtype) -> bool:
        """Always: signs survive rounding."""
        return True

    def bits_to_codes(self, bits: Tensor) -> Tensor:
        """bool (B, bits, *S) -> codes +-a, the same shape, float32."""
        return (bits.to(torch.float32) * 2 - 1) * self.amplitude

    def bits_to_indices(self, bits: Tensor) -> Tensor:
        """bool (B, bits, *S) -> indices (B, *S)."""
        return (bits.to(torch.int64) << self._places(bits)).sum(1)

    def indices_to_bits(self, indices: Tensor) -> Tensor:
        """Indices (B, *S) int64 -> bool (B, bits, *S): the tokens of a factorised prior."""
        check_indices(indices, self._size)
        expanded = indices.to(torch.int64).unsqueeze(1)
        return (expanded >> self._places(expanded)) % 2 == 1

    def extra_repr(self) -> str:
        entropy = f"entropy_weight={self.entropy_weight}, diversity_gamma={self.diversity_gamma}"
        entropy += f", inverse_temperature={self.inverse_temperature}, entropy_group={self.entropy_group}"
        return f"bits={self.dim}, commitment={self.commitment}, {entropy}"

    def _places(self, like: Tensor) -> Tensor:
        """0, ..., bits - 1, to broadcast over (B, bits, *S)."""
        return torch.arange(self.dim, device=like.device).view(-1, *[1] * (like.ndim - 2))

    def _losses(self, latents: Tensor, codes: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Unweighted losses by name, and their weighted sum; latents and codes (B, bits, *S)."""
        losses: dict[str, Tensor] = {}
        loss = latents.new_zeros(())
        if self.commitment:
            losses["commitment"] = (latents - codes).square().sum() / max(latents.numel(), 1)
            loss = loss + self.commitment * losses["commitment"]
        if self.entropy_weight:
            rows = latents.movedim(1, -1).reshape(-1, self.dim)
            logits = rows * (4 * self.inverse_temperature * self.amplitude)
            losses["entropy_sample"] = entropy = sample_entropy(logits, shared=self.training)
            if self.diversity_gamma:
                losses["entropy_batch"] = batch_entropy(logits, self.entropy_group, shared=self.training)
                entropy = entropy - self.diversity_gamma * losses["entropy_batch"]
            loss = loss + self.entropy_weight * entropy
        return losses, loss


class BSQ(LFQ):
    """LFQ of unit vectors: codes {-1, 1}^bits / sqrt(bits). Weights and tau by default as in the authors' code.

    No latent is further than sqrt(2) from its code, so the commitment is off by default.
    """

    def __init__(
        self,
        bits: int,
        commitment: float = 0.0,
        entropy_weight: float = 0.1,
        diversity_gamma: float = 1.0,
        inverse_temperature: float = 1.0,
        entropy_group: int | None = None,
    ) -> None:
        super().__init__(bits, commitment, entropy_weight, diversity_gamma, inverse_temperature, entropy_group)
        self.amplitude = bits**-0.5

    def latents(self, z: Tensor) -> Tensor:
        """z / |z| in float32; vectors shorter than 1e-8 stay as they are."""
        check_channels(z, self.dim)
        with float32_island(z):
            return unit(z.float())
