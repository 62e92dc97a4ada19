"""Recipes for ImageNet at 256x256 pixels: published settings, planned and not run. docs/scaling.md has how to run them.

`python docs/scaling_tables.py` counts the parameters, memory and operations that docstrings state, without computing anything;
`--dry-run` measures two steps on the machine at hand. Memory is of one process without sharding, in bfloat16: what is kept, and
the activations of an image. Hours are on paper: the operations of all steps, on 8 GPUs of 989 TFLOP/s at 25 % of that (what
0.84 steps a second of DiT-XL/2 on 128 images are of an A100, in the README of fast-DiT); convolutions may reach less.
Published results are of their authors' code, networks and runs.

Training images are those of a built data set: midway data build PATH/TO/train --resize 256 --out data/imagenet256
"""

from dataclasses import replace
from pathlib import Path

from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.presets import SIZES
from midway.gen.tokenizer.loss_config import LossConfig
from midway.gen.training.config import TrainConfig

IMAGENET256 = DataConfig(data="data/imagenet256", resize=256, channels=3, held_out=0.01)
F16 = TokenizerConfig(width=128, downsample=16, multipliers=(1, 1, 2, 2, 4), attention=True, upsample="nearest")
"""The widths of VQGAN's encoder and decoder with 16 pixels a code (Esser et al. 2021), which LlamaGen uses too."""
LLAMAGEN_LOSS = LossConfig(
    pixel="l2", perceptual=1.0, adversary="hinge", adversary_weight=0.5, adversary_start=20_000, critic_layers=3
)
LLAMAGEN_TRAIN = TrainConfig(
    steps=400_000,
    batch_size=128,
    lr=1e-4,
    betas=(0.9, 0.95),
    warmup=0,
    ema=0.9999,
    precision="bf16",
    log_every=100,
    save_every=10_000,
)
"""40 epochs of 1.28 million images."""


def _tokenizer(name: str, model: TokenizerConfig, loss: LossConfig = LLAMAGEN_LOSS) -> TokenizerTask:
    out = Path(f"runs/imagenet256-{name}")
    return TokenizerTask(out=out, data=IMAGENET256, model=model, loss=loss, train=LLAMAGEN_TRAIN, flip=True)


def imagenet256_vq() -> TokenizerTask:
    """LlamaGen's VQ-16: 16x16 codes of a codebook of 16384 unit vectors of 8 channels (3584 bits an image).

    Settings of Sun et al. 2024 (arXiv 2406.06525): L2, LPIPS 1, hinge loss of a patch discriminator 0.5 from step 20,000,
    commitment 0.25, AdamW 1e-4 (0.9, 0.95), batch 128, 40 epochs. The blocks are those of networks.py.
    Planned: 41.9 M trained parameters (discriminator included), 0.78 GiB and 1.27 GiB an image, 1.09 TFLOP an image, 8 hours.
    Published: reconstruction FID 2.19, PSNR 20.8 dB on the validation images.

    accelerate launch -m midway train tokenizer imagenet256-vq
    """
    codebook = {"quantizer": "vq_gradient", "codebook_size": 16384, "dim": 8, "options": '{"normalize": true}'}
    return _tokenizer("vq", replace(F16, **codebook))


def imagenet256_fsq() -> TokenizerTask:
    """The same with FSQ of 15,360 codes, levels 8 8 8 6 5: the set that its authors give for 2^14 codes (3560 bits an image).

    Mentzer et al. 2023 (arXiv 2309.15505, Table 1) for the levels; everything else as imagenet256-vq, so that the two differ
    by the quantizer alone. Planned: 41.8 M trained parameters, 0.78 GiB and 1.27 GiB an image, 1.09 TFLOP an image, 8 hours.
    Published: not for this pair; the paper's FSQ and VQ of 2^10 codes reach FID 4.53 and 4.51 with MaskGIT.

    accelerate launch -m midway train tokenizer imagenet256-fsq
    """
    return _tokenizer("fsq", replace(F16, quantizer="fsq", levels=(8, 8, 8, 6, 5)))


def imagenet256_kl() -> TokenizerTask:
    """The autoencoder of latent diffusion, KL-f8: 32x32 latents of 4 channels.

    Settings of Rombach et al. 2021 (arXiv 2112.10752): widths 128 256 512 512, L1, LPIPS 1, discriminator 0.5 with adaptive
    weight from step 50,001, KL weight 1e-6 on sums, which is 1e-6 / (3 256^2) on the mean of pixels. Optimizer and steps are
    LlamaGen's. Planned: 59.3 M trained parameters, 1.10 GiB and 1.63 GiB an image, 2.17 TFLOP an image, 16 hours.
    Published: reconstruction FID 0.90, PSNR 24.2 dB (their model, trained on OpenImages).

    accelerate launch -m midway train tokenizer imagenet256-kl
    """
    model = TokenizerConfig(
        quantizer="kl",
        dim=4,
        kl_weight=1e-6 / (3 * 256**2),
        width=128,
        downsample=8,
        multipliers=(1, 2, 4, 4),
        attention=True,
        upsample="nearest",
    )
    loss = replace(LLAMAGEN_LOSS, pixel="l1", adaptive=True, adversary_start=50_001)
    return _tokenizer("kl", model, loss)


SIT_TRAIN = TrainConfig(
    steps=400_000,
    batch_size=256,
    lr=1e-4,
    betas=(0.9, 0.999),
    warmup=0,
    ema=0.9999,
    precision="bf16",
    log_every=100,
    save_every=10_000,
)


def _latent(name: str, dit: DiTConfig) -> LatentTask:
    """A rectified flow with the settings of SiT (Ma et al. 2024, arXiv 2401.08740), which are DiT's but for the process."""
    return LatentTask(
        out=Path(f"runs/imagenet256-{name}"),
        tokenizer=Path("runs/imagenet256-kl"),
        model=LatentModelConfig(schedule="linear", target="velocity", time="uniform", label_dropout=0.1, dit=dit),
        train=SIT_TRAIN,
        flip=True,
    )


def imagenet256_dit_b() -> LatentTask:
    """DiT-B/2 as a rectified flow: 256 tokens of width 768, 12 layers.

    Batch 256, AdamW 1e-4 without weight decay, average 0.9999, labels dropped 0.1, 400,000 steps (80 epochs), uniform time.
    Planned: 130.3 M trained parameters, 2.43 GiB and 0.16 GiB an image, 0.14 TFLOP an image, 2 hours.
    Published for DiT-B/2 (denoising diffusion, 400,000 steps, without guidance): FID-50k 43.5.

    accelerate launch -m midway train latent imagenet256-dit-b --tokenizer runs/imagenet256-kl
    """
    return _latent("dit-b", DiTConfig(**SIZES["B"], patch=2))


def imagenet256_dit_xl() -> LatentTask:
    """DiT-XL/2 as a rectified flow: 256 tokens of width 1152, 28 layers.

    As imagenet256-dit-b. Planned: 674.8 M trained parameters, 12.57 GiB and 0.55 GiB an image, 0.71 TFLOP an image, 10 hours.
    Published at 80 epochs without guidance: FID-50k 19.5 (DiT), 17.2 with a rectified flow, 14.0 with batch 1024 and logit-normal
    time as well (Yao et al. 2025, arXiv 2501.01423, Table 1: `--model.time logit_normal`); SiT-XL/2 after 7,000,000 steps, with
    guidance, 2.06.

    accelerate launch -m midway train latent imagenet256-dit-xl --tokenizer runs/imagenet256-kl
    """
    return _latent("dit-xl", DiTConfig(**SIZES["XL"], patch=2))
