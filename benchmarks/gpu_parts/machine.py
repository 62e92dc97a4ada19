"""The machine: what it is, and the two ceilings that every other figure stands under, copies and matrix products."""

import importlib.util
import os
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from common import Result
from gpu_parts.part import Maker, Setting, turns, value_row

from midway.gen.core.environment import environment, version_of

MORE_PACKAGES = ("triton", "scipy", "vector-quantize-pytorch", "torchdiffeq", "tyro", "pytest")


def makers(setting: Setting) -> dict[str, Maker]:
    """The head of the report, then the ceilings."""
    kinds = {
        "bf16": (torch.bfloat16, False),
        "TF32": (torch.float32, True),
        "float32": (torch.float32, False),
        "float64": (torch.float64, False),
    }
    products = {f"matrix product, {name}": partial(product, setting, name, *kind) for name, kind in kinds.items()}
    return {"head": partial(head, setting), "copy": partial(copy, setting), **products}


def head(setting: Setting) -> Iterator[dict[str, Any]]:
    """Hardware and versions."""
    found = environment()
    found["packages"] = {**found["packages"], **{name: version_of(name) for name in MORE_PACKAGES}}
    yield {"header": {"hardware": hardware(setting.device), "environment": found}}


def hardware(device: torch.device) -> dict[str, Any]:
    """Of the processor, and of the GPU, its driver and libraries."""
    host = {"cores": os.cpu_count(), "device": device.type}
    if device.type != "cuda":
        return host
    about = torch.cuda.get_device_properties(device)
    return {
        **host,
        "gpu": about.name,
        "capability": f"{about.major}.{about.minor}",
        "memory_gib": round(about.total_memory / 2**30, 1),
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": driver(),
        "triton": importlib.util.find_spec("triton") is not None,
    }


def driver() -> str:
    """The version, or why there is none."""
    if shutil.which("nvidia-smi") is None:
        return "no nvidia-smi"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else "unknown"


def copy(setting: Setting) -> Iterator[Result]:
    """Bytes read and written a second, of a tensor many times as large as the caches."""
    x = torch.randn((1 << 30 if not setting.tiny else 1 << 16) // 4, device=setting.device)
    y = torch.empty_like(x)
    (taken,) = turns({"copy": lambda: y.copy_(x)}, setting, 1.0).values()
    yield value_row("copy", "GB/s", 2 * x.numel() * x.element_size() / statistics.median(taken) / 1e9)


def product(setting: Setting, name: str, dtype: torch.dtype, tf32: bool) -> Iterator[Result]:
    """Square matrices of random numbers: zeros run faster."""
    size = 64 if setting.tiny else 2048 if dtype == torch.float64 else 8192
    a, b = (torch.randn(size, size, device=setting.device, dtype=dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        (taken,) = turns({name: lambda: a @ b}, setting, 1.0).values()
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    yield value_row(f"matrix product, {name}", "TFLOP/s", 2 * size**3 / statistics.median(taken) / 1e12)
