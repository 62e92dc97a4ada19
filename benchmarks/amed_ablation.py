"""What each part of AMED is worth on a trained model: distance to a fine solution on unseen noise, per step budget.

    python benchmarks/amed_ablation.py --model runs/demo/model --out amed_ablation.json

Rows: unlearned solvers; AMED-Solver with constants or features, learned per step or end to end; AMED-Plugin on every base;
AMED-Solver from other teachers. Odd budgets take the first slope analytically, so 5 and 6 evaluations are the same steps with and
without it. The figure is the root-mean-square distance of standardised latents to Heun's method with 200 steps from the same
noise, which no solver was learned on. Training NFE and seconds, shown for the largest budget, include teacher and warm start.
About 7 minutes on two free cores.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor

from midway.gen.core.environment import environment
from midway.gen.core.processes import best_device
from midway.gen.diffusion.distill_amed import DistillConfig, SolverObjective, SolverTarget, TrajectoryBatch
from midway.gen.diffusion.load import TrainedModel, load_model
from midway.gen.diffusion.model import start_state
from midway.gen.diffusion.sampling import labels_of, noise_of
from midway.gen.training.batches import Context
from midway.samplers.amed import nodes
from midway.samplers.grids import GRIDS
from midway.samplers.learned_solver import LEARNED
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS, steps_for

FIRST_HELD_OUT = 1_000_000
"""Seed of the first evaluated sample; trajectories for learning are drawn for another purpose, so none is shared."""
UNLEARNED = ("ddim", "dpm2", "ipndm4", "dpmpp2m", "dpmpp3m")
BASES = ("euler", "dpm2", "ipndm3", "ipndm4", "dpmpp2m", "dpmpp3m")
TEACHERS = ("heun", "dpm2", "dpmpp3m", "unipc3")


@dataclass(frozen=True)
class Ablation:
    """What to learn, and how long."""

    model: Path
    """Run directory of a latent model."""
    out: Path
    """JSON file to write."""
    nfe: tuple[int, ...] = (4, 5, 6, 7, 8)
    grid: str = "uniform"
    n: int = 256
    """Held-out samples."""
    reference_steps: int = 200
    trajectories: int = 128
    teacher_steps: int = 24
    steps: int = 60
    """Optimizer steps."""
    batch_size: int = 32
    lr: float = 5e-3


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    """A name in `LEARNED`."""
    mode: Literal["per_step", "end_to_end"] = "per_step"
    teacher: str = "dpmpp2m"


@dataclass(frozen=True)
class Result:
    """One figure. rmse_start: of the same solver before learning (r = 1/2, c = a = 1); None for tables."""

    solver: str
    mode: str
    teacher: str
    nfe: int
    rmse: float
    rmse_start: float | None
    training_nfe: int
    seconds: float


def variants() -> Iterator[Variant]:
    """All rows but the unlearned ones."""
    for name in ("amed-constants", "amed", *(f"amed-plugin-{base}-constants" for base in BASES)):
        yield Variant(name)
        yield Variant(name, "end_to_end")
    yield from (Variant("amed-constants", teacher=teacher) for teacher in TEACHERS)


@dataclass(frozen=True)
class HeldOut:
    """Unseen noise (n, C, h, w), its labels (n,), and the latents that the fine solution reaches from it."""

    noise: Tensor
    labels: Tensor
    exact: Tensor


@torch.no_grad()
def held_out(trained: TrainedModel, task: Ablation, device: torch.device) -> HeldOut:
    """Heun's method on EDM's grid."""
    model, seeds = trained.model, torch.arange(FIRST_HELD_OUT, FIRST_HELD_OUT + task.n)
    noise, labels = noise_of(seeds, model.latent_shape).to(device), labels_of(seeds, model.classes).to(device)
    table = SOLVERS["heun"].build(model.schedule, GRIDS["karras"](model.schedule, task.reference_steps))
    start = start_state(model.schedule, table.grid[0], noise)
    return HeldOut(noise, labels, sample(model.field(labels), table, start))


def rmse(reached: Tensor, exact: Tensor) -> float:
    return (reached - exact).square().mean().sqrt().item()


@torch.no_grad()
def unlearned(trained: TrainedModel, task: Ablation, data: HeldOut, name: str, nfe: int) -> Result | None:
    """A table solver; None where it cannot make this budget with the first step that AMED takes there."""
    model, entry, analytic = trained.model, SOLVERS[name], nfe % 2 == 1
    try:
        steps = steps_for(entry.evaluations, nfe, analytic)
    except ValueError:
        return None
    table = entry.build(model.schedule, GRIDS[task.grid](model.schedule, steps), analytic)
    start = start_state(model.schedule, table.grid[0], data.noise)
    reached = sample(model.field(data.labels), table, start)
    return Result(name, "", "", nfe, rmse(reached, data.exact), None, 0, 0.0)


@torch.no_grad()
def end_error(objective: SolverObjective, trained: TrainedModel, data: HeldOut) -> float:
    """RMSE of the student as it is."""
    model = trained.model
    start = start_state(model.schedule, objective.grid[0], data.noise)
    return rmse(nodes(objective.solver, model.field(data.labels), objective.rule, start)[-1], data.exact)


def learn(trained: TrainedModel, task: Ablation, data: HeldOut, variant: Variant, nfe: int) -> Result:
    """Distil one variant at one budget with Adam and a cosine rate, and measure it."""
    torch.manual_seed(0)
    kind = LEARNED[variant.name]
    config = DistillConfig(
        variant.teacher, task.teacher_steps, task.trajectories, mode=variant.mode, checkpointing=False
    )
    target = SolverTarget(nfe, task.grid, 1.0, kind.constants, kind.base)
    objective = SolverObjective(trained.model, target, config).to(data.noise.device)
    before, begin = end_error(objective, trained, data), time.perf_counter()
    labels = labels_of(torch.arange(task.trajectories), trained.model.classes).to(data.noise.device)
    teacher = objective.run_teacher(labels)
    objective.warm_start(teacher, labels)
    optimizer = torch.optim.Adam(objective.parameters(), task.lr)
    for step in range(task.steps):
        optimizer.param_groups[0]["lr"] = task.lr * 0.5 * (1 + math.cos(math.pi * step / task.steps))
        items = torch.randperm(task.trajectories)[: task.batch_size]
        batch = TrajectoryBatch(teacher.take(items.to(labels.device)), labels[items.to(labels.device)])
        loss, _ = objective.loss(batch, Context(0, step, items))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    return Result(
        variant.name,
        variant.mode,
        variant.teacher,
        nfe,
        end_error(objective, trained, data),
        before,
        objective.counter.evaluations,
        seconds,
    )


def text(results: list[Result]) -> str:
    """A row per variant, a column per budget: RMSE, the best of a budget marked; training of the largest budget."""
    budgets = sorted({r.nfe for r in results})
    rows = sorted({(r.solver, r.mode, r.teacher) for r in results}, key=_first_place(results))
    best = {
        k: min((r.rmse for r in results if r.nfe == k and math.isfinite(r.rmse)), default=math.nan) for k in budgets
    }
    lines = [f"{'solver':32}{'mode':12}{'teacher':10}" + "".join(f"{k:>10}" for k in budgets) + f"{'NFE':>10}{'s':>7}"]
    for row in rows:
        own = {r.nfe: r for r in results if (r.solver, r.mode, r.teacher) == row}
        cells = "".join(_cell(own.get(k), best[k]) for k in budgets)
        last = own[max(own)]
        cost = f"{last.training_nfe:>10,}{last.seconds:>7.1f}" if last.training_nfe else ""
        lines.append(f"{row[0]:32}{row[1]:12}{row[2]:10}{cells}{cost}")
    return "\n".join(lines)


def _first_place(results: list[Result]) -> Callable[[tuple[str, str, str]], int]:
    order = {(r.solver, r.mode, r.teacher): i for i, r in reversed(list(enumerate(results)))}
    return order.__getitem__


def _cell(result: Result | None, best: float) -> str:
    if result is None:
        return f"{'':>10}"
    return f"{result.rmse:>9.4f}{'*' if result.rmse == best else ' '}"


def main(task: Ablation) -> None:
    """Measure all rows at all budgets; print the table and write the JSON."""
    device = best_device()
    trained, begin = load_model(task.model, device), time.perf_counter()
    data = held_out(trained, task, device)
    tables = [unlearned(trained, task, data, name, nfe) for name in UNLEARNED for nfe in task.nfe]
    results = [result for result in tables if result is not None]
    for variant in variants():
        for nfe in task.nfe:
            results.append(learn(trained, task, data, variant, nfe))
            print(f"{variant.name}, {variant.mode}, {variant.teacher}, NFE {nfe}: {results[-1].rmse:.4f}", flush=True)
    print(
        f"\nRMSE to {task.reference_steps} steps of Heun, {task.n} held-out samples, grid {task.grid}\n{text(results)}"
    )
    seconds = time.perf_counter() - begin
    found = {
        "model": str(task.model),
        "model_hash": trained.hash,
        "task": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(task).items()},
        "seconds": round(seconds, 1),
        "environment": environment(),
        "results": [asdict(result) for result in results],
    }
    task.out.write_text(json.dumps(found, indent=2) + "\n")
    print(f"{seconds:.0f} s; written: {task.out}")


if __name__ == "__main__":
    main(tyro.cli(Ablation, description=__doc__))
