"""DiT: a transformer over patches whose layers are modulated by time and class.

    h = patchify(x) + positions
    h = h + gate_1 * drop(attention(modulate(norm(h), shift_1, scale_1)))
    h = h + gate_2 * drop(mlp(modulate(norm(h), shift_2, scale_2)))  (shift, scale, gate) = linear(silu(time + class))

Peebles & Xie 2022, arXiv 2212.09748: adaLN-zero (the modulation starts at 0, so every block starts as the identity and the
network's first output is 0) and fixed 2-D sine-cosine positions. RMSNorm on queries and keys: Esser et al. 2024, arXiv
2403.03206, section 5.3.2. Norms, MLPs, rotations: layers.py; attention: mixers.py; `DiTConfig` has the switches.

With `conditioning` tokens time and class are tokens in front of the patches, as in Geng et al. 2025, arXiv 2512.02012, and blocks
have no modulation: norms have gamma and beta of their own, and the last layers of attention and MLP start at 0.

Dropout acts only in training, and its masks are functions of (seed, step, sample, layer): they are the same whatever batch a
sample comes in, and when activation checkpointing computes a block twice.
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.elementwise import GELU, gated, modulate, plus
from midway.gen.networks.layers import (
    Pairs,
    SwiGLU,
    drop,
    make_norm,
    normed,
    number_embedding,
    places_2d,
    positions_2d,
    rotation,
    swiglu_width,
)
from midway.gen.networks.mixers import MIXERS, Scale, logit_scale
from midway.gen.networks.network import Network, NetworkOutput
from midway.gen.training.batches import Context
from midway.tokenizers.recomputed import Recomputed
from midway.tokenizers.vit import patchify, unpatchify

TIME_TOKENS, CLASS_TOKENS = 4, 8
"""Of conditioning by tokens, as published."""


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, channels = config.width, config.width // config.heads
        self.heads, self.mix = config.heads, MIXERS[config.mixer]
        self.scale: Scale = config.attention_scale
        self.pairs: Pairs = config.details.rope_pairs
        self.base_channels = config.head_channels
        self.qkv = nn.Linear(width, 3 * width)
        eps = config.details.qk_norm_eps
        self.norm_q = nn.RMSNorm(channels, eps) if config.qk_norm else None
        self.norm_k = nn.RMSNorm(channels, eps) if config.qk_norm else None
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: Tensor | None = None) -> Tensor:
        batch, tokens, width = x.shape
        channels = width // self.heads
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, channels).permute(2, 0, 3, 1, 4)
        if self.norm_q is not None and self.norm_k is not None:
            q, k = normed(q, self.norm_q), normed(k, self.norm_k)
        mixed = self.mix(q, k, v, turn, logit_scale(self.scale, tokens, channels, self.base_channels), self.pairs)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(Recomputed):
    """Attention and MLP; `layer` keeps its dropout masks apart from those of other blocks."""

    def __init__(self, config: DiTConfig, layer: int) -> None:
        super().__init__()
        self.dropout, self.layer = config.dropout, layer
        width, inner, own = config.width, int(config.width * config.mlp_ratio), config.conditioning == "tokens"
        gains = own or config.details.norm_gains
        self.norm_1 = make_norm(config.norm, width, gains)
        self.norm_2 = make_norm(config.norm, width, gains, config.details.mlp_norm_eps)
        self.attention = Attention(config)
        if config.mlp == "swiglu":
            self.mlp = SwiGLU(width, swiglu_width(width, config.mlp_ratio))
        else:
            self.mlp = nn.Sequential(nn.Linear(width, inner), GELU(), nn.Linear(inner, width))
        self.modulation = None if own else nn.Linear(width, 6 * width)

    def start_as_identity(self) -> None:
        """Set to 0 what makes every branch 0: the gates or, without them, the last layers."""
        last = self.mlp.down if isinstance(self.mlp, SwiGLU) else cast(nn.Linear, self.mlp[2])
        for layer in (self.attention.out, last) if self.modulation is None else (self.modulation,):
            nn.init.zeros_(layer.weight)

    def compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, condition: Tensor, context: Context | None = None, turn: Tensor | None = None
    ) -> Tensor:
        """x (B, N, W) -> (B, N, W), for the modulation's condition (B, W); with a context, under dropout."""
        if self.modulation is None:
            x = plus(self._mixed(self.norm_1(x), context, turn), x)
            return plus(self._inner(self.norm_2(x), context), x)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=1)
        x = gated(self._mixed(modulate(self.norm_1(x), shift_1, scale_1), context, turn), gate_1, x)
        return gated(self._inner(modulate(self.norm_2(x), shift_2, scale_2), context), gate_2, x)

    def _mixed(self, x: Tensor, context: Context | None, turn: Tensor | None) -> Tensor:
        return drop(self.attention(x, turn), self.dropout, context, f"dropout {self.layer} attention")

    def _inner(self, x: Tensor, context: Context | None) -> Tensor:
        return drop(self.mlp(x), self.dropout, context, f"dropout {self.layer} mlp")


