"""The highest resident memory of this process so far."""

import resource
import sys
from pathlib import Path


def peak_kib() -> int:
    """KiB. Of Linux's status where there is one: `ru_maxrss` begins at the memory of the process that started this one."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().partition("VmHWM:")[2].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
