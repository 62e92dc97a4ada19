"""Which steps count, and when to stop: decided the same on every process, without the host waiting for the device.

A step counts when the mean loss over all processes and the gradient norm are finite; otherwise the optimizers, the codebooks and
the logged means are left as they were, by a switch on the device. The host reads the decision of the previous step (on a
GPU) or of this one (on a CPU), so that a device always has work queued.
"""

import math
from collections import deque
from dataclasses import astuple, dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

from midway.tokenizers.weights import check_tensors

RECENT = 20


@dataclass(frozen=True)
class StopFlags:
    """Conditions of one process: a stop signal arrived, the time limit has passed, a checkpoint or a preview is due."""

    stop: bool = False
    late: bool = False
    save: bool = False
    preview: bool = False


@dataclass(frozen=True)
class Decision:
    """What holds on all processes: the number of bad steps in a row, and the flags raised by any process."""

    streak: int
    stop_flags: StopFlags


class NonFiniteGuard:
    """Judges every step once, with one small collective if there are several processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._counts = torch.zeros(2, dtype=torch.int64, device=accelerator.device)  # bad steps in a row, bad steps
        self._all_but_streak = torch.tensor([0, 1], device=accelerator.device)
        self._recent: deque[tuple[Tensor, Tensor]] = deque(maxlen=RECENT)
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None, StopFlags]] = deque()
        self._lag = 1 if accelerator.device.type == "cuda" else 0

    def judge(self, loss: Tensor, norm: Tensor, stop_flags: StopFlags) -> Tensor:
        """0-dim bool on the device: whether this step counts. loss: 0-dim mean of this process; norm: of all gradients."""
        several = self.accelerator.num_processes > 1
        packet = self._agree(loss, stop_flags) if several else loss
        mean = packet[0] / self.accelerator.num_processes if several else loss
        step_ok = (mean + norm).abs() < math.inf  # false for NaN
        self._counts = torch.where(step_ok, self._counts * self._all_but_streak, self._counts + 1)
        self._recent.append((mean, norm))
        self._post(torch.cat([self._counts[:1].double(), packet[1:]]) if several else self._counts, stop_flags)
        return step_ok

    def _agree(self, loss: Tensor, stop_flags: StopFlags) -> Tensor:
        """float64 (5,): the sums over all processes of the loss and of the flags."""
        flags = torch.tensor(astuple(stop_flags), dtype=torch.float64, device=loss.device)
        return cast(Tensor, self.accelerator.reduce(torch.cat([loss.double().view(1), flags]), "sum"))

    def _post(self, packet: Tensor, stop_flags: StopFlags) -> None:
        if not self._lag:
            self._waiting.append((packet, None, stop_flags))
            return
        host = torch.empty(packet.shape, dtype=packet.dtype, pin_memory=True)
        host.copy_(packet, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((host, event, stop_flags))

    def read(self) -> Decision:
        """The decision of the newest step that has arrived on the host; no flags before the first."""
        if len(self._waiting) <= self._lag:
            return Decision(0, StopFlags())
        packet, event, stop_flags = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        streak, *flags = packet.tolist()
        several = self.accelerator.num_processes > 1
        return Decision(int(streak), StopFlags(*(flag > 0 for flag in flags)) if several else stop_flags)

    @property
    def streak(self) -> int:
        """Bad steps in a row until now; waits for the device."""
        return int(self._counts[0])

    @property
    def skipped(self) -> int:
        """Steps that did not count so far; waits for the device."""
        return int(self._counts[1])

    def losses(self) -> list[float]:
        """The last losses, at most 20, oldest first; the gradient norm where that is what was not finite."""
        pairs = [(float(loss), float(norm)) for loss, norm in self._recent]
        return [loss if math.isfinite(norm) else norm for loss, norm in pairs]

    def state(self) -> dict[str, Tensor]:
        """The counters that a resumed run restores."""
        return {"counts": self._counts}

    def load(self, state: dict[str, Tensor], step: int) -> None:
        """Restore the `state` of this step; decisions that were not yet read are dropped. ValueError for any other."""
        check_tensors(state, {"counts": self._counts})
        streak, skipped = state["counts"].tolist()
        if not 0 <= streak <= skipped <= step:
            raise ValueError(f"{skipped} bad steps of {step}, {streak} of them in a row")
        self._counts = state["counts"].to(self.accelerator.device)
        self._recent.clear()
        self._waiting.clear()
