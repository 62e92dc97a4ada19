"""The card of a learned solver."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class SolverCard:
    """Origin and cost of a learned solver. ValueError for counts and scales that cannot be."""

    name: str
    """A name in `learned_solver.LEARNED`, or `table`."""
    grid_name: str
    schedule: str
    """Its name in `SCHEDULES`, or `table.fingerprint` of any other."""
    model_hash: str
    nfe: int
    analytic_first: bool
    guidance: float
    training_nfe: int
    """Network evaluations spent on distillation, teacher included: every pass of a sample through the network counts 1, with
    gradient or without; recomputation in a backward pass does not count."""
    teacher: str
    base: str = "none"
    """Solver that AMED is plugged into, a name in `plugin.BASES`."""
    mode: str = "per_step"
    """How it was distilled: per_step or end_to_end."""
    analytic_history: bool = True
    """Whether later steps may weigh an analytic first slope (`AMEDSolver`)."""

    def __post_init__(self) -> None:
        if self.nfe < 1 or self.training_nfe < 0 or not math.isfinite(self.guidance):
            raise ValueError(
                f"a card needs nfe >= 1, training_nfe >= 0 and a finite guidance, got {self.nfe}, {self.training_nfe} and "
                f"{self.guidance}"
            )
