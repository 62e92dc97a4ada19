"""Quantizers by name: `{"type": "fsq", "levels": [8, 5, 5, 5]}` in a config file becomes an FSQ."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

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

QUANTIZERS: dict[str, type[Quantizer]] = {
    "fsq": FSQ,
    "vq": VQ,
    "vq_gradient": GradientVQ,
    "simvq": SimVQ,
    "lfq": LFQ,
    "bsq": BSQ,
    "residual": Residual,
    "grouped": Grouped,
    "two_level": TwoLevel,
    "kl": KL,
    "identity": Identity,
}


def make_quantizer(config: Mapping[str, Any]) -> Quantizer:
    """The quantizer that `config` describes: "type" and the arguments of that class.

    ValueError names an unknown type, an unknown key or a missing one, with the choices.
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
    return QUANTIZERS[name](**options)


def _nearest(name: str, choices: Iterable[str]) -> str:
    """A hint naming the closest choice, then all of them."""
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}choose one of: {', '.join(known)}"
