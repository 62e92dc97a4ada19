"""Online evaluation: the distances of the averaged weights at a few budgets, while a latent model trains."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pipelines import TINY, TINY_DIT, Pipeline, Script
from sweeps import measured, sweep_task

from midway.gen.commands import evaluate
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.flags.tasks import LatentTask
from midway.gen.training.config import OnlineConfig
from midway.gen.trainings import train_latent

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
TRAIN = replace(TINY, steps=10, measure_every=4)


def task(pipeline: Pipeline, out: Path, **changes: Any) -> LatentTask:
    early = OnlineConfig(nfe=(4, 6), n=24, grid="uniform", solver="ddim", features=str(pipeline.features))
    config = LatentModelConfig(schedule="cosine", dit=TINY_DIT)
    return LatentTask(out, pipeline.tokenizer, model=config, train=TRAIN, early=replace(early, **changes))


def output(out: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record.get("early")]


def test_answers_come_when_due_and_at_the_end_and_are_those_of_the_sweep(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    early = (
        f"--early.nfe 4 6 --early.n 24 --early.grid uniform --early.solver ddim --early.features {pipeline.features}"
    )
    train = "--steps 10 --batch-size 64 --model.dit.width 32 --model.dit.depth 2 --model.dit.heads 2 --measure-every 4"
    succeed(f"train_latent digits-dit --tokenizer {pipeline.tokenizer} --out {run} {train} {early}")
    answers = output(run)
    assert [answer["step"] for answer in answers] == [4, 8, 10]
    assert all(answer["n"] == 24 and "@" in answer["features"] and answer["seeds"] == "0-23" for answer in answers)
    assert "n = 24" in (run / "log.txt").read_text()
    swept = replace(sweep_task(pipeline, tmp_path / "report", nfe="4,6", n=24, blocks=1, exact_nfe=0), model=run)
    cells = measured(evaluate.run(swept))
    assert [answers[-1][f"distance_nfe_{cell.nfe}"] for cell in cells] == [pytest.approx(c.distance) for c in cells]


def test_looking_changes_nothing(pipeline: Pipeline, tmp_path: Path) -> None:
    weights = []
    for name, train in (("with", TRAIN), ("without", replace(TRAIN, measure_every=0))):
        train_latent.train(replace(task(pipeline, tmp_path / name), train=train))
        (folder,) = (tmp_path / name / "checkpoints").glob("step-10")
        weights.append((folder / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_online_evaluation_of_nothing_raise() -> None:
    wrongs: list[dict[str, Any]] = [{"n": 1}, {"nfe": ()}, {"nfe": (0,)}]
    for wrong in wrongs:
        with pytest.raises(ValueError, match="online evaluation"):
            OnlineConfig(**wrong)
