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


def _digits(kind: Kind) -> PriorTask:
    model = PriorConfig(kind, width=96, depth=4, heads=4, dropout=0.2)
    return PriorTask(Path(f"runs/digits-{kind}"), tokenizer=Path("runs/digits-fsq"), model=model, train=DIGITS)


def digits_causal() -> PriorTask:
    """TODO

    midway train prior digits-causal --tokenizer runs/digits-fsq
    """
    return _digits("causal")


def digits_masked() -> PriorTask:
    """TODO

    midway train prior digits-masked --tokenizer runs/digits-fsq
    """
    return _digits("masked")


def digits_mar() -> PriorTask:
    """4 continuous tokens of 6 channels, each drawn by a diffusion head: MAR.

    midway train prior digits-mar --tokenizer runs/digits-kl
    """
    head = TokenHeadConfig(width=128, repeats=4)
    model = PriorConfig("continuous", width=96, depth=4, heads=4, dropout=0.1, head=head)
    train = replace(DIGITS, ema=0.999)
    return PriorTask(Path("runs/digits-mar"), tokenizer=Path("runs/digits-kl"), model=model, train=train)


def mnist5k_mar() -> PriorTask:
    """64 continuous tokens of 3 channels, the latents of an FSQ tokenizer before they are rounded: MAR.

    midway train prior mnist5k-mar --tokenizer runs/mnist5k-fsq
    """
    head = TokenHeadConfig(width=128, repeats=1)
    model = PriorConfig("continuous", width=128, depth=4, heads=4, dropout=0.1, head=head)
    train = replace(DIGITS, steps=3000, batch_size=32, ema=0.999)
    return PriorTask(Path("runs/mnist5k-mar"), tokenizer=Path("runs/mnist5k-fsq"), model=model, train=train)


def small_prior(layout: CodeLayout | LatentLayout) -> PriorTask:
    """Wider where there are more tokens."""
    wide = layout.length > 64
    model = PriorConfig("causal", width=128 if wide else 96, depth=6 if wide else 4, heads=4, dropout=0.1)
    batch = 64 if layout.length <= 64 else 32
    train = replace(DIGITS, steps=2400, batch_size=batch)
    return PriorTask(tyro.MISSING, tokenizer=tyro.MISSING, model=model, train=train)


def small() -> PriorTask:
    """On a tokenizer of your own images: causal, sizes from the codes.

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
PRIOR_RECIPES = by_name(small, digits_causal, digits_masked, digits_mar, mnist5k_mar)
