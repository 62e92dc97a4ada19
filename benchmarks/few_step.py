"""Few-step models and solvers at equal CPU seconds of training, on digits: distance to the data per number of evaluations.

    python benchmarks/few_step.py --tokenizer runs/digits-fsq --folder runs/few-step --json benchmarks/results/few_step.json
    python benchmarks/few_step.py --start random ... --json benchmarks/results/few_step_random.json

1. For every training seed a flow model of --seconds of process time, and learned tables of it, whose process time is measured.
2. --start flow: few-step models begin at that flow model and have the same time on top as all its tables together, so that both
   are the same model and the same seconds more. Objectives with the derivative of the network by time begin at a flow model of
   the same seconds with --model.dit.time-scale 1, since at the usual 1000 that derivative is mostly noise. --start random: they
   begin at random weights and have the flow model's seconds, without those of tables.
3. A sweep of each seed's models (midway evaluate --few-step) on the same sampling seeds, in two feature spaces.

Numbers of steps follow from the process time of a step of every recipe, timed in turns on one thread, those of few-step models
also from the time of the first seed's tables. Every part goes on after a stop; of tables that were interrupted only the time of
the last call counts. The figures are means over training seeds and their standard deviations. Checked: with 1 and 2 evaluations
every few-step model against the best solver, learned tables included; with 8 against 1.2 times what Euler's method converges
to, the exact row. About an hour
on one free core.
"""

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from midway.gen.commands import evaluate
from midway.gen.core.environment import environment, hardware
from midway.gen.core.files import write_atomically
from midway.gen.diffusion.load import load_tokenizer
from midway.gen.diffusion.model import LatentModel
from midway.gen.evaluation.records import EXACT, LIMITS, Measurement
from midway.gen.recipes.recipes import LATENT_RECIPES
from midway.gen.sweep.run import Sweep
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.trainings import train_latent, train_solver

FLOW = "flow"
SLOW = "flow-slow"
"""The run of the flow model with the slow clock."""
FEW_STEP = ("shortcut", "alphaflow", "meanflow", "imf")
"""Recipes digits-..."""
DERIVED = ("meanflow", "imf")
"""Those with the derivative of the network."""
CONTINUED = ("--model.jump.flow-share", "0.25", "--lr", "0.001")
"""What is different where they begin at a flow model, whose velocity is there already; chosen with a training seed that is not
measured."""
SOLVERS = "euler,dpmpp2m,unipc3,table"
BUDGETS = (1, 2, 4, 8)
TURNS, TURN = 5, 20
"""Turns of the timing, and steps of each."""
LIMIT = 1.2


@dataclass(frozen=True)
class FewStep:
    """What to train, and how long."""

    tokenizer: Path
    """Run directory of the digits' tokenizer."""
    folder: Path
    """Where the runs and reports are written."""
    json: Path
    """File of the figures."""
    seconds: float = 120.0
    """Process time of each training, on one thread."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the trainings."""
    table_steps: int = 600
    """Optimizer steps of a learned table."""
    start: Literal["flow", "random"] = "flow"
    """What few-step models begin at: the weights of the flow model, whose velocities are also their teacher, or random ones."""


def step_seconds(recipe: str, task: FewStep) -> "Timed":
    """A model of the recipe on random latents, trained as `train_few` does."""
    name = recipe.removeprefix("digits-")
    words = [recipe, "--tokenizer", str(task.tokenizer), *(flags_of(task) if name != FLOW else [])]
    made = train_latent.resolve(train_latent.LatentTask, LATENT_RECIPES, words)
    shape = load_tokenizer(task.tokenizer)[0].latent_shape
    torch.manual_seed(0)
    model = LatentModel(replace(made.model, jump=replace(made.model.jump, alpha_steps=made.train.steps)), shape, 10)
    if name != FLOW and task.start == "flow":
        flow = LatentModel(LATENT_RECIPES[f"digits-{FLOW}"]().model, shape, 10).eval().requires_grad_(False)
        model.teacher = lambda z, t, labels: flow.conditional_field(z, t, labels).x0  # costs what its velocity does
    return Timed(model, torch.optim.AdamW(model.parameters(), lr=1e-4), made.train.batch_size, made.train.steps)


