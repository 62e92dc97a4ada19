"""Fetch the weights of a published feature network: midway download-weights inception

Where machines that measure have no network, run it where there is one, and copy the file that it names.
"""

from dataclasses import dataclass
from typing import Annotated

import tyro

from midway.gen.core.errors import UsageError, nearest
from midway.gen.features.efficientnet import EFFNET
from midway.gen.features.inception import INCEPTION
from midway.gen.features.vit import ENCODERS
from midway.gen.features.weights import find_weights
from midway.gen.flags.cli import resolve

KNOWN = {one.network: one for one in (INCEPTION, EFFNET, *(encoder.published for encoder in ENCODERS.values()))}


@dataclass(frozen=True, kw_only=True)
class DownloadTask:
    """Fetch one file of weights into the cache, checked; nothing is done if it is there."""

    network: Annotated[str, tyro.conf.Positional]
    """inception, dinov2-vitb14, dinov2-vitl14, clip-vitb32 or clip-vitl14; of effnet-lite0 the path in its package."""


def run(task: DownloadTask) -> None:
    """Find or fetch, and print the path."""
    if task.network not in KNOWN:
        raise UsageError(
            f"{task.network} is no published network", "its weights are not known", nearest(task.network, KNOWN)
        )
    print(find_weights(KNOWN[task.network]))


def command(arguments: list[str]) -> None:
    """The command line, parsed and run."""
    run(resolve(DownloadTask, {}, arguments))
