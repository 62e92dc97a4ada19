"""Ranges of the numbers of a configuration, checked when it is made: before a folder is created or a tensor allocated.

The largest numbers are far above what is trained, and far below what fills a machine before its first step.
"""

import math
from collections.abc import Sequence

from midway.gen.core.errors import UsageError, raising

WIDTH = (1, 2**16)
"""Channels, features, attention heads, pixels of a patch."""
LAYERS = (1, 1000)
BATCH = (1, 2**20)
COUNT = (1, 10**8)
"""Images, trajectories, draws, checkpoints."""
STEPS = (1, 10**6)
"""Steps of a solver."""
EVENTS = (0, 10**15)
"""Optimizer steps."""
RATIO = (1 / 64, 64)
SEED = (0, 2**62)
"""Seeds are added to, and must stay int64."""
POSITIVE = (math.ulp(0.0), 1e30)
WEIGHT = (0.0, 1e30)
"""Finite and not negative."""
SHARE = (0.0, 1.0)


def check_ranges(config: object, **ranges: tuple[float, float]) -> None:
    """UsageError unless each field named here, or each number of a tuple, is in its closed range; None passes, NaN does not."""
    for name, (least, most) in ranges.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not least <= number <= most:
                raise UsageError(f"{name} is {value}", f"it can be {_words(least, most)}", "correct the value")


def check_flag_ranges(task: object, **ranges: tuple[float, float]) -> None:
    """`check_ranges` of fields that are flags of a command by their names."""
    for name, limits in ranges.items():
        flag = f"--{name.replace('_', '-')} {getattr(task, name)}"
        with raising(UsageError, flag, "correct the value", UsageError, why=lambda error: getattr(error, "why", "")):
            check_ranges(task, **{name: limits})


def check_classes(classes: int, empty: Sequence[int], names: Sequence[str] = ()) -> None:
    """ValueError unless `empty` are some of these classes in order, not all of them, and `names` are those of all, or none."""
    known = all(0 <= label < classes for label in empty) and [*empty] == sorted(set(empty))
    if classes < 0 or not known or len(empty) >= max(classes, 1):
        raise ValueError(f"of {classes} classes those without images cannot be {list(empty)}")
    if len(names) not in (0, classes):
        raise ValueError(f"{classes} classes have {len(names)} names")


def _words(least: float, most: float) -> str:
    if (least, most) == POSITIVE:
        return "any positive, finite number"
    return "any finite number from 0" if (least, most) == WEIGHT else f"{least:,} to {most:,}"
