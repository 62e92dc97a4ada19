"""Peak memory: what is counted, and the names and units that it is given."""

import psutil
import torch

from midway.gen.progress.memory import PeakMemory, peak_memory


def test_the_peak_is_no_less_than_what_is_resident_and_never_falls() -> None:
    before = peak_memory().resident
    held = torch.ones(1 << 26)
    now = psutil.Process().memory_info().rss
    assert held.numel() * 4 <= now <= 1.01 * peak_memory().resident, "kernels count pages in batches"
    highest = peak_memory().resident
    del held
    assert before <= highest <= peak_memory().resident


def test_units_are_named() -> None:
    host, both = PeakMemory(3 * 2**29), PeakMemory(3 * 2**29, 2**31)
    assert str(host) == "peak memory of this process: 1.5 GiB resident"
    assert str(both) == f"{host}, 2 GiB allocated by PyTorch on the GPU"
    assert host.facts == {"peak_resident_bytes": 3 * 2**29}
    assert both.facts == host.facts | {"peak_cuda_allocated_bytes": 2**31}
