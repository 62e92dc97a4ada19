"""Previews by time or by step, which change nothing that is learned; what trackers get, and that their failures end nothing."""

import importlib.util
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import regression
import torch
from PIL import Image
from regression import Trained, assert_same_bits

from midway.gen.core.randomness import permutation
from midway.gen.core.runs import Run
from midway.gen.data.pictures import save_grid
from midway.gen.data.splits import DataConfig, load_splits
from midway.gen.metrics.psnr_ssim import PSNR_CAP, psnr
from midway.gen.tokenizer.objective import reconstruct
from midway.gen.training.config import TrainConfig
from midway.gen.training.interface import Hooks, Preview
from midway.gen.training.progress import Clock, PreviewTimer
from midway.gen.trainings.train_tokenizer import write_reconstructions
from midway.tokenizers.tokenizer import ImageTokenizer

pytestmark = pytest.mark.usefixtures("on_the_cpu")
CONFIG = TrainConfig(steps=6, batch_size=4, lr=0.05, warmup=2, ema=0.5, log_every=2)


class Stopwatch(Clock):
    """Moved by hand."""

    now = 0.0

    @property
    def here(self) -> float:
        return self.now


def times_of_previews(config: TrainConfig, seconds: int, cost: float) -> list[float]:
    """When previews are made that take `cost` seconds, of a training with a step a second."""
    clock = Stopwatch()
    timer, found = PreviewTimer(config, clock), list[float]()
    while clock.now < seconds:
        clock.now += 1
        if timer.is_due():
            assert not timer.is_due(), "once"
            found.append(clock.now)
            with timer.timed():
                clock.now += cost
    return found


def test_previews_come_every_few_minutes_and_take_little_of_the_time() -> None:
    cheap = times_of_previews(CONFIG, 9000, 0.0)
    assert cheap == [180.0 * (i + 1) for i in range(50)]
    dear = times_of_previews(CONFIG, 20_000, 30.0)
    assert dear[0] == 180 and 30 * len(dear) <= 0.021 * 20_000
    assert len(times_of_previews(CONFIG, 86_400, 0.0)) < 170
    assert times_of_previews(replace(CONFIG, preview_every=1000), 9000, 0.0) == []
    assert times_of_previews(replace(CONFIG, preview_seconds=0.0), 9000, 0.0) == []


def train(folder: Path, shown: list[int], **changes: Any) -> Trained:
    """With previews that use random numbers, whose steps are noted."""

    def preview(step: int) -> Preview:
        torch.rand(7)
        shown.append(step)
        path = folder / "samples" / f"{step}.png"
        save_grid(path, torch.full((2, 1, 8, 8), 10 * step, dtype=torch.uint8), 2, f"step {step}")
        return Preview(path, "samples", {"preview_psnr": 20.0 + step, "never": math.nan})

    hooks = Hooks(preview, validate=lambda step: 1.0 / step, measure=lambda step: {"distance_nfe_5": 0.5 * step})
    return regression.train(folder, replace(CONFIG, **changes), hooks=hooks)


def test_previews_by_time_change_no_bit_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    often, rarely, every = list[int](), list[int](), list[int]()
    train(tmp_path / "rarely", rarely)
    monkeypatch.setattr(PreviewTimer, "is_due", lambda timer: True)
    train(tmp_path / "often", often)
    train(tmp_path / "every", every, preview_every=4)
    assert (rarely, often, every) == ([6], [1, 2, 3, 4, 5, 6], [4, 6])
    assert_same_bits(tmp_path / "often", tmp_path / "rarely")


def test_the_preview_of_a_tokenizer_has_the_psnr_of_its_images(tmp_path: Path) -> None:
    """Of a tokenizer that changes nothing the greatest, and of the others the mean over the images that are shown."""
    run, splits = Run(tmp_path, "tokenizer"), load_splits(DataConfig())
    torch.manual_seed(0)
    for name, kind in (("none", {"type": "identity", "dim": 1}), ("some", {"type": "fsq", "levels": [3, 3]})):
        tokenizer = ImageTokenizer(
            in_channels=1, image_size=8, quantizer=kind, width=16, downsample=1 + (name == "some")
        ).eval()
        preview = write_reconstructions(run, tokenizer, splits, 7, name)
        shown = splits.held_out.images[permutation(0, "shown", 0, len(splits.held_out.images))[:32]]
        expected = psnr(shown, reconstruct(tokenizer, shown)).mean().item()
        assert (
            preview.figures == {"preview_psnr": expected} and preview.path.name == f"reconstructions-{name}-000007.png"
        )
        assert (expected == pytest.approx(PSNR_CAP)) == (name == "none")


