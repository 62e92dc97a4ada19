"""DiT: a transformer over patches whose layers are modulated by time and class.

    h = patches(x) + positions
    h = h + gate_1 * attention(modulate(norm(h), shift_1, scale_1))
    h = h + gate_2 * mlp(modulate(norm(h), shift_2, scale_2))        (shift, scale, gate) = linear(silu(time + class))

Peebles & Xie 2022, arXiv 2212.09748: adaLN-zero (the modulation starts at 0, so every block starts as the identity and the
network's first output is 0) and fixed 2-D sine-cosine positions. RMSNorm on queries and keys: Esser et al. 2024, arXiv
2403.03206, section 5.3.2.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class DiTConfig:
    """Size of the transformer. `patch` pixels of the latent a side make one token."""

    width: int = 96
    depth: int = 4
    heads: int = 4
    patch: int = 1
    mlp_ratio: float = 4.0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by heads ({self.heads}) and by 4 (2-D positions)")


class DiTOutput(NamedTuple):
    """value: (B, C, H, W). hidden: (B, tokens, width), the tokens after the middle block (an existing tensor, no extra cost)."""

    value: Tensor
    hidden: Tensor


def sinusoid(values: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """(N,) -> (N, dim): cosines and sines at `dim / 2` geometric frequencies."""
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, device=values.device) / half)
    angles = values.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def positions_2d(height: int, width: int, dim: int) -> Tensor:
    """(height * width, dim): half of the channels encode the row, half the column."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sinusoid(rows.flatten(), dim // 2), sinusoid(columns.flatten(), dim // 2)], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, W) under shift, scale (B, W)."""
    return x * (1 + scale[:, None]) + shift[:, None]


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
        mixed = F.scaled_dot_product_attention(
            self.norm_q(q.float()).to(v.dtype), self.norm_k(k.float()).to(v.dtype), v
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention and MLP with adaLN-zero modulation."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, inner = config.width, int(config.width * config.mlp_ratio)
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attention = Attention(width, config.heads)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(approximate="tanh"), nn.Linear(inner, width))
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.modulation(condition).chunk(6, dim=1)
        x = x + gate_1[:, None] * self.attention(modulate(self.norm_1(x), shift_1, scale_1))
        return x + gate_2[:, None] * self.mlp(modulate(self.norm_2(x), shift_2, scale_2))


class DiT(nn.Module):
    """(x (B, C, H, W), clock (B,) in [0, 1], labels (B,)) -> DiTOutput. Label `classes` means "no class"."""

    positions: Tensor

    def __init__(self, config: DiTConfig, channels: int, height: int, width: int, classes: int) -> None:
        super().__init__()
        if height % config.patch or width % config.patch:
            raise ValueError(
                f"latents of {height}x{width} cannot be cut into patches of {config.patch}: choose a divisor"
            )
        self.config, self.channels, self.grid = config, channels, (height // config.patch, width // config.patch)
        self.embed = nn.Linear(channels * config.patch**2, config.width)
        self.register_buffer("positions", positions_2d(*self.grid, config.width), persistent=False)
        self.time = nn.Sequential(nn.Linear(256, config.width), nn.SiLU(), nn.Linear(config.width, config.width))
        self.label = nn.Embedding(classes + 1, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.head = nn.Linear(config.width, channels * config.patch**2)
        self._initialise()

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

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, tokens, C p p)."""
        return F.pixel_unshuffle(x, self.config.patch).flatten(2).transpose(1, 2)

    def _image(self, tokens: Tensor) -> Tensor:
        """(B, tokens, C p p) -> (B, C, H, W)."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), self.config.patch)

    def forward(self, x: Tensor, clock: Tensor, labels: Tensor) -> DiTOutput:
        condition = F.silu(self.time(sinusoid(1000 * clock, 256)) + self.label(labels))
        h = self.embed(self._patches(x)) + self.positions
        hidden = h
        for i, block in enumerate(self.blocks):
            h = block(h, condition)
            if i == (len(self.blocks) - 1) // 2:
                hidden = h
        shift, scale = self.modulation(condition).chunk(2, dim=1)
        return DiTOutput(self._image(self.head(modulate(self.norm(h), shift, scale))), hidden)
