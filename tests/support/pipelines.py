"""The run directories of one tiny path through all scripts, and what a script leaves on the terminal."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from midway.gen.diffusion.load import TrainedModel, load_model
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.training.config import TrainConfig

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
TINY = TrainConfig(steps=25, batch_size=64, lr=1e-2, warmup=2, ema=0.9, log_every=10)
TINY_LATENT = replace(TINY, posthoc=(0.05, 0.1), posthoc_every=5)
TINY_DIT = DiTConfig(width=32, depth=2, heads=2)


@dataclass(frozen=True)
class Pipeline:
    """The run directories of one tiny path: tokenizer -> features, latent model -> learned solvers; and of a baseline."""

    root: Path
    tokenizer: Path
    features: Path
    model: Path
    baseline: Path

    def load(self) -> TrainedModel:
        """The latent model on the CPU."""
        return load_model(self.model, torch.device("cpu"))


@dataclass(frozen=True)
class Outcome:
    """What a script left on the terminal."""

    code: int
    out: str
    err: str


Script = Callable[..., Outcome]
