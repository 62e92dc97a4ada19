"""Recipes of baselines: plain functions that return a configuration; docstrings have command, run time and expected result.

Times are for 2 CPU cores unless a GPU is named.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from midway.gen.baselines.flow_config import FlowConfig, glow, nice, realnvp
from midway.gen.baselines.tarflow import TarFlowConfig
from midway.gen.baselines.vae import VAEConfig
from midway.gen.data.splits import DataConfig
from midway.gen.flags.baseline_tasks import BaselineTask, FlowTask, TarFlowTask, VAETask
from midway.gen.flags.cli import by_name, with_text
from midway.gen.training.config import TrainConfig

DIGITS_BASELINE_TRAIN = TrainConfig(
    steps=3000, lr=2e-3, batch_size=64, ema=0.99, log_every=50, validate_every=50, patience_validations=8
)
CIFAR10 = DataConfig(data="cifar10", held_out=0.1)
CIFAR10_BASELINE_TRAIN = TrainConfig(
    steps=100000, lr=1e-3, batch_size=64, ema=0.999, log_every=100, validate_every=2000, patience_validations=5
)


def digits_vae() -> VAETask:
    """A VAE of 8 latent channels at 2x2 positions. Under 1 min; ELBO 1.90 bits per dimension of held-out digits.

    midway train baseline digits-vae
    """
    train = replace(
        DIGITS_BASELINE_TRAIN, steps=600, batch_size=128, lr=3e-3, decay="cosine", weight_decay=0.5, validate_every=25
    )
    return VAETask(out=Path("runs/digits-vae"), train=train)


def digits_nice() -> FlowTask:
    """NICE: 6 additive couplings with fully connected networks. About 80 s; 2.24 bits per dimension of held-out digits.

    midway train baseline digits-nice
    """
    train = replace(DIGITS_BASELINE_TRAIN, batch_size=128, lr=1e-3, weight_decay=0.5)
    return FlowTask(out=Path("runs/digits-nice"), model=nice(width=256, couplings=6), train=train)


def digits_realnvp() -> FlowTask:
    """RealNVP of one scale. About 1 min; 2.00 bits per dimension of held-out digits (1.99 with --steps 3000).

    midway train baseline digits-realnvp
    """
    train = replace(DIGITS_BASELINE_TRAIN, steps=850)
    return FlowTask(out=Path("runs/digits-realnvp"), model=realnvp(width=64, scales=1), train=train)


def digits_glow() -> FlowTask:
    """Glow of one scale with 12 steps. About 1 min; 2.07 bits per dimension of held-out digits.

    midway train baseline digits-glow
    """
    train = replace(DIGITS_BASELINE_TRAIN, steps=800)
    return FlowTask(out=Path("runs/digits-glow"), model=glow(width=64, scales=1, steps=12), train=train)


def digits_tarflow() -> TarFlowTask:
    """TarFlow of 16 tokens: 4 flows of 2 blocks. About 1 min; 2.11 bits per dimension of held-out digits, still falling
    (2.01 with --steps 3000, which takes 3 min).

    midway train baseline digits-tarflow
    """
    train = replace(DIGITS_BASELINE_TRAIN, steps=500, lr=3e-3)
    return TarFlowTask(out=Path("runs/digits-tarflow"), train=train)


def cifar10_vae() -> VAETask:
    """A VAE of 32 latent channels at 8x8 positions. Meant for a GPU; not measured yet.

    midway train baseline cifar10-vae --data cifar10-train.zip --max-seconds 900
    """
    model = VAEConfig(latent_dim=32, width=192, blocks=4, mixtures=5)
    return VAETask(
        out=Path("runs/cifar10-vae"), data=CIFAR10, model=model, validation_images=1000, train=CIFAR10_BASELINE_TRAIN
    )


def _cifar10_flow(name: str, model: FlowConfig) -> FlowTask:
    out = Path(f"runs/cifar10-{name}")
    return FlowTask(out=out, data=CIFAR10, model=model, validation_images=1000, train=CIFAR10_BASELINE_TRAIN)


def cifar10_nice() -> FlowTask:
    """NICE: 4 additive couplings of width 1000. Meant for a GPU; not measured yet.

    midway train baseline cifar10-nice --data cifar10-train.zip --max-seconds 900
    """
    return _cifar10_flow("nice", nice(width=1000, couplings=4, hidden=4))


def cifar10_realnvp() -> FlowTask:
    """RealNVP of two scales. Meant for a GPU; not measured yet.

    midway train baseline cifar10-realnvp --data cifar10-train.zip --max-seconds 900
    """
    return _cifar10_flow("realnvp", realnvp(width=128, scales=2))


def cifar10_glow() -> FlowTask:
    """Glow of three scales with 16 steps. Meant for a GPU; not measured yet.

    midway train baseline cifar10-glow --data cifar10-train.zip --max-seconds 900
    """
    return _cifar10_flow("glow", glow(width=128, scales=3, steps=16))


def cifar10_tarflow() -> TarFlowTask:
    """TarFlow of 64 tokens: 6 flows of 4 blocks. Meant for a GPU.

    midway train baseline cifar10-tarflow --data cifar10-train.zip --max-seconds 900
    """
    model = TarFlowConfig(patch=4, flows=6, depth=4, width=256, heads=4)
    out = Path("runs/cifar10-tarflow")
    return TarFlowTask(out=out, data=CIFAR10, model=model, validation_images=1000, train=CIFAR10_BASELINE_TRAIN)


BASELINE_RECIPES: dict[str, Callable[[], BaselineTask]] = {
    "vae": with_text("A variational autoencoder, for any images.", lambda: VAETask(out=Path("runs/vae"))),
    "nice": with_text(
        "Additive couplings with fully connected networks, for any images.",
        lambda: FlowTask(out=Path("runs/nice"), model=nice()),
    ),
    "realnvp": with_text(
        "Affine couplings on checkerboards and channels, for any images.",
        lambda: FlowTask(out=Path("runs/realnvp"), model=realnvp()),
    ),
    "glow": with_text(
        "Affine couplings with 1x1 convolutions, for any images.",
        lambda: FlowTask(out=Path("runs/glow"), model=glow()),
    ),
    "tarflow": with_text(
        "An autoregressive transformer flow over patches, for any images.",
        lambda: TarFlowTask(out=Path("runs/tarflow")),
    ),
    **by_name(digits_vae, digits_nice, digits_realnvp, digits_glow, digits_tarflow),
    **by_name(cifar10_vae, cifar10_nice, cifar10_realnvp, cifar10_glow, cifar10_tarflow),
}
"""The first five are models with default settings, for any data; the others are tuned for one data set."""
