"""Codebook statistics between two optimizer steps: sums per code, and a uniform sample of the encoder vectors.

The sample is a reservoir: each vector has a priority from U(0, 1) and the largest priorities stay, so that merging
micro-batches or processes is again "the largest". The sample is as independent of how a batch is divided as the priorities are.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from midway.tokenizers.base import distributed
from midway.tokenizers.clustering import sums_by_code

_MAX_CANDIDATES = 512  # encoder vectors stored for restarts, hence restarts per step


class CodebookStatistics:
    """Sums since the last update. Not buffers: DistributedDataParallel would overwrite them with rank 0's.

    sums: (K, D + 1) float32, per code the sum of its vectors and their number. candidates: (R, D + 1) float32, vector and
    priority, the priority -1 where there is none. batches: micro-batches added.
    """

    def __init__(self, size: int, dim: int, device: torch.device) -> None:
        self.sums = torch.zeros(size, dim + 1, device=device, dtype=torch.float32)
        shape = min(size, _MAX_CANDIDATES), dim + 1
        self.candidates = torch.full(shape, -1.0, device=device, dtype=torch.float32)
        self.batches = 0

    def add(self, rows: Tensor, indices: Tensor, priorities: Tensor) -> None:
        """Add vectors `rows` (N, D) with codes `indices` (N,) and `priorities` (N,) float32, uniform in [0, 1]."""
        self.sums += sums_by_code(rows, indices, len(self.sums))
        new = torch.cat([rows, priorities.unsqueeze(1)], 1)
        self.candidates = highest_priority(torch.cat([self.candidates, new]), len(self.candidates))
        self.batches += 1

    def over_processes(self) -> tuple[Tensor, Tensor]:
        """(sums, candidates) of all processes together, the same on each."""
        if not distributed():
            return self.sums, self.candidates
        dist.all_reduce(self.sums)
        shares = [torch.empty_like(self.candidates) for _ in range(dist.get_world_size())]
        dist.all_gather(shares, self.candidates)
        return self.sums, highest_priority(torch.cat(shares), len(self.candidates))


def highest_priority(candidates: Tensor, size: int) -> Tensor:
    """The `size` rows of float32 (R, D + 1) with the largest last column, falling; ties go by the first column.

    float32 priorities do collide, and topk breaks ties by position. The bits of non-negative floats are ordered as the floats
    are, so both columns fit into one integer.
    """
    priority, first = (column.view(torch.int32).long() for column in (candidates[:, -1], candidates[:, 0]))
    return candidates[((priority << 32) + first).topk(size).indices]
