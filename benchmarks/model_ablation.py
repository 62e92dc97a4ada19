"""Which part of a modern latent model earns its place: parts added to the DiT of 2023 one at a time, and all together.

    python benchmarks/model_ablation.py --data digits --variants dit2023 time shift norm mlp positions qk-norm x0 muon modern
        --folder runs/ablation-digits --json benchmarks/results/ablation_digits.json
    python benchmarks/model_ablation.py --data mnist5k --variants dit2023 time norm mlp positions qk-norm direction muon modern
        --steps 500 --folder runs/ablation-mnist5k --json benchmarks/results/ablation_mnist5k.json
    python benchmarks/model_ablation.py --variants dit2023 align align-conv --steps 500 --n 500 --nfe 12
        --folder runs/ablation-align --json benchmarks/results/ablation_align.json

1. One tokenizer (midway train tokenizer), then for every training seed every variant below (midway train latent) at a constant
   learning rate, so that the weight average at any step is what a training of that many steps has.
2. Its figure is the Fréchet distance to the data (midway evaluate) in two feature spaces, of the same sampling seeds by
   DPM-Solver++(2M) at so many evaluations that little of the solver's error is left. It is taken at --steps optimizer steps, and
   at as many as take the process time of the base; the time of a step is measured on one thread, in turns of all variants.
3. Trainings of one seed have the same images, noise and times, so variants are compared by the ratio to what they are added to,
   seed by seed. Ratios scatter as much near the base as far from it, so the deviation of their logarithms is pooled over all
   variants of a column; a change within its 95 % interval (Student's t) is "=". Nine variants in four columns are 36 changes, so
   that two of them are expected outside by chance.

Every part goes on after a stop. About half an hour of one core each.
"""

import json
import math
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from scipy import stats

from midway.gen.commands import evaluate
from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.diffusion.model import LatentModel
from midway.gen.evaluation.records import LIMITS
from midway.gen.recipes.recipes import LATENT_RECIPES, TOKENIZER_RECIPES
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.optim import make_optimizers
from midway.gen.trainings import train_features, train_latent, train_tokenizer
from midway.gen.trainings.aligning import random_maps


class Variant(NamedTuple):
    """What is added to another variant."""

    text: str
    flags: tuple[str, ...]
    beside: str = "dit2023"


BASE = "dit2023"
NORMAL = ("--model.time", "logit_normal")
VARIANTS = {
    BASE: Variant("rectified flow, uniform times", (), ""),
    "time": Variant("logit-normal times", NORMAL),
    "shift": Variant("times shifted by the size of the latents", (*NORMAL, "--model.time-shift", "auto"), "time"),
    "norm": Variant("RMSNorm", ("--model.dit.norm", "rms")),
    "mlp": Variant("SwiGLU", ("--model.dit.mlp", "swiglu")),
    "positions": Variant("rotations beside added positions", ("--model.dit.positions", "both")),
    "qk-norm": Variant("RMSNorm on queries and keys", ("--model.dit.qk-norm", "")),
    "tokens": Variant("time and class as tokens, without adaLN", ("--model.dit.conditioning", "tokens")),
    "x0": Variant("predicts x0, loss of velocities", ("--model.target", "x0", "--model.weight", "velocity")),
    "direction": Variant("loss of the velocity's direction, too", ("--model.direction", "1")),
    "muon": Variant("Muon", ("--optimizer", "muon")),
    "modern": Variant("blocks of modern, logit-normal times", ("--model.dit.preset", "modern", *NORMAL)),
    "modern-muon": Variant("the same with Muon", ("--model.dit.preset", "modern", *NORMAL, "--optimizer", "muon")),
}
"""Flags beside those of the base, each with its value, "" where it has none."""
TEACHER = ("--align.teacher", "{folder}/teacher")
VARIANTS |= {
    "align": Variant("tokens aligned with a classifier's feature map", TEACHER),
    "align-conv": Variant(
        "the same by a convolution, on features normalised by place",
        (*TEACHER, "--align.projector", "conv", "--align.normalize", "spatial"),
    ),
}
"""Not among the variants by default: their teacher is trained first (midway train features); it is no network of a figure."""
COMMON = ("--model.schedule", "linear", "--model.target", "velocity", "--model.time", "uniform")
COMMON += ("--model.dit.preset", "dit2023", "--decay", "constant")
RECIPES = {"digits": ("digits-fsq", "digits-flow"), "mnist5k": ("mnist5k-fsq", "mnist5k-dit")}
"""Of a data set: the recipes of its tokenizer and of the model's size."""
SOLVER = "dpmpp2m"
TURNS, TURN = 5, 10
"""Turns of the timing, and steps of each."""
LEVEL = 0.95


