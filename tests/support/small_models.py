"""The smallest networks that fit() trains: a latent model and a tokenizer, and items for them."""

from typing import Any

import torch
from torch import Tensor

from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.tokenizer.objective import TokenizerObjective
from midway.gen.training.batches import ImageBatch, LatentBatch
from midway.tokenizers.tokenizer import ImageTokenizer

SIZE = 20
LATENT_SHAPE, CLASSES = (3, 4, 4), 4
VQ: dict[str, Any] = {"type": "vq", "codebook_size": 8, "dim": 4, "decay": 0.5}


def latents(wanted: Tensor) -> LatentBatch:
    """The latents `wanted` of SIZE."""
    made = torch.randn(SIZE, *LATENT_SHAPE, generator=torch.Generator().manual_seed(0))
    return LatentBatch(made[wanted], wanted % CLASSES)


def images(wanted: Tensor) -> ImageBatch:
    """The images `wanted` of SIZE."""
    pixels = torch.randint(0, 256, (SIZE, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return ImageBatch(pixels[wanted], wanted % CLASSES)


def latent_config(dropout: float = 0.0) -> LatentModelConfig:
    return LatentModelConfig(schedule="cosine", dit=DiTConfig(width=16, depth=2, heads=2, dropout=dropout))


def latent_model(dropout: float = 0.0) -> LatentModel:
    torch.manual_seed(0)
    return LatentModel(latent_config(dropout), LATENT_SHAPE, CLASSES)


def tokenizer(quantizer: dict[str, Any] = VQ, shortcut: str = "orthogonal") -> TokenizerObjective:
    torch.manual_seed(0)
    return TokenizerObjective(ImageTokenizer(width=8, blocks=1, quantizer=quantizer, shortcut=shortcut))
