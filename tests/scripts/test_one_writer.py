"""Commands that write beside others, or again where they wrote: locked, and replacing nothing that is not theirs."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pipelines import Pipeline, Script
from resuming import everything, unchanged

from midway.gen.commands import demo
from midway.gen.core.errors import UsageError
from midway.gen.core.files import read_json
from midway.gen.core.locks import lock
from midway.gen.core.runs import Run
from midway.gen.trainings import train_latent

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


class Stop(BaseException):
    """Ends a demo where a test has seen enough."""


@pytest.fixture
def at_the_model(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Of a demo: what is called when it trains its latent model, where it stops."""
    called: list[Any] = []

    def train(task: object) -> None:
        for function in called:
            function()
        raise Stop

    monkeypatch.setattr(train_latent, "train", train)
    return called


def test_a_running_demo_loses_nothing_to_other_commands(
    at_the_model: list[Any], script: Script, tmp_path: Path
) -> None:
    """Neither its folder to a second demo, nor a run that it has finished to a training."""
    task = demo.DemoTask(out=tmp_path / "demo", quick=True)

    def others() -> None:
        with unchanged(task.folder):
            done = script("demo", "--quick", "--out", task.folder)
            assert done.code == 2 and f"{task.folder} is being written by another process" in done.err
            run = task.folder / "tokenizer"
            done = script("train_tokenizer", "--config", run / "config.yaml", "--overwrite")
            assert done.code == 2 and f"{run} is being trained by another process" in done.err

    at_the_model.append(others)
    with pytest.raises(Stop):
        demo.run(task)
    assert (task.folder / "tokenizer/tokenizer").exists()


def test_a_demo_replaces_demos_alone(at_the_model: list[Any], pipeline: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    mine = Path(shutil.copytree(pipeline.tokenizer, out / "tokenizer"))
    with unchanged(out), pytest.raises(UsageError, match="tokenizer is not of an earlier demo"):
        demo.run(demo.DemoTask(out=out, quick=True))
    shutil.rmtree(mine)
    (out / "report.md").write_text("mine")
    with unchanged(out), pytest.raises(UsageError, match=r"report\.md is not of an earlier demo"):
        demo.run(demo.DemoTask(out=out, quick=True))


def test_a_demo_of_an_earlier_version_is_known_by_its_command(
    at_the_model: list[Any], pipeline: Pipeline, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(pipeline.tokenizer, tmp_path / "tokenizer"))
    text = (run / "env.json").read_text().replace(read_json(run / "env.json")["command"], "midway demo")
    (run / "env.json").write_text(text)
    with pytest.raises(Stop):
        demo.run(demo.DemoTask(out=tmp_path, quick=True))
    assert Run.open(run, "tokenizer").config["train"]["steps"] == 10, "the earlier one was replaced"


def test_a_run_is_verified_by_one_process_at_a_time(pipeline: Pipeline, script: Script, tmp_path: Path) -> None:
    """What a killed one left is no obstacle."""
    run = Path(shutil.copytree(pipeline.features, tmp_path / "run"))
    (run / ".verify/straight/checkpoints").mkdir(parents=True)
    (run / ".verify/straight/log.txt").touch()
    with lock(run / ".verify"), unchanged(run):
        done = script("verify_resume", run, "--steps", 2)
        assert done.code == 2 and "being used by another process" in done.err
    assert script("verify_resume", run, "--steps", 2).code == 0
    assert not (run / ".verify").exists()


def test_encoding_replaces_latents_alone(pipeline: Pipeline, script: Script, succeed: Script, tmp_path: Path) -> None:
    """Its own folder even if that is damaged; no file and no other folder."""
    call = f"encode --tokenizer {pipeline.tokenizer} --overwrite --out"
    cache = tmp_path / "latents"
    succeed(call, cache)
    assert script("encode", "--tokenizer", pipeline.tokenizer, "--out", cache).code == 2
    succeed(call, cache)
    for mine in (tmp_path / "file", tmp_path / "folder/file"):
        mine.parent.mkdir(exist_ok=True)
        mine.write_bytes(b"mine")
    for place in ("file", "folder"):
        done = script(*call.split(), tmp_path / place)
        assert done.code == 2 and "no folder of latents" in done.err
    assert (tmp_path / "file").read_bytes() == (tmp_path / "folder/file").read_bytes() == b"mine"
    run = Path(shutil.copytree(pipeline.tokenizer, tmp_path / "run"))
    (own,) = run.glob("latents-*[0-9a-f]")
    (own / "manifest.json").write_bytes(b"half")
    succeed("encode --tokenizer", run, "--overwrite")
    assert (own / "manifest.json").stat().st_size > 100


def test_a_list_of_bad_files_goes_with_the_report_that_it_was_of(succeed: Script, tmp_path: Path) -> None:
    mine = tmp_path / "bad_files.txt"
    mine.write_text("mine")
    for _ in range(2):
        succeed("data check digits --out", tmp_path)
        assert mine.read_text() == "mine"
    path = tmp_path / "data.json"
    path.write_text(json.dumps({**read_json(path), "bad": [{"name": "a.png", "reason": "damaged"}]}))
    succeed("data check digits --out", tmp_path)
    assert [*everything(tmp_path)] == ["data.json"]
