"""Which quantizer at how many bits? One network, one data set, one budget of steps; only the quantizer differs.

    python benchmarks/compare_tokenizers.py --data cifar10-train.zip --out runs/tokenizers

Every quantizer at codebooks of about 2^8, 2^10, 2^12 and 2^14 values a position, on f = 4 (8x8 positions of a 32x32 image). A
tokenizer is a run in --out, trained by midway train tokenizer and left alone if it is there, so that the command can be
stopped and called again.

    vq        EMA codebook, k-means start, restarts; 8 channels          fsq            the paper's levels
    vq_l2     the same on the unit sphere                                residual_fsq   two stages of half the bits each
    simvq     one linear map of a frozen codebook; 8 channels            lfq            a bit a channel, entropy weight 0.02
    kl        Gaussian posterior of 8 channels at four weights; its bits are its measured rate, KL / ln 2

Times: 28 tokenizers and 4 repeated seeds of 800 steps take about 90 minutes on one CPU core, measuring 10 more.
"""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from matplotlib.figure import Figure

from midway.gen.commands.evaluate_tokenizer import TokenizersTask
from midway.gen.commands.evaluate_tokenizer import run as evaluate
from midway.gen.core.config import to_dict
from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.core.runs import Run
from midway.gen.data.images import to_float
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.evaluation.tokenizer_records import TokenizerRow
from midway.gen.flags import cli
from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.report.drawing import COLOURS, MARKERS
from midway.gen.training.config import TrainConfig
from midway.gen.trainings.train_tokenizer import train
from midway.tokenizers.fsq import FSQ_LEVELS

BITS = (8, 10, 12, 14)
STAGE_LEVELS = {8: (5, 3), 10: (4, 3, 3), 12: (4, 4, 4), 14: (5, 5, 5)}
"""Of one of two stages, whose codes together are L^2 levels a channel: 225, 1296, 4096 and 15625 values."""
KL_WEIGHTS = {8: 6e-5, 10: 4e-5, 12: 2.5e-5, 14: 1.6e-5}
"""Chosen so that the rates about span those of the codebooks."""
QUANTIZERS = ("vq", "vq_l2", "simvq", "fsq", "residual_fsq", "lfq", "kl")
DIM = 8
REPEATED = ("vq", "fsq")
"""Trained from other seeds too, to know what a difference between two cells may be worth."""


Key = tuple[str, int, int]
"""Quantizer, bits, seed."""


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
    features: str = "effnet-lite0"
    """Feature space of the distances, or none."""
    n: int | None = 2000
    """Held-out images to measure on."""
    json: Path = Path("benchmarks/results/compare_tokenizers.json")
    page: Path | None = None
    """A Markdown page whose block `tokenizers` the table replaces; the picture goes into images/ beside it."""


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


def keys(comparison: Comparison) -> list[Key]:
    """Every tokenizer, the repeated seeds last."""
    found = [(quantizer, bits, 0) for bits in comparison.bits for quantizer in comparison.quantizers]
    again = [q for q in REPEATED if q in comparison.quantizers]
    middle = comparison.bits[min(1, len(comparison.bits) - 1)]
    return found + [(quantizer, middle, seed) for seed in range(1, comparison.repeats + 1) for quantizer in again]


def tasks(comparison: Comparison) -> dict[str, TokenizerTask]:
    """Run name -> what to train."""
    return {name(*key): task(comparison, *key) for key in keys(comparison)}


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


# ---- results ----


@dataclass(frozen=True)
class Cell:
    """One tokenizer. bits: of a position, log2 of the codebook, or KL's measured rate; psnr: of KL by draws from the posterior.

    psnr in dB, the mean over images; nmse: mean squared error / variance of the images; distance, interpolated: Fréchet.
    """

    quantizer: str
    target: int
    seed: int
    bits: float
    psnr: float
    nmse: float
    ssim: float
    distance: float | None
    interpolated: float | None
    usage: float | None
    perplexity: float | None
    entropy_bits: float | None
    parameters: int
    train_seconds: float


def cells(comparison: Comparison, rows: Mapping[str, TokenizerRow], variance: float) -> list[Cell]:
    """What was measured, in the order of `tasks`."""
    return [cell(key, rows[name(*key)], variance, seconds(comparison.out / name(*key))) for key in keys(comparison)]


def cell(key: Key, row: TokenizerRow, variance: float, train_seconds: float) -> Cell:
    """One row of a tokenizer report as a cell."""
    quantizer, target, seed = key
    bits = row.rate if row.bits is None else row.bits
    assert bits is not None
    return Cell(
        quantizer=quantizer,
        target=target,
        seed=seed,
        bits=bits / row.tokens,
        psnr=row.psnr if row.psnr_sampled is None else row.psnr_sampled,
        nmse=row.mse / variance,
        ssim=row.ssim,
        distance=row.distance,
        interpolated=row.interpolated,
        usage=row.usage,
        perplexity=row.perplexity,
        entropy_bits=None if row.entropy_bits is None else row.entropy_bits / row.tokens,
        parameters=row.parameters,
        train_seconds=train_seconds,
    )


