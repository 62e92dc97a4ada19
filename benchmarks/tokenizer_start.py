"""VQ or FSQ, fairly: each at its own best learning rate, from both starts of the linear shortcuts, until it learns no more.

    python benchmarks/tokenizer_start.py digits cifar10 --cifar10 cifar10-train.zip --cells cells.jsonl
    python benchmarks/tokenizer_start.py digits cifar10 --cells cells.jsonl --json benchmarks/results/tokenizer_start.json \
        --table --page docs/tokenizers.md

A cell is one training: data x quantizer x bits x start x learning rate x seed, with 16 positions an image (GRIDS). Learning
rates are constant after the warm-up. Every ROUND steps the averaged weights are measured on the first half of the held-out
images: a training is over when the best PSNR of the last third of its steps is less than FLAT dB above the best before, or at the
most steps of its grid, which the table marks. The best round counts, for on few images a tokenizer overfits. The first half
chooses the round and the learning rate; every figure is of the second half.

    psnr          dB, mean over the second half of the held-out images
    choice_psnr   of the first half
    entropy_bits  log2 of the perplexity of the tokens of training images (10,000 at most), a position
    edge_mass     fsq: share of digits that are the lowest or the highest; even_mass if all levels are used alike

Every finished cell is a line of --cells, and is left alone when the command is called again; seeds come in turn, so that a whole
grid is there as early as possible. --table prints each quantizer at the learning rate with the best mean choice_psnr.
"""

import itertools
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from midway.gen.core.config import from_dict, to_dict
from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.core.runs import Run
from midway.gen.data.images import to_float
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.tokenizer.objective import TokenizerObjective, evaluate_tokenizer
from midway.gen.training.accelerator import make_accelerator
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.tokenizers.fsq import FSQ, FSQ_LEVELS, saturation
from midway.tokenizers.options import Shortcut
from midway.tokenizers.tokenizer import ImageTokenizer

sys.path.insert(0, str(Path(__file__).parent))
from compare_tokenizers import embed

from midway.gen.flags.tasks import TokenizerConfig, TokenizerTask
from midway.gen.trainings.running import image_parts
from midway.gen.trainings.train_tokenizer import make_tokenizer

BITS = (8, 10, 12, 14)
QUANTIZERS = ("vq", "fsq")
ROUND = 250
LEAST = 1500
FLAT = 0.05
TRAINING_IMAGES = 10_000
"""Of which the tokens are counted."""


@dataclass(frozen=True)
class Grid:
    """The trainings on one data set."""

    data: DataConfig
    model: TokenizerConfig
    rates: tuple[float, ...]
    seeds: int
    steps: int
    """At most."""
    held_out: int = 2000
    """Images at most, half to choose by and half to measure on."""


GRIDS = {
    "digits": Grid(DataConfig(held_out=0.2), TokenizerConfig(width=32, downsample=2), (1e-3, 3e-3, 1e-2), 3, 4000),
    "cifar10": Grid(
        DataConfig(data="cifar10", held_out=0.1, resize=16),
        TokenizerConfig(width=48, downsample=4),
        (3e-3, 1e-2),
        2,
        4000,
    ),
}


@dataclass(frozen=True)
class Cell:
    """One training."""

    data: str
    quantizer: str
    bits: int
    shortcut: Shortcut
    lr: float
    seed: int


@dataclass(frozen=True)
class Result:
    """What a cell came to; see the top of this file."""

    cell: Cell
    psnr: float
    choice_psnr: float
    capacity_bits: float
    entropy_bits: float
    usage: float
    edge_mass: float | None
    even_mass: float | None
    start_psnr: float
    """Before the first step."""
    start_edge_mass: float | None
    steps: int
    """Of the best round."""
    flat: bool
    """Whether it stopped because it learned no more."""
    psnrs: tuple[float, ...]
    """choice_psnr every ROUND steps."""
    seconds: float
    """Process time."""


@dataclass(frozen=True)
class Study:
    """Train what is missing, then write or print what was asked for."""

    grids: tyro.conf.Positional[tuple[Literal["digits", "cifar10"], ...]]
    cells: Path
    """JSON lines, one a finished cell; appended to."""
    json: Path | None = None
    """Where to write all cells, with the hardware."""
    table: bool = False
    """Print the tables; nothing is trained."""
    page: Path | None = None
    """A Markdown page whose block `tokenizer start` the table replaces."""
    most: int | None = None
    """At most so many cells this time."""
    cifar10: str = "cifar10"
    """Its source: the name, or a folder or zip."""


def cells_of(name: str) -> Iterator[Cell]:
    """All cells of a grid, seed by seed."""
    grid = GRIDS[name]
    for seed, bits, lr in itertools.product(range(grid.seeds), BITS, grid.rates):
        for quantizer, shortcut in itertools.product(QUANTIZERS, ("orthogonal", "principal")):
            yield Cell(name, quantizer, bits, shortcut, lr, seed)


