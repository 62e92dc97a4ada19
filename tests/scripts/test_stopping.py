"""Scripts that a signal ends, alone and several processes of them: a line, its exit code, and the same command goes on."""

import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from multiprocess import Program, programs
from pipelines import SCRIPTS, TINY, Pipeline, Script
from resuming import newest, steps_of
from sweeps import sweep_task

from midway.gen.commands import evaluate, main
from midway.gen.core import checkpoints
from midway.gen.evaluation.sources import SolverSource
from midway.gen.flags import cli
from midway.gen.sweep.store import CellStore
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_features

COMMANDS = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "start")
ALONE = sorted({command.module.split(".")[1] for command in main.COMMANDS.values() if command.alone})


def stop(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stop_at(call: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which sends SIGTERM to its process as it is called for this time."""
    calls = list[int]()

    def stopping(*arguments: Any, **named: Any) -> Any:
        calls.append(0)
        if len(calls) == call:
            stop()
        return function(*arguments, **named)

    return stopping


@pytest.mark.parametrize("name", COMMANDS)
def test_a_signal_ends_every_script_with_a_line(name: str, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_starting_point", stop)
    done = script(name, "check" if name == "data" else "--help")
    assert done.code == 143 and done.out == ""
    assert done.err == "stopped by SIGTERM: no result was stored; the same command starts again\n"


# ---- a sweep ----


def test_a_sweep_that_is_stopped_goes_on_where_it_was(
    script: Script, pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = f"--model {pipeline.model} --features {pipeline.features} --out {tmp_path} --solvers ddim,heun --nfe 4,6"
    line = [
        "evaluate",
        *flags.split(),
        *["--grids", "uniform", "--samples", "20", "--blocks", "1", "--exact-nfe", "0"],
    ]
    with monkeypatch.context() as patch:
        patch.setattr(SolverSource, "sample", stop_at(4, SolverSource.sample))  # the first is not timed
        done = script(*line)
    assert done.code == 143 and not (tmp_path / "results.csv").exists()
    where = tmp_path / "cells"
    assert done.err == f"stopped by SIGTERM: what was measured is stored in {where}; the same command goes on\n"
    stored = {path: path.read_bytes() for path in where.glob("*.json")}
    assert len(stored) == 2
    assert script(*line).code == 0
    assert {path: path.read_bytes() for path in where.glob("*.json") if path in stored} == stored
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 7, "heads, floor, ceiling and four cells"


def stopped_sweep(task: evaluate.EvaluateTask, ranks: tuple[int, ...]) -> None:
    """One of several processes, some of which receive a signal in their second part."""
    if int(os.environ["RANK"]) in ranks:
        SolverSource.sample = stop_at(3, SolverSource.sample)  # the first is not timed
    evaluate.run(task)


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_several_processes_of_a_sweep_are_stopped_together(
    ranks: tuple[int, ...], pipeline: Pipeline, tmp_path: Path
) -> None:
    task = sweep_task(pipeline, tmp_path / "report", solvers="ddim,heun")
    with programs(stopped_sweep, tmp_path, task, ranks, ranks=(0, 1), processes=2) as both:
        assert [program.finish() for program in both] == [143, 143], [program.err for program in both]
    together = both[0].err + both[1].err
    assert together.count("stopped by SIGTERM: what was measured is stored in") == 1
    assert together.count("error: a partner process ended\n  why: rank 1 ended with exit code 143 (SIGTERM)") == (
        ranks == (1,)
    )
    assert "Traceback" not in together


# ---- trainings, at their beginning ----


def test_a_training_that_is_stopped_before_its_first_step_says_how_to_go_on(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ["train_features", "--out", tmp_path / "run", "--steps", 3, "--width", 8, "--batch-size", 32]
    with monkeypatch.context() as patch:
        patch.setattr(train_features, "fit", stop)
        done = script(*line)
    assert done.code == 143
    assert (
        done.err == f"stopped by SIGTERM: {tmp_path / 'run'} has begun; the same command with --resume auto goes on\n"
    )
    assert script(*line, "--resume", "auto").code == 0


def test_a_signal_during_the_first_save_leaves_that_checkpoint(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setattr(checkpoints, "write_manifest", stop_at(1, checkpoints.write_manifest))
    line = ["train_features", "--out", run, "--steps", 9, "--width", 8, "--batch-size", 32, "--save-every", 2]
    done = script(*line)
    assert done.code == 143 and "stopped by SIGTERM at step 3" in done.err
    assert steps_of(run) == [3, 2] and checkpoints.verify(newest(run)).step == 3
    assert script(*line, "--resume", "auto").code == 0


def train(task: train_features.FeaturesTask) -> None:
    train_features.train(task)


def ended_as_one(both: list[Program], code: int, error: str) -> None:
    """All of them with this exit code, and with one error of three lines between them."""
    assert [program.finish() for program in both] == [code] * len(both), [program.err for program in both]
    together = both[0].err + both[1].err
    assert together.count("error: ") == together.count("  why: ") == together.count("  fix: ") == 1, together
    assert error in together and "Traceback" not in together


def test_a_run_that_the_main_process_cannot_begin_is_one_error_of_all(tmp_path: Path) -> None:
    """They wait for its directory."""
    task = train_features.FeaturesTask(out=tmp_path / "run", width=8, train=TrainConfig(steps=2, batch_size=32, ema=0))
    task.out.mkdir()
    (task.out / "notes.txt").touch()
    with programs(train, tmp_path, task, ranks=(0, 1), processes=2) as both:
        ended_as_one(both, 2, f"error: {task.out} exists and is no run directory")


def cannot_save(task: train_features.FeaturesTask) -> None:
    """As `train`, with a full disk."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    checkpoints.BACKOFF, checkpoints.write_manifest = (), full
    train_features.train(task)


def test_an_error_of_the_main_process_in_a_training_is_one_error_of_all(pipeline: Pipeline, tmp_path: Path) -> None:
    """At a checkpoint, and as a run is tidied before it goes on."""
    task = train_features.FeaturesTask(out=tmp_path / "a", width=8, train=TrainConfig(steps=2, batch_size=32, ema=0))
    with programs(cannot_save, tmp_path / "1", task, ranks=(0, 1), processes=2) as both:
        ended_as_one(both, 5, "error: checkpoint")
    run = Path(shutil.copytree(pipeline.features, tmp_path / "b"))
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").mkdir()
    again = train_features.FeaturesTask(run, width=8, dim=8, train=replace(TINY, steps=26), resume="auto")
    with programs(train, tmp_path / "2", again, ranks=(0, 1), processes=2) as both:
        ended_as_one(both, 3, f"error: {run / 'metrics.jsonl'} cannot be read")


def test_a_sweep_that_cannot_begin_is_one_error_of_all(pipeline: Pipeline, tmp_path: Path) -> None:
    task = sweep_task(pipeline, tmp_path / "report")
    with (
        CellStore(tmp_path / "report/cells").claimed(),
        programs(stopped_sweep, tmp_path / "1", task, (), ranks=(0, 1), processes=2) as both,
    ):
        ended_as_one(both, 2, "cells is being written by another process")


# ---- scripts that do not divide their work ----


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ALONE)
def test_a_script_that_does_not_divide_its_work_runs_in_one_process(
    name: str, rank: int, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(rank))
    done = script(name, *(["check"] if name == "data" else []))
    assert done.code == 2 and done.out == ""
    assert (f"{name}.py runs in one process\n  why: WORLD_SIZE is 2" in done.err) == (rank == 0)
    assert rank == 0 or done.err == ""


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE=two"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"}, "MASTER_PORT"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "MIDWAY_TIMEOUT": "soon"},
            "MIDWAY_TIMEOUT=soon",
        ),
    ],
)
def test_an_environment_that_no_launcher_makes_raises_an_error(
    variables: dict[str, str], words: str, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = script("train_features")
    assert done.code == 2 and words in done.err
    assert [line[:7] for line in done.err.splitlines()] == ["error: ", "  why: ", "  fix: "]
