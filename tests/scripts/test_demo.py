"""The demo's whole path with a few steps of everything, and what the full demo would run."""

import csv
import os
import signal
from pathlib import Path
from typing import Any

import demo
import pytest

from midway.gen.core import signals
from midway.gen.diffusion.load import LEARNED
from midway.gen.diffusion.model import LatentModel
from midway.gen.evaluation.sources import SolverSource
from midway.samplers.solvers import SOLVERS


def stop_in(patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
    """SIGTERM in the third call of a method."""
    real, calls = getattr(owner, name), list[int]()

    def stop(*arguments: Any) -> Any:
        calls.append(0)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    patch.setattr(owner, name, stop)


def test_the_quick_demo_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also one that was interrupted: in a training, which saves its state, and in the sweep. Its next start goes on there."""
    out, task = tmp_path / "demo", demo.DemoTask(out=tmp_path / "demo", quick=True)
    for owner, name in ((LatentModel, "after_step"), (SolverSource, "sample")):
        with monkeypatch.context() as patch, signals.handling(), pytest.raises(signals.Stopped):
            stop_in(patch, owner, name)
            demo.run(task)
        assert not (out / "report.html").exists()
    capsys.readouterr()
    report = demo.run(task)
    assert capsys.readouterr().out.count("finished before") == 5
    assert (out / "model" / "log.txt").read_text().count("resuming from step") == 1
    assert report == out / "report.html"
    assert report.read_text().startswith("<!")
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["solver"] for row in rows[:3]] == ["floor", "ceiling", "exact"]
    solvers = ["euler", "ddim", "heun", "dpm2", "dpmpp2m", "dpmpp3m", "ipndm3", "amed-constants", "amed", "table"]
    assert [row["solver"] for row in rows[3:]] == solvers
    assert {row["nfe"] for row in rows[3:]} == {"4"} and rows[0]["features"].startswith("effnet-lite0@")
    for name in ("results.jsonl", "report.md", "distance_vs_nfe.png", "distance_vs_seconds.png"):
        assert (out / name).stat().st_size > 0
    demo.run(demo.DemoTask(out=out, quick=True))  # a second demo replaces the first


def test_the_full_demo_measures_every_solver_at_every_budget() -> None:
    task = demo.DemoTask()
    sweep = demo.evaluate_task(task)
    assert {*sweep.solvers.split(",")} <= {*SOLVERS, *LEARNED}
    assert sweep.nfe == "4,6,8,10,20" == demo.solver_task(task, "amed").nfe
    assert demo.latent_task(task).model.schedule == "vp"
    assert demo.tokenizer_task(task).model.quantizer == "fsq"


@pytest.mark.slow
def test_the_demo_holds_what_it_promises(tmp_path: Path) -> None:
    """About 5 minutes: near the floor at 20 NFE, and AMED ahead of where it starts from and of first-order solvers.

    By distance at 4 evaluations only: from 6 on the error bars overlap, and which is ahead depends on the training seed.
    """
    demo.run(demo.DemoTask(out=tmp_path / "demo"))
    with (tmp_path / "demo" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))

    def best(solver: str, nfe: int, measure: str) -> float:
        return min(float(r[measure]) for r in rows if r["solver"] == solver and int(r["nfe"]) == nfe)

    floor = best("floor", 0, "distance")
    assert min(best(solver, 20, "distance") for solver in SOLVERS) < 2 * floor
    for solver in ("euler", "ddim", "dpm2"):
        assert best("amed", 4, "distance") < best(solver, 4, "distance")
        for nfe in (4, 6, 8):
            assert best("amed", nfe, "rmse") < best(solver, nfe, "rmse")
