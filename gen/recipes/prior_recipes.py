"""Recipes of priors over codes; docstrings have command, run time and expected result. Times are for 2 CPU cores."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import tyro

from midway.gen.flags.cli import by_name
from midway.gen.flags.tasks import PriorTask
from midway.gen.priors.config import Kind, PriorConfig, TokenHeadConfig
from midway.gen.priors.layout import CodeLayout, LatentLayout
from midway.gen.training.config import TrainConfig

DIGITS = TrainConfig(
    steps=2000, batch_size=64, lr=2e-3, decay="cosine", weight_decay=0.05, ema=0.995, log_every=100, validate_every=100
)


def _prior(name: str, tokenizer: str, model: PriorConfig, train: TrainConfig) -> PriorTask:
    return PriorTask(Path(f"runs/{name}"), tokenizer=Path(f"runs/{tokenizer}"), model=model, train=train)


def digits_causal() -> PriorTask:
    """4 tokens of 6 digits, one after the other. Under 1 min; about 44 bits an image on held-out digits, where independent codes
    take 59.8 and a fixed length 63.9.

    So few images are soon known by heart: a third of the network is dropped out, weights decay, validation chooses the step. On
    `--tokenizer runs/digits-vq`, 16 tokens of 512 codes: 87 bits, where independent codes take 119 and a fixed length 144.

    midway train prior digits-causal --tokenizer runs/digits-fsq
    """
    model = PriorConfig("causal", width=128, depth=4, heads=4, dropout=0.3)
    train = replace(DIGITS, steps=500, weight_decay=0.3, ema=0.99, validate_every=50, patience_validations=5)
    return _prior("digits-causal", "digits-fsq", model, train)


def digits_masked() -> PriorTask:
    """The same tokens in any order, in 1 to 4 evaluations. About 1 min; at most about 46 bits an image on held-out digits.

    On `--tokenizer runs/digits-vq`: at most 91 bits (2 min).

    midway train prior digits-masked --tokenizer runs/digits-fsq
    """
    model = PriorConfig("masked", width=128, depth=4, heads=4, dropout=0.3)
    train = replace(DIGITS, steps=1000, weight_decay=0.3, ema=0.99)
    return _prior("digits-masked", "digits-fsq", model, train)


def digits_mar() -> PriorTask:
    """4 continuous tokens of 6 channels, each drawn by a diffusion head: MAR. 3 min of one core; held-out loss 0.48.

    Fréchet distance (effnet-lite0, 64 axes) of 1,000 images: 1.10 at 50 head evaluations a token, 1.16 by a table of 2.

    midway train prior digits-mar --tokenizer runs/digits-kl
    """
    head = TokenHeadConfig(width=128, repeats=4)
    model = PriorConfig("continuous", width=96, depth=4, heads=4, dropout=0.1, head=head)
    train = replace(DIGITS, ema=0.999)
    return PriorTask(Path("runs/digits-mar"), tokenizer=Path("runs/digits-kl"), model=model, train=train)


def mnist5k_causal() -> PriorTask:
    """64 tokens of 512 codes, one after the other. 4 min of one core; 172 bits an image on held-out digits, where independent
    codes take 315 and a fixed length 576, with --model.split digits.

    Fréchet distance (effnet-lite0, 64 axes) of 1,000 images 2.5, where the tokenizer alone has 2.0.

    midway train prior mnist5k-causal --tokenizer runs/mnist5k-fsq
    """
    model = PriorConfig("causal", width=128, depth=4, heads=4, dropout=0.3)
    train = replace(
        DIGITS, steps=900, batch_size=32, weight_decay=0.3, ema=0.99, validate_every=150, patience_validations=3
    )
    return _prior("mnist5k-causal", "mnist5k-fsq", model, train)


def mnist5k_masked() -> PriorTask:
    """The same tokens in any order, in 1 to 64 evaluations. 13 min of one core; at most 197 bits, with --model.split digits.

    Fréchet distance (effnet-lite0, 64 axes) of 1,000 images by maskgit 3.3 at 64 evaluations, 4.0 at 8.

    midway train prior mnist5k-masked --tokenizer runs/mnist5k-fsq
    """
    model = PriorConfig("masked", width=128, depth=4, heads=4, dropout=0.3)
    train = replace(
        DIGITS, steps=1800, batch_size=32, weight_decay=0.3, ema=0.99, validate_every=300, patience_validations=3
    )
    return _prior("mnist5k-masked", "mnist5k-fsq", model, train)


def mnist5k_mar() -> PriorTask:
    """64 continuous tokens of 3 channels, the latents of an FSQ tokenizer: MAR. About 17 min of one core; not measured yet.

    midway train prior mnist5k-mar --tokenizer runs/mnist5k-fsq
    """
    head = TokenHeadConfig(width=128, repeats=1)
    model = PriorConfig("continuous", width=128, depth=4, heads=4, dropout=0.1, head=head)
    train = replace(DIGITS, steps=3000, batch_size=32, ema=0.999)
    return PriorTask(Path("runs/mnist5k-mar"), tokenizer=Path("runs/mnist5k-fsq"), model=model, train=train)


def _cifar10(kind: Kind) -> PriorTask:
    model = PriorConfig(kind, width=192, depth=6, heads=6, dropout=0.1)
    train = replace(DIGITS, steps=100_000, lr=1e-3, ema=0.999, log_every=50, validate_every=500)
    return replace(_prior(f"cifar10-{kind}", "cifar10-fsq", model, train), flip=True, validation_images=500)


def cifar10_causal() -> PriorTask:
    """64 tokens of 6 digits on CIFAR-10, with mirror images. Not trained to its end yet.

    midway train prior cifar10-causal --max-seconds 900
    """
    return _cifar10("causal")


def cifar10_masked() -> PriorTask:
    """The same tokens in any order. Not trained to its end yet.

    midway train prior cifar10-masked --max-seconds 900
    """
    return _cifar10("masked")


def small_prior(layout: CodeLayout | LatentLayout) -> PriorTask:
    """A causal transformer, wider where there are more than 64 tokens; it ends where held-out bits no longer fall."""
    many = layout.length > 64
    width, depth = (128, 6) if many else (96, 4)
    model = PriorConfig("causal", width=width, depth=depth, heads=4, dropout=0.2)
    train = replace(DIGITS, steps=2400, batch_size=32 if many else 64, patience_validations=5)
    return PriorTask(tyro.MISSING, tokenizer=tyro.MISSING, model=model, train=train)


def small() -> PriorTask:
    """On a tokenizer of your own images: causal, sizes from the codes; it ends where held-out bits no longer fall.

    midway train prior small --tokenizer runs/my-tokenizer --out runs/my-prior
    """
    return small_prior(CodeLayout(((8, 8),), ((512,),)))


def describe_prior(name: str, layout: CodeLayout | LatentLayout, task: PriorTask) -> str:
    """`small for 64 tokens: width 96, depth 4, batch 64`."""
    model = task.model
    sizes = f"width {model.width}, depth {model.depth}, batch {task.train.batch_size}"
    return f"{name} for {layout.length} tokens: {sizes}"


GENERIC_PRIORS: dict[str, Callable[[CodeLayout | LatentLayout], PriorTask]] = {"small": small_prior}
PRIOR_SIZES = ("model.width", "model.depth", "train.batch_size")
"""What the number of tokens decides."""
PRIOR_RECIPES = by_name(
    small,
    digits_causal,
    digits_masked,
    digits_mar,
    mnist5k_causal,
    mnist5k_masked,
    mnist5k_mar,
    cifar10_causal,
    cifar10_masked,
)
