"""Presets and sizes: every switch by one name, and the numbers of parameters that are published."""

from dataclasses import fields

import pytest
import torch

from midway.gen.networks.dit import DiT
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.presets import PRESETS, SIZES

SIZED = (
    "width",
    "depth",
    "heads",
    "patch",
    "mlp_ratio",
    "dropout",
    "time_scale",
    "mup_base_width",
    "mup_base_heads",
    "details",
)
PUBLISHED = {"S": 33, "B": 130, "L": 458, "XL": 675}
"""Millions of parameters of DiT with patches of 2 (arXiv 2212.09748, Table 4)."""


def parameters(**choices: object) -> int:
    """Of a network of 4x32x32 latents and 1000 classes in patches of 2."""
    with torch.device("meta"):
        made = DiT(DiTConfig(patch=2, **choices), 4, 32, 32, 1000)  # pyright: ignore[reportArgumentType]
    return sum(p.numel() for p in made.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_sizes_have_the_published_numbers_of_parameters(size: str) -> None:
    """But for what the paper's network has besides: variances, predicted for 4 channels of each patch, and positions that are
    stored as parameters without being trained."""
    width, count = SIZES[size]["width"], parameters(**SIZES[size], **PRESETS["dit2023"])
    variances, positions = (width + 1) * 4 * 2**2, 16 * 16 * width
    assert round((count + variances) / 1e6) == PUBLISHED[size]
    if size == "XL":
        assert count + variances + positions == 675_129_632, "as the published code prints"
    modern = parameters(**SIZES[size], **PRESETS["modern"])
    assert 0 <= modern / count - 1 < 1e-3, (
        "gates have 2/3 of the hidden width, in multiples of 8; norms of q and k are new"
    )


def test_a_preset_sets_every_switch() -> None:
    switches = [field.name for field in fields(DiTConfig) if field.name not in SIZED]
    assert all([*values] == switches for values in PRESETS.values())
    assert DiTConfig(**PRESETS["dit2023"]) == DiTConfig(qk_norm=False), (
        "what was without switches has RMSNorm on q and k"
    )
