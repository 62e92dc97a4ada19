"""Tokenizers compared by what priors make of their codes, on one axis with priors of every kind: bits of an image and distance.

    python benchmarks/priors.py --data digits --rules halton maskgit --nfe 1 4 16 --folder runs/priors
        --json benchmarks/results/priors_digits.json
    python benchmarks/priors.py --data mnist5k --tokenizers fsq --rules halton maskgit --nfe 8 64 --blocks 1
        --folder runs/priors-mnist5k --json benchmarks/results/priors_mnist5k.json

1. For every training seed tokenizers of one network and equally many codes, FSQ, FSP and VQ, 512 each (midway train tokenizer).
2. On each a causal and a masked prior by the recipes of the data (midway train prior), the same for all tokenizers but in that
   codes of FSQ are predicted digit by digit.
3. Bits of held-out codes (midway evaluate-likelihood): of the prior, of independent positions, of a fixed length.
4. A sweep (midway evaluate) of both priors on the same sampling seeds, in two feature spaces. Its ceiling row is the tokenizer
   alone: decoded codes of held-out images, which no prior can be nearer than but by chance.

Every part goes on after a stop. The figures are means over training seeds and their standard deviations. Checked: each prior at
its largest budget against twice the ceiling row, and its bits against those of independent positions. About three quarters of
an hour of one core for the digits.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from midway.gen.commands import evaluate, evaluate_likelihood
from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.evaluation.records import CEILING, Measurement
from midway.gen.sweep.run import Sweep
from midway.gen.trainings import train_prior, train_tokenizer

SPLIT = {"fsq": "digits", "fsp": "digits", "vq": "joint"}
"""How priors predict a code: codes of FSQ have digits, those of a codebook have none."""
TOKENIZERS: dict[str, tuple[str, ...]] = {
    "fsq": ("--model.quantizer", "fsq", "--model.levels", "8", "8", "8"),
    "fsp": ("--model.quantizer", "fsq", "--model.levels", "8", "8", "8", "--model.form", "fsp"),
    "vq": ("--model.quantizer", "vq", "--model.codebook-size", "512"),
}
"""512 codes each."""
RECIPES = {"digits": ("digits-vq", "digits"), "mnist5k": ("mnist5k-fsq", "mnist5k")}
"""Of a data set: the recipe of its tokenizers, but for the quantizer, and what those of its priors begin with."""
KINDS = ("causal", "masked")
LIMIT = 2.0


@dataclass(frozen=True)
class Comparison:
    """What to train."""

    folder: Path
    """Where the runs and reports are written."""
    json: Path
    """File of the figures."""
    data: Literal["digits", "mnist5k"] = "digits"
    """The images."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""
    tokenizers: tuple[Literal["fsq", "fsp", "vq"], ...] = ("fsq", "fsp", "vq")
    """What is compared."""
    rules: tuple[str, ...] = ("random", "halton", "certain", "maskgit")
    """Of the masked priors."""
    nfe: tuple[int, ...] = ()
    """Their budgets (default: those of midway evaluate)."""
    blocks: int = 4
    """Blocks of images of each figure, as many images each as are held out."""
    steps: int | None = None
    """Optimizer steps of a prior (default: those of its recipe)."""


def train_all(task: Comparison, seed: int) -> None:
    """The tokenizers of a training seed, and their priors; the process time of each is noted."""
    of_tokenizer, of_prior = RECIPES[task.data]
    same = ["--seed", str(seed), "--preview-seconds", "0", "--resume", "auto"]
    for name in task.tokenizers:
        words = TOKENIZERS[name]
        tokenizer = str(place(task, seed, name))
        timed(task, seed, name, train_tokenizer.command, [of_tokenizer, *words, "--out", tokenizer, *same])
        for kind in KINDS:
            run = [f"{of_prior}-{kind}", "--tokenizer", tokenizer, "--out", str(place(task, seed, name, kind)), *same]
            run += ["--model.split", SPLIT[name]]
            steps = [] if task.steps is None else ["--steps", str(task.steps)]
            timed(task, seed, f"{name}-{kind}", train_prior.command, [*run, *steps])


def timed(task: Comparison, seed: int, name: str, command: Any, words: list[str]) -> None:
    """Run a training that is not finished; its process time goes into a file of the seed."""
    path = task.folder / f"seed-{seed}" / "seconds.json"
    took: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    if name in took:
        return
    begun = time.process_time()
    command(words)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(took | {name: time.process_time() - begun}).encode())


def place(task: Comparison, seed: int, tokenizer: str, kind: str = "") -> Path:
    """The run of a tokenizer, or of a prior on it."""
    return task.folder / f"seed-{seed}" / (f"{tokenizer}-{kind}" if kind else tokenizer)


def sweep_of(task: Comparison, seed: int, tokenizer: str) -> Sweep:
    """Both priors of a tokenizer; the masked one by several rules."""
    causal, masked = (str(place(task, seed, tokenizer, kind)) for kind in KINDS)
    out = str(task.folder / f"report-{seed}-{tokenizer}")
    words = ["--model", causal, "--priors", masked, "--prior-rules", ",".join(task.rules), "--out", out]
    words += ["--blocks", str(task.blocks)]
    if task.nfe:
        words += ["--prior-nfe", ",".join(map(str, task.nfe))]
    return evaluate.run(evaluate.resolve(evaluate.EvaluateTask, {}, words))


