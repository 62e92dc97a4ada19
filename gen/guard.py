"""Which steps count, and when to stop: decided the same on every process, without the host waiting for the device.

A step counts when the mean loss over all processes and the gradient norm are finite; otherwise the optimizers, the codebooks and
the logged means are left as they were, by a switch on the device. The host reads what was decided of the step before (on a
GPU) or of this one (on a CPU), so that a device always has work queued.
"""

import math
from collections import deque
from dataclasses import dataclass
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor

RECENT = 20


@dataclass(frozen=True)
class Wishes:
    """What this process would like, each 0 or 1: stop (a signal came), the time is over, a checkpoint is due."""

    stop: bool = False
    late: bool = False
    save: bool = False


@dataclass(frozen=True)
class Verdict:
    """What all processes agreed on: bad steps in a row, and whose wishes are granted."""

    streak: int
    wishes: Wishes


class Guard:
    """Judges every step once, with one small collective if there are several processes."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, device = accelerator, accelerator.device
        self.streak = torch.zeros((), dtype=torch.int64, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.recent = torch.full((RECENT,), math.nan, dtype=torch.float64, device=device)
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._lag = 1 if device.type == "cuda" else 0

    def judge(self, step: int, loss: Tensor, norm: Tensor, wishes: Wishes) -> Tensor:
        """0-dim bool on the device: whether step `step` counts. loss: 0-dim mean of this process; norm: of all gradients."""
        flags = torch.tensor([wishes.stop, wishes.late, wishes.save], dtype=torch.float64, device=loss.device)
        packet = torch.cat([loss.detach().double().view(1), flags])
        if self.accelerator.num_processes > 1:
            packet = cast(Tensor, self.accelerator.reduce(packet, "sum"))
        loss_everywhere = packet[0] / self.accelerator.num_processes
        kept = torch.isfinite(loss_everywhere) & torch.isfinite(norm)
        self.recent[step % RECENT] = torch.where(torch.isfinite(norm), loss_everywhere, norm.double())
        self.streak = torch.where(kept, 0, self.streak + 1)
        self.skipped = self.skipped + ~kept
        packet[0] = self.streak
        self._post(packet)
        return kept

    def _post(self, packet: Tensor) -> None:
        if not self._lag:
            self._waiting.append((packet, None))
            return
        host = torch.empty(packet.shape, dtype=packet.dtype, pin_memory=True)
        host.copy_(packet, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._waiting.append((host, event))

    def read(self) -> Verdict:
        """What was decided about the newest step whose decision has had the time to arrive."""
        if len(self._waiting) <= self._lag:
            return Verdict(0, Wishes())
        packet, event = self._waiting.popleft()
        if event is not None:
            event.synchronize()
        streak, *flags = packet.tolist()
        return Verdict(int(streak), Wishes(*(flag > 0 for flag in flags)))

    def losses(self, step: int) -> list[float]:
        """The last losses before `step`, oldest first; the gradient norm where that is what was not finite."""
        count = min(step, RECENT)
        recent = self.recent.tolist()
        return [recent[i % RECENT] for i in range(step - count, step)]

    def state(self) -> dict[str, Tensor]:
        """The counters that a resumed run goes on with."""
        return {"streak": self.streak, "skipped": self.skipped, "recent": self.recent}

    def load(self, state: dict[str, Tensor]) -> None:
        """Go on from `state`; what was waiting to be read is forgotten."""
        device = self.accelerator.device
        self.streak, self.skipped = state["streak"].to(device), state["skipped"].to(device)
        self.recent = state["recent"].to(device).clone()
        self._waiting.clear()
