"""What each part of AMED is worth on a trained model: distance to a fine solution on unseen noise, per step budget.

    python benchmarks/amed_ablation.py --model runs/demo/model --out amed_ablation.json

Rows: unlearned solvers; AMED-Solver and AMED-Plugin on several bases, by default end to end with constants; per step; with a
predictor; on the fitted grid; from other teachers. Odd budgets take the first slope analytically, so 5 and 6 evaluations are the
same number of steps with and without it. The figure is the root-mean-square distance of standardised latents to UniPC(3) with 96
steps from the same noise, which no solver was learned on. Training NFE and seconds, shown for the largest budget, include
teacher, warm start and the fit of a grid. About 12 minutes on two free cores.
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
from midway.gen.diffusion.field import start_state
from midway.gen.diffusion.load import TrainedModel, load_model
from midway.gen.diffusion.samplers import SamplerConfig, is_reachable, make_table
from midway.gen.diffusion.sampling import labels_of, noise_of
from midway.gen.distillation.amed import DistillConfig, SolverObjective, SolverTarget, objective_for
from midway.gen.training.batches import Context
from midway.samplers.amed import nodes
from midway.samplers.gits import GITS
from midway.samplers.grids import GRIDS
from midway.samplers.learned_solver import LEARNED
from midway.samplers.sample import sample
from midway.samplers.solvers import SOLVERS

FIRST_HELD_OUT = 1_000_000
"""Seed of the first evaluated sample; trajectories for learning are drawn for another purpose, so none is shared."""
UNLEARNED = ("ddim", "dpm2", "ipndm3", "ipndm4", "dpmpp2m", "dpmpp3m")
BASES = ("dpm2", "ipndm3", "ipndm4", "dpmpp3m")
MULTISTEP = ("ipndm3", "ipndm4", "dpmpp3m")
TEACHERS = (("dpmpp2m", "uniform", 24), ("ipndm4", "uniform", 9))
"""Other teachers: solver, grid, steps."""


@dataclass(frozen=True)
class Ablation:
    """What to learn, and how long."""

    model: Path
    """Run directory of a latent model."""
    out: Path
    """JSON file to write."""
    nfe: tuple[int, ...] = (5, 6, 7, 8)
    n: int = 256
    """Held-out samples."""
    reference_steps: int = 96
    trajectories: int = 256
    steps: int = 60
    """Optimizer steps."""
    batch_size: int = 32
    lr: float = 1e-2


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    name: str
    """A name in `LEARNED`."""
    mode: Literal["per_step", "end_to_end"] = "end_to_end"
    grid: str = "uniform"
    teacher: tuple[str, str, int] = ("unipc3", "logsnr", 32)
    """Solver, grid (per step: the student's, refined) and steps."""


@dataclass(frozen=True)
class Result:
    """One figure. rmse_start: of the same solver before learning (r = 1/2, c = a = 1); None for tables."""

    solver: str
    mode: str
    grid: str
    teacher: str
    nfe: int
    rmse: float
    rmse_start: float | None
    training_nfe: int
    seconds: float


def variants() -> Iterator[Variant]:
    """All rows but the unlearned ones."""
    plugins = [f"amed-plugin-{base}" for base in BASES]
    multistep = [f"amed-plugin-{base}" for base in MULTISTEP]
    yield from (Variant(name) for name in ("amed", *plugins))
    yield from (Variant(name, "per_step") for name in ("amed", *multistep[:2]))
    yield from (Variant(name, grid=GITS) for name in ("amed", *multistep))
    yield Variant("amed-predictor")
    yield Variant("amed-plugin-ipndm3-predictor", grid=GITS)
    yield from (Variant("amed-plugin-ipndm4", teacher=teacher) for teacher in TEACHERS)


@dataclass(frozen=True)
class HeldOut:
    """Unseen noise (n, C, h, w), its labels (n,), and the latents that the fine solution reaches from it."""

    noise: Tensor
    labels: Tensor
    exact: Tensor


@torch.no_grad()
def held_out(trained: TrainedModel, task: Ablation, device: torch.device) -> HeldOut:
    """UniPC(3), on equal steps of logSNR."""
    model, seeds = trained.model, torch.arange(FIRST_HELD_OUT, FIRST_HELD_OUT + task.n)
    noise, labels = noise_of(seeds, model.latent_shape).to(device), labels_of(seeds, model.classes).to(device)
    table = SOLVERS["unipc3"].build(model.schedule, GRIDS["logsnr"](model.schedule, task.reference_steps))
    start = start_state(model.schedule, table.grid[0], noise)
    return HeldOut(noise, labels, sample(model.field(labels), table, start))


def rmse(reached: Tensor, exact: Tensor) -> float:
    return (reached - exact).square().mean().sqrt().item()


@torch.no_grad()
def plain(trained: TrainedModel, data: HeldOut, name: str, grid: str, nfe: int) -> Result | None:
    """A table solver; None where it cannot make this budget with the first step that AMED takes there."""
    model, analytic = trained.model, nfe % 2 == 1
    if not is_reachable(name, nfe, analytic):
        return None
    table = make_table(name, grid, nfe, trained, SamplerConfig(analytic_first=analytic))
    start = start_state(model.schedule, table.grid[0], data.noise)
    reached = sample(model.field(data.labels), table, start)
    return Result(name, "", grid, "", nfe, rmse(reached, data.exact), None, 0, 0.0)


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
    solver, teacher_grid, teacher_steps = variant.teacher
    config = DistillConfig(
        solver, teacher_grid, teacher_steps, task.trajectories, mode=variant.mode, checkpointing=False
    )
    begin = time.perf_counter()
    objective = objective_for(trained, SolverTarget(nfe, variant.grid, 1.0, kind.constants, kind.base), config)
    objective.to(data.noise.device)
    before = end_error(objective, trained, data)
    labels = labels_of(torch.arange(task.trajectories), trained.model.classes).to(data.noise.device)
    take = objective.prepare(labels, {})
    optimizer = torch.optim.Adam(objective.parameters(), task.lr)
    for step in range(task.steps):
        optimizer.param_groups[0]["lr"] = task.lr * 0.5 * (1 + math.cos(math.pi * step / task.steps))
        items = torch.randperm(task.trajectories)[: task.batch_size]
        loss, _ = objective.loss(take(items.to(labels.device)), Context(0, step, items))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    return Result(
        variant.name,
        variant.mode,
        variant.grid,
        f"{solver}, {teacher_steps} on {teacher_grid if variant.mode == 'end_to_end' else variant.grid}",
        nfe,
        end_error(objective, trained, data),
        before,
        objective.counter.evaluations,
        seconds,
    )


def text(results: list[Result]) -> str:
    """A row per variant, a column per budget: RMSE, the best of a budget marked; training of the largest budget."""
    budgets = sorted({r.nfe for r in results})
    rows = sorted({_row(r) for r in results}, key=_first_place(results))
    best = {
        k: min((r.rmse for r in results if r.nfe == k and math.isfinite(r.rmse)), default=math.nan) for k in budgets
    }
    lines = [
        f"{'solver':32}{'mode':12}{'grid':9}{'teacher':22}"
        + "".join(f"{k:>10}" for k in budgets)
        + f"{'NFE':>10}{'s':>7}"
    ]
    for row in rows:
        own = {r.nfe: r for r in results if _row(r) == row}
        cells = "".join(_cell(own.get(k), best[k]) for k in budgets)
        last = own[max(own)]
        cost = f"{last.training_nfe:>10,}{last.seconds:>7.1f}" if last.training_nfe else ""
        lines.append(f"{row[0]:32}{row[1]:12}{row[2]:9}{row[3]:22}{cells}{cost}")
    return "\n".join(lines)


def _row(result: Result) -> tuple[str, str, str, str]:
    return result.solver, result.mode, result.grid, result.teacher


def _first_place(results: list[Result]) -> Callable[[tuple[str, str, str, str]], int]:
    order = {_row(r): i for i, r in reversed(list(enumerate(results)))}
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
    tables = [
        plain(trained, data, name, grid, nfe) for grid in ("uniform", GITS) for name in UNLEARNED for nfe in task.nfe
    ]
    results = [result for result in tables if result is not None]
    for variant in variants():
        for nfe in task.nfe:
            results.append(learn(trained, task, data, variant, nfe))
            print(
                "{solver}, {mode}, {grid}, {teacher}, NFE {nfe}: {rmse:.4f}".format_map(vars(results[-1])), flush=True
            )
    print(f"\nRMSE to {task.reference_steps} steps of UniPC(3), {task.n} held-out samples\n{text(results)}")
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
