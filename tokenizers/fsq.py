"""Finite scalar quantization: each channel is rounded to one of L levels (Mentzer et al. 2023, arXiv 2309.15505).

One affine map joins the two ways to write a channel, a digit in {0, ..., L - 1} and a code of about [-1, 1]:

    code = (digit - c) / a          digit = round(latent a + c), clamped to {0, ..., L - 1}          a = c but for "fsp"

    form "tanh" (the paper, app. A.1)    c = L // 2
        half = (L - 1)(1 + 1e-3) / 2,  offset = 1/2 if L is even else 0,  shift = atanh(offset / half)
        latent(z) = (tanh(z + shift) half - offset) / c
    all others                           c = (L - 1) / 2: codes span [-1, 1] and are symmetric about 0, for even L too
        "tanh", symmetric                latent(z) = tanh(z)                  (Parker et al. 2024, arXiv 2411.19842, sec. 3.2)
        "sigmoid"                        latent(z) = 2 sigmoid(z) - 1,        so that digit = round((L - 1) sigmoid(z))
        "ifsq", odd L                    latent(z) = 2 sigmoid(1.6 z) - 1     (iFSQ, arXiv 2601.17124)
        "fsp", a = L / 2                 latent(z) = 2 Phi(z) - 1             (FSP of VP-VAE, arXiv 2602.17133)

    index = sum_i digit_i basis_i,   basis_i = prod_{j < i} L_j      (mixed radix, int64 from end to end)

As tanh(z) = 2 sigmoid(2 z) - 1, three of them are one function of slope 2, 1 and 1.6. A slope only rescales z, which the last
layer of an encoder can do, so it is no option of its own; 1.6 and odd L, where 0 is a code, are what iFSQ is. FSP cuts [-1, 1]
into L equal bins, on which a normal z is spread evenly, and codes are their centres.

Noise dropout (arXiv 2411.19842, sec. 3.2), only in training: with probability p a whole sample is not rounded but has

    code = clamp(latent + u / a),   u ~ U(-1/2, 1/2) per element: half a step to either side; within the range of codes

FSP has p = 1 by default: its decoder never sees a code in training, only noise of one bin, within [-1, 1].

The indices are still those of the rounded value: of these samples alone, codes differ from indices_to_codes(indices), by
one step of 1 / c at most. The draw is a function of the noise given to `forward`.

The paper's listing has tan for atanh and 1 - 1e-3 for 1 + 1e-3: with atanh z = 0 is exactly code 0, and with the plus
sign both outermost levels are within reach. Half-way between two codes the even digit wins (arXiv 2411.19842: the upper);
for symmetric codes of even L, z = 0 is such a point. There is no loss, no state and no table of codes.
"""

import functools
import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import Literal, get_args

import torch
from torch import Tensor

from midway.tokenizers.base import Channel, Quantized, Quantizer, discrete, float32_island, straight_through, zero_of
from midway.tokenizers.checks import check_channels, check_indices, dropout_noise, one_a_sample
from midway.tokenizers.losses import mean

Form = Literal["tanh", "sigmoid", "ifsq", "fsp"]

FSQ_LEVELS: dict[int, tuple[int, ...]] = {  # by bits; arXiv 2309.15505, Table 1 and app. A.4.1
    4: (5, 3),
    6: (8, 8),
    8: (8, 6, 5),
    9: (8, 8, 8),
    10: (8, 5, 5, 5),
    11: (8, 8, 6, 5),
    12: (7, 5, 5, 5, 5),
    14: (8, 8, 8, 6, 5),
    16: (8, 8, 8, 5, 5, 5),
}
_MARGIN = 1e-3
_SLOPE = {"sigmoid": 1.0, "ifsq": 1.6}
_MAX_LEVEL = 2**16  # beyond it float32 codes of one channel are too close to be distinguished safely
_MAX_SIZE = 2**62  # half of int64, so that a few indices more, such as a mask, still fit


