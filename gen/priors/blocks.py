"""A transformer over tokens with places in the plane, causal or not.

    h = h + drop(attention(norm(h)))        h = h + drop(down(silu(gate(norm(h))) * up(norm(h))))

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), SwiGLU with a hidden layer of 8/3 of the width (Shazeer 2020, arXiv
2002.05202), RMSNorm on queries and keys (Dehghani et al. 2023, arXiv 2302.05442), and rotations by place (Su et al. 2021, arXiv
2104.09864): half of a head's channels are rotated by the row, half by the column, so that attention depends on differences of
places alone.

With a `Cache` a causal trunk takes tokens one after the other and computes each once (`Trunk.step`).
"""

import math
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.networks.layers import drop, normed, rotated, rotation, swiglu, swiglu_width
from midway.gen.training.batches import Context
from midway.tokenizers.recomputed import Recomputed


class Cache:
    """Keys and values of the first `length` tokens in every layer, with room for more: (B, heads, room, C)."""

    def __init__(self, depth: int, room: int) -> None:
        self.room, self.length = room, 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * depth

    def added(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, with those of the next tokens, (B, heads, n, C)."""
        shape = (*k.shape[:2], self.room, k.shape[3])
        keys, values = self.layers[layer] or (k.new_empty(shape), v.new_empty(shape))
        self.layers[layer], end = (keys, values), self.length + k.shape[2]
        keys[:, :, self.length : end], values[:, :, self.length : end] = k, v
        return keys[:, :, :end], values[:, :, :end]


class Block(Recomputed):
    """Attention and SwiGLU; `layer` keeps its dropout masks apart from those of other blocks."""

    def __init__(self, width: int, heads: int, dropout: float, layer: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.dropout, self.layer, self.causal = heads, dropout, layer, causal
        inner = swiglu_width(width)
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, turn: Tensor, context: Context | None = None, cache: Cache | None = None
    ) -> Tensor:
        """x (B, N, W) -> (B, N, W); with a context, under dropout; with a cache, of the tokens after those in it."""
        mixed = self._attend(normed(x, self.norm_1), turn, cache)
        x = x + drop(mixed, self.dropout, context, f"dropout {self.layer} attention")
        inner = swiglu(normed(x, self.norm_2), self.up, self.down)
        return x + drop(inner, self.dropout, context, f"dropout {self.layer} mlp")

    def _attend(self, x: Tensor, turn: Tensor, cache: Cache | None) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = rotated(normed(q, self.norm_q), turn), rotated(normed(k, self.norm_k), turn)
        if cache is not None:
            k, v = cache.added(self.layer, k, v)
        # a new token sees all that are before it
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and (cache is None or tokens > 1))
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Trunk(nn.Module):
    """Tokens (B, N, W) at places (N, 2) or (B, N, 2) -> hidden (B, N, W), normed. Causal: token n sees tokens 0 .. n."""

    compilable: ClassVar[bool] = True
    """`forward`: the same shapes in every step of a training."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float, causal: bool) -> None:
        super().__init__()
        self.channels = width // heads
        self.blocks = nn.ModuleList(Block(width, heads, dropout, layer, causal) for layer in range(depth))
        self.norm = nn.RMSNorm(width)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))  # so that the sum over layers stays of one size
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * depth) if last else 0.02)

    def forward(self, x: Tensor, places: Tensor, context: Context | None = None) -> Tensor:
        turn = rotation(places, self.channels)
        for block in self.blocks:
            x = block(x, turn, context)
        return normed(x, self.norm)

    def step(self, x: Tensor, places: Tensor, cache: Cache) -> Tensor:
        """Hidden (B, n, W) of the next tokens (B, n, W), at places (n, 2): what a causal `forward` of all has there.

        ValueError for several tokens after others. Not compiled, as every length would be a graph of its own.
        """
        if x.shape[1] > 1 and cache.length:
            raise ValueError(f"{x.shape[1]} tokens after {cache.length}: only the first ones come together")
        turn = rotation(places, self.channels)
        for block in self.blocks:
            x = cast(Block, block).compute(x, turn, cache=cache)
        cache.length += x.shape[1]
        return normed(x, self.norm)
