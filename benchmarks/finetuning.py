"""Fine-tuning by adapters and as a whole, on other images: distance to them, parameters, bytes and seconds of training.

    python benchmarks/finetuning.py --model runs/digits-pixel-flow --data negatives --folder runs/finetuning
        --json benchmarks/results/finetuning.json

Every recipe of midway finetune at every rate, as many steps each, and the model before it; one sweep cell each (dpmpp2m on
karras), on the same sampling seeds. Seconds are process time of the command on one thread, with latents that are encoded already.
Parts that are done are kept. About 20 minutes on one free core.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from midway.gen.commands import evaluate
from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.core.runs import Run, kind_of
from midway.gen.diffusion.adapters import KIND
from midway.gen.evaluation.records import LIMITS
from midway.gen.trainings import finetune

RATES = {"full": (1e-3, 3e-3), "lora": (3e-3, 1e-2), "lora-plus": (1e-3, 3e-3), "lora-ga": (3e-3, 1e-2)}


@dataclass(frozen=True)
class Finetuning:
    """What to train, and how long."""

    model: Path
    """Run directory of the latent model."""
    data: str
    """The other images."""
    folder: Path
    """Where the runs and reports are written."""
    json: Path
    """File of the figures."""
    steps: int = 1000
    """Optimizer steps of each."""
    nfe: int = 10
    """Network evaluations of a sample."""


def row(task: Finetuning, recipe: str, rate: float, steps: int) -> dict[str, Any]:
    """One training, measured; kept in its folder."""
    out = task.folder / (f"{recipe}-{rate:g}" if steps else "before")
    file = out / "figures.json"
    if file.exists():
        return json.loads(file.read_text())
    flags = [
        "--model",
        str(task.model),
        "--data",
        task.data,
        "--out",
        str(out),
        "--steps",
        str(steps),
        "--lr",
        f"{rate}",
    ]
    begun = time.process_time()
    finetune.command([recipe, *flags, "--preview-seconds", "0", "--overwrite"])
    seconds = time.process_time() - begun
    adapter = kind_of(out) == KIND
    folder = Run.open(out, kind_of(out)).checkpoint
    stored = folder / KIND / "adapter_model.safetensors" if adapter else folder / "ema.safetensors"
    starts = json.loads((out / "env.json").read_text())["starts"]
    found = {
        "finetuned": recipe if steps else "before",
        "rate": rate if steps else 0.0,
        "steps": steps,
        "parameters": starts[-1]["parameters"] if steps else 0,
        "bytes": stored.stat().st_size if steps else 0,
        "seconds": seconds if steps else 0.0,
        **measured(task, out, adapter),
    }
    write_atomically(file, json.dumps(found).encode())
    return found


def measured(task: Finetuning, out: Path, adapter: bool) -> dict[str, Any]:
    """Distances in two feature spaces, and of held-out images."""
    model = ["--model", str(task.model), "--adapter", str(out)] if adapter else ["--model", str(out)]
    words = ["--solvers", "dpmpp2m", "--nfe", str(task.nfe), "--grids", "karras", "--exact-nfe", "0", "--metrics", ""]
    sweep = evaluate.run(evaluate.resolve(evaluate.EvaluateTask, {}, [*model, *words]))
    (own,) = [m for m in sweep.measurements if m.solver not in LIMITS]
    floor = next(m for m in sweep.measurements if m.solver == "floor")
    names = [name for name in own.metrics if name == "distance" or name.endswith("_distance")]
    facts = {
        "n": own.n,
        "blocks": own.blocks,
        "features": own.features,
        "further": own.further,
        "reference": own.reference,
    }
    return {
        **{name: own.metrics[name].mean for name in names},
        **{f"{name}_error": own.metrics[name].std for name in names},
        **{f"floor_{name}": floor.metrics[name].mean for name in names},
        **facts,
    }


def main(task: Finetuning) -> None:
    """Train, measure, write."""
    torch.set_num_threads(1)
    rows = [row(task, "lora", 1e-3, 0)]
    rows += [row(task, recipe, rate, task.steps) for recipe, rates in RATES.items() for rate in rates]
    found = {"environment": environment(), "hardware": hardware(), "rows": rows}
    write_atomically(task.json, (json.dumps(found, indent=1) + "\n").encode())
    for each in rows:
        print(f"{each['finetuned']:<10} {each['rate']:<6g} {each['distance']:.3f} ± {each['distance_error']:.3f}")


if __name__ == "__main__":
    main(tyro.cli(Finetuning, description=__doc__))
