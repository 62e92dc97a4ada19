"""Recipes of latent models; times are for 2 CPU cores unless a GPU is named."""

from dataclasses import replace
from pathlib import Path

from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.diffusion.pairs import ReflowConfig
from midway.gen.flags.tasks import LatentTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.presets import MODERN
from midway.gen.networks.unet import UNetConfig
from midway.gen.objectives.jump_config import JumpConfig, Objective
from midway.gen.recipes.generic import base_latent, small_latent
from midway.gen.training.config import TrainConfig


def small_latents() -> LatentTask:
    """On a tokenizer of your own images: a DiT of at most 64 tokens, sizes from the latents. 6 min of one core for 28x28 grey.

    midway train latent small --tokenizer runs/my-tokenizer --out runs/my-model
    """
    return small_latent((6, 8, 8))


def base_latents() -> LatentTask:
    """The same on a GPU: DiT-S of at most 256 tokens as a rectified flow, 100,000 steps. Not measured yet.

    midway train latent base --tokenizer runs/my-tokenizer --out runs/my-model
    """
    return base_latent((6, 8, 8))


DIGITS_DIT = DiTConfig(width=96, depth=4, heads=4, patch=1)
DIGITS_TRAIN = TrainConfig(steps=4000, batch_size=64, lr=3e-3, decay="cosine", log_every=100)


def _digits_latent(name: str, model: LatentModelConfig) -> LatentTask:
    tokenizer = Path("runs/digits-fsq")
    return LatentTask(out=Path(f"runs/digits-{name}"), tokenizer=tokenizer, model=model, train=DIGITS_TRAIN)


def digits_dit() -> LatentTask:
    """A 0.7M-parameter DiT of 4 tokens on the variance-preserving schedule. About 2 min.

    midway train latent digits-dit --tokenizer runs/digits-fsq
    """
    model = LatentModelConfig(schedule="vp", target="v", time_mean=-0.4, time_std=1.2, dit=DIGITS_DIT)
    return _digits_latent("dit", model)


def digits_flow() -> LatentTask:
    """The same DiT as a rectified flow with SD3's logit-normal time. About 2 min.

    midway train latent digits-flow --tokenizer runs/digits-fsq
    """
    model = LatentModelConfig(schedule="linear", target="velocity", dit=DIGITS_DIT)
    return _digits_latent("flow", model)


def _digits_jumps(objective: Objective, steps: int, share: float) -> LatentTask:
    """A few-step model: it jumps from one time to another in one evaluation (docs/few-step.md).

    Uniform times, since normal ones hardly ever span the whole way; half the usual power of the weight, which moves the optimum
    where latents are few and skewed.
    """
    whole = objective == "shortcut"  # which draws the whole way by itself
    model = LatentModelConfig(
        schedule="linear",
        target="velocity",
        time="logit_normal" if whole else "uniform",
        objective=objective,
        jump=JumpConfig(flow_share=share, weight_power=0.0 if whole else 0.5),
        dit=replace(DIGITS_DIT, time_scale=1.0),
    )
    task = _digits_latent(objective, model)
    return replace(task, train=replace(task.train, steps=steps))


def digits_shortcut() -> LatentTask:
    """A few-step model of the same size, trained without derivatives: images in 1, 2, 4, ... evaluations. About 2 min.

    midway train latent digits-shortcut --tokenizer runs/digits-fsq
    """
    return _digits_jumps("shortcut", 3000, 0.5)


def digits_alphaflow() -> LatentTask:
    """alpha-Flow: from flow matching to MeanFlow in one training. About 2 min.

    midway train latent digits-alphaflow --tokenizer runs/digits-fsq
    """
    return _digits_jumps("alphaflow", 3000, 0.5)


def digits_meanflow() -> LatentTask:
    """MeanFlow: average velocities by the derivative of the network. About 2 min.

    midway train latent digits-meanflow --tokenizer runs/digits-fsq
    """
    return _digits_jumps("meanflow", 2600, 0.75)


