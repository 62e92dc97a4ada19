"""The smallest models of diffusers, with random weights."""

from typing import Any

import torch

BLOCKS = {"block_out_channels": (4, 8), "layers_per_block": 1, "norm_num_groups": 2}
AUTOENCODER: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
}
"""Options of AutoencoderKL and VQModel."""


def unet(diffusers: Any, down: str = "DownBlock2D", up: str = "UpBlock2D", **options: Any) -> Any:
    """Of images (3, 8, 8); `down` and `up` are its inner blocks."""
    torch.manual_seed(0)
    types = {"down_block_types": ("DownBlock2D", down), "up_block_types": (up, "UpBlock2D")}
    return diffusers.UNet2DModel(sample_size=8, **BLOCKS, **types, **options).eval()


def conditional_unet(diffusers: Any) -> Any:
    """Of latents (4, 8, 8), with encoder_hidden_states of 6 channels."""
    torch.manual_seed(0)
    down, up = ("DownBlock2D", "CrossAttnDownBlock2D"), ("CrossAttnUpBlock2D", "UpBlock2D")
    types = {"down_block_types": down, "up_block_types": up, "attention_head_dim": 4}
    return diffusers.UNet2DConditionModel(sample_size=8, cross_attention_dim=6, **BLOCKS, **types).eval()


def dit(diffusers: Any, classes: int) -> Any:
    """Of latents (4, 4, 4), with learned variances."""
    torch.manual_seed(0)
    size = {"num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 1, "sample_size": 4, "patch_size": 2}
    return diffusers.DiTTransformer2DModel(in_channels=4, out_channels=8, num_embeds_ada_norm=classes, **size).eval()
