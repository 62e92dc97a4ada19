"""Options of midway train baseline: one dataclass for each kind of baseline, whose fields are its flags."""

from dataclasses import dataclass, field
from typing import Annotated

from midway.gen.baselines.flow_config import FlowConfig
from midway.gen.baselines.tarflow import TarFlowConfig
from midway.gen.baselines.vae import VAEConfig
from midway.gen.data.splits import DataConfig
from midway.gen.flags.cli import Flat
from midway.gen.flags.tasks import TrainingTask


@dataclass(frozen=True, kw_only=True)
class BaselineTask(TrainingTask):
    """Train a baseline: a model of images that gives bits per dimension."""

    data: Annotated[DataConfig, Flat] = field(default_factory=DataConfig)
    conditional: bool = False
    """Train on the class of each image as well."""
    validation_images: int | None = None
    """Number of held-out images in validation (default: all)."""
    draws: int | None = None
    """Draws of the bound in validation and in the final score (default: 16 for a VAE, else --model.draws)."""


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