@dataclass(frozen=True)
class Ablation:
    """What to train."""

    folder: Path
    """Where the runs and reports are written."""
    json: Path
    """File of the figures."""
    data: Literal["digits", "mnist5k"] = "digits"
    """The images."""
    variants: tuple[str, ...] = tuple(name for name, variant in VARIANTS.items() if TEACHER[0] not in variant.flags)
    """Which of them; the base and what they are added to must be among them."""
    steps: int = 2000
    """Optimizer steps of the base."""
    lr: float = 2e-3
    """Learning rate of all."""
    ema: float = 0.995
    """Decay of the weight average."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""
    n: int = 1000
    """Images of each figure."""
    nfe: int = 24
    """Evaluations of the solver."""

    def __post_init__(self) -> None:
        for name in self.variants:
            if name not in VARIANTS:
                raise ValueError(f"there is no variant {name}, there are {', '.join(VARIANTS)}")
            if (beside := VARIANTS[name].beside or BASE) not in self.variants:
                raise ValueError(f"{name} is compared with {beside}, which is not among --variants: add it")


def words_of(task: Ablation, name: str) -> list[str]:
    """The flags of a variant, from the recipe on; a later flag has the last word."""
    recipe = RECIPES[task.data][1]
    common = [*COMMON, "--optimizer", "adamw", "--lr", str(task.lr), "--ema", str(task.ema)]
    flags = dict(zip(common[::2], common[1::2], strict=True))
    own = [word.format(folder=task.folder) for word in VARIANTS[name].flags]
    flags |= dict(zip(own[::2], own[1::2], strict=True))
    tokenizer = str(task.folder / "tokenizer")
    return [recipe, "--tokenizer", tokenizer, *(word for pair in flags.items() for word in pair if word)]


def step_seconds(task: Ablation) -> dict[str, float]:
    """Process time of an optimizer step of every variant on one thread, the least of its turns.

    What was timed before stays, so that runs keep their stops; new variants are timed beside the base, in its seconds of then.
    """
    path = task.folder / "step-seconds.json"
    known: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    new = [name for name in task.variants if name not in known]
    if not new:
        return known
    made = {name: Timed(task, name) for name in dict.fromkeys((BASE, *new))}
    for one in made.values():
        one.turn()
    turns = [{name: one.turn() for name, one in made.items()} for _ in range(TURNS)]
    least = {name: min(turn[name] for turn in turns) for name in made}
    unit = known.get(BASE, least[BASE]) / least[BASE]
    found = known | {name: least[name] * unit for name in new}
    write_atomically(path, json.dumps(found).encode())
    return found


class Timed:
    """A variant that is trained on random latents of the tokenizer's shape."""

    def __init__(self, task: Ablation, name: str) -> None:
        made = train_latent.resolve(train_latent.LatentTask, LATENT_RECIPES, words_of(task, name))
        shape = load_tokenizer(task.folder / "tokenizer")[0].latent_shape
        torch.manual_seed(0)
        self.model = LatentModel(made.model, shape, 10)
        size = made.train.batch_size
        maps = random_maps(made, self.model, size, torch.Generator().manual_seed(0))
        self.batch = LatentBatch(torch.randn(size, *shape), torch.arange(size) % 10, features=maps)
        self.optimizers = make_optimizers(self.model, made.train, torch.device("cpu"))

    def turn(self) -> float:
        """Seconds of a step, mean over one turn."""
        size, begun = len(self.batch.labels), time.process_time()
        for step in range(TURN):
            loss, _ = self.model.loss(self.batch, Context(0, step, torch.arange(step * size, (step + 1) * size)))
            loss.backward()
            for optimizer in self.optimizers:
                optimizer.step()
                optimizer.zero_grad()
        return (time.process_time() - begun) / TURN


def stops(task: Ablation, seconds: Mapping[str, float], name: str) -> dict[str, int]:
    """Optimizer steps of a variant at equal steps and at equal seconds."""
    return {"steps": task.steps, "seconds": round(task.steps * seconds[BASE] / seconds[name] / 10) * 10}


