"""Validation during training: the best value so far, early stopping, and the folder of the best weights.

    best <- (step, value) if value < best value, else validations since the best <- + 1;      stop once they are `patience`

best/step-N/    as in checkpoints.py: ema.safetensors, or model.safetensors if there is no average, and the exports of the script

The counters are part of every checkpoint. The folder that the last checkpoint refers to is kept beside a better one until the
next checkpoint is written, so that a reset or resumed run finds it.
"""

import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from midway.gen.core import checkpoints
from midway.gen.core.files import clear_temporaries
from midway.tokenizers.weights import check_tensors

MANY = 1 << 30


class Validation:
    """Values of validations, lower is better; one that is not finite is never best."""

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.step, self.value, self.since = -1, math.inf, 0
        self.active = False
        """Whether any validation took place."""

    def judge(self, step: int, value: float) -> bool:
        """Record the value of optimizer step `step`; whether it is the best so far."""
        self.active = True
        better = math.isfinite(value) and value < self.value
        self.step, self.value = (step, value) if better else (self.step, self.value)
        self.since = 0 if better else self.since + 1
        return better

    @property
    def is_over(self) -> bool:
        """Whether `patience` validations in a row brought no better value."""
        return 0 < self.patience <= self.since

    @property
    def best(self) -> tuple[int, float] | None:
        """Optimizer step and value of the best one, None before there is one."""
        return (self.step, self.value) if self.step >= 0 else None

    def state(self) -> dict[str, Tensor]:
        """State for a resumed run; empty before the first validation."""
        counts = {
            "value": torch.tensor(self.value, dtype=torch.float64),
            "steps": torch.tensor([self.step, self.since]),
        }
        return counts if self.active else {}

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Restore the `state` of this step. ValueError for any other."""
        expected = {"value": torch.tensor(0.0, dtype=torch.float64), "steps": torch.tensor([0, 0])}
        check_tensors({name: value.nan_to_num() for name, value in state.items()}, expected if state else {})
        best, since = state["steps"].tolist() if state else (-1, 0)
        if not (-1 <= best <= step and 0 <= since <= step + 1 and (best < 0 or math.isfinite(state["value"].item()))):
            raise ValueError(f"the best validation is of step {best} of {step}, {since} before the last one")
        self.step, self.since = best, since
        self.value = state["value"].item() if state else math.inf
        self.active = bool(state)


def keep_only(root: Path, *steps: int) -> None:
    """Remove the folders step-N in `root`, but not those of these steps; `latest` names the last one left."""
    if not root.exists():
        return
    clear_temporaries(root)
    for path in checkpoints.directories(root):
        if int(path.name[5:]) not in steps:
            shutil.rmtree(path, ignore_errors=True)
    left = checkpoints.directories(root)
    if left:
        checkpoints.point_to(root, int(left[0].name[5:]))
    else:
        shutil.rmtree(root, ignore_errors=True)
