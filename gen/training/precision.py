"""`--precision auto`: bfloat16 autocast where it was measured to be faster and as good, float32 elsewhere.

The choice is a function of the hardware and the network, not of a timing, which would depend on what else the machine does.
benchmarks/precision.py has the measurements: narrow networks lose more by the conversions than they gain by the arithmetic.
"""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from accelerate.utils import parse_flag_from_env

from midway.gen.core.config import read_yaml
from midway.gen.training.config import TrainConfig

LEAST_WIDTH = {"conv": 64, "transformer": 256}
"""Channels or features from which on bfloat16 is faster on CPUs that have it."""


def has_bf16() -> bool:
    """Whether the device of a training here multiplies bfloat16 in hardware: a GPU, or a CPU with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def resolve_precision(
    config: TrainConfig, run: Path | None = None, network: Literal["conv", "transformer"] = "conv", width: int = 0
) -> tuple[TrainConfig, tuple[str, ...]]:
    """`config` without "auto", and a line for the log if it had it. `width`: of the narrowest layers of its network that matter.

    A resumed `run` keeps its precision, on another machine too. Width 0, a network that was not measured, is float32.
    """
    if config.precision != "auto":
        return config, ()
    recorded = _recorded(run) if run is not None else None
    if recorded is not None:
        return replace(config, precision=recorded), (f"precision {recorded}, as this run began",)
    least = LEAST_WIDTH[network]
    if not has_bf16():
        found, why = "no", "this machine has no bfloat16 arithmetic"
    elif width < least:
        found, why = (
            "no",
            f"bfloat16 pays from a width of {least} on" if width else "bfloat16 was not measured for this network",
        )
    else:
        found, why = "bf16", f"this machine has bfloat16 arithmetic, and a width of {width} is at least {least}"
    return replace(config, precision=found), (f"precision {found}: {why}",)


def _recorded(run: Path) -> Literal["no", "bf16"] | None:
    """The precision of the run in this folder, if there is one; what is damaged is the run's own to report."""
    path = run / "config.yaml"
    values = read_yaml(path) if path.is_file() else None
    train = values.get("train") if isinstance(values, dict) else None
    precision = train.get("precision") if isinstance(train, dict) else None
    return precision if precision in ("no", "bf16") else None