@dataclass
class Timed:
    """A training loop that is timed; alpha-Flow's objective changes on the way, so steps are spread over all of it."""

    model: LatentModel
    optimizer: torch.optim.Optimizer
    batch: int
    total: int
    """Steps of the training."""

    def turn(self, number: int) -> float:
        """Seconds of a step, mean over one turn."""
        size, total = self.batch, self.total
        batch = LatentBatch(torch.randn(size, *self.model.latent_shape), torch.arange(size) % 10)
        begun = time.process_time()
        for i in range(TURN):
            step = int(total * (number * TURN + i + 0.5) / (TURNS * TURN))
            loss, _ = self.model.loss(batch, Context(0, step, torch.arange(step * size, (step + 1) * size)))
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (time.process_time() - begun) / TURN


def steps_of(task: FewStep, name: str, seconds: float) -> int:
    """Optimizer steps of a recipe that take the seconds."""
    path = task.folder / "step-seconds.json"
    if not path.exists():
        timed = {each: step_seconds(f"digits-{each}", task) for each in (FLOW, *FEW_STEP)}
        for one in timed.values():
            one.turn(0)
        turns = {each: [one.turn(number) for number in range(TURNS)] for each, one in timed.items()}
        task.folder.mkdir(parents=True, exist_ok=True)
        found = {each: statistics.mean(values) for each, values in turns.items()}
        write_atomically(path, json.dumps(found).encode())
    return round(seconds / json.loads(path.read_text())[name] / 10) * 10


def train_flow(task: FewStep, seed: int) -> None:
    """The flow model of a training seed, and its tables, whose process time is noted."""
    count = steps_of(task, FLOW, task.seconds)
    train(task, FLOW, seed, count, [])
    if task.start == "flow":
        train(task, FLOW, seed, count, ["--model.dit.time-scale", "1"], SLOW)
    path = task.folder / f"seed-{seed}" / "table-seconds.json"
    took: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    for nfe in BUDGETS:
        if str(nfe) in took:
            continue
        learned = ["table", "--model", str(place(task, FLOW, seed)), "--nfe", str(nfe)]
        begun = time.process_time()
        train_solver.command([*learned, "--steps", str(task.table_steps), "--resume", "auto"])
        took[str(nfe)] = time.process_time() - begun
        write_atomically(path, json.dumps(took).encode())


def few_step_seconds(task: FewStep) -> float:
    """What each few-step model is trained for, beside the flow model that it may begin at."""
    if task.start == "random":
        return task.seconds
    return sum(json.loads((task.folder / f"seed-{task.seeds[0]}" / "table-seconds.json").read_text()).values())


def train_few(task: FewStep, seed: int) -> dict[str, int]:
    """The few-step models of a training seed; their steps."""
    steps = {name: steps_of(task, name, few_step_seconds(task)) for name in FEW_STEP}
    for name, count in steps.items():
        train(task, name, seed, count, flags_of(task, seed, SLOW if name in DERIVED else FLOW))
    return steps


def flags_of(task: FewStep, seed: int | None = None, first: str = FLOW) -> list[str]:
    """Those of a few-step model that begins at the run `first`; without a seed not what it begins at."""
    if task.start == "random":
        return []
    flow = str(place(task, first, seed or 0))
    begin = [] if seed is None else ["--init", flow, "--teacher", flow]
    return [*CONTINUED, *begin]


def train(task: FewStep, name: str, seed: int, count: int, flags: Sequence[str], run: str = "") -> None:
    """A recipe, for a number of steps, in the run of its name unless another is given."""
    out = str(place(task, run or name, seed))
    words = [f"digits-{name}", "--tokenizer", str(task.tokenizer), "--out", out, *flags]
    numbers = ["--steps", str(count), "--seed", str(seed), "--preview-seconds", "0", "--resume", "auto"]
    train_latent.command([*words, *numbers])


def place(task: FewStep, name: str, seed: int) -> Path:
    """The run of a recipe and a seed."""
    return task.folder / f"seed-{seed}" / name


