"""Validation in fit(): the best weights are kept, the run stops for want of better ones, and resuming changes none of it."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch
from regression import SIZE, Fault, Regression, in_steps, samples
from resuming import contents, records
from safetensors.torch import load_file
from torch import Tensor

from midway.gen.core import checkpoints
from midway.gen.core.config import to_dict
from midway.gen.core.errors import UsageError
from midway.gen.core.runs import Run
from midway.gen.training.accelerator import check_unused, make_accelerator
from midway.gen.training.batches import Context
from midway.gen.training.config import TrainConfig
from midway.gen.training.fit import fit
from midway.gen.training.interface import FitResult, Hooks, Items

pytestmark = pytest.mark.usefixtures("on_the_cpu")

CONFIG = TrainConfig(steps=13, batch_size=4, lr=0.05, warmup=2, ema=0.5, log_every=4, validate_every=2, save_every=5)
VALUES = {2: 3.0, 4: 2.0, 6: math.nan, 8: -math.inf, 10: 2.0, 12: 1.5, 13: 1.75}
"""Of these steps 2, 4 and 12 are best, when they come; 10 is only as good as 4."""


def interrupted_in(fatal: int) -> Fault:
    """A fault that ends step `fatal` with KeyboardInterrupt."""

    def fault(context: Context) -> Tensor:
        if context.step == fatal:
            raise KeyboardInterrupt
        return torch.zeros(len(context.sample_ids), dtype=torch.bool)

    return fault


@dataclass
class Job:
    """One way to train; `seen` are the steps that were validated, with the weights then in the model."""

    folder: Path
    config: TrainConfig = CONFIG
    values: dict[int, float] = field(default_factory=lambda: VALUES)
    model: Regression = field(default_factory=Regression)
    seen: dict[int, Tensor] = field(default_factory=dict)

    def validate(self, step: int) -> float:
        assert not self.model.training and not torch.is_grad_enabled()
        self.seen[step] = self.model.weight.detach().clone()
        torch.manual_seed(7)  # what is drawn here must not matter
        return self.values[step]

    def run(self, resume: bool = False) -> FitResult:
        self.folder.mkdir(parents=True, exist_ok=True)
        run = Run(self.folder, "test", {"train": to_dict(self.config)}, quiet=True)
        items, hooks = Items(samples, SIZE, "x"), Hooks(export=export, validate=self.validate)
        return fit(self.model, items, self.config, run, make_accelerator(self.config), hooks, resume)


def export(folder: Path, averaged: dict[str, Tensor]) -> None:
    (folder / "export.json").write_text(json.dumps(averaged["weight"].tolist()))


def best_steps(folder: Path) -> list[int]:
    return [checkpoints.verify(path).step for path in checkpoints.directories(folder / "best")]


def assert_same(folder: Path, expected: Path) -> None:
    """Newest checkpoint, best/ and records."""
    newest = [checkpoints.verify(checkpoints.directories(f / "checkpoints")[0]).path for f in (folder, expected)]
    assert newest[0].name == newest[1].name
    assert contents(newest[0]) == contents(newest[1])
    assert contents(folder / "best") == contents(expected / "best")
    assert records(folder) == records(expected)


# ---- what is kept ----


@pytest.mark.parametrize("ema", [0.5, 0.0])
def test_the_weights_of_the_best_validation_are_stored(ema: float, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", replace(CONFIG, ema=ema))
    result = job.run()
    assert result.best == (12, 1.5) and result.finished and result.steps == 13
    assert list(job.seen) == list(VALUES)
    assert best_steps(job.folder) == [12]
    folder = job.folder / "best" / "step-12"
    weights = load_file(folder / ("ema.safetensors" if ema else "model.safetensors"))
    assert torch.equal(weights["weight"], job.seen[12])
    assert json.loads((folder / "export.json").read_text()) == job.seen[12].tolist()
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["export.json", "manifest.json", "ema.safetensors" if ema else "model.safetensors"]
    )
    logged = {r["step"]: r["validation"] for r in records(job.folder) if "validation" in r}
    assert logged == {step: value if math.isfinite(value) else None for step, value in VALUES.items()}


def test_validation_changes_nothing_in_the_training(tmp_path: Path) -> None:
    with_it, without = Job(tmp_path / "a"), Job(tmp_path / "b", replace(CONFIG, validate_every=0))
    with_it.run()
    result = without.run()
    assert result.best is None and not without.seen and not (without.folder / "best").exists()
    for file in ("model", "ema", "optimizer"):
        tensors, expected = (
            load_file(f / f"checkpoints/step-13/{file}.safetensors") for f in (with_it.folder, without.folder)
        )
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert [r for r in records(with_it.folder) if "validation" not in r] == records(without.folder)


def test_what_is_never_finite_is_never_best(tmp_path: Path) -> None:
    values = dict(zip(VALUES, [math.nan, math.inf, -math.inf, math.nan, math.inf, -math.inf, math.nan]))
    job = Job(tmp_path / "run", replace(CONFIG, patience_validations=3), values)
    result = job.run()
    assert result.best is None and result.steps == 6 and not (job.folder / "best").exists()
    assert "3 validations without a better one; none was finite" in (job.folder / "log.txt").read_text()


# ---- stopping early ----


@pytest.mark.parametrize(("patience", "end"), [(1, 6), (2, 8), (3, 10), (4, 13)])
def test_a_run_stops_after_so_many_validations_without_a_better_one(patience: int, end: int, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", replace(CONFIG, patience_validations=patience))
    result = job.run()
    assert (result.steps, result.finished) == (end, True)
    assert result.best == ((12, 1.5) if end == 13 else (4, 2.0))
    assert checkpoints.directories(job.folder / "checkpoints")[0].name == f"step-{end}"
    log = (job.folder / "log.txt").read_text()
    assert (f"stopped early at step {end}: {patience} validations without" in log) == (end < 13)
    assert "--resume auto continues" not in log
    before, logged = contents(job.folder / "checkpoints"), records(job.folder)
    again = Job(job.folder, job.config)
    after = again.run(resume=True)
    assert (after.steps, after.finished, after.best) == (result.steps, True, result.best)
    assert not again.seen, "a run that stopped early has ended"
    assert contents(job.folder / "checkpoints") == before and records(job.folder) == logged


def test_a_run_can_be_resumed_with_more_patience(tmp_path: Path) -> None:
    whole, run = Job(tmp_path / "whole"), Job(tmp_path / "run", replace(CONFIG, patience_validations=2))
    whole.run()
    run.run()
    result = Job(run.folder).run(resume=True)
    assert result.best == (12, 1.5) and result.steps == 13
    assert contents(run.folder / "best") == contents(whole.folder / "best")


# ---- going on ----


@pytest.mark.parametrize("patience", [3, 4])
def test_a_run_may_stop_after_every_single_step(patience: int, tmp_path: Path) -> None:
    config = replace(CONFIG, patience_validations=patience)
    whole, parts = Job(tmp_path / "whole", config), tmp_path / "parts"
    result = whole.run()
    for step in range(1, result.steps + 1):
        part = Job(parts, replace(config, max_steps=1)).run(resume=True)
        assert part.steps == step
        assert best_steps(parts) == ([] if step < 2 else [2] if step < 4 else [4] if step < 12 else [12])
    assert_same(parts, whole.folder)
    assert Job(parts, config).run(resume=True).best == result.best


@pytest.mark.parametrize("fatal", [1, 4, 6, 9, 12])
def test_a_killed_run_resumes_from_its_checkpoint_and_the_best_folder_of_it(fatal: int, tmp_path: Path) -> None:
    """Checkpoints at 5 and 10, so that better folders than theirs are lost, and those that they speak of are not."""
    whole, parts = Job(tmp_path / "whole"), Job(tmp_path / "parts")
    whole.run()
    parts.model.fault = interrupted_in(fatal)
    with pytest.raises(KeyboardInterrupt):
        parts.run()
    saved = 5 * (fatal // 5)
    killed = Job(parts.folder, replace(CONFIG, max_steps=1))
    assert killed.run(resume=True).steps == saved + 1
    assert best_steps(parts.folder) == ([4] if saved else [])
    Job(parts.folder).run(resume=True)
    assert_same(parts.folder, whole.folder)


def test_until_the_next_checkpoint_the_folder_of_the_last_one_stays(tmp_path: Path) -> None:
    job = Job(tmp_path / "run", values={**VALUES, 6: 1.9, 8: 1.8})
    job.model.fault = interrupted_in(9)
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert best_steps(job.folder) == [8, 4]
    assert (job.folder / "best" / "latest").read_text() == "step-8\n"


def test_a_lost_folder_is_no_obstacle_and_comes_back(tmp_path: Path) -> None:
    whole, parts = Job(tmp_path / "whole"), Job(tmp_path / "parts")
    whole.run()
    Job(parts.folder, replace(CONFIG, max_steps=11)).run()
    for path in (parts.folder / "best").rglob("*.safetensors"):
        path.unlink()
    Job(parts.folder).run(resume=True)
    assert_same(parts.folder, whole.folder)


def test_going_back_from_bad_steps_takes_the_best_back_too(tmp_path: Path) -> None:
    """At step 10 it goes back to step 5; the value of step 6 is then another, and was best."""
    values = {**VALUES, 6: 1.0}
    job = Job(tmp_path / "run", replace(CONFIG, patience=2), values)
    job.model.fault = in_steps(8, 9)
    seen: list[list[int]] = []

    def validate(step: int) -> float:
        if step == 6:
            seen.append(best_steps(job.folder))
            job.model.fault = None if len(seen) > 1 else job.model.fault
            return 1.0 if len(seen) == 1 else 5.0
        return VALUES[step]

    job.validate = validate  # pyright: ignore[reportAttributeAccessIssue]
    result = job.run()
    assert len(seen) == 2 and seen == [[4], [4]]
    assert result.best == (12, 1.5) and best_steps(job.folder) == [12]
    assert [r["step"] for r in records(job.folder) if "validation" in r] == [*VALUES]


# ---- errors ----


REFUSED: dict[str, tuple[Callable[[], None], type[Exception], str]] = {
    "nothing to call": (lambda: check_unused(CONFIG), UsageError, "no validation"),
    "shards": (
        lambda: check_unused(CONFIG, validates=True, sharded=True),
        UsageError,
        "FSDP does not support validation",
    ),
    "patience alone": (
        lambda: replace(CONFIG, validate_every=0, patience_validations=2) and None,
        ValueError,
        "validate_every",
    ),
    "a negative interval": (lambda: replace(CONFIG, validate_every=-1) and None, ValueError, "validate_every"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_validation_raises(name: str) -> None:
    call, error, words = REFUSED[name]
    with pytest.raises(error, match=words):
        call()


def test_a_best_folder_that_cannot_be_written_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "BACKOFF", ())
    job = Job(tmp_path / "run")
    job.folder.mkdir()
    (job.folder / "best").write_text("in the way")
    with pytest.raises(UsageError, match="step-2 was not written"):
        job.run()
