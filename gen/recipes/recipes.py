"""Recipes: plain functions that return a configuration; docstrings have command, run time and expected result.

Here are those of tokenizers, and the names of all; latent_recipes.py has those of latent models. Times are for 2 CPU cores unless
a GPU is named.
"""

from dataclasses import replace
from pathlib import Path

from midway.gen.data.splits import DataConfig
from midway.gen.flags.cli import by_name
from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.recipes import imagenet_recipes as imagenet
from midway.gen.recipes import latent_recipes as latent
from midway.gen.recipes.generic import Shape, base_tokenizer, small_tokenizer
from midway.gen.training.config import TrainConfig


def small() -> TokenizerTask:
    """Your own images, grey or RGB, 8 to 512 pixels a side: FSQ, sizes from the images. 1 min of one core for 28x28 grey,
    6 min for 96x96 RGB.

    Images are square, or are made so by --resize. The log has the sizes that were chosen, config.yaml too; every flag overrides.

    midway train tokenizer small --data path/to/images --out runs/my-tokenizer
    """
    return small_tokenizer(Shape())


def base() -> TokenizerTask:
    """The same on a GPU: residual blocks at every resolution, 30,000 steps. Not measured yet.

    midway train tokenizer base --data path/to/images --out runs/my-tokenizer
    """
    return base_tokenizer(Shape())


DIGITS_TOKENIZER_TRAIN = TrainConfig(steps=600, batch_size=128, lr=2e-3, decay="cosine", ema=0.99, log_every=50)


def _digits_tokenizer(name: str, model: TokenizerConfig) -> TokenizerTask:
    return TokenizerTask(out=Path(f"runs/digits-{name}"), model=model, train=DIGITS_TOKENIZER_TRAIN)


def digits_fsq() -> TokenizerTask:
    """8x8 digits to 4 FSQ codes of 64000 values (64 bits an image). Under 1 min; PSNR about 22.7 dB on held-out digits.

    midway train tokenizer digits-fsq
    """
    return _digits_tokenizer("fsq", TokenizerConfig(levels=(8, 8, 8, 5, 5, 5), width=64, downsample=4))


def digits_vq() -> TokenizerTask:
    """8x8 digits to 16 codes of a learned 512-entry codebook (144 bits an image). Under 1 min.

    midway train tokenizer digits-vq
    """
    return _digits_tokenizer("vq", TokenizerConfig(quantizer="vq"))


def digits_kl() -> TokenizerTask:
    """8x8 digits to 2x2 continuous latents of 6 channels with a small KL term. Under 1 min.

    midway train tokenizer digits-kl
    """
    return _digits_tokenizer("kl", TokenizerConfig(quantizer="kl", dim=6, width=64, downsample=4))


def digits_pixels() -> TokenizerTask:
    """No tokenizer: the latents are the pixels, so that a latent model becomes a pixel model. Seconds.

    midway train tokenizer digits-pixels
    """
    return TokenizerTask(
        out=Path("runs/digits-pixels"), model=TokenizerConfig(quantizer="identity", downsample=1), train=TrainConfig()
    )


MNIST = DataConfig(data="mnist5k", resize=32)


def mnist5k_fsq() -> TokenizerTask:
    """MNIST's digits at 32x32 to 8x8 FSQ codes of 512 values (576 bits an image). 50 s of one core; held-out PSNR about 28 dB.

    At 28 pixels a latent would have 7x7 positions, which patches of 2 do not divide; 49 tokens cost three times as much as 16.

    midway train tokenizer mnist5k-fsq
    """
    return TokenizerTask(
        out=Path("runs/mnist5k-fsq"),
        data=MNIST,
        model=TokenizerConfig(levels=(8, 8, 8), width=48, blocks=1, downsample=4, shortcut="principal"),
        train=replace(DIGITS_TOKENIZER_TRAIN, batch_size=64, lr=4e-3),
    )


def cifar10_fsq() -> TokenizerTask:
    """CIFAR-10 to 8x8 FSQ codes of 64000 values (6 channels, 1024 bits an image).

    midway train tokenizer cifar10-fsq --data cifar10-train.zip --max-seconds 480
    """
    return TokenizerTask(
        out=Path("runs/cifar10-fsq"),
        data=DataConfig(data="cifar10", held_out=0.1),
        model=TokenizerConfig(levels=(8, 8, 8, 5, 5, 5), width=64, downsample=4, blocks=2),
        train=TrainConfig(steps=20000, batch_size=64, lr=1e-3, ema=0.999, log_every=50),
    )


TOKENIZER_RECIPES = by_name(
    small,
    base,
    digits_fsq,
    digits_vq,
    digits_kl,
    digits_pixels,
    mnist5k_fsq,
    cifar10_fsq,
    imagenet.imagenet256_fsq,
    imagenet.imagenet256_vq,
    imagenet.imagenet256_kl,
)


LATENT_RECIPES = {"small": latent.small_latents, "base": latent.base_latents} | by_name(
    latent.digits_dit,
    latent.digits_flow,
    latent.digits_shortcut,
    latent.digits_alphaflow,
    latent.digits_meanflow,
    latent.digits_imf,
    latent.digits_reflow,
    latent.digits_modern,
    latent.digits_edm,
    latent.digits_pixel_flow,
    latent.digits_unet,
    latent.mnist5k_dit,
    latent.cifar10_dit,
    imagenet.imagenet256_dit_b,
    imagenet.imagenet256_dit_xl,
)
