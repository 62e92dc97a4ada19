"""Processes, devices and precision: the Accelerator of a training, and how its global batch is divided."""

import os
import warnings
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor

from midway.gen.core.errors import UsageError, raising
from midway.gen.core.processes import joining, launched
from midway.gen.training.config import TrainConfig


def make_accelerator(config: TrainConfig, out: Path | None = None, idle: bool = False) -> Accelerator:
    """An Accelerator whose DDP leaves buffers alone: quantizers keep theirs equal themselves. Trackers write below `out`.

    `idle`: some parameters get no gradient in some steps, which DDP must expect.
    Without a GPU several processes connect only with `cpu=True`; else each would train alone.
    UsageError when the global batch cannot be shared equally, or a tracker is not installed.
    """
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by cuBLAS for determinism
        torch.backends.cudnn.benchmark = False
    # its successor is not in older versions of torch
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    several = launched()[1] > 1
    fix = "change --log-with or --precision"
    with raising(UsageError, "the accelerator cannot be set up", fix, ValueError, ImportError), joining() as patience:
        accelerator = Accelerator(
            mixed_precision=config.precision,
            cpu=several and not torch.cuda.is_available(),
            log_with=list(config.log_with) or None,
            project_dir=out,
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=idle),
                InitProcessGroupKwargs(timeout=patience),
            ],
        )
    missing = set(config.log_with) - {str(getattr(t, "value", t)) for t in accelerator.log_with}
    if missing:
        names = ", ".join(sorted(missing))
        raise UsageError(f"--log-with {names}", "it is not installed", f"pip install {names}, or drop the flag")
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError(
            "FSDP 1 is not supported", "its flattened parameters have no names", "set fsdp_version: 2 in its config"
        )
    share_of(config, accelerator)
    _check_agreed(config, accelerator)
    return accelerator


def _check_agreed(config: TrainConfig, accelerator: Accelerator) -> None:
    """UsageError on every process if they have different precisions, which `auto` may choose on different machines."""
    processes = accelerator.num_processes
    if processes > 1:
        bf16 = torch.tensor(float(config.precision == "bf16"), device=accelerator.device)
        share = cast(Tensor, accelerator.reduce(bf16, "sum")).item()
        if share not in (0, processes):
            what = f"{share:.0f} of {processes} processes train in bf16, the others in float32"
            raise UsageError(what, "their machines differ", "pass --precision bf16 or --precision no")


def check_unused(config: TrainConfig, validates: bool = False, measures: bool = False, sharded: bool = False) -> None:
    """UsageError for flags that this training does not support."""
    validation, measures_every = f"--validate-every {config.validate_every}", f"--measure-every {config.measure_every}"
    if config.validate_every and not validates:
        raise UsageError(validation, "this training has no validation", "use --validate-every 0")
    if config.measure_every and not measures:
        raise UsageError(measures_every, "only latent models have online evaluation", "use --measure-every 0")
    if config.validate_every and sharded:
        what, why = (
            "FSDP does not support validation",
            "validation needs the whole model, and every process has a shard of it",
        )
        raise UsageError(what, why, "use DDP (accelerate launch --multi_gpu), or --validate-every 0")


def share_of(config: TrainConfig, accelerator: Accelerator) -> int:
    """Samples of one micro-batch of one process; UsageError when the batch cannot be shared equally."""
    parts = accelerator.num_processes * config.accumulation
    if config.batch_size % parts:
        raise UsageError(
            f"batch size {config.batch_size} cannot be shared equally",
            f"{accelerator.num_processes} processes x {config.accumulation} micro-batches are {parts} parts",
            f"use a multiple of {parts}",
        )
    return config.batch_size // parts
