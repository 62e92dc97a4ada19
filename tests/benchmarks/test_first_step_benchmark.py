"""The benchmark of the time to the first step runs, and leaves nothing behind."""

import json
from pathlib import Path

import benchmark_modules
import pytest


@pytest.mark.slow
def test_the_first_step_of_two_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_step = benchmark_modules.benchmark("first_step")
    first_step.main(tmp_path / "sets", [8, 12], 1, tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["results"]
    assert [row["images"] for row in rows] == [8, 12]
    assert all(row["seconds"] > 0 for row in rows)
    assert not list((tmp_path / "sets").iterdir())