FIGURES = {
    "validation": [(3, 1 / 3), (6, 1 / 6)],
    "distance_nfe_5": [(3, 1.5), (6, 3.0)],
    "preview_psnr": [(4, 24.0), (6, 26.0)],
}
"""What `train` measures with `TRACKED`."""
TRACKED = {"validate_every": 3, "measure_every": 3, "preview_every": 4}


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_gets_pictures_and_held_out_figures(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(run, [], log_with=("tensorboard",), **TRACKED)
    logs = [EventAccumulator(str(path), {"images": 0}).Reload() for path in run.rglob("events.out.tfevents.*")]
    (events,) = (log for log in logs if "loss" in log.Tags()["scalars"])
    for name, expected in FIGURES.items():
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-6)) for step, value in expected]
    assert "never" not in events.Tags()["scalars"]
    (tag,) = events.Tags()["images"]
    pictures = events.Images(tag)
    assert [picture.step for picture in pictures] == [4, 6]
    with Image.open(run / "samples" / "6.png") as picture:
        assert (pictures[1].width, pictures[1].height) == picture.size


class FakeRun:
    """What wandb.init returns; `broken` fails at everything but the first calls."""

    def __init__(self, broken: bool = False) -> None:
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.broken, self.finished = broken, False

    def log(self, values: dict[str, Any], step: int) -> None:
        if self.broken:
            raise ConnectionError("no network\nat all")
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished = True


def fake_wandb(monkeypatch: pytest.MonkeyPatch, run: FakeRun | None) -> dict[str, Any]:
    """A module `wandb` that makes this run, or none; the arguments of `init`."""
    asked: dict[str, Any] = {}

    def init(**arguments: Any) -> FakeRun:
        asked.update(arguments)
        if run is None:
            raise ValueError("api_key not configured")
        return run

    config = SimpleNamespace(update=lambda values, **_: asked.update(config=values))
    module = SimpleNamespace(init=init, config=config, Image=np.asarray, __spec__=None)
    monkeypatch.setitem(sys.modules, "wandb", module)  # pyright: ignore[reportArgumentType]
    from accelerate import tracking, utils

    for place in (tracking, utils.imports):
        monkeypatch.setattr(place, "is_wandb_available", lambda: True)
    monkeypatch.setattr(tracking, "_available_trackers", [tracking.LoggerType.WANDB])
    return asked


def test_wandb_gets_pictures_and_held_out_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = FakeRun()
    asked = fake_wandb(monkeypatch, run)
    train(tmp_path / "mine", [], log_with=("wandb",), **TRACKED)
    assert (asked["project"], asked["name"], asked["dir"]) == ("midway", "mine", str(tmp_path / "mine"))
    assert asked["config"]["train.steps"] == 6
    for name, expected in FIGURES.items():
        assert [(step, values[name]) for step, values in run.logged if name in values] == expected
    pictures = [(step, values["samples"]) for step, values in run.logged if "samples" in values]
    assert [step for step, _ in pictures] == [4, 6]
    with Image.open(tmp_path / "mine" / "samples" / "6.png") as picture:
        assert np.array_equal(pictures[1][1][0], np.asarray(picture))
    steps = [step for step, _ in run.logged]
    assert steps == sorted(steps), "wandb drops what comes late"
    assert run.finished


@pytest.mark.parametrize("run", [None, FakeRun(broken=True)], ids=["not set up", "no network"])
def test_a_tracker_that_fails_is_a_warning_once_and_training_goes_on(
    run: FakeRun | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake_wandb(monkeypatch, run)
    train(tmp_path / "failing", [], log_with=("wandb",), **TRACKED)
    printed = capsys.readouterr().out
    assert printed.count("the tracker wandb failed") == 1
    place = printed.index("warning: the tracker wandb failed, training goes on\n")
    why = "ValueError: api_key not configured" if run is None else "ConnectionError: no network at all"
    assert printed[place:].splitlines()[1:3] == [
        f"  why: {why}",
        "  fix: metrics.jsonl and samples/ have all of it; check the set-up of wandb, or drop --log-with wandb",
    ]
    train(tmp_path / "alone", [], **TRACKED)
    assert_same_bits(tmp_path / "failing", tmp_path / "alone")