def bits_of(task: Comparison, seed: int, tokenizer: str) -> dict[str, float]:
    """Bits of an image's held-out codes: by kind of prior, `independent` and `fixed`."""
    runs = [str(place(task, seed, tokenizer, kind)) for kind in KINDS]
    out = task.folder / f"bits-{seed}-{tokenizer}"
    if not (out / "results.json").exists():
        evaluate_likelihood.command(["--models", *runs, "--features", "none", "--out", str(out)])
    rows = json.loads((out / "results.json").read_text())["rows"]
    found = {kind: row["code_bits"] for kind in KINDS for row in rows if row["name"].endswith(kind)}
    return {**found, "independent": rows[0]["code_independent"], "fixed": rows[0]["code_fixed"]}


def figures(
    sweeps: dict[tuple[str, int], Sweep], bits: dict[tuple[str, int], dict[str, float]], seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """A row for every (tokenizer, prior or limit, budget): means over trainings and deviations, in every feature space."""
    cells: dict[tuple[str, str, int], list[Measurement]] = {}
    for (tokenizer, _), sweep in sweeps.items():
        for m in sweep.measurements:
            cells.setdefault((tokenizer, m.solver, m.nfe if m.kind == "prior" else 0), []).append(m)
    return [row(*key, found, bits, seconds) for key, found in cells.items()]


def row(
    tokenizer: str,
    name: str,
    nfe: int,
    found: Sequence[Measurement],
    bits: dict[tuple[str, int], dict[str, float]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """One row."""
    first = found[0]
    names = [metric for metric in first.metrics if metric == "distance" or metric.endswith("distance")]
    values = {metric: [m.metrics[metric].mean for m in found] for metric in names}
    prior = next((f"{tokenizer}-{kind}" for kind in KINDS if f"{tokenizer}-{kind}" in name), "")
    return {
        "tokenizer": tokenizer,
        "name": name,
        "prior": prior,
        "nfe": nfe,
        "kind": first.kind,
        "features": {"distance": first.features, **{f"{short}_distance": long for short, long in first.spaces.items()}},
        "distances": {metric: statistics.mean(each) for metric, each in values.items()},
        "deviations": {metric: deviation(each) for metric, each in values.items()},
        "values": values,
        "token_evaluations": first.token_evaluations,
        "seconds_a_sample": first.seconds,
        "training_images": first.training_images,
        "training_seconds": seconds.get(prior),
        "n": first.n,
        "blocks": first.blocks,
        "seeds": first.seeds,
        "reference": first.reference,
    }


def deviation(values: Sequence[float]) -> float | None:
    """Of one training there is none."""
    return statistics.stdev(values) if len(values) > 1 else None


def bit_rows(bits: dict[tuple[str, int], dict[str, float]]) -> list[dict[str, Any]]:
    """Of every tokenizer and code: mean bits of an image and their deviation over trainings."""
    found: dict[tuple[str, str], list[float]] = {}
    for (tokenizer, _), named in bits.items():
        for name, value in named.items():
            found.setdefault((tokenizer, name), []).append(value)
    return [
        {"tokenizer": t, "code": c, "bits": statistics.mean(v), "deviation": deviation(v), "values": v}
        for (t, c), v in found.items()
    ]


def verdicts(rows: Sequence[dict[str, Any]], codes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to hold: distance at the largest budget against twice the ceiling, bits against independent positions."""
    found = []
    for tokenizer in dict.fromkeys(r["tokenizer"] for r in rows):
        own = [r for r in rows if r["tokenizer"] == tokenizer]
        ceiling = next(r for r in own if r["name"] == CEILING)
        for kind in KINDS:
            lines = [r for r in own if r["prior"] == f"{tokenizer}-{kind}"]
            most = max(r["nfe"] for r in lines)
            for metric, least in ceiling["distances"].items():
                best = min((r for r in lines if r["nfe"] == most), key=lambda r: r["distances"][metric])
                line = {"tokenizer": tokenizer, "prior": kind, "figure": metric, "of": best["name"], "nfe": most}
                value, than = best["distances"][metric], LIMIT * least
                found.append({**line, "value": value, "than": than, "held": value < than})
        by = {r["code"]: r["bits"] for r in codes if r["tokenizer"] == tokenizer}
        for kind in KINDS:
            value, than = by[kind], by["independent"]
            line = {"tokenizer": tokenizer, "prior": kind, "figure": "bits", "value": value, "than": than}
            found.append({**line, "held": value < than})
    return found


def main(task: Comparison) -> None:
    """Train, measure, write, print what was to hold."""
    torch.set_num_threads(1)
    for seed in task.seeds:
        train_all(task, seed)
    keys = [(tokenizer, seed) for seed in task.seeds for tokenizer in task.tokenizers]
    bits = {(tokenizer, seed): bits_of(task, seed, tokenizer) for tokenizer, seed in keys}
    sweeps = {(tokenizer, seed): sweep_of(task, seed, tokenizer) for tokenizer, seed in keys}
    each = [json.loads((task.folder / f"seed-{seed}" / "seconds.json").read_text()) for seed in task.seeds]
    seconds = {name: statistics.mean(one[name] for one in each) for name in each[0]}
    rows, codes = figures(sweeps, bits, seconds), bit_rows(bits)
    found = {
        "environment": environment(),
        "hardware": hardware(),
        "data": task.data,
        "training_seeds": list(task.seeds),
        "seconds": seconds,
        "bits": codes,
        "rows": rows,
        "verdicts": verdicts(rows, codes),
    }
    write_atomically(task.json, (json.dumps(found, indent=1) + "\n").encode())
    for line in found["verdicts"]:
        held = "less" if line["held"] else "NOT LESS"
        print(
            f"{line['tokenizer']} {line['prior']} {line['figure']}: {line['value']:.3f}, {held} than {line['than']:.3f}"
        )


if __name__ == "__main__":
    main(tyro.cli(Comparison, description=__doc__))
