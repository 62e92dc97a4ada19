"""State dicts of transformers of other projects, as data: which of their tensors is which of ours, and what the network means.

    dit            facebookresearch/DiT      predicts eps, and a variance that is dropped, at a timestep
    sit            willisma/SiT              predicts data minus noise at 1 - t
    lightningdit   hustvl/LightningDiT       as SiT; gated MLPs, RMSNorm, rotations, norms of queries and keys if it has them
    diffusers      DiTTransformer2DModel     as DiT, with an embedding of timestep and class in every block, all equal

In names `{i}` is the number of a block. A tuple is rows one after the other. A name of theirs with `{i}` for one of ours without
is a tensor that every block has, with equal numbers in all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from midway.gen.diffusion.inputs import Inputs
from midway.samplers.prediction import Target

LayoutName = Literal["dit", "sit", "lightningdit", "diffusers"]
Names = dict[str, str | tuple[str, ...]]


def layers(pairs: Mapping[str, str | tuple[str, ...]]) -> Names:
    """Names of weights and biases, for names of layers."""
    found: Names = {}
    for ours, theirs in pairs.items():
        for kind in ("weight", "bias"):
            parts = (theirs,) if isinstance(theirs, str) else theirs
            named = tuple(f"{part}.{kind}" for part in parts)
            found[f"{ours}.{kind}"] = named[0] if isinstance(theirs, str) else named
    return found


@dataclass(frozen=True)
class Option:
    """Tensors of some networks of a layout alone, which have the one called `sign`, and what ours is built with for them."""

    sign: str
    names: Names
    switches: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """Tensors by name, ours to theirs, and the process, target and inputs of the network.

    sign: factor of the output. scale: of latents, published with the model; None where that is a mean and std by channel.
    """

    source: str
    names: Names
    options: tuple[Option, ...]
    inputs: Inputs
    schedule: Literal["linear", "vp"]
    target: Target
    sign: float = 1.0
    scale: float | None = 0.18215
    details: Mapping[str, Any] = field(default_factory=dict)


OUTSIDE = layers(
    {
        "embed": "x_embedder.proj",
        "time.0": "t_embedder.mlp.0",
        "time.2": "t_embedder.mlp.2",
        "blocks.{i}.attention.qkv": "blocks.{i}.attn.qkv",
        "blocks.{i}.attention.out": "blocks.{i}.attn.proj",
        "blocks.{i}.modulation": "blocks.{i}.adaLN_modulation.1",
        "modulation": "final_layer.adaLN_modulation.1",
        "head": "final_layer.linear",
    }
) | {"label.weight": "y_embedder.embedding_table.weight", "positions": "pos_embed"}
"""What the first three share."""
GELU = Option(
    "blocks.0.mlp.fc1.weight",
    layers({"blocks.{i}.mlp.0": "blocks.{i}.mlp.fc1", "blocks.{i}.mlp.2": "blocks.{i}.mlp.fc2"}),
)
LIGHTNING = (
    GELU,
    Option(
        "blocks.0.mlp.w12.weight",
        layers({"blocks.{i}.mlp.up": "blocks.{i}.mlp.w12", "blocks.{i}.mlp.down": "blocks.{i}.mlp.w3"}),
        {"mlp": "swiglu"},
    ),
    Option(
        "blocks.0.norm1.weight",
        {
            "blocks.{i}.norm_1.weight": "blocks.{i}.norm1.weight",
            "blocks.{i}.norm_2.weight": "blocks.{i}.norm2.weight",
            "norm.weight": "final_layer.norm_final.weight",
        },
        {"norm": "rms"},
        {"norm_gains": True},
    ),
    Option(
        "feat_rope.freqs_cos",
        {"turn": ("feat_rope.freqs_cos", "feat_rope.freqs_sin")},
        {"positions": "both"},
        {"rope_pairs": "neighbours"},
    ),
    Option(
        "blocks.0.attn.q_norm.weight",
        {
            "blocks.{i}.attention.norm_q.weight": "blocks.{i}.attn.q_norm.weight",
            "blocks.{i}.attention.norm_k.weight": "blocks.{i}.attn.k_norm.weight",
        },
        {"qk_norm": True},
        {"qk_norm_eps": 1e-6},
    ),
)
IN_BLOCK = "transformer_blocks.{i}.norm1.emb"
DIFFUSERS = layers(
    {
        "embed": "pos_embed.proj",
        "time.0": f"{IN_BLOCK}.timestep_embedder.linear_1",
        "time.2": f"{IN_BLOCK}.timestep_embedder.linear_2",
        "blocks.{i}.attention.qkv": tuple(f"transformer_blocks.{{i}}.attn1.to_{part}" for part in "qkv"),
        "blocks.{i}.attention.out": "transformer_blocks.{i}.attn1.to_out.0",
        "blocks.{i}.modulation": "transformer_blocks.{i}.norm1.linear",
        "blocks.{i}.mlp.0": "transformer_blocks.{i}.ff.net.0.proj",
        "blocks.{i}.mlp.2": "transformer_blocks.{i}.ff.net.2",
        "modulation": "proj_out_1",
        "head": "proj_out_2",
    }
) | {"label.weight": f"{IN_BLOCK}.class_embedder.embedding_table.weight"}

LAYOUTS: dict[LayoutName, Layout] = {
    "dit": Layout("facebookresearch/DiT", OUTSIDE, (GELU,), "ddpm", "vp", "eps"),
    "sit": Layout("willisma/SiT", OUTSIDE, (GELU,), "sit", "linear", "velocity", sign=-1.0),
    "lightningdit": Layout(
        "hustvl/LightningDiT", OUTSIDE, LIGHTNING, "sit", "linear", "velocity", sign=-1.0, scale=None
    ),
    "diffusers": Layout(
        "DiTTransformer2DModel of diffusers", DIFFUSERS, (), "ddpm", "vp", "eps", details={"time_intervals": 127}
    ),
}
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24, 1792: 28}
"""Attention heads of published networks by their width, which no tensor tells."""
