"""Base of the vector quantizers: the nearest code, its losses, and the gradient through it.

    k = argmin_k |z - e_k|^2        codes = e_k exactly        (van den Oord et al. 2017, arXiv 1711.00937)

    "commitment"   mean((z - sg[e_k])^2)     weight `commitment`, beta, 0.25 in the paper
    "codebook"     mean((sg[z] - e_k)^2)     weight 1; only of codebooks that learn by gradient (eq. 3)

    `normalize`: z and e are unit vectors, in the search, the losses and the output (ViT-VQGAN: Yu et al. 2021, arXiv 2110.04627,
    section 3.2): few channels, 8 say, are then enough. The latents are the unit vectors.
    `gradient`: the gradient of the codes to the encoder: "straight_through", or "rotation" (rotation.py).
    `entropy_weight`: weight of "entropy_sample" - "entropy_batch" (code_entropy.py), both computed only if it is not 0. MaskGIT
    has weight 0.1 and temperature 0.01.

Means are over all numbers of z. taming-transformers and diffusers by default ("legacy") give beta to the other term.
"""

from abc import abstractmethod
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from midway.tokenizers.base import (
    Observation,
    Quantized,
    Quantizer,
    discrete,
    float32_island,
    straight_through,
    zero_of,
)
from midway.tokenizers.checks import check_channels, check_finite, check_indices, check_noise
from midway.tokenizers.clustering import nearest_code
from midway.tokenizers.code_entropy import code_entropy
from midway.tokenizers.losses import mean_square
from midway.tokenizers.rotation import rotated, unit

Gradient = Literal["straight_through", "rotation"]


class Codebook(Quantizer):
    """Base of the vector quantizers: a subclass defines its codes by `raw_codebook`."""

    learns_by_gradient: bool
    """Whether there is a loss that moves the codes."""

    def __init__(
        self,
        codebook_size: int,
        dim: int,
        commitment: float,
        normalize: bool,
        gradient: Gradient,
        entropy_weight: float,
        entropy_temperature: float,
    ) -> None:
        super().__init__()
        _check(codebook_size, dim, commitment, gradient, entropy_weight, entropy_temperature)
        self.codebook_size = self._size = codebook_size
        self.dim = dim
        self.commitment = commitment
        self.normalize = normalize
        self.gradient: Gradient = gradient
        self.entropy_weight, self.entropy_temperature = entropy_weight, entropy_temperature

    @abstractmethod
    def raw_codebook(self) -> Tensor:
        """The codes before `normalize`, (K, D) float32, with their gradient if they learn by it."""

    def codes(self) -> Tensor:
        """All codes, (K, D) float32: row k is code k."""
        raw = self.raw_codebook()
        return unit(raw) if self.normalize else raw

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, D, *S) -> codes, and the losses above. Gradient to z: that of the codes, by `gradient`, and of the losses.

        `noise` (B, 1 or more, *S): its first channel gives the priorities of vectors in restarts; without it a generator of each
        rank does. A NaN in z or in a code makes the losses NaN, and `update` learns nothing from that step.
        """
        latents = self.latents(z)
        rows = self._rows(latents.detach())
        priorities = self._priorities(noise, latents)
        with float32_island(z):
            book = self.codes()
            flat = nearest_code(rows, book.detach())
            indices = flat.view(z.shape[:1] + z.shape[2:])
            codes = F.embedding(indices, book).movedim(-1, 1)
            losses, loss = self._losses(latents, codes, book)
            loss = loss + zero_of(z)
            through = rotated if self.gradient == "rotation" else straight_through
            observation = Observation(rows, flat, priorities)
            return discrete(through(codes, latents), indices, losses, loss, self._size, observation)

    def latents(self, z: Tensor) -> Tensor:
        check_channels(z, self.dim)
        with float32_island(z):
            return unit(z.float()) if self.normalize else z.float()

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Of equal codes the one of the lowest index; code 0 where `latents` has a NaN."""
        check_channels(latents, self.dim, "latents")
        with float32_island(latents):
            book = self.codes().detach()
            flat = nearest_code(self._rows(latents.detach().float()), book)
            indices = flat.view(latents.shape[:1] + latents.shape[2:])
            return F.embedding(indices, book).movedim(-1, 1), indices

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        check_indices(indices, self._size)
        with float32_island(indices):
            return F.embedding(indices, self.codes().detach()).movedim(-1, 1)

    def distinct_in(self, dtype: torch.dtype) -> bool:
        if super().distinct_in(dtype):
            return True
        book = self.codes().detach()
        return torch.equal(book[nearest_code(book.to(dtype).float(), book)], book)  # equal codes are one

    def extra_repr(self) -> str:
        shown = f"codebook_size={self._size}, dim={self.dim}, commitment={self.commitment}"
        shown += ", normalize=True" if self.normalize else ""
        shown += f", gradient={self.gradient!r}" if self.gradient != "straight_through" else ""
        return shown + (f", entropy_weight={self.entropy_weight}" if self.entropy_weight else "")

    def _priorities(self, noise: Tensor | None, latents: Tensor) -> Tensor | None:
        """Of each vector in restarts, (N,) float32, uniform in (0, 1): ndtr(noise[:, 0]), the normal distribution function."""
        if noise is None or not self.noise_channels:
            return None
        check_noise(noise[:, :1], latents[:, :1])
        return torch.special.ndtr(noise[:, 0].to(latents)).flatten()

    def _losses(self, latents: Tensor, codes: Tensor, book: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Unweighted losses by name, and their weighted sum; latents and codes (B, D, *S), book (K, D)."""
        commitment = mean_square(latents, codes.detach())
        losses, loss = {"commitment": commitment}, self.commitment * commitment
        if self.learns_by_gradient:
            losses["codebook"] = mean_square(codes, latents.detach())
            loss = loss + losses["codebook"]
        if self.entropy_weight:
            sample, batch = code_entropy(self._rows(latents), book, self.entropy_temperature, shared=self.training)
            losses |= {"entropy_sample": sample, "entropy_batch": batch}
            loss = loss + self.entropy_weight * (sample - batch)
        return losses, loss

    def _rows(self, latents: Tensor) -> Tensor:
        """(B, D, *S) -> (B * S, D)."""
        return latents.movedim(1, -1).reshape(-1, self.dim)


def _check(
    size: int, dim: int, commitment: float, gradient: str, entropy_weight: float, entropy_temperature: float
) -> None:
    if size < 1 or dim < 1:
        raise ValueError(f"codebook_size {size}, dim {dim}: both must be at least 1")
    check_finite("commitment", commitment, ", 0.25 by default")
    if gradient not in get_args(Gradient):
        raise ValueError(f"gradient is {gradient!r}; choose 'straight_through' or 'rotation'")
    check_finite("entropy_weight", entropy_weight, ": 0 for none, 0.1 as in MaskGIT")
    check_finite("entropy_temperature", entropy_temperature, ", 0.01 by default", positive=True)
