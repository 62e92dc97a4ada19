"""The most memory that this process has used, with what is counted in its name.

resident     resident set of the process since its start, of the host's memory (getrusage)
allocated    what PyTorch had allocated for tensors on a CUDA device at once, without its cache and the libraries' own memory
"""

import resource
import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PeakMemory:
    """Bytes; `allocated` is None without a CUDA device."""

    resident: int
    allocated: int | None = None

    def __str__(self) -> str:
        cuda = "" if self.allocated is None else f", {gib(self.allocated)} allocated by PyTorch on the GPU"
        return f"peak memory of this process: {gib(self.resident)} resident{cuda}"

    @property
    def facts(self) -> dict[str, int]:
        """For JSON; the unit is in the names."""
        cuda = {} if self.allocated is None else {"peak_cuda_allocated_bytes": self.allocated}
        return {"peak_resident_bytes": self.resident} | cuda


def peak_memory() -> PeakMemory:
    """Of this process, until now; on the GPU of the current device."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    return PeakMemory(most_resident(), torch.cuda.max_memory_allocated() if used else None)


def most_resident() -> int:
    """Most bytes that this process has had resident."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def gib(size: float) -> str:
    """`2.4 GiB`."""
    return f"{size / 2**30:.3g} GiB"
