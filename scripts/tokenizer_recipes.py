"""Recipes of train_tokenizer.py: plain functions that return a configuration. Times are for 2 CPU cores."""

from collections.abc import Callable
from pathlib import Path

from tokenizer_task import TokenizerConfig, TokenizerTask

from midway.gen.data.splits import DataConfig
from midway.gen.training.config import TrainConfig

DIGITS_TOKENIZER_TRAIN = TrainConfig(steps=600, batch_size=128, lr=2e-3, decay="cosine", ema=0.99, log_every=50)


def digits_fsq() -> TokenizerTask:
    """8x8 digits to 4 FSQ codes of 64000 values (64 bits an image). Under 1 min; PSNR about 22 dB on held-out digits.

    python scripts/train_tokenizer.py digits-fsq
    """
    return TokenizerTask(
        out=Path("runs/digits-fsq"),
        model=TokenizerConfig(levels=(8, 8, 8, 5, 5, 5), width=64, downsample=4),
        train=DIGITS_TOKENIZER_TRAIN,
    )


def digits_vq() -> TokenizerTask:
    """8x8 digits to 16 codes of a learned 512-entry codebook (144 bits an image). Under 1 min.

    python scripts/train_tokenizer.py digits-vq
    """
    return TokenizerTask(
        out=Path("runs/digits-vq"), model=TokenizerConfig(quantizer="vq"), train=DIGITS_TOKENIZER_TRAIN
    )


def digits_kl() -> TokenizerTask:
    """8x8 digits to 2x2 continuous latents of 6 channels with a small KL term. Under 1 min.

    python scripts/train_tokenizer.py digits-kl
    """
    return TokenizerTask(
        out=Path("runs/digits-kl"),
        model=TokenizerConfig(quantizer="kl", dim=6, width=64, downsample=4),
        train=DIGITS_TOKENIZER_TRAIN,
    )


def digits_pixels() -> TokenizerTask:
    """No tokenizer: the latents are the pixels, so that a latent model becomes a pixel model. Seconds.

    python scripts/train_tokenizer.py digits-pixels
    """
    return TokenizerTask(
        out=Path("runs/digits-pixels"), model=TokenizerConfig(quantizer="identity", downsample=1), train=TrainConfig()
    )


def cifar10_fsq() -> TokenizerTask:
    """CIFAR-10 to 8x8 FSQ codes of 64000 values (6 channels, 1024 bits an image).

    python scripts/train_tokenizer.py cifar10-fsq --data cifar10-train.zip --max-seconds 480
    """
    return TokenizerTask(
        out=Path("runs/cifar10-fsq"),
        data=DataConfig(data="cifar10", held_out=0.1),
        model=TokenizerConfig(levels=(8, 8, 8, 5, 5, 5), width=64, downsample=4, blocks=2),
        train=TrainConfig(steps=20000, batch_size=64, lr=1e-3, ema=0.999, log_every=50),
    )


TOKENIZER_RECIPES: dict[str, Callable[[], TokenizerTask]] = {
    "digits-fsq": digits_fsq,
    "digits-vq": digits_vq,
    "digits-kl": digits_kl,
    "digits-pixels": digits_pixels,
    "cifar10-fsq": cifar10_fsq,
}