def seconds(run: Path) -> float:
    """Of training, from its log."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return max(record.get("seconds", 0.0) for record in records)


def table(found: Sequence[Cell]) -> str:
    """Markdown: a row a quantizer, a column a size; PSNR, Fréchet distance and perplexity of the first seed, best PSNR bold."""
    first = [c for c in found if c.seed == 0]
    targets = list(dict.fromkeys(c.target for c in first))
    best = {target: max(c.psnr for c in first if c.target == target and c.quantizer != "kl") for target in targets}
    head = ["quantizer", *(f"about 2^{target}" for target in targets)]
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * len(targets)}"]
    for quantizer in dict.fromkeys(c.quantizer for c in first):
        entries = [entry(c, best[c.target]) for c in first if c.quantizer == quantizer]
        lines.append(f"| `{quantizer}` | {' | '.join(entries)} |")
    return "\n".join(lines) + "\n"


def entry(one: Cell, best: float) -> str:
    """bits; PSNR; distance; perplexity."""
    psnr = f"**{one.psnr:.2f} dB**" if one.psnr == best else f"{one.psnr:.2f} dB"
    parts = [f"{one.bits:.1f} bits", psnr]
    parts += [] if one.distance is None else [f"FD {one.distance:.2f}"]
    parts += [] if one.perplexity is None else [f"perpl. {one.perplexity:.0f}"]
    return "<br>".join(parts)


def spread(found: Sequence[Cell]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation of PSNR over the seeds of each quantizer that was repeated."""
    groups: dict[str, list[float]] = {}
    repeated = {(c.quantizer, c.target) for c in found if c.seed}
    for c in found:
        if (c.quantizer, c.target) in repeated:
            groups.setdefault(f"{c.quantizer}-{c.target}", []).append(c.psnr)
    return {
        key: {"seeds": len(values), "mean": statistics.mean(values), "std": statistics.stdev(values)}
        for key, values in groups.items()
    }


def repeated(found: Sequence[Cell]) -> str:
    """`spread` in words."""
    parts = [f"`{key}` {s['mean']:.2f} ± {s['std']:.2f} dB ({s['seeds']:.0f})" for key, s in spread(found).items()]
    return ", ".join(parts)


def plot(path: Path, found: Sequence[Cell]) -> None:
    """PSNR and, if measured, Fréchet distance against bits of a position; repeated seeds as further marks."""
    shown = [("psnr", "PSNR in dB, mean over held-out images")]
    if all(c.distance is not None for c in found):
        shown.append(("distance", "Fréchet distance of reconstructions to training images"))
    figure = Figure(figsize=(6.4 * len(shown), 4.8), dpi=160, facecolor="white", layout="constrained")
    every = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (measure, label) in zip(every, shown, strict=True):
        for i, quantizer in enumerate(dict.fromkeys(c.quantizer for c in found)):
            look = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
            own = [c for c in found if c.quantizer == quantizer]
            line = sorted((c.bits, getattr(c, measure)) for c in own if c.seed == 0)
            axes.plot(*zip(*line), label=quantizer, linewidth=1.7, markersize=6, **look)
            for c in own:
                if c.seed:
                    axes.plot(
                        c.bits, getattr(c, measure), markersize=6, markerfacecolor="none", linestyle="none", **look
                    )
        axes.set_xlabel("bits of a position (of kl: measured rate)")
        axes.set_ylabel(label)
        axes.grid(True, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    every[0].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def embed(page: Path, text: str, block: str = "tokenizers") -> None:
    """Put `text` between the page's `<!-- begin BLOCK -->` and `<!-- end BLOCK -->`."""
    before, begin, rest = page.read_text().partition(f"<!-- begin {block} -->\n")
    _, end, after = rest.partition(f"<!-- end {block} -->")
    if not begin or not end:
        raise SystemExit(f"{page} has no block {block} for the table")
    page.write_text(f"{before}{begin}{text}{end}{after}")


def main(comparison: Comparison) -> None:
    """Train what is missing, measure everything, write."""
    runs = train_all(comparison)
    task = TokenizersTask(
        tokenizers=tuple(run.path for run in runs),
        features=comparison.features,
        out=comparison.out / "report",
        n=comparison.n,
        noise=(0.0, 0.2),
        title="Quantizers compared",
    )
    measured = {m.row.name: m.row for m in evaluate(task)}
    images = load_splits(comparison.data).held_out.images[:]
    found = cells(comparison, measured, to_float(images).double().var().item())
    some = next(iter(measured.values()))
    facts = {
        "environment": environment(),
        "hardware": hardware(),
        "trained_at": sorted({json.loads((run.path / "env.json").read_text())["git"] for run in runs}),
        "comparison": to_dict(comparison),
        "protocol": {"n": some.n, "images": some.images, "features": some.features, "reference": some.reference},
        "floor": some.floor,
        "spread": spread(found),
        "cells": [asdict(c) for c in found],
    }
    write_atomically(comparison.json, (json.dumps(facts, indent=2) + "\n").encode())
    print(table(found))
    if comparison.page is not None:
        show(comparison.page, found, facts)


def show(page: Path, found: Sequence[Cell], facts: Mapping[str, Any]) -> None:
    """Table, picture and protocol of a result file in a page's block `tokenizers`."""
    plot(page.parent / "images" / "tokenizers.png", found)
    protocol, floor = facts["protocol"], facts["floor"]
    distance = f"; Fréchet distance ({protocol['features']}) to {protocol['reference']}" + (
        "" if floor is None else f" (floor {floor:.2f})"
    )
    measured = any(c.distance is not None for c in found)
    caption = (
        f"n = {protocol['n']} held-out images of {protocol['images']}{distance if measured else ''}.\n"
        f"PSNR over seeds: {repeated(found)}.\n"
    )
    what = "PSNR and distance" if measured else "PSNR"
    embed(page, f"{table(found)}\n![{what} against bits](images/tokenizers.png)\n\n{caption}")


if __name__ == "__main__":
    cli.main(lambda arguments: main(cli.resolve(Comparison, {}, arguments)), alone=True)