class FSQ(Quantizer):
    """One channel per entry of `levels`; K is their product. float32 inside, whatever the caller's autocast.

    `symmetric` concerns the tanh form, the others always are; L = 2 needs it, or another form. `noise_dropout` is p in [0, 1],
    by default 0, of fsp 1; above 0, `forward` takes noise of D + 1 channels in training. levels: 2 to 2**16 each, K at most
    2**62.
    """

    levels: Tensor
    basis: Tensor

    def __init__(
        self, levels: Sequence[int], form: Form = "tanh", symmetric: bool = False, noise_dropout: float | None = None
    ) -> None:
        super().__init__()
        if noise_dropout is None:
            noise_dropout = 1.0 if form == "fsp" else 0.0
        _check(levels, form, symmetric, noise_dropout)
        self.form: Form = form
        self.symmetric = symmetric
        self.noise_dropout = noise_dropout
        self._shifted = form == "tanh" and not symmetric
        self.outer_z = _outer_z(levels, form, self._shifted)
        self.dim = len(levels)
        self.noise_channels = self.dim + 1 if noise_dropout else 0
        self.codebook_size = self._size = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        # Integers, because `module.to(torch.bfloat16)` leaves them alone; not in the checkpoint, because config has them.
        self.register_buffer("levels", torch.tensor(levels, dtype=torch.int64), persistent=False)
        self.register_buffer("basis", torch.tensor(basis, dtype=torch.int64), persistent=False)

    def start_channels(self) -> list[Channel]:
        """Components rotated to equal variances, since every channel has about as many levels.

        Of tanh(z) = 2 sigmoid(2 z) - 1 the standard deviation is 1: then a normal distribution uses the levels about evenly.
        """
        return [Channel(i, 2 / _SLOPE.get(self.form, 2.0), balanced=True) for i in range(self.dim)]

    def forward(self, z: Tensor, noise: Tensor | None = None) -> Quantized:
        """z (B, D, *S) -> codes in [-1, 1]; no losses. Gradient: that of `latents`, with noise dropout too.

        `noise` (B, D + 1, *S), standard normal, is used in training by noise dropout only, which needs it: D channels
        give u, the last one at its first position decides whether the sample is rounded.
        """
        with float32_island(z):
            latents = self.latents(z)
            digits = self.latents_to_digits(latents.detach())
            codes = self.digits_to_codes(digits)
            if self.training and self.noise_dropout:
                codes = self._drop(codes, latents.detach(), noise)
            codes = straight_through(codes, latents)
            return discrete(codes, self.digits_to_indices(digits), {}, zero_of(z), self._size)

    def latents(self, z: Tensor) -> Tensor:
        """The bounded value in code units, (B, D, *S) float32; even levels of the paper's form reach from -1 to 1 - 2/L."""
        check_channels(z, self.dim)
        with float32_island(z):
            if self.form == "fsp":
                return 2 * torch.special.ndtr(z.float()) - 1
            if self.form != "tanh":
                return 2 * torch.sigmoid(z.float() * _SLOPE[self.form]) - 1
            if self.symmetric:
                return torch.tanh(z.float())
            half, offset, shift = (channelwise(v, z) for v in tanh_constants(self.levels))
            return (torch.tanh(z.float() + shift) * half - offset) / channelwise(self._centre(), z)

    def nearest(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Rounds in the bounded space, with no second tanh."""
        digits = self.latents_to_digits(latents)
        return self.digits_to_codes(digits), self.digits_to_indices(digits)

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        return self.digits_to_codes(self.indices_to_digits(indices))

    def distinct_in(self, dtype: torch.dtype) -> bool:
        """See `Quantizer.distinct_in`: from the levels of the channels, since the codes themselves may be 2**62."""
        tops = channelwise(self.levels - 1, self.levels.view(1, -1, 1))
        digits = torch.arange(int(self.levels.max()), device=tops.device).minimum(tops).unsqueeze(0)
        return torch.equal(self.latents_to_digits(self.digits_to_codes(digits).to(dtype)), digits)

    def latents_to_digits(self, latents: Tensor) -> Tensor:
        """(B, D, *S) -> int64 digits (B, D, *S), digit i in {0, ..., L_i - 1}."""
        check_channels(latents, self.dim, "latents")
        with float32_island(latents):
            centre, scale = channelwise(self._centre(), latents), channelwise(self._scale(), latents)
            digits = torch.round(latents.float() * scale + centre).to(torch.int64)
            return digits.clamp(min=0).minimum(channelwise(self.levels - 1, latents))

    def digits_to_codes(self, digits: Tensor) -> Tensor:
        """int64 digits (B, D, *S) -> codes, the same shape, float32."""
        return (digits - channelwise(self._centre(), digits)) / channelwise(self._scale(), digits)

    def digits_to_indices(self, digits: Tensor) -> Tensor:
        """int64 digits (B, D, *S) -> indices (B, *S); the first channel is the least significant."""
        return (digits * channelwise(self.basis, digits)).sum(1)

    def indices_to_digits(self, indices: Tensor) -> Tensor:
        """Indices (B, *S) int64 -> digits (B, D, *S): the tokens of a factorised prior."""
        check_indices(indices, self._size)
        expanded = indices.to(torch.int64).unsqueeze(1)
        basis, levels = channelwise(self.basis, expanded), channelwise(self.levels, expanded)
        return torch.div(expanded, basis, rounding_mode="floor") % levels

    def extra_repr(self) -> str:
        options = f"symmetric={self.symmetric}, noise_dropout={self.noise_dropout}"
        return f"levels={self.levels.tolist()}, form={self.form!r}, {options}"

    def _centre(self) -> Tensor:
        """c, (D,) float32. (The quotient of integers would have the default dtype, which may be bfloat16.)"""
        return (self.levels // 2).float() if self._shifted else (self.levels - 1).float() / 2

    def _scale(self) -> Tensor:
        """a, (D,) float32."""
        return self.levels.float() / 2 if self.form == "fsp" else self._centre()

    def _drop(self, codes: Tensor, latents: Tensor, noise: Tensor | None) -> Tensor:
        """`codes`, but latents with uniform noise of one step in the samples that `noise` picks."""
        uniform = torch.special.ndtr(dropout_noise(noise, latents, self.noise_channels, "noise_dropout").to(latents))
        scale, tops = channelwise(self._scale(), latents), channelwise(self.levels - 1, latents)
        noisy = latents + (uniform[:, :-1] - 0.5) / scale
        dropped = one_a_sample(uniform) <= self.noise_dropout
        highest = torch.ones_like(scale) if self.form == "fsp" else tops / scale - 1
        return torch.where(dropped, noisy.clamp(min=-1).minimum(highest), codes)


def saturation(quantizer: FSQ, z: Tensor) -> dict[str, Tensor]:
    """How far z (B, D, *S) has run into the flat ends of the bound, where gradients vanish: float32 scalars for logs.

    "edge_mass": share of digits in the outermost bins, 0 and L - 1; 2 / L, averaged over channels, if all are used evenly.
    "mean_abs_z": mean |z|; 0.8 for a standard normal.
    """
    z = z.detach().float()
    lowest, highest = (channelwise(end, z) for end in _on(z.device, quantizer.outer_z))
    edge = (z < lowest) | (z > highest)
    return {"edge_mass": mean(edge.float()), "mean_abs_z": mean(z.abs())}


@functools.cache
def _on(device: torch.device, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    """float32 (rows, columns); cached, because every training step logs `saturation`."""
    return torch.tensor(rows, dtype=torch.float32, device=device)


def _outer_z(levels: Sequence[int], form: Form, shifted: bool) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The z (D,) below which a digit is 0, and those (D,) above which it is L - 1: where latent a + c is 1/2 and L - 3/2."""

    def z_of(value: float, level: int) -> float:  # of latent a + c
        if form == "fsp":
            return NormalDist().inv_cdf((value + 0.5) / level)
        if not shifted:
            return 2 / _SLOPE.get(form, 2.0) * math.atanh(2 * value / (level - 1) - 1)
        half, offset = (level - 1) * (1 + _MARGIN) / 2, (level % 2 == 0) / 2
        return math.atanh((value - level // 2 + offset) / half) - math.atanh(offset / half)

    return tuple(z_of(0.5, level) for level in levels), tuple(z_of(level - 1.5, level) for level in levels)


def tanh_constants(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(half, offset, shift) of the tanh form for levels (D,), float32."""
    half = (levels - 1).float() * ((1 + _MARGIN) / 2)
    offset = (levels % 2 == 0).float() / 2
    return half, offset, torch.atanh(offset / half)


def channelwise(vector: Tensor, like: Tensor) -> Tensor:
    """(D,) -> (D, 1, ..., 1), to broadcast over (B, D, *S)."""
    return vector.view(-1, *[1] * (like.ndim - 2))


def _check(levels: Sequence[int], form: str, symmetric: bool, noise_dropout: float) -> None:
    if form not in get_args(Form):
        raise ValueError(f"form is {form!r}; choose 'tanh', 'sigmoid', 'ifsq' or 'fsp'")
    if not levels or any(not isinstance(level, int) or level < 2 or level > _MAX_LEVEL for level in levels):
        raise ValueError(f"levels are {list(levels)}; give at least one, each an integer from 2 to {_MAX_LEVEL}")
    if form == "tanh" and min(levels) == 2 and not symmetric:
        raise ValueError(
            f"levels are {list(levels)}; tanh puts nearly all of N(0, 1) in one bin at L = 2: "
            "symmetric=True, or form='sigmoid'"
        )
    if form == "ifsq" and any(level % 2 == 0 for level in levels):
        raise ValueError(
            f"levels are {list(levels)}; iFSQ has odd ones only, so that 0 is a code: "
            "add or take 1, or choose form='sigmoid', which is the same but for the slope"
        )
    if math.prod(levels) > _MAX_SIZE:
        raise ValueError(f"levels {list(levels)} make {math.prod(levels)} codes; int64 indices allow up to 2**62")
    if not 0 <= noise_dropout <= 1:
        raise ValueError(f"noise_dropout is {noise_dropout}; give a probability in [0, 1], 0 to round always")