class DiT(Network):
    """The transformer; its hidden tokens are those after the middle block, unless another is taken."""

    positions: Tensor
    turn: Tensor | None

    def __init__(
        self, config: DiTConfig, channels: int, height: int, width: int, classes: int, more: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        if height % config.patch or width % config.patch:
            raise ValueError(
                f"latents of {height}x{width} cannot be cut into patches of {config.patch}: choose a divisor"
            )
        self.feature_dim, self.time_scale = config.width, config.time_scale
        self.time_intervals = config.details.time_intervals
        self.config, self.channels, self.grid = config, channels, (height // config.patch, width // config.patch)
        self.front = TIME_TOKENS + CLASS_TOKENS if config.conditioning == "tokens" else 0
        self.embed = nn.Linear(channels * config.patch**2, config.width)
        self._place(config)
        self.time = number_embedding(config.width)
        self.label = nn.Embedding(classes + 1, config.width)
        self.prefix = nn.Parameter(torch.empty(self.front, config.width)) if self.front else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.taken = (config.depth - 1) // 2
        self.norm = make_norm(config.norm, config.width, self.front > 0 or config.details.norm_gains)
        self.modulation = None if self.front else nn.Linear(config.width, 2 * config.width)
        self.head = nn.Linear(config.width, channels * config.patch**2)
        self._initialise()
        self.add_more(more)

    def _place(self, config: DiTConfig) -> None:
        """Buffers of positions: what is added, 0 where nothing is, and rotations; those of tokens in front are none."""
        stored = config.details.stored_places
        added = positions_2d(*self.grid, config.width) * (config.positions != "rope")
        self.register_buffer("positions", added, persistent=stored)
        places = torch.cat([torch.zeros(self.front, 2), places_2d(*self.grid)])
        turn = None if config.positions == "sincos" else rotation(places, config.width // config.heads)
        self.register_buffer("turn", turn, persistent=stored)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for weight in (self.time[0].weight, self.time[2].weight, self.label.weight, self.prefix):
            if weight is not None:
                nn.init.normal_(cast(Tensor, weight), std=0.02)
        if (wider := self.config.wider) != 1:  # of embeddings the same at every width, of hidden layers by its root
            inputs, width = self.embed.in_features, self.config.width
            with torch.no_grad():
                self.embed.weight.mul_(math.sqrt((inputs + width) / (inputs + width / wider)))
                cast(nn.Linear, self.time[2]).weight.div_(math.sqrt(wider))
        for module in self.blocks:
            cast(Block, module).start_as_identity()
        for layer in (self.modulation, self.head):
            if layer is not None:
                nn.init.zeros_(layer.weight)

    def rate_of(self, name: str) -> float:
        """muP: of weights whose number of inputs grows with the width, one over the growth."""
        layer, _, kind = name.rpartition(".")
        first = layer == "embed" or (layer.startswith(("time.", "more.")) and layer.endswith(".0"))
        grows = kind == "weight" and isinstance(self.get_submodule(layer), nn.Linear) and not first
        return 1 / self.config.wider if grows else 1.0

    def take(self, block: int) -> None:
        if block > len(self.blocks):
            raise ValueError(f"there is no block {block}: the transformer has {len(self.blocks)}")
        self.taken = block - 1 if block else self.taken

    def join(self, times: Tensor, classes: Tensor) -> Tensor:
        """The modulation's input (*, W), or the tokens in front (*, 12, W)."""
        if self.prefix is None:
            return F.silu(times + classes)
        shape = torch.broadcast_shapes(times.shape, classes.shape)
        found = [part.expand(shape)[..., None, :] for part in (times, classes)]
        own = self.prefix.split([TIME_TOKENS, CLASS_TOKENS])
        return torch.cat([part + each for part, each in zip(found, own, strict=True)], dim=-2)

    def predict(self, x: Tensor, condition: Tensor, context: Context | None) -> NetworkOutput:
        h = self.embed(patchify(x, self.config.patch)) + self.positions
        if self.front:
            h = torch.cat([condition.to(h.dtype), h], dim=1)
        hidden = h
        for i, block in enumerate(self.blocks):
            h = block(h, condition, context, self.turn)
            if i == self.taken:
                hidden = h
        hidden, h = hidden[:, self.front :], self.norm(h[:, self.front :])
        if self.modulation is not None:
            h = modulate(h, *self.modulation(condition).chunk(2, dim=1))
        return NetworkOutput(unpatchify(self.head(h), self.grid, self.config.patch), hidden)
