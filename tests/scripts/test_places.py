"""Runs from other directories, moved runs, moved images, unfinished trainings and chosen checkpoints."""

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from pictures import noise, save
from pipelines import TINY, TINY_DIT, Pipeline, Script

from midway.gen.baselines.vae import VAEConfig
from midway.gen.core import checkpoints
from midway.gen.core.errors import DataError
from midway.gen.core.runs import OWN, Run
from midway.gen.data.places import data_of, images_at, moved_run, recorded_fingerprint, trained_alike, trained_on
from midway.gen.data.splits import DataConfig
from midway.gen.diffusion.load import load_model, solver_path
from midway.gen.diffusion.model import LatentModelConfig
from midway.gen.flags.baseline_tasks import VAETask
from midway.gen.flags.evaluation_flags import EvaluateTask, folder
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.progress.finished import progress_of, selected, unfinished
from midway.gen.trainings import train_baseline, train_features, train_latent, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
DATA, USAGE = 3, 2
CPU = torch.device("cpu")
SHORT = replace(TINY, steps=4, batch_size=8, save_every=2, keep=9)
SWEEP = "--solvers euler --nfe 2 --grids uniform --n 8 --blocks 1 --exact-nfe 0 --metrics sliced --features pixels"


@dataclass(frozen=True)
class Place:
    """A folder of images, runs trained on them from paths relative to their parent, and where they are now."""

    images: Path
    tokenizer: Path
    model: Path
    features: Path


def write_images(folder: Path, first: int = 0) -> None:
    for index in range(40):
        save(folder / "ab"[index % 2] / f"{index:02}.png", noise(8, 8, seed=first + index))


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Trained in one directory by relative paths, moved to another as a whole; the first one is gone."""
    root = tmp_path_factory.mktemp("places")
    first, second = root / "first", root / "deep" / "second"
    write_images(first / "photos")
    before = Path.cwd()
    os.chdir(first)
    data, out = DataConfig(data="./photos"), Path("runs")
    train_tokenizer.train(
        TokenizerTask(out / "t", data=data, model=TokenizerConfig(width=8, downsample=2), train=SHORT)
    )
    model = LatentModelConfig(dit=TINY_DIT)
    train_latent.train(LatentTask(out / "m", out / "t", model=model, train=replace(SHORT, steps=8, max_steps=4)))
    train_features.train(train_features.FeaturesTask(out / "f", data=data, width=8, dim=4, train=SHORT))
    os.chdir(before)
    second.parent.mkdir()
    first.rename(second)
    yield Place(second / "photos", second / "runs/t", second / "runs/m", second / "runs/f")


def config_of(run: Path) -> dict[str, object]:
    return yaml.safe_load((run / "config.yaml").read_text())


def test_a_run_stores_absolute_paths(moved: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = moved.images.parents[2] / "first"
    assert config_of(moved.tokenizer)["out"] == str(first / "runs/t")
    assert config_of(moved.tokenizer)["data"]["data"] == str(first / "photos")  # pyright: ignore
    assert config_of(moved.model)["tokenizer"] == str(first / "runs/t")
    assert "first" not in (moved.tokenizer / "tokenizer" / "README.md").read_text()


def test_a_moved_run_works_from_any_directory(
    moved: Place, tmp_path: Path, succeed: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images and tokenizer that were moved together with it are found."""
    monkeypatch.chdir(tmp_path)
    assert data_of(Run.open(moved.model, "latent_model")).data == str(moved.images)
    assert (
        moved_run(Run.open(moved.model, "latent_model"), Path(str(config_of(moved.model)["tokenizer"])))
        == moved.tokenizer
    )
    succeed("sample --nfe 2 --n 4 --out x.png --model", moved.model)
    succeed("verify_resume", moved.model, "--steps", 2)
    succeed(f"evaluate {SWEEP} --out report --model", moved.model)
    succeed("encode --out latents --tokenizer", moved.tokenizer)
    task = train_latent.LatentTask(Path("m2"), moved.tokenizer, model=LatentModelConfig(dit=TINY_DIT), train=SHORT)
    train_latent.train(task)
    assert config_of(tmp_path / "m2")["tokenizer"] == str(moved.tokenizer)
    assert config_of(tmp_path / "m2")["data"]["data"] == str(moved.images)  # pyright: ignore


