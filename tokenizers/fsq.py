"""Finite scalar quantization: each channel is rounded to one of L levels (Mentzer et al. 2023, arXiv 2309.15505).

One affine map joins the two ways to write a channel, a digit in {0, ..., L - 1} and a code of about [-1, 1]:

    code = (digit - c) / c          digit = round(latent c + c), clamped to {0, ..., L - 1}

    form "tanh" (the paper, app. A.1)    c = L // 2
        half = (L - 1)(1 + 1e-3) / 2,  offset = 1/2 if L is even else 0,  shift = atanh(offset / half)
        latent(z) = (tanh(z + shift) half - offset) / c
    form "sigmoid"                       c = (L - 1) / 2
        latent(z) = 2 sigmoid(z) - 1,    so that digit = round((L - 1) sigmoid(z))

    index = sum_i digit_i basis_i,   basis_i = prod_{j < i} L_j      (mixed radix, int64 from end to end)

The paper's listing has tan for atanh and 1 - 1e-3 for 1 + 1e-3: with atanh z = 0 is exactly code 0, and with the plus
sign both outermost levels are within reach. There is no loss, no state and no table of codes.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from midway.tokenizers.base import (
    Quantized,
    Quantizer,
    check_channels,
    check_indices,
    discrete,
    float32_island,
    straight_through,
)

Form = Literal["tanh", "sigmoid"]

FSQ_LEVELS: dict[int, tuple[int, ...]] = {  # by bits; arXiv 2309.15505, Table 1: every L >= 5
    8: (8, 6, 5),
    10: (8, 5, 5, 5),
    12: (7, 5, 5, 5, 5),
    14: (8, 8, 8, 6, 5),
    16: (8, 8, 8, 5, 5, 5),
}
_MARGIN = 1e-3
_MAX_LEVEL = 2**16  # beyond it float32 codes of one channel are too close to be told apart safely


class FSQ(Quantizer):
    """One channel per entry of `levels`; K is their product. float32 inside, whatever the caller's autocast."""

    levels: Tensor
    basis: Tensor

    def __init__(self, levels: Sequence[int], form: Form = "tanh") -> None:
        super().__init__()
        _check(levels, form)
        self.form: Form = form
        self.dim = len(levels)
        self.codebook_size = self._size = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # Integers, because `module.to(torch.bfloat16)` leaves them alone; not in the checkpoint, because config has them.
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64), persistent=False)
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.int64), persistent=False)

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, D, *S) -> codes in [-1, 1]; no losses. Gradient: that of `latents`."""
        with float32_island(z):
            latents = self.latents(z)
            digits = self.latents_to_digits(latents.detach())
            codes = straight_through(self.digits_to_codes(digits), latents)
            return discrete(codes, self.digits_to_indices(digits), {}, codes.new_zeros(()), self._size)

    def latents(self, z: Tensor) -> Tensor:
        """The bounded value in code units, (B, D, *S) float32; even tanh levels reach from -1 to 1 - 2/L."""
        check_channels(z, self.dim)
        with float32_island(z):
            if self.form == "sigmoid":
                return 2 * torch.sigmoid(z.float()) - 1
            half, offset, shift = (_channelwise(v, z) for v in tanh_constants(self.levels))
            return (torch.tanh(z.float() + shift) * half - offset) / _channelwise(self._centre(), z)

    def snap(self, latents: Tensor) -> Tensor:
        """The nearest code: rounds in the bounded space, with no second tanh."""
        return self.digits_to_codes(self.latents_to_digits(latents))

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self.digits_to_codes(self.indices_to_digits(indices))

    def codes_to_indices(self, codes: Tensor) -> Tensor:
        return self.digits_to_indices(self.latents_to_digits(codes))

    def latents_to_digits(self, latents: Tensor) -> Tensor:
        """(B, D, *S) -> int64 digits (B, D, *S), digit i in {0, ..., L_i - 1}."""
        check_channels(latents, self.dim, "latents")
        with float32_island(latents):
            centre = _channelwise(self._centre(), latents)
            digits = torch.round(latents.float() * centre + centre).to(torch.int64)
            return digits.clamp(min=0).minimum(_channelwise(self.levels - 1, latents))

    def digits_to_codes(self, digits: Tensor) -> Tensor:
        """int64 digits (B, D, *S) -> codes, the same shape, float32."""
        centre = _channelwise(self._centre(), digits)
        return (digits - centre) / centre

    def digits_to_indices(self, digits: Tensor) -> Tensor:
        """int64 digits (B, D, *S) -> indices (B, *S); the first channel is the least significant."""
        return (digits * _channelwise(self.basis, digits)).sum(1)

    def indices_to_digits(self, indices: Tensor) -> Tensor:
        """Indices (B, *S) int64 -> digits (B, D, *S): the tokens of a factorised prior."""
        check_indices(indices, self._size)
        expanded = indices.to(torch.int64).unsqueeze(1)
        basis, levels = _channelwise(self.basis, expanded), _channelwise(self.levels, expanded)
        return torch.div(expanded, basis, rounding_mode="floor") % levels

    def extra_repr(self) -> str:
        return f"levels={self.levels.tolist()}, form={self.form!r}"

    def _centre(self) -> Tensor:
        """c, (D,) float32."""
        return ((self.levels - 1) / 2 if self.form == "sigmoid" else self.levels // 2).float()


def tanh_constants(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(half, offset, shift) of the tanh form for levels (D,), float32."""
    half = (levels - 1).float() * ((1 + _MARGIN) / 2)
    offset = (levels % 2 == 0).float() / 2
    return half, offset, torch.atanh(offset / half)


def _channelwise(vector: Tensor, like: Tensor) -> Tensor:
    """(D,) -> (D, 1, ..., 1), to broadcast over (B, D, *S)."""
    return vector.view(-1, *[1] * (like.ndim - 2))


def _check(levels: Sequence[int], form: str) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; choose 'tanh' or 'sigmoid'")
    if not levels or any(level < 2 or level > _MAX_LEVEL for level in levels):
        raise ValueError(f"levels are {list(levels)}; give at least one, each from 2 to {_MAX_LEVEL}")
    if form == "tanh" and min(levels) == 2:
        raise ValueError(
            f"levels are {list(levels)}; tanh puts nearly all of N(0, 1) in one bin at L = 2: form='sigmoid'"
        )
    if math.prod(levels) >= 2**63:
        raise ValueError(
            f"levels {list(levels)} make {math.prod(levels)} codes; an int64 index allows fewer than 2**63"
        )
