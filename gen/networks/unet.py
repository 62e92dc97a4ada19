"""The U-Net of diffusers (UNet2DModel) as the network of a latent model: its own modules, conditioned by ours.

    skips, h = down(conv(x))        h = middle(h)        value = conv(silu(norm(up(h, skips))))

Ho et al. 2020, arXiv 2006.11239, appendix B: residual blocks at every resolution, to which the condition, time + class, is
added, and self-attention at the lowest. The last convolution starts at 0, so the first output is 0. There is no dropout.
"""

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from midway.gen.core.errors import UsageError, one_line
from midway.gen.core.ranges import LAYERS, WIDTH, check_ranges
from midway.gen.networks.layers import number_embedding
from midway.gen.networks.network import Network, NetworkOutput
from midway.gen.training.batches import Context


@dataclass(frozen=True)
class UNetConfig:
    """Size of the U-Net."""

    widths: tuple[int, ...] = (64, 128)
    """Channels at every resolution, the finest first; each has half as many pixels a side as the one before."""
    blocks: int = 1
    """Residual blocks of every resolution on the way down; on the way up there is one more."""
    attention: bool = True
    """Self-attention at the lowest resolution."""
    time_scale: float = 1000.0
    """Factor of the time in its sinusoids; 1 for objectives of jumps, which take the derivative by time."""

    def __post_init__(self) -> None:
        check_ranges(self, widths=WIDTH, blocks=LAYERS, time_scale=(1e-3, 1e6))
        if not self.widths or any(width % 8 for width in self.widths):
            raise ValueError(f"widths are {self.widths}: give multiples of 8, one for each resolution")

    @property
    def about(self) -> str:
        """The network in words."""
        return f"U-Net, widths {', '.join(map(str, self.widths))}, residual blocks {self.blocks}"


class UNet(Network):
    """The U-Net; its hidden tokens are the pixels at the lowest resolution, after the middle blocks."""

    def __init__(
        self, config: UNetConfig, channels: int, height: int, width: int, classes: int, more: tuple[str, ...] = ()
    ) -> None:
        super().__init__()
        factor, wide = 2 ** (len(config.widths) - 1), 4 * config.widths[0]
        if height % factor or width % factor:
            raise ValueError(
                f"latents of {height}x{width} cannot be halved {len(config.widths) - 1} times: give fewer widths"
            )
        self.grid, self.feature_dim = (height // factor, width // factor), config.widths[-1]
        self.time_scale = config.time_scale
        self.time, self.label = number_embedding(wide), nn.Embedding(classes + 1, wide)
        parts = _diffusers_unet(config, channels)
        self.enter, self.down, self.middle, self.up = parts.conv_in, parts.down_blocks, parts.mid_block, parts.up_blocks
        self.leave = nn.Sequential(parts.conv_norm_out, parts.conv_act, parts.conv_out)
        for module in self.modules():
            if hasattr(
                module, "gradient_checkpointing"
            ):  # which calls this, and diffusers sets it only on whole models
                module._gradient_checkpointing_func = _recompute  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.label.weight, std=0.02)
        for last in (parts.conv_out.weight, parts.conv_out.bias):
            nn.init.zeros_(last)
        self.add_more(more)

    def join(self, times: Tensor, classes: Tensor) -> Tensor:
        """(*, W), which every residual block adds after a layer of its own."""
        return times + classes

    def predict(self, x: Tensor, condition: Tensor, context: Context | None) -> NetworkOutput:
        h = self.enter(x)
        skips = [h]
        for block in self.down:
            h, found = block(h, condition)
            skips += found
        h = self.middle(h, condition)
        hidden = h.flatten(2).mT
        for block in self.up:
            count = len(block.resnets)  # pyright: ignore[reportArgumentType]
            h, skips = block(h, tuple(skips[-count:]), condition), skips[:-count]
        return NetworkOutput(self.leave(h), hidden)


def _diffusers_unet(config: UNetConfig, channels: int) -> Any:
    """UsageError where diffusers cannot be imported."""
    try:
        from diffusers.models.unets.unet_2d import UNet2DModel
    except (ImportError, RuntimeError) as error:
        raise UsageError(
            "a U-Net needs the package diffusers",
            one_line(error),
            "pip install 'midway[bench]', or use --model.network dit",
        ) from None
    plain = len(config.widths) - config.attention
    return UNet2DModel(
        in_channels=channels,
        out_channels=channels,
        block_out_channels=config.widths,
        layers_per_block=config.blocks,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",) * config.attention,
        up_block_types=("AttnUpBlock2D",) * config.attention + ("UpBlock2D",) * plain,
        add_attention=config.attention,
        norm_num_groups=math.gcd(32, *config.widths),
    )


def _recompute(module: nn.Module, *inputs: Tensor) -> Tensor:
    return checkpoint(module, *inputs, use_reentrant=False, preserve_rng_state=False)  # pyright: ignore
