"""Small encoders with their decoders, of RGB images, and one case of every architecture for contracts over all of them."""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from midway.tokenizers.networks import Decoder, Encoder, Upsample
from midway.tokenizers.vit import ViTConfig, ViTDecoder, ViTEncoder

UPSAMPLES = get_args(Upsample)
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "attention": {"attention": True},
    "multipliers": {"multipliers": (1, 2)},
    "both": {"attention": True, "multipliers": (1, 2, 3)},
}


class Pair(nn.Module):
    """Encoder and decoder, one after the other."""

    def __init__(self, encoder: nn.Module, decoder: nn.Module) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def conv_pair(upsample: Upsample = "nearest", factor: int = 4, width: int = 32, blocks: int = 1, **options: Any) -> Any:
    """Convolutional, with codes of 4 channels."""
    torch.manual_seed(0)
    encoder = Encoder(3, width, factor, blocks, 4, **options)
    return Pair(encoder, Decoder(4, width, factor, blocks, 3, upsample, **options))


def vit_pair(tokens: int | None, width: int = 16, depth: int = 2, heads: int = 2) -> Any:
    """Transformers of 12x12 images in 3x3 patches of 4, with codes of 6 channels."""
    torch.manual_seed(0)
    sizes = ViTConfig(12, 4, width, depth, heads, tokens)
    return Pair(ViTEncoder(3, sizes, 6), ViTDecoder(6, sizes, 3))


PAIRS: dict[str, Callable[[], Any]] = {
    **{f"conv, {u}, {o}": lambda u=u, o=o: conv_pair(u, **OPTIONS[o]) for u in UPSAMPLES for o in OPTIONS},
    **{f"conv, factor {factor}": lambda factor=factor: conv_pair(factor=factor) for factor in (1, 2)},
    **{f"vit, {tokens}": lambda tokens=tokens: vit_pair(tokens) for tokens in (None, 1, 5)},
}
"""All take images of 12x12."""
