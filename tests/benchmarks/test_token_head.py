"""The figure of a prior's head, on a tiny one: rows, counts, what goes on after a stop, and the table of a page."""

import json
from pathlib import Path

import benchmark_modules
import pytest
from pipelines import Pipeline
from prior_runs import prior_run

from midway.gen.priors.config import TokenHeadConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_are_counted_and_not_measured_twice(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = TokenHeadConfig(width=16, depth=1)
    run = prior_run(pipeline.root / "measured-head", pipeline.tokenizer, kind="continuous", head=head)
    bench = benchmark_modules.benchmark("token_head")
    monkeypatch.setattr(bench, "FINE", ("euler", "logsnr", 8))
    learned = ["--model", str(run), "--nfe", "2", "--steps", "2", "--table.pairs", "8", "--table.teacher-steps", "4"]
    monkeypatch.setattr(
        bench, "learn_tables", lambda _: bench.train_solver.command(["table", *learned, "--resume", "auto"])
    )
    small = {"solvers": ("euler",), "nfe": (1, 2), "table_nfe": (2,), "features": ("pixels",), "n": 12}
    study = bench.TokenHeadStudy(run, tmp_path / "figures.json", trunk_nfe=2, **small)
    with benchmark_modules.as_before():
        bench.main(study)
    found = json.loads(study.json.read_text())
    rows = [(row["head_solver"], row["grid"], row["head_nfe"], row["trunk_nfe"]) for row in found["rows"]]
    assert rows == [
        ("table", "best", 2, 2),
        ("euler", "uniform", 1, 2),
        ("euler", "uniform", 2, 2),
        ("euler", "karras", 1, 2),
        ("euler", "karras", 2, 2),
    ]
    assert all(len(row["distances"]["pixels"]) == 2 and row["rmse"] > 0 for row in found["rows"])
    written = study.json.read_bytes()
    monkeypatch.setattr(bench.Bench, "row", lambda *_: pytest.fail("measured again"))
    with benchmark_modules.as_before():
        bench.main(study)
    assert study.json.read_bytes() == written
