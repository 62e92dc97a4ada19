"""Self-attention, for sequences of tokens and for maps, and the transformer block made of it.

    attention(x) = out(softmax(q k^T / sqrt(d)) v)      q, k, v = linear(x) in heads of d channels
                                                        q <- scale q / rms(q),  k <- k / rms(k)
    map          x + attention(norm(x)), every position a token; `out` starts at zero, so that it starts as the identity
    block        x = x + attention(norm(x));   x = x + mlp(norm(x))

Attention: Vaswani et al. 2017, arXiv 1706.03762. Normalised queries and keys keep the logits bounded in bfloat16: Esser et al.
2024, arXiv 2403.03206, section 5.3.2; theirs scale k too, which the product makes one. In the middle of a convolutional
autoencoder: Esser et al. 2021, arXiv 2012.09841. Norms before, not after (Xiong et al. 2020, arXiv 2002.04745), as in ViT
(Dosovitskiy et al. 2021, arXiv 2010.11929).

N tokens cost N^2 in time, but not in memory where torch has a fused kernel.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.precision import widened
from midway.tokenizers.recomputed import Recomputed

_HEAD = 64  # channels of a head in a map: what fused kernels are made for


class SelfAttention(nn.Module):
    """(B, N, width) -> the same; `heads` divides `width`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        check_heads(width, heads)
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.scale = nn.Parameter(torch.ones(width // heads))
        self.out = linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.split(x)))

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, width) -> queries, keys and values of all heads, each (B, heads, N, d)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return (_normalised(q) * self.scale).to(v.dtype), _normalised(k).to(v.dtype), v

    def merge(self, mixed: Tensor) -> Tensor:
        """(B, heads, N, d) -> (B, N, width)."""
        return self.out(mixed.transpose(1, 2).flatten(2))


class AttentionBlock(Recomputed):
    """Maps (B, width, h, w) -> the same; the identity at initialisation. Heads of 64 channels if they divide `width`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(math.gcd(8, width), width)
        self.attention = SelfAttention(width, 1 if width % _HEAD else width // _HEAD)
        nn.init.zeros_(self.attention.out.weight)

    def compute(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # a view if x is channels_last, and so is the way back
        return x + self.attention(tokens).transpose(1, 2).unflatten(2, x.shape[2:])


class TransformerBlock(Recomputed):
    """(B, N, width) -> the same, with an MLP of four times the width."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.mlp = nn.Sequential(linear(width, 4 * width), nn.GELU(approximate="tanh"), linear(4 * width, width))

    def compute(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


def _normalised(x: Tensor) -> Tensor:
    """x (..., d) / its root mean square over d, float32 or float64."""
    return F.rms_norm(widened(x), x.shape[-1:], eps=1e-6)


def linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts as in ViT: Glorot's uniform weights (Glorot and Bengio 2010), zero bias."""
    layer = nn.Linear(in_features, out_features)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def check_heads(width: int, heads: int) -> None:
    """ValueError unless `heads` divides `width`."""
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"width {width} cannot be divided into {heads} heads: choose a divisor of the width")
