"""Work divided among several gloo processes, forked from one that has imported everything."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Work = Callable[[int, int, Callable[[], None]], Any]
"""(rank, processes, join) -> what torch.save can write; `join()` makes the process group, so objects may be made before it."""


def together(work: Work, processes: int, folder: Path) -> list[Any]:
    """The results of `work`, a function of a module, on each rank."""
    multiprocessing.set_forkserver_preload(["midway.gen.tokenizer.objective"])
    mp.start_processes(_run, (work, processes, str(folder)), nprocs=processes, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes)]


def _run(rank: int, work: Work, processes: int, folder: str) -> None:
    torch.set_num_threads(1)

    def join() -> None:
        where = f"file://{folder}/rendezvous"
        patience = timedelta(seconds=120)
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=processes, timeout=patience)

    result = work(rank, processes, join)
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    torch.save(result, f"{folder}/{rank}.pt")
