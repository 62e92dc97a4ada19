"""Trackers of experiments beside metrics.jsonl, by the classes of Accelerate; what fails there never ends a training."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from midway.gen.core.errors import MidwayError, one_line

PROJECT = "midway"
PICTURED: dict[str, dict[str, Any]] = {"tensorboard": {"dataformats": "NHWC"}, "wandb": {}}
"""Trackers that take pictures (1, H, W, 3) as uint8, and what else they are passed."""


class Trackers:
    """Those of these names, which write below `folder`; the first failure of each is a warning of three lines, given to `say`."""

    def __init__(
        self, names: Sequence[Any], folder: Path, config: Mapping[str, Any], say: Callable[[str], object]
    ) -> None:
        self._say, self._failed, self._all = say, set[str](), dict[str, Any]()
        for name in (str(getattr(name, "value", name)) for name in names):
            with self._trying(name):
                kind, more = LOGGER_TYPE_TO_CLASS[name], {}
                if name == "wandb":  # else it writes into the current directory, and invents a name
                    more = {"dir": str(folder), "name": folder.name}
                tracker = kind(PROJECT, str(folder)) if kind.requires_logging_directory else kind(PROJECT, **more)
                tracker.start()
                self._all[name] = tracker
                tracker.store_init_configuration(dict(config))

    def log(self, values: Mapping[str, Any], step: int) -> None:
        """Figures by their names."""
        for name, tracker in self._all.items():
            with self._trying(name):
                tracker.log(dict(values), step=step)

    def picture(self, title: str, path: Path, step: int) -> None:
        """A picture file, for those that take any."""
        for name in self._all.keys() & PICTURED:
            with self._trying(name), Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))[None]
                self._all[name].log_images({title: pixels}, step=step, **PICTURED[name])

    def close(self) -> None:
        """End all of them."""
        for name, tracker in self._all.items():
            with self._trying(name):
                tracker.finish()
        self._all = {}

    @contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if name not in self._failed:
                self._failed.add(name)
                fix = (
                    f"metrics.jsonl and samples/ have all of it; check the set-up of {name}, or drop --log-with {name}"
                )
                self._say(
                    f"warning: {MidwayError(f'the tracker {name} failed, training goes on', one_line(error), fix)}"
                )
