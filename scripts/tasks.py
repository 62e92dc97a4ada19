"""What a training script is told: one dataclass each, whose fields are its flags. recipes.py fills them in."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tokenizer_task import Flat as Flat
from tokenizer_task import QuantizerName as QuantizerName
from tokenizer_task import Resume as Resume
from tokenizer_task import TokenizerConfig as TokenizerConfig
from tokenizer_task import TokenizerTask as TokenizerTask

from midway.gen.baselines.flow_config import FlowConfig
from midway.gen.baselines.tarflow import TarFlowConfig
from midway.gen.baselines.vae import VAEConfig
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.evaluation.online import OnlineConfig
from midway.gen.training.config import TrainConfig


@dataclass(frozen=True)
class LatentTask:
    """Train a latent model on a tokenizer's latents."""

    out: Path
    """Run directory to create."""
    tokenizer: Path
    """Run directory of the tokenizer; its data set is used."""
    latents: Path | None = None
    """Latent cache (default: beside the tokenizer; made if missing)."""
    model: LatentModelConfig = field(default_factory=LatentModelConfig)
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    early: OnlineConfig = field(default_factory=OnlineConfig)
    """With --measure-every: what is measured."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)
    overwrite: bool = False
    """Delete a run that is already at --out."""
    resume: Resume = "no"
    """auto: go on from the newest checkpoint at --out, or start if there is none."""


@dataclass(frozen=True, kw_only=True)
class BaselineTask:
    """Train a baseline: a model of images that gives bits per dimension."""

    out: Path
    """Run directory to create."""
    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    conditional: bool = False
    """Tell the model the class of each image."""
    validation_images: int | None = None
    """Held-out images that a validation looks at (default: all)."""
    draws: int | None = None
    """Draws of the bound in validation and of the figure at the end (default: 16 for a VAE, else the model's own)."""
    train: Annotated[TrainConfig, Flat] = field(default_factory=TrainConfig)
    overwrite: bool = False
    """Delete a run that is already at --out."""
    resume: Resume = "no"
    """auto: go on from the newest checkpoint at --out, or start if there is none."""


@dataclass(frozen=True, kw_only=True)
class VAETask(BaselineTask):
    """Train a VAE."""

    model: VAEConfig = field(default_factory=VAEConfig)


@dataclass(frozen=True, kw_only=True)
class FlowTask(BaselineTask):
    """Train a flow of couplings: NICE, RealNVP, Glow."""

    model: FlowConfig = field(default_factory=FlowConfig)


@dataclass(frozen=True, kw_only=True)
class TarFlowTask(BaselineTask):
    """Train a TarFlow."""

    model: TarFlowConfig = field(default_factory=TarFlowConfig)


BASELINE_TASKS: dict[str, type[VAETask] | type[FlowTask] | type[TarFlowTask]] = {
    "vae": VAETask,
    "flow": FlowTask,
    "tarflow": TarFlowTask,
}
"""By the kind of baseline (gen/baselines/registry.py)."""