def task_of(cell: Cell, cifar10: str) -> TokenizerTask:
    """What is trained: 8 channels and 2^bits codes, or the levels of the FSQ paper."""
    grid = GRIDS[cell.data]
    data = replace(grid.data, data=cifar10) if cell.data == "cifar10" else grid.data
    model = replace(
        grid.model,
        quantizer=cell.quantizer,
        codebook_size=2**cell.bits,
        levels=FSQ_LEVELS[cell.bits],
        shortcut=cell.shortcut,
    )
    train = TrainConfig(steps=grid.steps, batch_size=64, lr=cell.lr, ema=0.998, save_seconds=0, keep=1, seed=cell.seed)
    return TokenizerTask(out=Path("unused"), data=data, model=model, train=replace(train, max_steps=ROUND))


@cache
def splits_of(data: DataConfig) -> Splits:
    """The images, read once."""
    return load_splits(data)


def train(cell: Cell, task: TokenizerTask) -> Result:
    """Train a cell from the beginning."""
    splits = splits_of(task.data)
    choice, scored = halves(splits.held_out.images[: GRIDS[cell.data].held_out])
    levels = FSQ_LEVELS[cell.bits]
    began, rounds, psnrs, over = time.process_time(), [], list[float](), False
    with tempfile.TemporaryDirectory() as folder:
        start = measured(trained(task, Path(folder) / "start", 0)[0], scored)
        while not over:
            tokenizer, finished = trained(task, Path(folder) / "run", task.train.steps)
            rounds.append(tokenizer)
            psnrs.append(measured(tokenizer, choice)["psnr"])
            over = finished or is_flat(psnrs)
    best = psnrs.index(max(psnrs))
    tokenizer = rounds[best]
    end = measured(tokenizer, scored)
    found = evaluate_tokenizer(tokenizer, splits.train.images[:TRAINING_IMAGES])
    fsq = cell.quantizer == "fsq"
    return Result(
        cell=cell,
        psnr=end["psnr"],
        choice_psnr=psnrs[best],
        capacity_bits=math.log2(math.prod(levels)) if fsq else float(cell.bits),
        entropy_bits=math.log2(found["perplexity"]),
        usage=found["usage"],
        edge_mass=end.get("edge_mass"),
        even_mass=statistics.mean(2 / level for level in levels) if fsq else None,
        start_psnr=start["psnr"],
        start_edge_mass=start.get("edge_mass"),
        steps=ROUND * (best + 1),
        flat=is_flat(psnrs),
        psnrs=tuple(round(psnr, 3) for psnr in psnrs),
        seconds=round(time.process_time() - began, 1),
    )


def halves(images: Tensor) -> tuple[Tensor, Tensor]:
    """Every second image, and the others: held-out images may be sorted by class."""
    return images[::2], images[1::2]


def trained(task: TokenizerTask, folder: Path, steps: int) -> tuple[ImageTokenizer, bool]:
    """The tokenizer with averaged weights after ROUND more steps of the run at `folder`, and whether it has done all `steps`.

    Of 0 steps: as it starts.
    """
    splits, config = splits_of(task.data), replace(task.train, steps=steps)
    torch.manual_seed(config.seed)
    accelerator = make_accelerator(config)
    objective = TokenizerObjective(make_tokenizer(task, splits.train))
    items = image_parts(objective, splits).items
    run = Run.create(folder, "tokenizer", to_dict(replace(task, train=config)), resume=True)
    result = fit(objective, items, config, run, accelerator, resume=True)
    if steps and result.ema is not None:
        objective.load_state_dict(result.ema.shadow)
    return objective.eval().tokenizer, result.finished


@torch.no_grad()
def measured(tokenizer: ImageTokenizer, images: Tensor) -> dict[str, float]:
    """PSNR of these images, and how far FSQ has run into its outer levels."""
    quality = evaluate_tokenizer(tokenizer, images)
    if isinstance(tokenizer.quantizer, FSQ):
        quality["edge_mass"] = saturation(tokenizer.quantizer, tokenizer.encode(to_float(images)))["edge_mass"].item()
    return quality


def is_flat(psnrs: Sequence[float]) -> bool:
    """Whether the best of the last third of the steps is less than FLAT dB above the best before."""
    before = 2 * len(psnrs) // 3
    return len(psnrs) * ROUND >= LEAST and max(psnrs[before:]) - max(psnrs[:before]) < FLAT


# ---- results ----