def sweep_of(task: FewStep, seed: int) -> Sweep:
    """All of a seed on one axis."""
    models = [str(place(task, name, seed)) for name in FEW_STEP]
    words = ["--model", str(place(task, FLOW, seed)), "--solvers", SOLVERS, "--nfe", ",".join(map(str, BUDGETS))]
    flags = ["--few-step", *models, "--out", str(task.folder / f"report-{seed}")]
    return evaluate.run(evaluate.resolve(evaluate.EvaluateTask, {}, [*words, *flags]))


def figures(sweeps: Sequence[Sweep]) -> list[dict[str, Any]]:
    """A row for every (model or solver, budget): means over trainings and deviations, in every feature space."""
    cells: dict[tuple[str, int], list[Measurement]] = {}
    for sweep in sweeps:
        for m in sweep.measurements:
            cells.setdefault((m.solver, 0 if m.solver in LIMITS else m.nfe), []).append(m)
    return [row(name, nfe, found) for (name, nfe), found in cells.items()]


def row(name: str, nfe: int, found: Sequence[Measurement]) -> dict[str, Any]:
    """One row."""
    first = found[0]
    spaces = {"distance": first.features, **{f"{short}_distance": long for short, long in first.spaces.items()}}
    names = [metric for metric in first.metrics if metric == "distance" or metric.endswith("distance")]
    values = {metric: [m.metrics[metric].mean for m in found] for metric in names}
    means = {metric: statistics.mean(each) for metric, each in values.items()}
    return {
        "name": name,
        "nfe": nfe,
        "kind": first.kind,
        "features": spaces,
        "distances": means,
        "deviations": {metric: statistics.stdev(each) if len(each) > 1 else None for metric, each in values.items()},
        "values": values,
        "training_images": first.training_images,
        "model_nfe": first.model_nfe,
        "training_nfe": first.training_nfe,
        "n": first.n,
        "blocks": first.blocks,
        "seeds": first.seeds,
        "reference": first.reference,
    }


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was to hold, by feature space, budget and model: its distance, the other one, and whether it is less."""
    found, exact = [], next(r for r in rows if r["name"] == EXACT)
    by = {(r["name"], r["nfe"]): r for r in rows}
    for metric in exact["distances"]:
        for nfe in (1, 2, 8):
            solvers = {name: by[name, nfe]["distances"][metric] for name in SOLVERS.split(",") if (name, nfe) in by}
            best = min(solvers, key=lambda name: solvers[name])
            beside, than = (best, solvers[best]) if nfe < 8 else (EXACT, LIMIT * exact["distances"][metric])
            for name in FEW_STEP:
                own = by[name, nfe]["distances"][metric]
                line = {"metric": metric, "nfe": nfe, "model": name, "distance": own, "beside": beside, "than": than}
                found.append({**line, "held": own < than})
    return found


def main(task: FewStep) -> None:
    """Train, measure, write, print what was to hold."""
    torch.set_num_threads(1)
    steps: dict[str, int] = {}
    for seed in task.seeds:
        train_flow(task, seed)
    for seed in task.seeds:
        steps = train_few(task, seed)
    rows = figures([sweep_of(task, seed) for seed in task.seeds])
    found = {
        "environment": environment(),
        "hardware": hardware(),
        "start": task.start,
        "seconds": task.seconds,
        "few_step_seconds": few_step_seconds(task),
        "steps": steps,
        "training_seeds": list(task.seeds),
        "rows": rows,
        "verdicts": verdicts(rows),
    }
    write_atomically(task.json, (json.dumps(found, indent=1) + "\n").encode())
    for line in found["verdicts"]:
        than = f"{line['beside']} {line['than']:.3f}" if line["nfe"] < 8 else f"{LIMIT} x exact {line['than']:.3f}"
        held = "less" if line["held"] else "NOT LESS"
        print(f"{line['metric']} NFE {line['nfe']}: {line['model']} {line['distance']:.3f}, {held} than {than}")


if __name__ == "__main__":
    main(tyro.cli(FewStep, description=__doc__))
