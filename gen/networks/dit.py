"""DiT: a transformer over patches whose layers are modulated by time and class.

    h = patchify(x) + positions
    h = h + gate_1 * drop(attention(modulate(norm(h), shift_1, scale_1)))
    h = h + gate_2 * drop(mlp(modulate(norm(h), shift_2, scale_2)))  (shift, scale, gate) = linear(silu(time + class))

Peebles & Xie 2022, arXiv 2212.09748: adaLN-zero (the modulation starts at 0, so every block starts as the identity and the
network's first output is 0) and fixed 2-D sine-cosine positions. RMSNorm on queries and keys: Esser et al. 2024, arXiv
2403.03206, section 5.3.2. Dropout acts only in training, and its masks are functions of (seed, step, sample, layer): they are
the same whatever batch a sample comes in, and when activation checkpointing computes a block twice.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, NamedTuple, cast

from torch import Tensor, nn
from torch.nn import functional as F

from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.layers import drop, modulate, normed, number_embedding, positions_2d, sinusoid, start_at_zero
from midway.gen.training.batches import Context
from midway.tokenizers.precision import widened
from midway.tokenizers.recomputed import Recomputed
from midway.tokenizers.vit import patchify, unpatchify

EMPTY: Mapping[str, Tensor] = MappingProxyType({})


class DiTOutput(NamedTuple):
    """value: (B, C, H, W). hidden: (B, tokens, width), the tokens after the middle block (an existing tensor, no extra cost)."""

    value: Tensor
    hidden: Tensor


class Attention(nn.Module):
    """Multi-head self-attention with RMS-normalised queries and keys."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.norm_q, self.norm_k = nn.RMSNorm(width // heads), nn.RMSNorm(width // heads)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(normed(q, self.norm_q), normed(k, self.norm_k), v)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(Recomputed):
    """Attention and MLP with adaLN-zero modulation; `layer` keeps its dropout masks apart from those of other blocks."""

    def __init__(self, config: DiTConfig, layer: int) -> None:
        super().__init__()
        self.dropout, self.layer = config.dropout, layer
        width, inner = config.width, int(config.width * config.mlp_ratio)
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, config.heads)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.modulation = nn.Linear(width, 6 * width)

    def compute(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, condition: Tensor, context: Context | None = None
    ) -> Tensor:
        """x (B, N, W) and condition (B, W) -> (B, N, W); with a context, under dropout."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=1)
        mixed = self.attention(modulate(self.norm_1(x), shift_1, scale_1))
        x = x + gate_1[:, None] * drop(mixed, self.dropout, context, f"dropout {self.layer} attention")
        inner = self.mlp(modulate(self.norm_2(x), shift_2, scale_2))
        return x + gate_2[:, None] * drop(inner, self.dropout, context, f"dropout {self.layer} mlp")


class DiT(nn.Module):
    """(x (B, C, H, W), noise_angle (B,) in [0, 1], labels (B,)) -> DiTOutput. Label `classes` means "no class".

    `more` names further numbers in [0, 1], (B,) each, that the modulation depends on (a jump's `span`, `guidance`), each with
    an embedding that starts at 0. Inputs of any floating-point dtype; the output has the weights'.
    """

    compilable: ClassVar[bool] = True
    """A function of tensors alone, which torch.compile can take whole."""

    positions: Tensor

    def __init__(
        self, config: DiTConfig, channels: int, height: int, width: int, classes: int, more: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        if height % config.patch or width % config.patch:
            raise ValueError(
                f"latents of {height}x{width} cannot be cut into patches of {config.patch}: choose a divisor"
            )
        self.config, self.channels, self.grid = config, channels, (height // config.patch, width // config.patch)
        self.embed = nn.Linear(channels * config.patch**2, config.width)
        self.register_buffer("positions", positions_2d(*self.grid, config.width), persistent=False)
        self.time = number_embedding(config.width)
        self.label = nn.Embedding(classes + 1, config.width)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.head = nn.Linear(config.width, channels * config.patch**2)
        self._initialise()
        self.more = nn.ModuleDict({name: number_embedding(config.width) for name in more})
        for embedding in self.more.values():
            start_at_zero(cast(nn.Sequential, embedding))

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (self.time[0], self.time[2], self.label):
            nn.init.normal_(layer.weight, std=0.02)  # pyright: ignore[reportArgumentType]
        for module in self.blocks:
            nn.init.zeros_(cast(Block, module).modulation.weight)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)

    def conditions(self, noise_angle: Tensor, labels: Tensor, more: Mapping[str, Tensor] = EMPTY) -> Tensor:
        """(E, B, W): the modulation's input for every noise_angle (E,), with `more` (E,), and every label (B,)."""
        return F.silu(self._times(noise_angle, more)[:, None] + self.label(labels))

    def _times(self, noise_angle: Tensor, more: Mapping[str, Tensor]) -> Tensor:
        dtype, scale = self.embed.weight.dtype, self.config.time_scale
        found = self.time(sinusoid(scale * widened(noise_angle), 256).to(dtype))
        for name, embedding in self.more.items():
            found = found + embedding(sinusoid(more[name], 256).to(dtype))
        return found

    def forward(
        self,
        x: Tensor,
        noise_angle: Tensor | None = None,
        labels: Tensor | None = None,
        context: Context | None = None,
        condition: Tensor | None = None,
        more: Mapping[str, Tensor] = EMPTY,
    ) -> DiTOutput:
        """For noise_angle, labels and `more`, or for the condition (B, W) made of them. With a context, as in training, dropout
        acts."""
        if condition is None:
            assert noise_angle is not None and labels is not None
            condition = F.silu(self._times(noise_angle, more) + self.label(labels))
        h = self.embed(patchify(x.to(self.embed.weight.dtype), self.config.patch)) + self.positions
        hidden = h
        for i, block in enumerate(self.blocks):
            h = block(h, condition, context)
            if i == (len(self.blocks) - 1) // 2:
                hidden = h
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        tokens = self.head(modulate(self.norm(h), shift, scale))
        return DiTOutput(unpatchify(tokens, self.grid, self.config.patch), hidden)