COMMANDS = {
    "encode": "encode --tokenizer {0.tokenizer} --out latents",
    "train_latent": "train_latent digits-dit --tokenizer {0.tokenizer} --out m --steps 1 --batch-size 4 --latents none",
    "evaluate": "evaluate --model {0.model} --out report " + SWEEP,
    "evaluate_tokenizer": "evaluate_tokenizer --tokenizers {0.tokenizer} --features none --out report",
    "evaluate_likelihood": "evaluate_likelihood --models {0.model} --features none --nfe 2 --n 4 --out report",
    "verify_resume": "verify_resume {0.features} --steps 2",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_take_another_place_of_the_images_by_fingerprint(
    command: str, moved: Place, tmp_path: Path, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """None: the error names both places and the flag. Other images: the error names both fingerprints. The same: it runs."""
    place = Place(tmp_path / "else", *(tmp_path / "runs" / name for name in "tmf"))
    shutil.copytree(moved.tokenizer.parent, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    line = COMMANDS[command].format(place).removesuffix(" --latents none").split()
    done = script(*line)
    stored = moved.images.parents[2] / "first" / "photos"
    assert done.code == DATA and str(stored) in done.err and str(tmp_path / "photos") in done.err
    assert "--data-path" in done.err
    write_images(tmp_path / "others", first=100)
    done = script(*line, "--data-path", "others")
    then = recorded_fingerprint(Run.open(moved.tokenizer, "tokenizer"))
    assert done.code == DATA and then[:12] in done.err and "their fingerprint is" in done.err
    shutil.copytree(moved.images, tmp_path / "else")
    done = script(*line, "--data-path", "else")
    assert done.code == 0, done.err


def test_a_training_resumes_where_its_images_are_now(
    moved: Place, tmp_path: Path, script: Script, succeed: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(moved.tokenizer.parent, tmp_path / "runs")
    shutil.copytree(moved.images, tmp_path / "else")
    monkeypatch.chdir(tmp_path)
    again = "--config runs/m/config.yaml --out runs/m --resume auto --tokenizer runs/t"
    assert script(*f"train_latent {again}".split()).code == DATA
    assert "resuming from step 4" in succeed(f"train_latent {again} --data-path else").out
    assert unfinished(Path("runs/m")) == ()
    shutil.copytree(moved.model, tmp_path / "alone")  # a latent model without its tokenizer's run beside it
    assert script("verify_resume", "alone", "--steps", 2).code == DATA
    succeed("verify_resume alone --steps 2 --tokenizer runs/t --data-path else")
    image_run = "train_features --config runs/f/config.yaml --out runs/f --resume auto --steps 6 --data"
    write_images(tmp_path / "others", first=100)
    done = script(*f"{image_run} others".split())
    assert done.code == USAGE and "data fingerprint" in done.err
    assert "resuming from step 4" in succeed(f"{image_run} else").out


def test_runs_of_moved_images_are_still_runs_of_the_same_images(moved: Place, tmp_path: Path) -> None:
    """Two further instances: networks that measure, and comparisons of runs, by fingerprint where the paths differ."""
    tokenizer, features = Run.open(moved.tokenizer, "tokenizer"), Run.open(moved.features, "features")
    assert trained_alike(tokenizer, features)
    shutil.copytree(moved.images, tmp_path / "copy")
    assert trained_on(features, DataConfig(data=str(tmp_path / "copy")))
    assert not trained_on(features, DataConfig(data=str(tmp_path / "copy"), held_out=0.5))
    write_images(tmp_path / "others", first=100)
    assert not trained_on(features, DataConfig(data=str(tmp_path / "others")))
    assert not trained_on(features, DataConfig())
    other = replace(features, config={**features.config, "data": {"data": str(tmp_path / "others")}})
    assert trained_alike(other, features), "the record counts, not the path"
    other = replace(features, config={**features.config, "data": {"data": str(moved.images), "held_out": 0.5}})
    assert not trained_alike(other, features), "and the split"


def test_paths_of_earlier_versions_are_relative(moved: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First to the working directory, then to the run: it was so far from its images."""
    run = replace(
        Run.open(moved.tokenizer, "tokenizer"), config={"out": "runs/t", "data": {"data": "photos"}, "train": {}}
    )
    monkeypatch.chdir(tmp_path)
    assert data_of(run).data == str(moved.images)
    write_images(tmp_path / "photos")
    assert data_of(run).data == "photos"
    lost = replace(run, config={"out": "runs/t", "data": {"data": "gone"}})
    with pytest.raises(DataError, match="nor, relative to the run, at") as caught:
        images_at(lost)
    assert str(tmp_path / "gone") in caught.value.why and str(moved.images.parent / "gone") in caught.value.why


# ---- unfinished trainings and chosen checkpoints ----


def test_an_unfinished_training_is_marked_everywhere(
    moved: Place, tmp_path: Path, succeed: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mark = "m: step 4 of 8; the training is not finished"
    assert unfinished(moved.model) == (mark,) and unfinished(moved.tokenizer, moved.features, "pixels", None) == ()
    assert load_model(moved.model, CPU).weights.endswith("step 4 of 8")
    done = succeed("sample --nfe 2 --n 4 --out x.png --model", moved.model)
    assert done.err == f"warning: {mark}\n" and "step 4 of 8" in done.out
    done = succeed(f"evaluate {SWEEP} --out report --model", moved.model)
    assert mark in done.out
    for name in ("report.md", "report.html"):
        assert (tmp_path / "report" / name).read_text().count("step 4 of 8") >= 2, name
    done = succeed(f"evaluate_likelihood --features none --nfe 2 --n 4 --out bits --models {moved.model}")
    assert mark in done.out and mark in (tmp_path / "bits" / "report.md").read_text()


def test_an_unfinished_tokenizer_is_marked_in_card_training_and_comparison(
    moved: Place, tmp_path: Path, succeed: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = DataConfig(data=str(moved.images))
    task = TokenizerTask(Path("t"), data=data, model=TokenizerConfig(width=8, downsample=2), train=SHORT)
    train_tokenizer.train(replace(task, train=replace(SHORT, steps=129, max_steps=3)))
    assert "3 of 129, not finished" in (tmp_path / "t" / "tokenizer" / "README.md").read_text()
    mark = "t: step 3 of 129; the training is not finished"
    done = succeed("train_latent digits-dit --tokenizer t --out m --steps 1 --batch-size 4 --model.dit.width 32")
    assert mark in done.out and mark in (tmp_path / "m" / "log.txt").read_text()
    assert mark in succeed("encode --tokenizer t --out latents").out
    done = succeed("evaluate_tokenizer --tokenizers t --features none --out report")
    assert mark in done.out and mark in (tmp_path / "report" / "report.md").read_text()


def test_a_training_that_stopped_early_is_finished(moved: Place, tmp_path: Path) -> None:
    """Bits per dimension that never improve end it; its record is read, and of an earlier version, without it, the counters."""
    train = replace(SHORT, steps=50, lr=0.0, warmup=0, validate_every=1, patience_validations=2, save_every=1)
    data, model = DataConfig(data=str(moved.images)), VAEConfig(latent_dim=2, width=8, blocks=1, mixtures=1)
    train_baseline.train(VAETask(out=tmp_path / "b", data=data, model=model, train=train, validation_images=4, draws=2))
    run = Run.open(tmp_path / "b", "baseline")
    for recorded in (True, False):
        newest = checkpoints.directories(run.checkpoints)[0]
        found = progress_of(run, newest)
        assert found is not None and found.finished and found.step < 50 and unfinished(run) == ()
        assert unfinished(Path(f"{run.path}@{found.step - 1}")), "an earlier checkpoint of it is not"
        longer = replace(run, config={**run.config, "train": {**run.config["train"], "steps": 90}})
        assert unfinished(longer), "a training that is to go on is not"
        for path in checkpoints.directories(run.checkpoints) if recorded else ():
            state = json.loads((path / "state.json").read_text())
            del state["finished"]
            (path / "state.json").write_text(json.dumps(state))


def test_a_checkpoint_is_chosen_by_its_step(
    moved: Place, tmp_path: Path, script: Script, succeed: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights, its name in reports, its own cells, report and solvers; the error lists the steps that there are."""
    monkeypatch.chdir(tmp_path)
    early, late = (load_model(Path(f"{moved.model}@{step}"), CPU) for step in (2, 4))
    assert early.hash != late.hash == load_model(moved.model, CPU).hash
    assert early.weights.endswith("step 2 of 8") and early.run.place == f"{moved.model}@2"
    assert solver_path(early.run, "amed", "karras", 4) == moved.model / "solvers/step-2/amed-karras-nfe4"
    assert solver_path(late.run, "amed", "karras", 4) == moved.model / "solvers/amed-karras-nfe4"
    own = folder(EvaluateTask(model=Path(f"{moved.model}@2")))
    assert own == moved.model / "report-step-2" and OWN.fullmatch(own.name), "removed with the run by --overwrite"
    done = script("sample", "--model", f"{moved.model}@3")
    assert done.code == DATA and "steps 2, 4" in done.err and f"{moved.model}@4" in done.err
    for step, new in ((4, True), (2, True), (4, False)):
        before = {*(tmp_path / "report" / "cells").rglob("*")}
        succeed(f"evaluate {SWEEP} --out report --model {moved.model}@{step}")
        assert ({*(tmp_path / "report" / "cells").rglob("*")} != before) == new
    task = LatentTask(Path("m"), Path(f"{moved.tokenizer}@2"), model=LatentModelConfig(dit=TINY_DIT), train=SHORT)
    train_latent.train(task)
    assert config_of(tmp_path / "m")["tokenizer"] == f"{moved.tokenizer}@2"
    assert "resume is exact" in succeed("verify_resume m --steps 2").out
    done = succeed(f"evaluate_tokenizer --tokenizers {moved.tokenizer}@2 {moved.tokenizer} --features none --out both")
    rows = [json.loads(line) for line in (tmp_path / "both" / "results.jsonl").read_text().splitlines()]
    assert {row["name"] for row in rows if "name" in row} == {"t@2", "t"} and "t: step 2 of 4" in done.out


def test_a_run_whose_name_has_an_at_sign_is_itself(moved: Place, tmp_path: Path, pipeline: Pipeline) -> None:
    shutil.copytree(moved.model, tmp_path / "m@2")
    shutil.copytree(moved.model, tmp_path / "m")
    assert load_model(tmp_path / "m@2", CPU).weights.endswith("step 4 of 8")
    assert load_model(tmp_path / "m@2@2", CPU).weights.endswith("step 2 of 8")
    assert load_model(tmp_path / "m@step-2", CPU).weights.endswith("step 2 of 8")
    run = Run.open(
        Path(f"{pipeline.baseline}@{selected(Run.open(pipeline.baseline, 'baseline')).name[5:]}"), "baseline"
    )
    assert selected(run).name == selected(Run.open(pipeline.baseline, "baseline")).name, "also of best/"
