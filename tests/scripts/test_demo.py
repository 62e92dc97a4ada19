"""The demo's whole path with a few steps of everything, and what the full demo would run."""

import csv
import os
import signal
from pathlib import Path
from typing import Any, Literal

import pytest

from midway.gen.commands import demo
from midway.gen.core import signals
from midway.gen.diffusion.load import LEARNED
from midway.gen.diffusion.model import LatentModel
from midway.gen.evaluation.records import LIMITS
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
    solvers = ["euler", "ddim", "heun", "dpm2", "dpmpp2m", "dpmpp3m", "ipndm3", "amed", "amed-plugin-ipndm3", "table"]
    assert [row["solver"] for row in rows[3:]] == solvers
    assert {row["nfe"] for row in rows[3:]} == {"4"} and rows[0]["features"].startswith("effnet-lite0@")
    for name in ("results.jsonl", "report.md", "distance_vs_nfe.png", "distance_vs_seconds.png"):
        assert (out / name).stat().st_size > 0
    demo.run(demo.DemoTask(out=out, quick=True))  # a second demo replaces the first


@pytest.mark.parametrize("source", ["digits", "mnist5k"])
def test_the_full_demo_measures_every_solver_at_every_budget(source: Literal["digits", "mnist5k"]) -> None:
    task = demo.DemoTask(source)
    sweep = demo.evaluate_task(task)
    assert sweep.solvers and {*sweep.solvers.split(",")} <= {*SOLVERS, *LEARNED}
    assert sweep.nfe == "4,6,8,10" == demo.solver_task(task, "amed").nfe == demo.solver_task(task, "table").nfe
    assert demo.latent_task(task).model.schedule == "vp"
    tokenizer = demo.tokenizer_task(task)
    assert tokenizer.model.quantizer == "fsq" and tokenizer.data.data == source
    assert tokenizer.out.parent == demo.latent_task(task).tokenizer.parent == sweep.out == task.folder


@pytest.mark.slow
def test_the_quick_demo_on_mnist(tmp_path: Path) -> None:
    report = demo.run(demo.DemoTask("mnist5k", tmp_path / "demo", quick=True))
    assert report.parent == tmp_path / "demo" and "MNIST, 5,000 digits" in report.read_text()


@pytest.mark.slow
def test_the_demo_holds_what_it_promises(tmp_path: Path) -> None:
    """About 6 minutes: to the exact solution the table is nearest, then AMED, then what it starts from and first order."""
    demo.run(demo.DemoTask(out=tmp_path / "demo"))
    with (tmp_path / "demo" / "results.csv").open() as file:
        rows = {(row["solver"], int(row["nfe"])): row for row in csv.DictReader(file)}
    for measure in ("rmse", "to_exact"):
        for nfe in (4, 6, 8):
            found = {solver: float(rows[solver, nfe][measure]) for solver in ("euler", "ddim", "dpm2", "amed", "table")}
            assert found["table"] < found["amed"] < min(found["euler"], found["ddim"], found["dpm2"])
    floor, ceiling, exact = (
        float(next(row["distance"] for (name, _), row in rows.items() if name == limit)) for limit in LIMITS
    )
    assert floor < ceiling < exact
