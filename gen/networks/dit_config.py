"""Sizes of the transformer of a latent model."""

from dataclasses import dataclass

from midway.gen.core.ranges import LAYERS, RATIO, WIDTH, check_ranges


@dataclass(frozen=True)
class DiTConfig:
    """Size of the transformer. `patch` pixels of the latent a side make one token."""

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

    def __post_init__(self) -> None:
        check_ranges(self, width=WIDTH, depth=LAYERS, heads=WIDTH, patch=WIDTH, mlp_ratio=RATIO, time_scale=(1e-3, 1e6))
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width {self.width} must be divisible by heads ({self.heads}) and by 4 (2-D positions)")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give a number in [0, 1)")
