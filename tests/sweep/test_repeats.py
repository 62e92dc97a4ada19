"""Several trainings of one configuration in one table: means and deviations over trainings."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurements import changed, measurement
from pipelines import TINY_DIT, TINY_LATENT, Pipeline, Script
from sweeps import sweep_task

from midway.gen.commands import evaluate
from midway.gen.core.errors import DataError
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.evaluation.comparing import differences
from midway.gen.evaluation.records import LIMITS, Measurement, from_record
from midway.gen.flags.tasks import LatentTask
from midway.gen.sweep.repeats import check_repeats, left_out, merge_trainings
from midway.gen.trainings import train_latent

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


def cell(solver: str, grid: str, distance: float, rmse: float | None = 0.5, **more: Any) -> Measurement:
    made = measurement(solver, grid, 4, distance, 0.1, rmse, kid=distance / 10)
    return changed(made, **({"distance_blocks": (distance - 0.1, distance + 0.1)} | more))


def test_figures_are_means_over_trainings_and_deviations_among_them() -> None:
    sweeps = [[cell("ddim", "karras", d, rmse=r)] for d, r in ((1.0, 0.1), (2.0, 0.3), (4.5, 0.2))]
    (merged,) = merge_trainings(sweeps)
    assert merged.distance == pytest.approx(2.5)
    assert merged.std("distance") == pytest.approx(np.std([1, 2, 4.5], ddof=1))
    assert merged.value("rmse") == pytest.approx(0.2) and merged.value("kid") == pytest.approx(0.25)
    assert merged.std("kid") == pytest.approx(np.std([0.1, 0.2, 0.45], ddof=1))
    assert merged.distances == (1.0, 2.0, 4.5) and merged.trainings == 3


def test_the_exact_solution_is_averaged_and_the_other_limits_are_the_firsts() -> None:
    sweeps = [[cell(limit, "", d, None, nfe=48 * (limit == "exact")) for limit in LIMITS] for d in (1.0, 3.0)]
    assert [(m.solver, m.distance) for m in merge_trainings(sweeps)] == [
        ("floor", 1.0),
        ("ceiling", 1.0),
        ("exact", 2.0),
    ]


def test_what_is_not_of_all_trainings_is_left_out_and_named() -> None:
    """Its blocks would be taken for trainings, in differences with the others."""
    stay = [cell("floor", "", 0.5, None, nfe=0), cell("vae", "", 3.0, None, baseline=True)]
    first = [*stay, cell("ddim", "karras", 1.0), cell("table", "karras", 0.8)]
    second = [changed(stay[0], distance=0.6), cell("ddim", "karras", 1.4), cell("table", "uniform", 0.9)]
    merged = merge_trainings([first, second])
    assert [(c.solver, c.trainings) for c in merged] == [("floor", 1), ("vae", 1), ("ddim", 2)]
    assert merged[:2] == stay
    assert left_out([first, second]) == ["table on karras at NFE 4", "table on uniform at NFE 4"]
    assert list(differences(merged)) == [("ddim", 4)]


def test_records_of_all_trainings_are_named() -> None:
    (merged,) = merge_trainings([[cell("ddim", "karras", 1.0, record=name)] for name in ("a1", "b2")])
    assert merged.record == "a1 b2"


@pytest.mark.parametrize("key", ["steps", "lr", "ema"])
def test_a_longer_or_other_training_is_no_repeat(key: str, pipeline: Pipeline, again: Path) -> None:
    first, other = pipeline.load(), load_model(again, torch.device("cpu"))
    check_repeats(first, [other])
    train = {**other.run.config["train"], key: 7}
    changed = replace(other, run=replace(other.run, config={**other.run.config, "train": train}))
    with pytest.raises(DataError, match=rf"train\.{key}"):
        check_repeats(first, [changed])


def test_another_tokenizer_makes_no_repeat(pipeline: Pipeline, again: Path) -> None:
    other = load_model(again, torch.device("cpu"))
    next(other.tokenizer.parameters()).data.view(-1)[0] += 1
    with pytest.raises(DataError, match="its tokenizer"):
        check_repeats(pipeline.load(), [other])


@pytest.fixture(scope="module")
def again(pipeline: Pipeline) -> Path:
    """The pipeline's model trained with another seed."""
    path = pipeline.root / "again"
    config = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    train_latent.train(LatentTask(path, pipeline.tokenizer, model=config, train=replace(TINY_LATENT, seed=1)))
    return path


def task(pipeline: Pipeline, out: Path, *repeats: Path) -> evaluate.EvaluateTask:
    return sweep_task(pipeline, out, solvers="ddim,euler", repeats=repeats)


def test_two_trainings_in_one_table(pipeline: Pipeline, again: Path, succeed: Script, tmp_path: Path) -> None:
    alone = [
        evaluate.run(replace(task(pipeline, tmp_path / m.name), model=m)).measurements for m in (pipeline.model, again)
    ]
    runs = f"--model {pipeline.model} --repeats {again} --features {pipeline.features} --out {tmp_path}/both"
    flags = "--solvers ddim,euler --nfe 4 --grids uniform --n 20 --blocks 2 --exact-nfe 8 --batch-size 8"
    succeed(f"evaluate {runs} {flags}")
    both = [from_record(json.loads(line)) for line in (tmp_path / "both/results.jsonl").read_text().splitlines()]
    for a, b, merged in zip(*alone, both, strict=True):
        if merged.solver not in ("floor", "ceiling"):
            assert merged.distances == (a.distance, b.distance) and a.distance != b.distance
            assert merged.trainings == 2
    text = (tmp_path / "both" / "report.md").read_text()
    assert "2 trainings" in text and "2 disjoint block(s) of each training" in text and "disjoint blocks." not in text
    assert "standard deviation over trainings" in (tmp_path / "both" / "report.html").read_text()
