"""Kinds of blocks and sizes of transformers by name. A flag of a name stands for all the fields that it has here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

DIT2023: dict[str, Any] = {
    "norm": "layer",
    "mlp": "gelu",
    "positions": "sincos",
    "qk_norm": False,
    "conditioning": "adaln",
    "mixer": "softmax",
    "attention_scale": "fixed",
}
"""DiT as published (Peebles & Xie 2022, arXiv 2212.09748)."""
MODERN = DIT2023 | {"norm": "rms", "mlp": "swiglu", "positions": "both", "qk_norm": True}
"""The blocks of LightningDiT (Yao et al. 2025, arXiv 2501.01423, Table 1), with added positions besides rotations. Which of
them earn their place here: docs/model.md."""
PRESETS: dict[str, dict[str, Any]] = {"dit2023": DIT2023, "modern": MODERN}
SIZES: dict[str, dict[str, Any]] = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
"""arXiv 2212.09748, Table 1."""


class Shorthand(NamedTuple):
    """A flag whose values stand for several fields of the dataclass that has it."""

    text: str
    values: Mapping[str, Mapping[str, Any]]


SHORTHANDS = {
    "preset": Shorthand("All kinds of the blocks by one name; flags of single ones override it.", PRESETS),
    "size": Shorthand(
        "Width, depth and heads of the published DiT of this name; flags of single ones override it.", SIZES
    ),
}
