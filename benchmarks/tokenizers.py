"""Which quantizer at how many bits? One network, one data set, one budget of steps; only the quantizer differs.

    python benchmarks/tokenizers.py --data cifar10-train.zip --out runs/tokenizers

Every quantizer at codebooks of about 2^8, 2^10, 2^12 and 2^14 values a position, on f = 4 (8x8 positions of a 32x32 image). A
tokenizer is a run in --out, trained by scripts/train_tokenizer.py and left alone if it is there, so that the command can be
stopped and called again.

    vq        EMA codebook, k-means start, restarts; 8 channels          fsq            the paper's levels
    vq_l2     the same on the unit sphere                                residual_fsq   two stages of half the bits each
    simvq     one linear map of a frozen codebook; 8 channels            lfq            a bit a channel, entropy weight 0.02
    kl        Gaussian posterior of 8 channels at four weights; its bits are its measured rate, KL / ln 2
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from midway.gen.runs import Run
from midway.gen.splits import DataConfig
from midway.gen.train_config import TrainConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from train_tokenizer import train

from recipes import TokenizerConfig, TokenizerTask

BITS = (8, 10, 12, 14)
FSQ_LEVELS = {8: (8, 6, 5), 10: (8, 5, 5, 5), 12: (7, 5, 5, 5, 5), 14: (8, 8, 8, 6, 5)}
STAGE_LEVELS = {8: (5, 3), 10: (4, 3, 3), 12: (4, 4, 4), 14: (5, 5, 5)}
"""Of one of two stages, whose codes together are L^2 levels a channel: 225, 1296, 4096 and 15625 values."""
KL_WEIGHTS = {8: 6e-5, 10: 4e-5, 12: 2.5e-5, 14: 1.6e-5}
"""Chosen so that the rates about span those of the codebooks."""
QUANTIZERS = ("vq", "vq_l2", "simvq", "fsq", "residual_fsq", "lfq", "kl")
DIM = 8
REPEATED = ("vq", "fsq")
"""Trained from other seeds too, to know what a difference between two cells may be worth."""


@dataclass(frozen=True)
class Comparison:
    """What to train and where."""

    out: Path
    """Directory of the runs."""
    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=lambda: DataConfig(held_out=0.1))
    steps: int = 800
    width: int = 48
    batch_size: int = 64
    bits: tuple[int, ...] = BITS
    quantizers: tuple[str, ...] = QUANTIZERS
    repeats: int = 2
    """More seeds of vq and fsq at the second of `bits`."""


def model(quantizer: str, bits: int, width: int) -> TokenizerConfig:
    """The tokenizer of one cell."""
    base = {"width": width, "downsample": 4, "dim": DIM, "codebook_size": 2**bits}
    if quantizer == "vq_l2":
        return TokenizerConfig(quantizer="vq", options='{"normalize": true}', **base)
    if quantizer == "fsq":
        return TokenizerConfig(quantizer="fsq", levels=FSQ_LEVELS[bits], **base)
    if quantizer == "residual_fsq":
        stages = {"base": {"type": "fsq", "levels": STAGE_LEVELS[bits]}, "depth": 2}
        return TokenizerConfig(quantizer="residual", options=json.dumps(stages), **base)
    if quantizer == "lfq":
        return TokenizerConfig(quantizer="lfq", options='{"entropy_weight": 0.02}', **{**base, "dim": bits})
    if quantizer == "kl":
        return TokenizerConfig(quantizer="kl", kl_weight=KL_WEIGHTS[bits], **base)
    return TokenizerConfig(quantizer="simvq" if quantizer == "simvq" else "vq", **base)


def tasks(comparison: Comparison) -> dict[str, TokenizerTask]:
    """Run name -> what to train, the repeated seeds last."""
    cells = [(quantizer, bits, 0) for bits in comparison.bits for quantizer in comparison.quantizers]
    again = [q for q in REPEATED if q in comparison.quantizers]
    middle = comparison.bits[min(1, len(comparison.bits) - 1)]
    cells += [(quantizer, middle, seed) for seed in range(1, comparison.repeats + 1) for quantizer in again]
    return {name(*cell): task(comparison, *cell) for cell in cells}


def name(quantizer: str, bits: int, seed: int) -> str:
    """Of a run's directory."""
    return f"{quantizer}-{bits}" + (f"-seed{seed}" if seed else "")


def task(comparison: Comparison, quantizer: str, bits: int, seed: int) -> TokenizerTask:
    """One cell."""
    return TokenizerTask(
        out=comparison.out / name(quantizer, bits, seed),
        data=comparison.data,
        model=model(quantizer, bits, comparison.width),
        flip=True,
        train=TrainConfig(
            steps=comparison.steps,
            batch_size=comparison.batch_size,
            lr=1e-3,
            decay="cosine",
            ema=0.99,
            log_every=100,
            seed=seed,
        ),
        resume="auto",
    )


def is_done(wanted: TokenizerTask) -> bool:
    """Whether its last checkpoint is there."""
    return (wanted.out / "config.yaml").exists() and (
        wanted.out / "checkpoints" / f"step-{wanted.train.steps}"
    ).exists()


def train_all(comparison: Comparison) -> list[Run]:
    """Every run, trained if it is not there yet."""
    wanted = tasks(comparison)
    for one in wanted.values():
        if not is_done(one):
            train(one)
    return [Run.open(one.out, "tokenizer") for one in wanted.values()]


def main(comparison: Comparison) -> None:
    """Train, then measure."""
    train_all(comparison)


if __name__ == "__main__":
    main(tyro.cli(Comparison))
