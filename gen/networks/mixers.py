"""How the tokens of an attention layer mix: softmax or linear attention, with or without rotations R by place.

    softmax  o_m = sum_n softmax_n(c (R_m q_m) . (R_n k_n)) v_n
    linear   o_m = sum_n (R_m phi(q_m)) . (R_n phi(k_n)) v_n / sum_n phi(q_m) . phi(k_n),        phi(x) = elu(x) + 1

Linear attention is Katharopoulos et al. 2020, arXiv 2006.16236, eq. 4 to 7: sums over n come first, so its cost is linear in the
number of tokens. Rotations, as of Su et al. 2021, arXiv 2104.09864, act in its numerator alone (their eq. 19), so that the
denominator stays positive. In both, places enter by their differences alone.
"""

import math
from typing import Literal, Protocol

from torch import Tensor
from torch.nn import functional as F

from midway.gen.networks.layers import Pairs, rotated

MixerName = Literal["softmax", "linear"]
Scale = Literal["fixed", "tokens"]
TOKENS = 256
"""Number of tokens at which both scales are the same: 16 x 16 patches."""


class Mixer(Protocol):
    """q, k, v (B, heads, N, C), a `rotation` (2, N, C / 2) or None, the factor c of the logits, and the channels that are rotated
    together -> (B, heads, N, C)."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, turn: Tensor | None, scale: float | None, pairs: Pairs = "halves", /
    ) -> Tensor: ...


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, turn: Tensor | None, scale: float | None, pairs: Pairs = "halves"
) -> Tensor:
    """c is 1 / sqrt(C) where `scale` is None."""
    if turn is not None:
        q, k = rotated(q, turn, pairs), rotated(k, turn, pairs)
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


def phi(x: Tensor) -> Tensor:
    """elu(x) + 1 = x + 1 for x > 0, e^x below, where the sum would round to 0."""
    return F.relu(x) + x.clamp(max=0).exp()


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, turn: Tensor | None, scale: float | None, pairs: Pairs = "halves"
) -> Tensor:
    """Has no logits, so `scale` does not act. Sums over tokens are means, which half precision can hold."""
    q, k = phi(q), phi(k) / k.shape[-2]
    total = q @ k.sum(-2)[..., None]
    if turn is not None:
        q, k = rotated(q, turn, pairs), rotated(k, turn, pairs)
    return q @ (k.transpose(-2, -1) @ v) / total


MIXERS: dict[MixerName, Mixer] = {"softmax": softmax_attention, "linear": linear_attention}


def logit_scale(kind: Scale, tokens: int, channels: int, base: int) -> float | None:
    """c for so many tokens and channels of a head, `base` of them at the base of muP; None for 1 / sqrt(channels).

    fixed: sqrt(base) / channels, which is 1 / sqrt(channels) at the base (Yang et al. 2022, arXiv 2203.03466, definition 4.1).
    tokens: times sqrt(log(tokens) / log(TOKENS)), by which the entropy of attention depends less on their number (Jin et al.
    2023, arXiv 2306.08645).
    """
    if kind == "fixed":
        return None if base == channels else math.sqrt(base) / channels
    return math.sqrt(math.log(tokens) / math.log(TOKENS) / channels) * math.sqrt(base / channels)
