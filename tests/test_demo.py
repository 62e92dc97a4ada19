"""The demo's whole path with a few steps of everything, and what the full demo would run."""

import csv
from pathlib import Path

import demo

from midway.gen.evaluate import LEARNED
from midway.samplers.solvers import SOLVERS


def test_the_quick_demo_ends_with_a_report(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    report = demo.run(demo.DemoTask(out=out, quick=True))
    assert report == out / "report.html"
    assert report.read_text().startswith("<!")
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["solver"] == "floor"
    assert [row["solver"] for row in rows[1:]] == ["euler", "ddim", "heun", "dpm2", "dpmpp2m", "amed-constants", "amed"]
    assert {row["nfe"] for row in rows[1:]} == {"4"}
    for name in ("results.jsonl", "report.md", "distance_vs_nfe.png", "distance_vs_seconds.png"):
        assert (out / name).stat().st_size > 0
    demo.run(demo.DemoTask(out=out, quick=True))  # a second demo replaces the first


def test_the_full_demo_measures_every_solver_at_every_budget() -> None:
    task = demo.DemoTask()
    sweep = demo.evaluate_task(task)
    assert set(sweep.solvers.split(",")) == {*SOLVERS, *LEARNED}
    assert sweep.nfe == "4,6,8,10,20" == demo.solver_task(task, "amed").nfe
    assert demo.latent_task(task).model.schedule == "vp"
    assert demo.tokenizer_task(task).model.quantizer == "fsq"
