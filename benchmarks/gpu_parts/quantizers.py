"""The rows of benchmarks/quantizers.py on the GPU: steps and memory beside vector-quantize-pytorch and diffusers."""

from collections.abc import Callable
from functools import partial

import quantizers as benchmark
from gpu_parts.part import Maker, Setting

TINY = benchmark.Sizes((2, 3), 16, (2, 3), 32, 4, (2, 2), 4, (5, 4), 2, 8, 8, 300, 2)


def makers(setting: Setting) -> dict[str, Maker]:
    """Each is skipped where its peer is not installed."""
    made = benchmark.comparisons(TINY if setting.tiny else benchmark.Sizes(), setting.device)
    seconds, least = (0.0, 2) if setting.tiny else (0.3 * setting.seconds / len(made), 10)
    return {named(make): partial(benchmark.rows_of, make, seconds, least, setting.device) for make in made}


def named(make: Callable[[], object]) -> str:
    """The function that makes a comparison and its sizes, under which it is reported if it fails."""
    assert isinstance(make, partial)
    sizes = ", ".join(str(value) for value in make.args if not hasattr(value, "type"))
    return f"{make.func.__name__.replace('_', ' ')} ({sizes})"
