"""Processes, devices and precision: the Accelerator of a training, and how its global batch is divided."""

import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy
from torch.utils.flop_counter import FlopCounterMode

from midway.gen.core.errors import MidwayError, UsageError, is_memory, one_line, raising
from midway.gen.core.processes import joining, launched
from midway.gen.training.batches import Context
from midway.gen.training.config import TrainConfig
from midway.gen.training.interface import Trainable
from midway.gen.training.optim import state_bytes
from midway.tokenizers.memory import Need, memory_of, training_need, without_numbers

ROOM = 0.9
"""Share of a device's memory that tensors may take: the rest is for kernels, and lost between blocks."""


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
    warnings.filterwarnings("ignore", message=".*no supported trackers.*")  # an error follows
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
        raise UsageError(
            measures_every, "only latent models and priors have online evaluation", "use --measure-every 0"
        )
    if config.validate_every and sharded:
        what, why = (
            "FSDP does not support validation",
            "validation needs the whole model, and every process has a shard of it",
        )
        raise UsageError(what, why, "use DDP (accelerate launch --multi_gpu), or --validate-every 0")


def check_sharding(model: nn.Module, accelerator: Accelerator) -> None:
    """UsageError for FSDP by size where it would shard a list of modules, or what `model` names in `read_in_parts`.

    FSDP gathers the weights of a module when it is called, which these are not.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if (
        plugin is None
        or getattr(plugin.auto_wrap_policy, "func", plugin.auto_wrap_policy) is not size_based_auto_wrap_policy
    ):
        return
    for name, module in model.named_modules():
        uncalled = isinstance(module, nn.ModuleList) or name in getattr(model, "read_in_parts", ())
        size = sum(parameter.numel() for parameter in module.parameters())
        if uncalled and size > plugin.min_num_params:
            what = f"FSDP by size cannot shard {name} of this model"
            why = f"it has {size:,} weights, more than {plugin.min_num_params:,}, and is evaluated in parts"
            fix = "use fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP with Block, as docs/accelerate_fsdp.yaml does"
            raise UsageError(what, why, fix)


@contextmanager
def explaining_memory(
    config: TrainConfig, accelerator: Accelerator, model: nn.Module, batches: Callable[[], Callable[[int], Any]]
) -> Iterator[None]:
    """Within the block an error for want of memory becomes one that names the --accumulation that fits.

    `batches()` is what `loss_need` takes.
    """
    try:
        yield
    except Exception as error:
        if not is_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold the activations
        total, kept = memory_of(accelerator.device)[0], state_bytes(model, config)
        try:
            fits = loss_need(model, batches(), config.precision == "bf16").fits(int(ROOM * total) - kept)
        except Exception:  # a model that cannot be computed without numbers: the next smaller one
            fits = share_of(config, accelerator)
        raise memory_error(config, accelerator.num_processes, fits, kept, total, one_line(error)) from None


def loss_need(model: nn.Module, batches: Callable[[int], Any], half: bool = False) -> Need:
    """Memory of the activations of a `Trainable`; `batches(n)` are n samples without numbers (`batches_like`)."""

    def loss(copied: nn.Module, count: int) -> Tensor:
        context = Context(0, 0, torch.arange(count, device="meta"))
        return cast(Trainable, copied).loss(batches(count), context)[0]

    return training_need(model, loss, half)


def loss_flops(model: nn.Module, batches: Callable[[int], Any]) -> int:
    """Floating-point operations of products and convolutions that one sample of a `Trainable` takes, forward and backward."""
    copied, samples = without_numbers(model).eval(), 2
    with FlopCounterMode(display=False) as counter:
        context = Context(0, 0, torch.arange(samples, device="meta"))
        cast(Trainable, copied).loss(batches(samples), context)[0].backward()
    return counter.get_total_flops() // samples


def memory_error(config: TrainConfig, processes: int, fits: int, kept: int, total: int, why: str) -> MidwayError:
    """`fits` samples of a micro-batch would have fitted, beside `kept` of `total` bytes; at most half of those that did not."""
    share = config.batch_size // (processes * config.accumulation)
    what = f"memory ran out in a micro-batch of {share} sample{'s' if share > 1 else ''} a process"
    about = f"weights, gradients, optimizer and averages take {kept / 2**30:.3g} GiB of {total / 2**30:.3g} GiB; {why}"
    otherwise = "--gradient-checkpointing or --precision bf16"
    for accumulation in range(config.accumulation + 1, config.batch_size // processes + 1):
        micro, rest = divmod(config.batch_size, processes * accumulation)
        if not rest and micro <= max(min(fits, share // 2), 1) <= share // 2:
            fix = f"use --accumulation {accumulation}, micro-batches of {micro}, with the same result; or {otherwise}"
            return MidwayError(what, about, fix)
    fix = f"use {otherwise}, a smaller model, or shard it over several GPUs (docs/scaling.md)"
    return MidwayError(what, about, fix)


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