def digits_imf() -> LatentTask:
    """Improved MeanFlow: the same along the network's own velocity. About 2 min.

    midway train latent digits-imf --tokenizer runs/digits-fsq
    """
    return _digits_jumps("imf", 2600, 0.75)


def digits_reflow() -> LatentTask:
    """A second rectified flow, from the weights of digits-flow and on pairs of its own sampler. About 2 min.

    midway train latent digits-reflow --tokenizer runs/digits-fsq
    """
    flow = Path("runs/digits-flow")
    task = replace(digits_flow(), out=Path("runs/digits-reflow"), init=flow, reflow=ReflowConfig(source=flow))
    model = replace(task.model, time="uniform")  # straighter by a fifth than with normal times
    return replace(task, model=model, train=replace(task.train, steps=2000, lr=1e-3))


def digits_modern() -> LatentTask:
    """digits-flow with RMSNorm, SwiGLU, and rotations besides added positions, at the same number of parameters. About 2 min.

    midway train latent digits-modern --tokenizer runs/digits-fsq
    """
    task = _digits_latent("modern", digits_flow().model)
    return replace(task, model=replace(task.model, dit=replace(DIGITS_DIT, **MODERN)))


def digits_edm() -> LatentTask:
    """The same DiT with EDM's preconditioning and noise distribution. About 2 min.

    midway train latent digits-edm --tokenizer runs/digits-fsq
    """
    model = LatentModelConfig(schedule="edm", target="v", time_mean=-1.2, time_std=1.2, dit=DIGITS_DIT)
    return _digits_latent("edm", model)


def digits_pixel_flow() -> LatentTask:
    """A pixel model: a rectified flow on the identity tokenizer, on dequantised pixels, so that it has bits per dimension.
    About 1 min.

    midway train tokenizer digits-pixels && midway train latent digits-pixel-flow
    """
    return LatentTask(
        out=Path("runs/digits-pixel-flow"),
        tokenizer=Path("runs/digits-pixels"),
        model=LatentModelConfig(dequantise=True, dit=DiTConfig(width=64, depth=4, heads=4, patch=2)),
        train=replace(DIGITS_TRAIN, steps=1000, lr=2e-3, ema=0.99),
    )


def digits_unet() -> LatentTask:
    """The same pixel model with diffusers' U-Net in place of the transformer. About 2 min.

    midway train tokenizer digits-pixels && midway train latent digits-unet
    """
    task = digits_pixel_flow()
    model = LatentModelConfig(dequantise=True, network="unet", unet=UNetConfig(widths=(32, 64)))
    return replace(task, out=Path("runs/digits-unet"), model=model)


def mnist5k_dit() -> LatentTask:
    """A 0.7M-parameter DiT of 16 tokens on 8x8 latents of MNIST's digits, with Muon. 4 min of one core.

    Fréchet distance (effnet-lite0, 64 axes) of 1,000 images: floor 0.16, ceiling 1.83, exact row 2.59.

    midway train latent mnist5k-dit --tokenizer runs/mnist5k-fsq
    """
    return LatentTask(
        out=Path("runs/mnist5k-dit"),
        tokenizer=Path("runs/mnist5k-fsq"),
        model=LatentModelConfig(
            schedule="vp", target="v", time_mean=0.1, time_std=1.2, dit=replace(DIGITS_DIT, patch=2)
        ),
        train=replace(DIGITS_TRAIN, steps=2400, optimizer="muon"),
    )


def cifar10_dit() -> LatentTask:
    """A class-conditional DiT of 16 tokens on 8x8 latents of CIFAR-10, cosine schedule.

    midway train latent cifar10-dit --max-seconds 900
    """
    return LatentTask(
        out=Path("runs/cifar10-dit"),
        tokenizer=Path("runs/cifar10-fsq"),
        model=LatentModelConfig(schedule="cosine", target="v", dit=DiTConfig(width=192, depth=6, heads=6, patch=2)),
        train=TrainConfig(steps=100000, batch_size=128, lr=1e-3, ema=0.999, log_every=50),
    )
