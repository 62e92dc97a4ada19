"""The flags that sampling and measuring share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from midway.gen.core.ranges import BATCH, check_flag_ranges
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import EVERYWHERE


@dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How samples are drawn."""

    guidance: float = 1.0
    """Classifier-free guidance scale; 1 is none."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only noise levels sigma / alpha above the first and up to the second number."""
    guide: Path | None = None
    """Autoguidance: run directory of a smaller or less trained model of the same kind, in place of the missing class."""
    analytic_first: bool = False
    """Replace the first evaluation by the analytic direction (odd budgets for two-stage solvers)."""
    eta: float = 0.0
    """ddim only: 0 is deterministic, 1 ancestral."""
    batch_size: int = 256
    """Images that are sampled at once; the rest is unchanged but for rounding."""
    precision: Literal["no", "bf16"] = "no"
    """bf16: the network runs under autocast; the solver's state stays float32."""
    graph: bool = False
    """On a GPU, run the trajectory of every full batch as one CUDA graph; nothing changes on a CPU."""

    def __post_init__(self) -> None:
        check_flag_ranges(self, batch_size=BATCH)

    def sampler_options(self, device: torch.device) -> dict[str, Any]:
        """The same as fields of SamplerConfig; the guiding model is loaded."""
        same = ("guidance", "analytic_first", "eta", "batch_size", "precision", "graph")
        weak = load_model(self.guide, device) if self.guide else None
        own = {name: getattr(self, name) for name in same}
        return {**own, "interval": self.guidance_interval or EVERYWHERE, "weak": weak}

    @property
    def guides(self) -> bool:
        """Whether any flag asks for guidance."""
        return self.guidance != 1 or self.guidance_interval is not None or self.guide is not None
