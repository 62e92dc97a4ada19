"""Residuals beside tables and learned noise by their commands: learned, sampled, measured, and what stands in their way."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import Pipeline, Script
from resuming import seal
from sweeps import measured, sweep_task

from midway.gen.commands import evaluate
from midway.gen.diffusion.load import load_model, load_solver
from midway.gen.distillation.table import TableConfig
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_solver
from midway.samplers.residual import Residual, ResidualShape
from midway.samplers.residual_solver import ResidualTable
from midway.samplers.table import Table

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TRAIN = TrainConfig(steps=2, batch_size=8, lr=0.03, warmup=0, ema=0, log_every=1)
PAIRS = "--table.pairs 16 --table.teacher-steps 6 --residual.held-out 4 --residual.width 8 --residual.blocks 1"
STEPS = "--steps 4 --batch-size 4 --validate-every 2"
NOISE = (
    "--noise.teacher dpmpp2m --noise.teacher-steps 4 --noise.trajectories 8 --noise.seed 1 --noise.analytic-first True "
    "--noise.loss distribution --noise.node-weight 0.2 --noise.start 0.5 --noise.ranges.limit 0.1 "
    "--noise.ranges.amed.scale-dir 0.1 --noise.ranges.amed.scale-time 0.1 --noise.ranges.amed.hidden 8"
)


@pytest.fixture(scope="module")
def model(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the model with a learned table at 3 evaluations."""
    copied = Path(shutil.copytree(pipeline.model, tmp_path_factory.mktemp("frontier") / "model"))
    table = TableConfig(pairs=16, teacher_steps=6)
    train_solver.train(train_solver.SolverTask(copied, "table", "3", "best", table=table, train=TRAIN))
    return copied


def test_frontier_solvers_are_learned_sampled_and_measured_by_name(
    model: Path, pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """The residual has the weights that did best on held-out pairs, and prints what it costs; a sweep does, too."""
    for name in ("table-residual", "table-residual-1x1"):
        done = succeed(f"train_solver {name} --model {model} --nfe 3 {PAIRS} {STEPS}")
        assert "MFLOP of the residual" in done.out and "4 held-out pairs: RMSE" in done.out
        assert "% of what it adds is outside the span" in done.out
    succeed(f"train_solver adasde --model {model} --nfe 3 --grid uniform --steps 2 --batch-size 4 {NOISE}")
    trained = load_model(model, torch.device("cpu"))
    residual, noisy = load_solver(trained, "table-residual", "best", 3), load_solver(trained, "adasde", "uniform", 3)
    assert isinstance(residual, ResidualTable) and isinstance(noisy, Table) and noisy.stochastic
    best, card = model / "solvers/table-residual-best-nfe3/best", residual.card
    assert [path.name for path in best.glob("step-*")] in (["step-2"], ["step-4"])
    assert residual.base == load_solver(trained, "table", "best", 3)
    assert residual.base.card is not None
    own = card.training_nfe - residual.base.card.training_nfe
    assert own == 20 * 6 + 4 * 4 * 3 + 2 * 4 * 3, "teacher, four steps and two validations, whichever step did best"
    task = replace(sweep_task(pipeline, tmp_path / "report", nfe="3"), model=model, blocks=2)
    cells = measured(evaluate.run(replace(task, solvers="table,table-residual,table-residual-1x1,adasde")))
    assert [c.solver for c in cells] == ["table", "table-residual", "table-residual-1x1", "adasde"]
    assert all(c.nfe == 3 and c.training_nfe > 0 for c in cells)
    assert cells[0].flops == cells[3].flops == 3 * residual.costs.network
    assert cells[1].flops == cells[0].flops + residual.costs.residual
    rmse = [c.value("rmse") or 0 for c in cells]
    assert rmse[3] > 2 * rmse[0] > 0, "what draws noise ends elsewhere"
    assert "MFLOP" in (tmp_path / "report" / "report.md").read_text()
    for name in ("table-residual", "adasde"):
        done = succeed(f"sample --model {model} --solver {name} --nfe 3 --n 4 --out {tmp_path}/grid.png")
        assert "3 evaluations each" in done.out


def test_a_resumed_residual_is_the_uninterrupted_one(model: Path, succeed: Script, tmp_path: Path) -> None:
    """Bit for bit, what it validates with included."""
    found = []
    for flags in ((), ("--max-steps", 2)):
        copied = Path(
            shutil.copytree(model, tmp_path / f"model{len(flags)}", ignore=shutil.ignore_patterns("*residual*"))
        )
        line = f"train_solver table-residual --model {copied} --nfe 3 {PAIRS} {STEPS}"
        succeed(line, *flags)
        if flags:
            succeed(line, "--resume", "auto")
        solver = load_solver(load_model(copied, torch.device("cpu")), "table-residual", "best", 3)
        assert isinstance(solver, ResidualTable)
        found.append(solver)
    assert found[0].hash == found[1].hash


def test_what_stands_in_their_way(model: Path, script: Script, tmp_path: Path) -> None:
    """A residual without its table, of another guidance or of other latents; noise on a budget or of a teacher it cannot have."""
    learn = f"table-residual --model {model} {PAIRS} --nfe"
    cases = {
        f"{learn} 4": "has no learned table to stand beside",
        f"{learn} 3 --guidance 2": "none on grid best at guidance 2.0",
        f"adasde --model {model} --nfe 4 --noise.analytic-first True": "NFE 4 | 3 or 5",
        f"adasde --model {model} --nfe 4 --noise.teacher ddpm": "draws noise",
        f"adasde --model {model} --nfe 4 --grid best": "unknown grid 'best'",
        f"adasde --model {model} --nfe 4 --noise.ranges.limit 2": "limit must be in",
        f"adasde --model {model} --nfe 4 --noise.trajectories 1": "trajectories is 1",
    }
    for line, words in cases.items():
        done = script("train_solver", *line.split())
        assert done.code == 2, (line, done.err)
        assert len(done.err.splitlines()) == 3, done.err
        assert all(word in done.err for word in words.split(" | ")), done.err
    copied = Path(shutil.copytree(model, tmp_path / "model"))
    assert (
        script(
            "train_solver",
            *f"table-residual --model {copied} --nfe 3 {PAIRS} --steps 1 --overwrite --validate-every 0".split(),
        ).code
        == 0
    )
    (file,) = copied.glob("solvers/table-residual-best-nfe3/checkpoints/step-*/solver.safetensors")
    trained = load_model(copied, torch.device("cpu"))
    solver = load_solver(trained, "table-residual", "best", 3)
    assert isinstance(solver, ResidualTable)
    other = Residual(ResidualShape((5, 4, 4), 3, 8, 1)).eval().requires_grad_(False)
    replace(solver, residual=other).save(file)
    seal(file.parent)
    done = script("sample", "--model", copied, "--solver", "table-residual", "--nfe", 3, "--out", tmp_path / "grid.png")
    assert done.code == 3 and len(done.err.splitlines()) == 3, done.err
    assert "learned for latents (5, 4, 4)" in done.err and "train it again" in done.err
