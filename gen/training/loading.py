"""The batches of one process, read ahead of its training by threads, in the order of training.

Micro-batch m of step s of process r holds b consecutive samples of the stream of `Order`, from position

    ((s A + m) P + r) b,        A micro-batches a step, P processes,

so that what will be trained on is known far ahead, and threads change neither samples nor order: not at a start, after a
reset to a checkpoint, or with another number of them. An error of a read is raised where its batch is due.

Threads, not processes: decoders, file reads, checksums and copies release the interpreter lock, batches need not pass from one
process to another, and all readers share one open file.
"""

import os
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.gen.training.accelerator import share_of
from midway.gen.training.batches import Context, Order
from midway.gen.training.config import TrainConfig
from midway.gen.training.interface import Items

AHEAD = 2
"""Batches that are read ahead for each thread: one that is being read, and one that is ready."""
WORTH_A_THREAD = 2e-3
"""Seconds of reading a batch. Below, to hand it over and to wait for the interpreter lock may cost more than it saves."""
MOST = 8
"""Threads that `auto` starts at most."""


class Loader:
    """Gives fit() its batches on the device. A context, after which no thread is left.

    At most `AHEAD` batches a thread are read, or being read, beyond the one that is due.
    """

    def __init__(
        self, items: Items, config: TrainConfig, accelerator: Accelerator, say: Callable[[str], None] | None = None
    ) -> None:
        self.items, self.order, self.device = items, Order(items.size, config.seed), accelerator.device
        self.processes, self.rank = accelerator.num_processes, accelerator.process_index
        self.accumulation, self.share = config.accumulation, share_of(config, accelerator)
        self.end = config.steps * config.accumulation
        self.workers = None if config.workers == "auto" else config.workers
        """Threads; None while `auto` measures."""
        self.say = say
        self._seconds: list[float] = []
        self._pool: ThreadPoolExecutor | None = None
        self._ahead: deque[tuple[int, Future[Any]]] = deque()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._drop()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def position(self, step: int, micro: int) -> int:
        """The global position of the first sample of a micro-batch of this process."""
        return self._position(step * self.accumulation + micro)

    def __call__(self, step: int, micro: int, context: Context) -> Any:
        """The batch of a micro-batch, on the device; whatever the reading raised."""
        number = step * self.accumulation + micro
        batch = self._here(number) if not self.workers else self._by_threads(number, self.workers)
        return on_device(self.items, batch, context, self.device)

    def _position(self, number: int) -> int:
        return (number * self.processes + self.rank) * self.share

    def _here(self, number: int) -> Any:
        """Read in this thread; with `auto`, the faster of the first two reads decides about threads."""
        wanted, begun = self._wanted(number), time.perf_counter()
        batch = self._read(wanted)
        if self.workers is None:
            self._seconds.append(time.perf_counter() - begun)
            if len(self._seconds) == 2:
                self.workers = threads_for(min(self._seconds), cores_of_this_process())
                if self.workers and self.say is not None:
                    took = f"a batch of {self.share} is read in {1e3 * min(self._seconds):.1f} ms"
                    self.say(f"loading: {took}; {self.workers} threads read ahead (--workers auto)")
        return batch

    def _by_threads(self, number: int, workers: int) -> Any:
        if not self._ahead or self._ahead[0][0] != number:
            self._drop()  # the first batch, or fit() went back to a checkpoint
        following = self._ahead[-1][0] + 1 if self._ahead else number
        for later in range(following, max(number + 1, min(self.end, number + workers * AHEAD + 1))):
            self._ahead.append((later, self._threads(workers).submit(self._read, self._wanted(later))))
        return self._ahead.popleft()[1].result()

    def _threads(self, workers: int) -> ThreadPoolExecutor:
        if self._pool is None:
            # a new thread would pin memory on the first GPU, whichever is that of its process
            begin = partial(torch.cuda.set_device, _index(self.device)) if self.device.type == "cuda" else None
            self._pool = ThreadPoolExecutor(workers, "loader", initializer=begin)
        return self._pool

    def _wanted(self, number: int) -> Tensor:
        return self.order(self._position(number), self.share)

    def _read(self, wanted: Tensor) -> Any:
        batch = self.items.read(wanted)
        return each(batch, _pinned) if self.device.type == "cuda" else batch

    def _drop(self) -> None:
        """Forget what was read ahead; what is being read is waited for, so that no more is held than is promised."""
        wait([future for _, future in self._ahead if not future.cancel()])
        self._ahead.clear()


def on_device(items: Items, batch: Any, context: Context, device: torch.device) -> Any:
    """A batch that was read, on the device, as the model has it. Copies from pinned memory do not wait for the device."""
    placed = each(batch, lambda tensor: tensor.to(device, non_blocking=True))
    return placed if items.augment is None else items.augment(placed, context)


def batches_like(items: Items, device: torch.device) -> Callable[[int], Any]:
    """A function of n that gives n samples of these items without numbers: shapes and types, on the device "meta"."""
    context = Context(0, 0, torch.zeros(1, dtype=torch.int64, device=device))
    example = on_device(items, items.read(torch.zeros(1, dtype=torch.int64)), context, device)
    return lambda count: each(example, lambda x: torch.empty(count, *x.shape[1:], dtype=x.dtype, device="meta"))


def each(batch: Any, work: Callable[[Tensor], Tensor]) -> Any:
    """A batch with `work` of each of its tensors: a tensor, or a dataclass or tuple of batches; the rest stays."""
    if isinstance(batch, Tensor):
        return work(batch)
    if isinstance(batch, tuple):
        return tuple(each(part, work) for part in batch)
    if is_dataclass(batch) and not isinstance(batch, type):
        parts = {f.name: each(getattr(batch, f.name), work) for f in fields(batch) if f.init}
        return replace(batch, **parts)
    return batch


def _index(device: torch.device) -> int:
    """Of a GPU; that of a single process has none of its own, and is the current one."""
    return torch.cuda.current_device() if device.index is None else device.index


def _pinned(tensor: Tensor) -> Tensor:
    return tensor.pin_memory() if tensor.device.type == "cpu" else tensor


def threads_for(seconds: float, cores: int) -> int:
    """How many threads read ahead where a read takes `seconds` and this process has `cores`: all but one, which trains."""
    return 0 if seconds < WORTH_A_THREAD else min(max(cores - 1, 1), MOST)


def cores_of_this_process() -> int:
    """Its share of the cores that this program may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(cores // (int(here) if here.isdigit() and int(here) else 1), 1)