def read(path: Path) -> list[Result]:
    """The finished cells."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [from_dict(Result, json.loads(line)) for line in lines]


def table(found: Sequence[Result]) -> str:
    """Markdown: a row a size of codes; VQ and FSQ from both starts, at the learning rate chosen on the other half."""
    columns = list(itertools.product(QUANTIZERS, ("orthogonal", "principal")))
    head = [
        "data",
        "bits",
        *(f"{quantizer}, {shortcut}" for quantizer, shortcut in columns),
        "fsq - vq at equal entropy",
    ]
    lines = [f"| {' | '.join(head)} |", f"| --- | ---: |{' ---: |' * (len(columns) + 1)}"]
    for data, bits in sorted({(r.cell.data, r.cell.bits) for r in found}, key=lambda key: (key[0] != "digits", key)):
        entries = [entry([r for r in found if key_of(r.cell) == (data, bits, *column)]) for column in columns]
        beyond = at_equal_entropy([r for r in found if r.cell.data == data], bits)
        lines.append(f"| {' | '.join([data, str(bits), *entries, '' if beyond is None else f'{beyond:+.1f} dB'])} |")
    return "\n".join(lines) + "\n"


def at_equal_entropy(results: Sequence[Result], bits: int) -> float | None:
    """How many dB FSQ is above VQ of as much entropy, interpolated between VQ's sizes; each from its better start.

    None where VQ's sizes do not reach that entropy.
    """
    points = []
    for size in BITS:
        if vq := [r for r in results if (r.cell.quantizer, r.cell.bits) == ("vq", size)]:
            best = chosen(vq)
            points.append((mean(best, "entropy_bits"), mean(best, "psnr")))
    fsq = [r for r in results if (r.cell.quantizer, r.cell.bits) == ("fsq", bits)]
    entropy, psnr = (mean(chosen(fsq), name) for name in ("entropy_bits", "psnr")) if fsq else (math.inf, 0.0)
    for (low, below), (high, above) in itertools.pairwise(points):
        if low <= entropy <= high:
            return psnr - (below + (above - below) * (entropy - low) / (high - low))
    return None


def chosen(results: Sequence[Result]) -> list[Result]:
    """All seeds at the start and learning rate with the best mean choice_psnr."""
    groups: dict[tuple[str, float], list[Result]] = {}
    for r in results:
        groups.setdefault((r.cell.shortcut, r.cell.lr), []).append(r)
    return max(groups.values(), key=lambda group: mean(group, "choice_psnr"))


def key_of(cell: Cell) -> tuple[str, int, str, str]:
    """A cell of the table."""
    return cell.data, cell.bits, cell.quantizer, cell.shortcut


def entry(results: Sequence[Result]) -> str:
    """PSNR, its standard deviation over seeds and their number; entropy; learning rate; edge mass at the start and the end."""
    if not results:
        return ""
    best = chosen(results)
    spread = f" ± {statistics.stdev(r.psnr for r in best):.2f}" if len(best) > 1 else ""
    parts = [
        f"{mean(best, 'psnr'):.2f}{spread} dB ({len(best)})",
        f"{mean(best, 'entropy_bits'):.2f} bits",
        f"rate {best[0].cell.lr:g}",
    ]
    if best[0].edge_mass is not None:
        parts.append(f"edges {mean(best, 'start_edge_mass'):.0%} to {mean(best, 'edge_mass'):.0%}")
    parts += [] if all(r.flat for r in best) else ["still learning"]
    return "<br>".join(parts)


def mean(results: Sequence[Result], name: str) -> float:
    """Of one number over results."""
    return statistics.mean(getattr(r, name) for r in results)


def main(study: Study) -> None:
    """Train what is missing, or show what is there."""
    missing = [] if study.table else list(itertools.chain.from_iterable(cells_of(name) for name in study.grids))
    done = {r.cell for r in read(study.cells)}
    for cell in sorted((cell for cell in missing if cell not in done), key=lambda cell: cell.seed)[: study.most]:
        result = train(cell, task_of(cell, study.cifar10))
        with study.cells.open("a") as file:
            file.write(json.dumps(to_dict(result)) + "\n")
        print(f"{cell}: {result.psnr:.2f} dB after {result.steps} steps, {result.seconds:.0f} s", flush=True)
    found = [r for r in read(study.cells) if r.cell.data in study.grids]
    if study.json is not None:
        facts = {
            "environment": environment(),
            "hardware": hardware(),
            "grids": {n: to_dict(GRIDS[n]) for n in study.grids},
        }
        rule = {"round": ROUND, "least": LEAST, "flat_db": FLAT}
        head = json.dumps({**facts, "rule": rule}, indent=1).removesuffix("\n}")
        rows = ",\n".join(json.dumps(to_dict(r)) for r in found)
        write_atomically(study.json, f'{head},\n "cells": [\n{rows}\n]\n}}\n'.encode())
    if study.table:
        print(table(found))
    if study.page is not None:
        embed(study.page, table(found), "tokenizer start")


if __name__ == "__main__":
    main(tyro.cli(Study))
