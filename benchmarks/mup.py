"""Learning rates at several widths, with muP and without: the best of a narrow model is that of wider ones, or is not.

    python benchmarks/mup.py --tokenizer runs/digits-fsq --folder runs/mup --json benchmarks/results/mup.json

One training (midway train latent) of every width and rate, all on the same images, noise and times, at a constant rate after the
warm-up; heads have as many channels more as the width grows. Its figure is the mean loss of the last fifth of its steps. Goes on
after a stop. About a quarter of an hour of one core.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.trainings import train_latent

COMMON = (
    "--model.dit.depth",
    "2",
    "--warmup",
    "10",
    "--preview-seconds",
    "0",
    "--save-seconds",
    "0",
    "--resume",
    "auto",
)


@dataclass(frozen=True)
class Transfer:
    """What to train."""

    tokenizer: Path
    """Run directory of the digits' tokenizer."""
    folder: Path
    """Where the runs are written."""
    json: Path
    """File of the figures."""
    widths: tuple[int, ...] = (32, 64, 128, 256)
    """Of the networks; the first is the base."""
    rates: tuple[float, ...] = (2**-11, 2**-10, 2**-9, 2**-8, 2**-7, 2**-6, 2**-5)
    """Learning rates."""
    steps: int = 300
    """Optimizer steps of a training."""
    seed: int = 0
    """Of the trainings."""


def loss_of(task: Transfer, width: int, rate: float, mup: bool) -> float:
    """Mean loss of the last fifth of a training, infinite where it had no finite one."""
    out = task.folder / f"{'mup' if mup else 'plain'}-{width}-{rate:g}"
    last = task.steps // 5
    words = ["digits-flow", "--tokenizer", str(task.tokenizer), "--out", str(out), "--model.dit.width", str(width)]
    words += ["--model.dit.mup-base-width", str(task.widths[0] if mup else 0), "--lr", str(rate), "--decay", "constant"]
    words += ["--steps", str(task.steps), "--log-every", str(last), "--seed", str(task.seed), *COMMON]
    train_latent.command(words)
    loss = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["loss"]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def best(task: Transfer, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every width, with muP and without: the best rate, and how much more loss the base's best rate has."""
    found = []
    for mup in (True, False):
        by = {(row["width"], row["rate"]): row["loss"] for row in rows if row["mup"] is mup}
        least = {width: min(task.rates, key=lambda rate, width=width: by[width, rate]) for width in task.widths}
        base = least[task.widths[0]]
        for width in task.widths:
            loss = {"loss": by[width, least[width]], "loss_at_base": by[width, base]}
            found.append({"mup": mup, "width": width, "rate": least[width], **loss})
    return found


def main(task: Transfer) -> None:
    """Train, write, print the best rates."""
    torch.set_num_threads(1)
    rows = [
        {"width": width, "rate": rate, "mup": mup, "loss": loss_of(task, width, rate, mup)}
        for width in task.widths
        for rate in task.rates
        for mup in (True, False)
    ]
    found = {
        "environment": environment(),
        "hardware": hardware(),
        "data": "digits",
        "steps": task.steps,
        "seed": task.seed,
        "best": best(task, rows),
        "rows": rows,
    }
    write_atomically(task.json, (json.dumps(found, indent=1) + "\n").encode())
    for line in found["best"]:
        name = f"{'muP' if line['mup'] else 'without'}, width {line['width']}"
        losses = f"loss {line['loss']:.4f}, at the base's {line['loss_at_base']:.4f}"
        print(f"{name}: best rate {line['rate']:g}, {losses}")


if __name__ == "__main__":
    main(tyro.cli(Transfer, description=__doc__))
