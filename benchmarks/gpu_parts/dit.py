"""A training step and sampling of our DiT beside diffusers' DiTTransformer2DModel of the same weights, as in dit_speed.py."""

from collections.abc import Iterator
from functools import partial

import dit_speed
from common import Result
from gpu_parts.part import Maker, Setting


def makers(setting: Setting) -> dict[str, Maker]:
    """DiT-S on 256 tokens, or a small one, eager and compiled."""
    size = dit_speed.Size("S/2, 256 tokens", 384, 12, 6, 2, 4, 32, 32)
    if setting.tiny:
        size = dit_speed.Size("tiny", 16, 2, 2, 2, 3, 4, 2)
    ways = [dit_speed.Way(), dit_speed.Way("bf16"), dit_speed.Way("bf16", compiled=setting.cuda)]
    pairs = [(kind, way) for way in dict.fromkeys(ways) for kind in dit_speed.TARGETS]
    seconds = 0.4 * setting.seconds / len(pairs)
    return {f"{kind}, {way.name}": partial(row, setting, kind, way, size, seconds) for kind, way in pairs}


def row(setting: Setting, kind: str, way: dit_speed.Way, size: dit_speed.Size, seconds: float) -> Iterator[Result]:
    """One comparison."""
    yield dit_speed.measured(kind, way, size, setting.device, 0.0 if setting.tiny else seconds, 3)
