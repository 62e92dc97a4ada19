"""Training a feature network: it stops by held-out accuracy, keeps the best weights, and its name depends on no thread count."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import Script

from midway.gen.commands.verify_resume import VerifyTask, verify
from midway.gen.core import checkpoints
from midway.gen.core.runs import Run
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.features.classifier import load_features
from midway.gen.features.open import named_extractor
from midway.gen.progress.finished import selected, unfinished
from midway.gen.trainings import train_features
from midway.gen.trainings.train_features import FeaturesTask, accuracy_of

USAGE = 2


def trained(out: Path, **changes: object) -> FeaturesTask:
    task = FeaturesTask(out, width=8, dim=8)
    train = replace(task.train, **{"batch_size": 64, "lr": 2e-2, "warmup": 4, "validate_every": 5, **changes})  # pyright: ignore
    task = replace(task, train=train)
    train_features.train(task)
    return task


def test_it_stops_by_held_out_accuracy_and_stores_the_best(tmp_path: Path) -> None:
    """The printed accuracy is of all held-out images by the weights that other commands load; the run counts as finished."""
    trained(tmp_path / "f", patience_validations=2)
    run = Run.open(tmp_path / "f", "features")
    values = {r["step"]: r["validation"] for line in metrics(run) if "validation" in (r := json.loads(line))}
    best, last = min(values, key=lambda step: (values[step], step)), max(values)
    assert last == best + 10 < 2000 and selected(run) == run.best / f"step-{best}" and unfinished(run) == ()
    network, held_out = load_features(selected(run) / "features.safetensors"), load_splits(DataConfig()).held_out
    accuracy, _ = accuracy_of(network, held_out.images, held_out.labels)
    assert values[best] == pytest.approx(1 - accuracy) and json.loads(metrics(run)[-1])["held_out_accuracy"] == accuracy
    line = f"held-out accuracy {accuracy:.4f} (step {best}, the best in validation); metric {network.name}"
    assert line in (run.path / "log.txt").read_text()
    assert named_extractor(run.path, DataConfig(), "the images").name == network.name
    newest = checkpoints.directories(run.checkpoints)[0].name.removeprefix("step-")
    other = named_extractor(f"{run.path}@{newest}", DataConfig(), "the images")
    assert other.name != network.name, "a chosen checkpoint is another network"


def metrics(run: Run) -> list[str]:
    return (run.path / "metrics.jsonl").read_text().splitlines()


def test_the_name_depends_on_no_thread_count(tmp_path: Path) -> None:
    threads, names = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            trained(tmp_path / str(count), steps=8, save_every=4, keep=2, patience_validations=0)
            assert "the run's own step-8" in " ".join(verify(VerifyTask(tmp_path / str(count), steps=4)))
            assert torch.get_num_threads() == count, "the caller's threads come back"
            names.append(re.findall(r"metric (\S+)", (tmp_path / str(count) / "log.txt").read_text()))
    finally:
        torch.set_num_threads(threads)
    assert names[0] == names[1] and len(names[0]) == 1


def test_it_needs_a_place(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = script("train_features", "--steps", 1)
    assert done.code == USAGE and "--out" in done.err and not [*tmp_path.iterdir()]
