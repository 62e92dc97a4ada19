"""Quantizers by name: `{"type": "fsq", "levels": [8, 5, 5, 5]}` in a config file becomes an FSQ."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from midway.tokenizers.arguments import check_arguments
from midway.tokenizers.base import Quantizer
from midway.tokenizers.fsq import FSQ
from midway.tokenizers.gradient_vq import GradientVQ
from midway.tokenizers.grouped import Grouped
from midway.tokenizers.kl import KL, Identity
from midway.tokenizers.lfq import BSQ, LFQ
from midway.tokenizers.residual import Residual
from midway.tokenizers.simvq import SimVQ
from midway.tokenizers.two_level import TwoLevel
from midway.tokenizers.vq import VQ


def residual(base: Mapping[str, Any], depth: int, dropout: float = 0.0) -> Residual:
    """`depth` stages of the config `base`."""
    return Residual(_copies(base, depth, "depth"), dropout)


def grouped(base: Mapping[str, Any], groups: int) -> Grouped:
    """`groups` quantizers of the config `base` side by side."""
    return Grouped(_copies(base, groups, "groups"))


def two_level(top: Mapping[str, Any], bottom: Mapping[str, Any]) -> TwoLevel:
    """Two levels of the configs `top` and `bottom`."""
    return TwoLevel(_discrete(top, "top"), _discrete(bottom, "bottom"))


QUANTIZERS: dict[str, Callable[..., Quantizer]] = {
    "fsq": FSQ,
    "vq": VQ,
    "vq_gradient": GradientVQ,
    "simvq": SimVQ,
    "lfq": LFQ,
    "bsq": BSQ,
    "residual": residual,
    "grouped": grouped,
    "two_level": two_level,
    "kl": KL,
    "identity": Identity,
}


PARTS = ("base", "top", "bottom")
"""Options that are configs themselves."""


def make_quantizer(config: Mapping[str, Any]) -> Quantizer:
    """The quantizer of `config`: "type" and the arguments of its entry in QUANTIZERS.

    ValueError names an unknown type, an unknown key or a missing one, with the choices, or a value of another type.
    """
    options = dict(config)
    name = options.pop("type", None)
    if name not in QUANTIZERS:
        raise ValueError(f"quantizer type is {name!r}; {_nearest(str(name), QUANTIZERS)}")
    parameters = inspect.signature(QUANTIZERS[name]).parameters
    for key in options:
        if key not in parameters:
            raise ValueError(f"quantizer {name!r} has no option {key!r}; {_nearest(str(key), parameters)}")
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in options:
            raise ValueError(f"quantizer {name!r} needs {key!r}, and the config has {sorted(options)}")
    own = {key: value for key, value in options.items() if key not in PARTS}
    check_arguments(QUANTIZERS[name], own, f"quantizer {name!r}")
    return QUANTIZERS[name](**options)


def _discrete(config: Mapping[str, Any], role: str) -> Quantizer:
    """The quantizer of `config`, to serve as `role`. ValueError if it is continuous or no config."""
    if not isinstance(config, Mapping):
        raise ValueError(f'{role} is {config!r}; give the config of a quantizer, such as {{"type": "vq", ...}}')
    quantizer = make_quantizer(config)
    if quantizer.codebook_size is None:
        raise ValueError(
            f"{role} is of type {config['type']!r}, which is continuous and has no codes to combine: "
            "choose a discrete type, such as 'vq' or 'fsq'"
        )
    return quantizer


def _copies(base: Mapping[str, Any], count: int, name: str) -> list[Quantizer]:
    """`count` quantizers of one config; where it takes a seed, each has the next, so that codebooks start apart."""
    if int(count) != count or count < 2:
        raise ValueError(f"{name} is {count}; give an integer of at least 2: 1 is the base itself")
    first = _discrete(base, "base")
    seed = getattr(first, "seed", None)
    apart = [{} if seed is None else {"seed": seed + i} for i in range(1, int(count))]
    return [first, *(_discrete({**base, **options}, "base") for options in apart)]


def _nearest(name: str, choices: Iterable[str]) -> str:
    """A hint naming the closest choice, then all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose one of: {', '.join(known)}"
