"""Codebook statistics between two optimizer steps: sums per code, and a uniform sample of the vectors seen.

The sample is a reservoir: each vector has a priority from U(0, 1) and the largest priorities stay, so that merging
micro-batches or processes is again "keep the largest". If the priority of a vector does not depend on the batch it came
in, neither does the sample.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from midway.tokenizers.clustering import sums_by_code

_MAX_CANDIDATES = 512  # encoder vectors kept for restarts, hence restarts per step
_REMEMBERED = 256  # batches between two updates that a compiled forward can recognise


class Pending:
    """Statistics since the last update. Not buffers: DistributedDataParallel would overwrite them with rank 0's."""

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self.sums = torch.zeros(size, dim + 1, device=device, dtype=torch.float32)  # s_k, n_k
        shape = min(size, _MAX_CANDIDATES), dim + 1
        self.candidates = torch.full(shape, -1.0, device=device, dtype=torch.float32)  # x, priority
        self.fingerprints: list[Tensor] = []
        self.recent = torch.zeros(_REMEMBERED, dtype=torch.int64, device=device)

    def add(self, rows: Tensor, indices: Tensor, priorities: Tensor) -> None:
        """rows (N, D) with codes `indices` (N,): adds their sums, and keeps a uniform sample of all rows so far.

        priorities: (N,) float32, uniform in [0, 1].
        """
        self.sums += sums_by_code(rows, indices, len(self.sums))
        new = torch.cat([rows, priorities.unsqueeze(1)], 1)
        self.candidates = highest_priority(torch.cat([self.candidates, new]), len(self.candidates))
        self.fingerprints.append(fingerprint(indices))

    def add_unless_seen(self, rows: Tensor, indices: Tensor, priorities: Tensor) -> None:
        """`add` for a compiled forward, with tensors alone: only the run of the graph can tell whether autograd recomputes it."""
        mark = fingerprint(indices)
        new = torch.ops.midway.is_new(mark, self.recent)
        self.sums = self.sums + torch.where(new, sums_by_code(rows, indices, len(self.sums)), 0)
        candidates = torch.cat([rows, torch.where(new, priorities, -1).unsqueeze(1)], 1)
        self.candidates = highest_priority(torch.cat([self.candidates, candidates]), len(self.candidates))
        self.recent = torch.cat([mark.unsqueeze(0), self.recent[:-1]])

    def has_seen(self, indices: Tensor) -> bool:
        """Whether a batch with exactly these indices was added."""
        return any(torch.equal(fingerprint(indices), old) for old in self.fingerprints)


def highest_priority(candidates: Tensor, size: int) -> Tensor:
    """The `size` rows of float32 (R, D + 1) with the largest last column, falling; ties go by the first column.

    float32 priorities do collide, and what topk makes of a tie depends on where the rows stand. The bits of floats that
    are not negative are ordered as the floats are, so both columns fit into one integer.
    """
    priority, first = (column.view(torch.int32).long() for column in (candidates[:, -1], candidates[:, 0]))
    return candidates[((priority << 32) + first).topk(size).indices]


def fingerprint(indices: Tensor) -> Tensor:
    """A 64-bit hash of the sequence of indices (N,), as a tensor."""
    position = torch.arange(1, len(indices) + 1, device=indices.device)
    return ((indices + 1) * position * 0x9E3779B97F4A7C1 ^ position).sum()


def in_backward() -> bool:
    """Whether autograd is running now: a forward in there is a recomputation."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("midway::is_new", mutates_args=())
def _is_new(mark: Tensor, recent: Tensor) -> Tensor:
    """Whether the batch of fingerprint `mark` () is to be counted, bool (): not if autograd is recomputing one of `recent`."""
    return (recent != mark).all() if in_backward() else torch.ones_like(mark, dtype=torch.bool)


@_is_new.register_fake
def _(mark: Tensor, recent: Tensor) -> Tensor:
    return torch.empty_like(mark, dtype=torch.bool)


def distributed() -> bool:
    # Asked each time: the process group may be made after the quantizer.
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    return dist.get_rank() if distributed() else 0


def over_ranks(pending: Pending) -> tuple[Tensor, Tensor]:
    """(sums, candidates) over all processes, the same on each."""
    if not distributed():
        return pending.sums, pending.candidates
    dist.all_reduce(pending.sums)
    shares = [torch.empty_like(pending.candidates) for _ in range(dist.get_world_size())]
    dist.all_gather(shares, pending.candidates)
    return pending.sums, highest_priority(torch.cat(shares), len(pending.candidates))
