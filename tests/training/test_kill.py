"""Training in processes that are killed, interrupted or run out of disk: no checkpoint is lost, and the run can be resumed."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from resuming import (
    DATA,
    TRAIN,
    VQ,
    Child,
    Conditions,
    assert_same_run,
    everything,
    newest,
    records,
    start,
    steps_of,
    train,
    unchanged,
)

from midway.gen.core import checkpoints
from midway.gen.core.errors import UsageError
from midway.gen.flags.tasks import TokenizerTask
from midway.gen.training.config import TrainConfig

pytestmark = pytest.mark.usefixtures("one_thread")  # the other processes have one thread as well

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
KILLS = 8
LONG = replace(TRAIN, steps=40, log_every=7, save_seconds=0)
SAVING = replace(LONG, save_every=1)
SLOW = Conditions(pause=0.02)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that was never stopped."""
    return train(task(tmp_path_factory.mktemp("whole") / "run"))


def task(out: Path, train: TrainConfig = LONG) -> TokenizerTask:
    """A tokenizer with a codebook whose codes restart."""
    return TokenizerTask(out, DATA, VQ, flip=True, train=train, resume="auto")


def half_saved(run: Path) -> list[Path]:
    """Checkpoints that are being written, or whose writer was killed."""
    return list((run / "checkpoints").glob(".step-*.tmp"))


def lines_of(child: Child) -> list[str]:
    """The error that a child ended with: what, why, fix."""
    output = child.output.read_text()
    assert "Traceback" not in output, output[-3000:]
    lines = output.strip().splitlines()[-3:]
    assert [line[:7] for line in lines] == ["error: ", "  why: ", "  fix: "], output[-3000:]
    return lines


# ---- kill -9 ----


def live(child: Child, rng: random.Random, phase: str) -> None:
    """Let a training get to this phase, and a random time further."""
    before = steps_of(child.run)
    if phase == "any":
        time.sleep(rng.uniform(0, 0.6))
    elif phase == "training":
        child.wait_for(lambda: steps_of(child.run) != before)
        time.sleep(rng.uniform(0, 0.06))
    else:
        child.wait_for(lambda: half_saved(child.run))
        time.sleep(rng.choice([0, rng.uniform(0, 0.03)]))


def test_a_run_that_is_killed_many_times_is_one_that_was_not(whole: Path, tmp_path: Path) -> None:
    """SIGKILL while starting, training and saving. What is there afterwards is valid, and never older than before."""
    rng, run, newest_step, halves = random.Random(1), tmp_path / "run", 0, 0
    for i in range(KILLS):
        child = start(task(run, SAVING))
        live(child, rng, ("any", "saving", "training", "saving", "training")[i % 5])
        assert child.finish(signal.SIGKILL) == -signal.SIGKILL, "the run must be longer than its attempts"
        halves += bool(half_saved(run))
        skipped: list[str] = []
        found = next(checkpoints.valid(run / "checkpoints", skipped.append), None)
        assert not skipped
        assert (0 if found is None else found.step) >= newest_step
        newest_step = 0 if found is None else found.step
    assert halves >= 2, "some must have been killed while they saved"
    assert KILLS // 4 < newest_step < LONG.steps
    assert start(task(run, SAVING)).finish() == 0
    assert_same_run(run, whole)
    assert not half_saved(run)
    assert steps_of(run) == [40, 39]


