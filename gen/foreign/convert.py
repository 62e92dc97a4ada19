"""A state dict of another project as a latent model of ours, whose network computes the same numbers (layouts.py).

The patches are cut by a matrix product here and by a convolution there: the same sums, in an order of the library's own. The
weights of the last layer change their order, from (row, column, channel) of a patch to (channel, row, column), lose learned
variances, and change their sign where theirs is the velocity from noise to data.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from midway.gen.core.errors import DataError, UsageError, raising
from midway.gen.diffusion.description import LatentModelConfig
from midway.gen.diffusion.model import LatentModel
from midway.gen.foreign.layouts import HEADS, LAYOUTS, Layout, LayoutName
from midway.gen.networks.dit_config import Details, DiTConfig
from midway.gen.networks.layers import swiglu_width
from midway.tokenizers.weights import check_published, load_weights

PLAIN: dict[str, Any] = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "attention_bias": True,
    "norm_elementwise_affine": False,
}
"""Settings of diffusers' network that ours has no other for."""
State = dict[str, Tensor]


@dataclass(frozen=True)
class Imported:
    """A latent model, and how many numbers of its file it does not have: learned variances."""

    model: LatentModel
    dropped: int


def import_model(
    state: Mapping[str, Tensor],
    name: LayoutName,
    heads: int | None = None,
    settings: Mapping[str, Any] | None = None,
    class_names: tuple[str, ...] = (),
) -> Imported:
    """The model of a state dict; `settings`: config.json of diffusers, `heads` where the width is of no published network.

    DataError for tensors that are not those of the layout; UsageError for a size that only a flag can tell.
    """
    layout, settings = LAYOUTS[name], dict(settings or {})
    with raising(DataError, "these weights cannot be used", "get the file again"):
        check_published(state)
    ours = renamed(state, name)
    check_settings(settings, name)
    size, side = size_of(ours, layout, heads, settings)
    channels, classes = ours["embed.weight"].shape[1], len(ours["label.weight"]) - 1
    if "positions" not in ours:
        ours["positions"] = published_positions(side // size.patch, size.width)
    whole = numbers(ours)
    ours = as_ours(ours, size, channels, layout.sign)
    config = LatentModelConfig(layout.schedule, layout.target, dit=size, inputs=layout.inputs)
    names = class_names if len(class_names) == classes else ()
    with raising(DataError, f"these weights are not of layout {name}", "get the file again", ValueError, RuntimeError):
        model = LatentModel(config, (channels, side, side), classes, (), names)
        load_weights(model, {f"network.{key}": value.float() for key, value in ours.items()})
    return Imported(model.eval(), whole - numbers(ours))


def numbers(ours: State) -> int:
    """How many the last layer has."""
    return ours["head.weight"].numel() + ours["head.bias"].numel()


def renamed(state: Mapping[str, Tensor], name: LayoutName) -> State:
    """Their tensors by our names. DataError for missing and surplus ones, naming the layout that they are of if there is one."""
    layout, blocks = LAYOUTS[name], depth(state)
    wanted = names_of(layout, state, blocks)
    missing, surplus = difference(wanted, state)
    if missing or surplus:
        others = [other for other, its in LAYOUTS.items() if not any(difference(names_of(its, state, blocks), state))]
        parts = [
            f"{len(keys)} {what}, such as {sorted(keys)[0]}"
            for what, keys in (("missing", missing), ("surplus", surplus))
            if keys
        ]
        fix = f"--layout {' or '.join(others)} has exactly these" if others else f"give a checkpoint of {layout.source}"
        raise DataError(f"these weights are not of layout {name}", f"of its tensors {' and '.join(parts)}", fix)
    found = {}
    for ours, theirs in wanted.items():
        parts = [shared(state, part, blocks) for part in theirs]
        found[ours] = torch.stack([part[:, ::2] for part in parts]) if ours == "turn" else torch.cat(parts)
    return found


def names_of(layout: Layout, state: Mapping[str, Tensor], blocks: int) -> dict[str, tuple[str, ...]]:
    """Our names and theirs, of all blocks, with the options that a state dict has."""
    every = dict(layout.names)
    for option in options(layout, state):
        every |= option.names
    found = {}
    for ours, theirs in every.items():
        parts = (theirs,) if isinstance(theirs, str) else theirs
        if "{i}" in ours:
            for i in range(blocks):
                found[ours.replace("{i}", str(i))] = tuple(part.replace("{i}", str(i)) for part in parts)
        else:
            found[ours] = parts
    return found


def options(layout: Layout, state: Mapping[str, Tensor]) -> list[Any]:
    """Those whose sign the state dict has."""
    return [option for option in layout.options if option.sign in state]


def difference(wanted: Mapping[str, tuple[str, ...]], state: Mapping[str, Tensor]) -> tuple[set[str], set[str]]:
    """Names that are missing in a state dict, and those that it has too many."""
    blocks = depth(state)
    every = {part.replace("{i}", str(i)) for parts in wanted.values() for part in parts for i in range(max(blocks, 1))}
    return every - state.keys(), state.keys() - every


def depth(state: Mapping[str, Tensor]) -> int:
    """How many blocks a state dict has, in any layout."""
    parts = [name.split(".") for name in state]
    numbers = [int(p[1]) for p in parts if p[0] in ("blocks", "transformer_blocks") and p[1:2] and p[1].isdigit()]
    return max(numbers, default=-1) + 1


def shared(state: Mapping[str, Tensor], name: str, blocks: int) -> Tensor:
    """A tensor, or the one that every block has; DataError where they differ."""
    if "{i}" not in name:
        return state[name]
    each = [state[name.replace("{i}", str(i))] for i in range(blocks)]
    if not all(torch.equal(part, each[0]) for part in each[1:]):
        raise DataError(
            "the blocks have different embeddings of time or class",
            f"{name} is not the same in all of them, and here they share one",
            "give weights that were converted from DiT, whose blocks share it too",
        )
    return each[0]


def size_of(ours: State, layout: Layout, heads: int | None, settings: Mapping[str, Any]) -> tuple[DiTConfig, int]:
    """The transformer that has these tensors, and the pixels a side of its latents."""
    width, patch = ours["label.weight"].shape[1], ours["embed.weight"].shape[-1]
    known = heads or settings.get("num_attention_heads") or HEADS.get(width)
    if known is None or width % known:
        raise UsageError(
            f"--heads {'is not given' if known is None else known}",
            f"width {width} is of no published network, and no tensor tells its attention heads",
            "give the number of heads that it was built with, which divides the width",
        )
    switches, details = {"mlp": "gelu", "norm": "layer", "positions": "sincos", "qk_norm": False}, dict(layout.details)
    for option in options_of(ours, layout):
        switches |= option.switches
        details |= option.details
    if "norm_eps" in settings:
        details["mlp_norm_eps"] = float(settings["norm_eps"])
    inner = ours["blocks.0.mlp.down.weight" if switches["mlp"] == "swiglu" else "blocks.0.mlp.2.weight"].shape[1]
    ratio = inner * (1.5 if switches["mlp"] == "swiglu" else 1) / width
    if switches["mlp"] == "swiglu" and swiglu_width(width, ratio) != inner:
        why = f"their gated MLPs have {inner} hidden channels, not a multiple of 8"
        raise DataError("these weights have no network here", why, "take a network of another width")
    size = {"width": width, "depth": depth(ours), "heads": known, "patch": patch, "mlp_ratio": ratio, "time_scale": 1.0}
    config = DiTConfig(**size, **switches, details=Details(stored_places=True, **details))  # pyright: ignore[reportArgumentType]
    if "sample_size" in settings:
        return config, int(settings["sample_size"])
    return config, round(ours["positions"].shape[-2] ** 0.5) * patch


def options_of(ours: State, layout: Layout) -> list[Any]:
    """Those whose tensors are there by our names."""
    return [option for option in layout.options if all(name.replace("{i}", "0") in ours for name in option.names)]


def as_ours(ours: State, size: DiTConfig, channels: int, sign: float) -> State:
    """The same numbers in the shapes and the order of ours."""
    found = {name: with_shifts(value, size.width) if "modulation" in name else value for name, value in ours.items()}
    found["embed.weight"] = ours["embed.weight"].flatten(1)
    found["positions"] = ours["positions"].reshape(-1, size.width)
    for kind in ("weight", "bias"):
        rows = ours[f"head.{kind}"].unflatten(0, (size.patch**2, -1))[:, :channels]
        found[f"head.{kind}"] = sign * rows.transpose(0, 1).flatten(0, 1)
    return found


def with_shifts(modulation: Tensor, width: int) -> Tensor:
    """(6 W, *) as it is; of blocks without shifts, (scale, gate) twice, with shifts of 0."""
    if len(modulation) != 4 * width:
        return modulation
    first, second = modulation.chunk(2)
    none = torch.zeros_like(modulation[:width])
    return torch.cat([none, first, none, second])


def published_positions(side: int, width: int) -> Tensor:
    """(side * side, width): the fixed positions of DiT: of the column, then of the row, sines and then cosines.

    Computed in float64 as by their authors, and rounded to float32.
    """
    steps = torch.arange(width // 4, dtype=torch.float64) / (width / 4)
    angles = torch.arange(side, dtype=torch.float64)[:, None] * (1 / 10000**steps)
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([line.repeat(side, 1), line.repeat_interleave(side, 0)], dim=1).float()


def check_settings(settings: Mapping[str, Any], name: LayoutName) -> None:
    """DataError for a network of diffusers that ours cannot be, and for one whose sizes are not there."""
    if name == "diffusers" and "sample_size" not in settings:
        why = "config.json, which has its heads and the size of its latents, is not beside the weights"
        raise DataError(
            "this network of diffusers cannot be built", why, "give the folder `transformer` of the pipeline"
        )
    for key, value in PLAIN.items():
        if settings.get(key, value) != value:
            fix = "take a network that DiT was converted to"
            raise DataError("this network of diffusers has no counterpart", f"its {key} is {settings[key]}", fix)
