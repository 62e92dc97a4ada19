"""One autoregressive flow over the tokens of an image, as a causal transformer.

For tokens x_0 .. x_{N-1}, each of D numbers, in the order of the flow (TarFlow: Zhai et al. 2024, arXiv 2412.06329; the idea:
Papamakarios et al. 2017, arXiv 1705.07057):

    z_i = (x_i - mu_i) exp(-alpha_i)          (mu_i, alpha_i) = head(transformer(x_0 .. x_{i-1}, class))_i
    x_i = z_i exp(alpha_i) + mu_i             ln|det dz/dx| = -sum of all alpha

The forward pass evaluates all N tokens at once; the inverse needs one evaluation per token. The head is initially zero, so a new
flow is the identity. Position i of the transformer's input holds x_{i-1}, and zeros at i = 0, so that the first token has a
class-dependent mean and scale too (in the paper that token is unchanged).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.tokenizers.attention import SelfAttention, linear
from midway.tokenizers.recomputed import Recomputed

_STD = 0.02  # of position and class embeddings at initialisation


@dataclass
class KeyValues:
    """Keys and values (B, heads, N, d) of one layer, of which the first `length` positions are filled."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values so far, k and v (B, heads, n, d) the last of them."""
        first, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, first : self.length] = k
        self.values[:, :, first : self.length] = v
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]


class CausalAttention(SelfAttention):
    """(B, N, width) -> the same shape; position i attends to 0 .. i."""

    def forward(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        """With a `past`, x is the next position (B, 1, width), and is appended to it."""
        q, k, v = self.split(x)
        if past is not None:
            k, v = past.append(k, v)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=past is None))


class CausalBlock(Recomputed):
    """Pre-norm residual attention and MLP."""

    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        inner = int(width * mlp_ratio)
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads)
        self.mlp = nn.Sequential(linear(width, inner), nn.GELU(approximate="tanh"), linear(inner, width))

    def compute(self, x: Tensor, past: KeyValues | None = None) -> Tensor:
        x = x + self.attention(self.norm_1(x), past)
        return x + self.mlp(self.norm_2(x))


class AutoregressiveFlow(nn.Module):
    """Tokens (B, N, D) <-> z (B, N, D); `flipped` goes from the last token to the first.

    Labels int64 (B,), None without classes; the label `classes` means "no class".
    """

    def __init__(
        self, shape: tuple[int, int], width: int, depth: int, heads: int, mlp_ratio: float, classes: int, flipped: bool
    ) -> None:
        super().__init__()
        (self.tokens, dim), self.flipped = shape, flipped
        self.embed = linear(dim, width)
        self.positions = nn.Parameter(_STD * torch.randn(self.tokens, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=_STD)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.head_shape = (heads, width // heads)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * dim)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """z (B, N, D) and ln|det dz/dx| (B,), in float32 or better."""
        x = self.ordered(x)
        mean, log_scale = self.moments(x, labels).chunk(2, dim=2)
        return self.ordered((x - mean) * (-log_scale).exp()), -log_scale.flatten(1).sum(1)

    def ordered(self, tokens: Tensor) -> Tensor:
        """Tokens of an image in the order of this flow, and back: the function is its own inverse."""
        return tokens.flip(1) if self.flipped else tokens

    def moments(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """(mu, alpha) side by side, (B, N, 2 D), of tokens x (B, N, D) in this flow's order, all at once."""
        h = F.pad(self.embed(x[:, :-1]), (0, 0, 1, 0)) + self.positions
        h = h if self.label is None else h + self.label(labels)[:, None]
        for block in self.blocks:
            h = block(h)
        return self._head(h)

    # ---- one token after the other ----

    def inverse(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Tokens x (B, N, D) of z (B, N, D), one after another with cached keys and values."""
        past, x = self._empty_cache(len(z)), []
        for z_i in self.ordered(z).unbind(1):
            mean, log_scale = self.next_moments(x[-1] if x else None, labels, past).chunk(2, dim=-1)
            x.append(z_i * log_scale.exp() + mean)
        return self.ordered(torch.stack(x, dim=1))

    def _empty_cache(self, count: int) -> list[KeyValues]:
        """Empty keys and values of `count` samples, one for each layer."""
        heads, size = self.head_shape
        empty = [self.positions.new_empty(2, count, heads, self.tokens, size) for _ in self.blocks]
        return [KeyValues(keys, values) for keys, values in empty]

    def next_moments(self, last: Tensor | None, labels: Tensor | None, past: list[KeyValues]) -> Tensor:
        """(mu_i, alpha_i), (B, 2 D), of the token that follows `last` = x_{i-1} (B, D), None at i = 0; extends `past`."""
        i, count = past[0].length, past[0].keys.shape[0]
        h = self.positions[i].expand(count, 1, -1)
        h = h if last is None else h + self.embed(last)[:, None]
        h = h if self.label is None else h + self.label(labels)[:, None]
        for block, layer in zip(self.blocks, past, strict=True):
            h = block.compute(h, layer)  # pyright: ignore[reportCallIssue]
        return self._head(h)[:, 0]

    def _head(self, h: Tensor) -> Tensor:
        """In the dtype of the weights also under autocast: the log-determinant is a sum of its outputs."""
        with torch.autocast(h.device.type, enabled=False):
            return self.head(self.norm(h.to(self.head.weight.dtype)))