def train(task: Ablation, name: str, seed: int, stop: Mapping[str, int]) -> Path:
    """The run of a variant and a training seed, with a checkpoint at each of its stops."""
    out = task.folder / f"seed-{seed}" / name
    first, last = min(stop.values()), max(stop.values())
    numbers = ["--steps", str(last), "--save-every", str(first), "--keep", str(last // first + 1)]
    quiet = ["--save-seconds", "0", "--preview-seconds", "0", "--log-every", "200", "--resume", "auto"]
    train_latent.command([*words_of(task, name), "--out", str(out), "--seed", str(seed), *numbers, *quiet])
    return out


def distances(task: Ablation, run: Path, step: int) -> dict[str, Any]:
    """Distances of a run at a step by feature space, and what they belong to."""
    out = run / f"report-{step}"
    words = ["--model", f"{run}@{step}", "--solvers", SOLVER, "--nfe", str(task.nfe), "--grids", "logsnr"]
    words += ["--n", str(task.n), "--blocks", "1", "--exact-nfe", "0", "--metrics", "", "--out", str(out)]
    sweep = evaluate.run(evaluate.resolve(evaluate.EvaluateTask, {}, words))
    found = next(m for m in sweep.measurements if m.solver == SOLVER)
    names = [name for name in found.metrics if name == "distance" or name.endswith("distance")]
    return {
        "features": {"distance": found.features, **{f"{short}_distance": long for short, long in found.spaces.items()}},
        "values": {name: found.metrics[name].mean for name in names},
        "limits": {
            m.solver: {name: m.metrics[name].mean for name in names} for m in sweep.measurements if m.solver in LIMITS
        },
        "n": found.n,
        "nfe": found.nfe,
        "seeds": found.seeds,
        "reference": found.reference,
    }


def compare(values: Mapping[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Changes of variants beside what they are added to, as fractions: geometric mean over seeds, 95 % interval, verdict.

    values: distances of every variant by training seed, in one order. The variance of log ratios is pooled over variants.
    """
    pairs = {name: VARIANTS[name].beside for name in values if VARIANTS[name].beside}
    logs = {
        name: [math.log(a / b) for a, b in zip(values[name], values[base], strict=True)] for name, base in pairs.items()
    }
    means = {name: statistics.mean(each) for name, each in logs.items()}
    seeds = len(values[BASE])
    if seeds < 2:
        return {name: {"change": math.expm1(m), "interval": None, "verdict": "one seed"} for name, m in means.items()}
    spread = math.sqrt(statistics.mean(statistics.variance(each) for each in logs.values())) if logs else 0.0
    half = float(stats.t.ppf(0.5 + LEVEL / 2, max(len(logs), 1) * (seeds - 1))) * spread / math.sqrt(seeds)
    found = {}
    for name, mean in means.items():
        verdict = "=" if abs(mean) <= half else "better" if mean < 0 else "worse"
        interval = [math.expm1(mean - half), math.expm1(mean + half)]
        found[name] = {"change": math.expm1(mean), "interval": interval, "verdict": verdict}
    return found


def main(task: Ablation) -> None:
    """Train, measure, write, print what was found."""
    torch.set_num_threads(1)
    tokenizer = ["--out", str(task.folder / "tokenizer"), "--preview-seconds", "0", "--resume", "auto"]
    train_tokenizer.command([RECIPES[task.data][0], *tokenizer])
    if any(TEACHER[0] in VARIANTS[name].flags for name in task.variants):
        data = TOKENIZER_RECIPES[RECIPES[task.data][0]]().data
        train_features.train(train_features.FeaturesTask(task.folder / "teacher", data, resume="auto"))
    seconds = step_seconds(task)
    measured: dict[tuple[str, int, str], dict[str, Any]] = {}
    for seed in task.seeds:
        for name in task.variants:
            stop = stops(task, seconds, name)
            run = train(task, name, seed, stop)
            for axis, step in stop.items():
                measured[name, seed, axis] = distances(task, run, step)
    first = measured[BASE, task.seeds[0], "steps"]
    found = {
        "environment": environment(),
        "hardware": hardware(),
        "data": task.data,
        "training_seeds": list(task.seeds),
        "tokens": tokens(task),
        **{key: first[key] for key in ("features", "limits", "n", "nfe", "seeds", "reference")},
        "rows": rows(task, seconds, measured),
    }
    write_atomically(task.json, (json.dumps(found, indent=1) + "\n").encode())
    for row in found["rows"]:
        line = ", ".join(
            f"{column} {cell['mean']:.3f} {cell.get('verdict', '')}" for column, cell in row["cells"].items()
        )
        print(f"{row['variant']}: {line}")


def tokens(task: Ablation) -> int:
    """Patches of a latent."""
    made = train_latent.resolve(train_latent.LatentTask, LATENT_RECIPES, words_of(task, BASE))
    shape = load_tokenizer(task.folder / "tokenizer")[0].latent_shape
    return math.prod(shape[1:]) // made.model.dit.patch**2


def rows(
    task: Ablation, seconds: Mapping[str, float], measured: Mapping[tuple[str, int, str], dict[str, Any]]
) -> list[dict[str, Any]]:
    """A row for every variant: its steps, and a cell for every axis and feature space."""
    axes = ("steps", "seconds")
    spaces = measured[BASE, task.seeds[0], "steps"]["values"]
    columns = [(axis, space) for axis in axes for space in spaces]
    values = {
        (axis, space): {
            name: [measured[name, seed, axis]["values"][space] for seed in task.seeds] for name in task.variants
        }
        for axis, space in columns
    }
    compared = {column: compare(values[column]) for column in columns}
    found = []
    for name in task.variants:
        cells = {
            f"{axis} {space}": {
                "mean": statistics.mean(values[axis, space][name]),
                "values": values[axis, space][name],
                **compared[axis, space].get(name, {}),
            }
            for axis, space in columns
        }
        variant = VARIANTS[name]
        kind = {"variant": name, "text": variant.text, "beside": variant.beside, "flags": list(variant.flags)}
        counts = {"step_seconds": seconds[name], "stops": stops(task, seconds, name)}
        found.append({**kind, **counts, "cells": cells})
    return found


if __name__ == "__main__":
    main(tyro.cli(Ablation, description=__doc__))