# ---- SIGTERM, SIGINT ----


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_is_resumed_after_a_signal(number: int, code: int, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    child = start(task(run), SLOW)
    child.wait_for(lambda: "training on cpu" in child.output.read_text())
    time.sleep(0.2)
    assert child.finish(number) == code
    (step,) = steps_of(run)
    what, why, fix = lines_of(child)
    assert what == f"error: stopped by {signal.Signals(number).name} at step {step}"
    assert str(newest(run)) in why and "--resume auto" in fix
    assert 0 < step < LONG.steps
    assert start(task(run)).finish() == 0
    assert_same_run(run, whole)


def test_an_echo_of_the_signal_is_ignored_and_a_later_one_ends_at_once(tmp_path: Path) -> None:
    """Launchers repeat what the terminal sent; who asks again after a while wants it now."""
    echo = start(task(tmp_path / "echo"), Conditions(pause=0.5))
    again = start(task(tmp_path / "again"), Conditions(pause=30.0, repeat_after=0.1))
    for child in (echo, again):
        child.wait_for(lambda child=child: "training on cpu" in child.output.read_text())
    time.sleep(0.2)
    for child in (echo, again):
        assert child.process.pid is not None
        os.kill(child.process.pid, signal.SIGTERM)
        child.wait_for(lambda child=child: "once more to end at once" in child.output.read_text())
    time.sleep(0.15)
    assert echo.finish(signal.SIGTERM) == 143
    assert len(steps_of(tmp_path / "echo")) == 1
    assert again.finish(signal.SIGTERM, timeout=10) == -signal.SIGTERM
    assert steps_of(tmp_path / "again") == []


def test_a_second_trainer_raises_and_the_first_continues(whole: Path, tmp_path: Path) -> None:
    run, gate = tmp_path / "run", tmp_path / "gate"
    first = start(task(run), Conditions(gate=gate))
    try:
        first.wait_for(lambda: "training on cpu" in first.output.read_text())
        assert (second := start(task(run))).finish() == 2
        assert "being trained by another process" in second.output.read_text()
        for call in (task(run), replace(task(run), resume="no", overwrite=True), replace(task(run), resume="no")):
            with unchanged(run), pytest.raises(UsageError, match="being trained by another process"):
                train(call)
    finally:
        gate.touch()
    assert first.finish() == 0
    assert_same_run(run, whole)


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def test_a_launcher_of_two_processes_that_is_terminated_leaves_a_checkpoint(tmp_path: Path) -> None:
    """torchrun passes SIGTERM on to both, which agree on the step after which they save."""
    run, log = tmp_path / "run", tmp_path / "terminal"
    flags = ["--model.quantizer", "kl", "--model.width", "8", "--model.blocks", "1", "--held-out", "0.9"]
    flags += ["--steps", "1000000", "--batch-size", "32", "--resume", "auto", "--out", str(run)]
    command = [*LAUNCH, str(SCRIPTS / "train_tokenizer.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with log.open("w") as terminal:
        launcher = subprocess.Popen(command, env=environment, stdout=terminal, stderr=terminal)
        try:
            end = time.monotonic() + 120
            while not (run / "metrics.jsonl").exists():
                assert launcher.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
                time.sleep(0.02)
            launcher.terminate()
            assert launcher.wait(timeout=60) != 0
        finally:
            launcher.kill()
    (step,) = steps_of(run)
    assert checkpoints.verify(newest(run)).step == step >= 50
    assert f"stopped by SIGTERM at step {step}" in log.read_text()
    assert not half_saved(run)


# ---- disk ----


def test_a_full_disk_costs_the_new_checkpoint_only(whole: Path, tmp_path: Path) -> None:
    """Files may not grow beyond 20 kB: exit code 5, the older checkpoint untouched, and the run goes on when they may."""
    run = tmp_path / "run"
    assert start(task(run, replace(SAVING, max_steps=5))).finish() == 0
    assert steps_of(run) == [5, 4]
    with_checkpoints = everything(run / "checkpoints")
    assert max(len(content or b"") for content in with_checkpoints.values()) > 20_000
    child = start(task(run, SAVING), Conditions(file_limit=20_000))
    assert child.finish() == 5
    what, _, fix = lines_of(child)
    assert "step-6 was not written" in what and "free space" in fix and "--resume auto" in fix
    assert everything(run / "checkpoints") == with_checkpoints
    assert checkpoints.verify(newest(run)).step == 5
    assert start(task(run)).finish() == 0
    assert_same_run(run, whole)


def test_a_finished_run_ends_with_0_and_is_left_as_it_is(tmp_path: Path) -> None:
    run = tmp_path / "run"
    short = task(run, replace(TRAIN, steps=3))
    assert start(short).finish() == 0
    before, logged = everything(run / "checkpoints"), records(run)
    assert start(short).finish() == 0
    assert everything(run / "checkpoints") == before and records(run) == logged
    with unchanged(run):
        assert start(replace(short, train=replace(short.train, seed=1))).finish() == 2
