"""One configuration of every quantizer and of its main options, for contracts over all of them."""

from typing import Any

import torch
from tensors import normal
from torch import Tensor

from midway.tokenizers.base import Quantizer
from midway.tokenizers.quantizers import make_quantizer
from midway.tokenizers.two_level import TwoLevel

VQ = {"type": "vq", "codebook_size": 12, "dim": 3, "decay": 0.5}
GRADIENT = {"type": "vq_gradient", "codebook_size": 12, "dim": 3, "restart_after": 2}
SIMVQ = {"type": "simvq", "codebook_size": 12, "dim": 3}

CASES: dict[str, dict[str, Any]] = {
    "fsq": {"type": "fsq", "levels": [8, 5, 4]},
    "fsq, symmetric": {"type": "fsq", "levels": [2, 5, 4], "symmetric": True},
    "fsq, sigmoid": {"type": "fsq", "levels": [2, 9, 4], "form": "sigmoid"},
    "fsq, noise dropout": {"type": "fsq", "levels": [8, 5, 4], "noise_dropout": 0.5},
    "fsq, ifsq": {"type": "fsq", "levels": [5, 9, 3], "form": "ifsq", "noise_dropout": 0.5},
    "fsq, fsp": {"type": "fsq", "levels": [2, 9, 4], "form": "fsp", "noise_dropout": 0.5},
    "vq": VQ,
    "vq, unit, rotation": {**VQ, "normalize": True, "gradient": "rotation"},
    "gradient": GRADIENT,
    "gradient, unit, rotation": {**GRADIENT, "normalize": True, "gradient": "rotation"},
    "gradient, entropy": {**GRADIENT, "entropy_weight": 0.1, "entropy_temperature": 0.5},
    "simvq": SIMVQ,
    "simvq, unit, rotation": {**SIMVQ, "normalize": True, "gradient": "rotation"},
    "lfq": {"type": "lfq", "bits": 5},
    "bsq": {"type": "bsq", "bits": 5, "commitment": 0.1, "entropy_group": 4},
    "residual": {"type": "residual", "base": VQ, "depth": 3, "dropout": 0.5},
    "residual, fsq": {"type": "residual", "base": {"type": "fsq", "levels": (5, 4, 3)}, "depth": 2, "dropout": 0.5},
    "residual, gradient": {"type": "residual", "base": GRADIENT, "depth": 2},
    "residual, deep": {"type": "residual", "base": {**VQ, "codebook_size": 16, "dim": 4}, "depth": 6},
    "grouped": {"type": "grouped", "base": VQ, "groups": 2},
    "grouped, residual": {"type": "grouped", "base": {"type": "residual", "base": VQ, "depth": 2}, "groups": 2},
    "two_level": {"type": "two_level", "top": VQ, "bottom": {**VQ, "dim": 4}},
    "two_level, mixed": {
        "type": "two_level",
        "top": {**VQ, "gradient": "rotation"},
        "bottom": {"type": "fsq", "levels": [3, 4]},
    },
    "two_level, parts": {
        "type": "two_level",
        "top": {"type": "residual", "base": VQ, "depth": 2},
        "bottom": {"type": "grouped", "base": {**VQ, "dim": 2}, "groups": 2},
    },
    "kl": {"type": "kl", "dim": 3},
    "identity": {"type": "identity", "dim": 4},
}
CONTINUOUS = ("kl", "identity")
DISCRETE = [name for name in CASES if name not in CONTINUOUS]
SUMS = ["residual", "residual, gradient", "residual, deep", "grouped, residual", "two_level, parts"]
"""Sums of codes that the nearest codes of each stage need not give back."""
LEARNING = [
    name for name in CASES if any(kind in name for kind in ("vq", "gradient", "residual", "grouped", "two_level"))
]
LEARNING = [name for name in LEARNING if not name.startswith("simvq") and name != "residual, fsq"]
"""Those with a codebook that learns from statistics."""


def started(case: str | dict[str, Any]) -> Quantizer:
    """Of a case or a config, in training mode, codebooks from Gaussian data, the conditioning of two levels not zero."""
    quantizer = make_quantizer(CASES[case] if isinstance(case, str) else case)
    if isinstance(quantizer, TwoLevel):
        with torch.no_grad():
            for parameter in quantizer.condition.parameters():
                parameter.copy_(0.3 * normal(*parameter.shape, seed=parameter.numel()))
    quantizer.start(normal(30, quantizer.in_dim, 4, 4, seed=77))
    return quantizer


def inputs(quantizer: Quantizer, count: int = 6, side: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """z and the noise of `count` samples."""
    z = normal(count, quantizer.in_dim, side, side, seed=seed)
    return z, normal(count, max(quantizer.noise_channels, 1), side, side, seed=1000 + seed)


def every_index(quantizer: Quantizer) -> Tensor:
    """(K + 7, ...): each index everywhere in a 4 x 4 grid, then seven grids at random."""
    size, shape = quantizer.codebook_size or 0, (quantizer.tokens(4, 4), quantizer.groups)
    drawn = torch.randint(0, size, (7, *shape), generator=torch.Generator().manual_seed(0))
    indices = torch.cat([torch.arange(size).view(-1, 1, 1).expand(-1, *shape), drawn])
    indices = indices if isinstance(quantizer, TwoLevel) else indices.unflatten(1, (4, 4))
    return indices if quantizer.groups > 1 else indices.squeeze(-1)
