"""Sizes and blocks of the transformer of a latent model. The defaults of the switches are what runs without them have."""

from dataclasses import dataclass, field, fields
from typing import ClassVar, Literal

from midway.gen.core.ranges import LAYERS, RATIO, WIDTH, check_ranges
from midway.gen.networks.layers import Norm, Pairs
from midway.gen.networks.mixers import MixerName, Scale
from midway.gen.networks.presets import DIT2023, SHORTHANDS, Shorthand


@dataclass(frozen=True)
class Details:
    """What networks of others have otherwise than ours; `midway import-model` sets it (gen/foreign/)."""

    stored_places: bool = False
    """Whether added positions and rotations are part of the weights."""
    rope_pairs: Pairs = "halves"
    """Channels of a head that are rotated together: i and i + C / 2, or the neighbours 2 i and 2 i + 1."""
    norm_gains: bool = False
    """Whether norms have a gamma of their own besides the modulation."""
    mlp_norm_eps: float = 1e-6
    """What is added to the variance in the norm before the MLP."""
    qk_norm_eps: float | None = None
    """What is added to the mean square in the norms of queries and keys; None for the resolution of float32."""
    time_intervals: int = 128
    """Sinusoid i of 128 of the time has the frequency 10000^(-i / time_intervals)."""

    def __post_init__(self) -> None:
        check_ranges(self, mlp_norm_eps=(1e-12, 1), time_intervals=WIDTH)


@dataclass(frozen=True)
class DiTConfig:
    """Size and blocks of the transformer. `patch` pixels of the latent a side make one token."""

    shorthands: ClassVar[dict[str, Shorthand]] = SHORTHANDS

    width: int = 96
    """Channels of a token."""
    depth: int = 4
    """Transformer blocks."""
    heads: int = 4
    """Attention heads."""
    patch: int = 1
    """Pixels of the latent a side that make one token."""
    mlp_ratio: float = 4.0
    """Width of the hidden layer of each block, as a multiple of width."""
    dropout: float = 0.0
    """Share of each block's attention and MLP outputs that is set to 0 in training."""
    time_scale: float = 1000.0
    """Factor of the time in its sinusoids. The derivative by time, which objectives of jumps take, is proportional to it: 1 for
    those."""
    norm: Norm = "layer"
    """Norm before attention and MLP: LayerNorm, RMSNorm, or tanh(alpha x) in place of one (dyt)."""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """MLP of each block. swiglu is gated, with 2/3 of the hidden width and so as many weights (rounded up to a multiple of 8)."""
    positions: Literal["sincos", "rope", "both"] = "sincos"
    """How tokens get their places: sines and cosines added to them, rotations of queries and keys, or both."""
    qk_norm: bool = True
    """RMSNorm on queries and keys."""
    conditioning: Literal["adaln", "tokens"] = "adaln"
    """How time and class enter: by the scales, shifts and gates of every block, or as 12 tokens more, without those weights."""
    mixer: MixerName = "softmax"
    """Softmax attention, or linear attention, whose cost is linear in the number of tokens."""
    attention_scale: Scale = "fixed"
    """Factor of softmax attention's logits: by the width of a head alone, or times sqrt(log(tokens) / log(256))."""
    details: Details = field(default_factory=Details)
    """Of imported networks."""

    mup_base_width: int = 0
    """muP: the width that start and learning rate are meant for; at others they are scaled, so that one serves all (0: off)."""
    mup_base_heads: int = 0
    """muP: heads at that width (0: as many)."""

    @property
    def wider(self) -> float:
        """Widths of the base of muP that this one is; 1 without muP."""
        return self.width / self.mup_base_width if self.mup_base_width else 1.0

    @property
    def head_channels(self) -> int:
        """Channels of a head whose logits are divided by their root: those of the base of muP."""
        return (self.mup_base_width or self.width) // ((self.mup_base_width and self.mup_base_heads) or self.heads)

    @property
    def about(self) -> str:
        """The network in words: its size, and the kinds of blocks that are not the default."""
        kinds = {f.name: (getattr(self, f.name), f.default) for f in fields(self) if f.name in DIT2023}
        changes = [f"{name} {value}" for name, (value, default) in kinds.items() if value != default]
        return ", ".join([f"DiT, width {self.width}, depth {self.depth}, patch {self.patch}", *changes])

    def __post_init__(self) -> None:
        check_ranges(self, width=WIDTH, depth=LAYERS, heads=WIDTH, patch=WIDTH, mlp_ratio=RATIO, time_scale=(1e-3, 1e6))
        check_ranges(self, mup_base_width=(0, WIDTH[1]), mup_base_heads=(0, WIDTH[1]))
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by heads ({self.heads}) and by 4 (2-D positions)")
        if self.positions != "sincos" and self.width // self.heads % 4:
            raise ValueError(
                f"positions {self.positions}: a head has {self.width // self.heads} channels, not a multiple of 4"
            )
        if self.mixer == "linear" and self.attention_scale != "fixed":
            raise ValueError("attention_scale tokens needs mixer softmax: linear attention has no logits")
        if self.mup_base_heads and not self.mup_base_width:
            raise ValueError("mup_base_heads has no effect without mup_base_width: drop it, or give the width")
        if self.mup_base_width % (self.mup_base_heads or self.heads):
            raise ValueError(
                f"mup_base_width {self.mup_base_width} must be divisible by its heads ({self.mup_base_heads or self.heads})"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a number in [0, 1)")
