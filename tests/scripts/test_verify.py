"""verify_resume.py returns 0 for every kind of run, 1 for what is not exact; posthoc_ema.py makes a run that commands take."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import Pipeline, Script
from torch import Tensor

from midway.gen.core import checkpoints
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import LatentModel
from midway.gen.training.batches import Context
from midway.gen.training.power_ema import Snapshot, find_snapshots, reconstruct


@pytest.mark.parametrize("kind", ["tokenizer", "features", "model", "solver", "baseline"])
def test_every_kind_of_run_resumes_exactly_and_is_left_alone(kind: str, pipeline: Pipeline, succeed: Script) -> None:
    run = pipeline.model / "solvers/amed-predictor-uniform-nfe4" if kind == "solver" else getattr(pipeline, kind)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    done = succeed("verify_resume", run, "--steps", 5)
    assert "5 steps from step" in done.out
    assert "equal, straight and stopped-and-resumed" in done.out
    assert done.out.endswith("resume is exact\n")
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_a_later_checkpoint_and_logged_losses_are_compared_too(
    pipeline: Pipeline, script: Script, succeed: Script, tmp_path: Path
) -> None:
    """Checkpoints at steps 4 and 8, losses of steps 6 and 8; one that was not logged so is named."""
    run = tmp_path / "m"
    flags = "--steps 8 --save-every 4 --log-every 2"
    succeed(f"train_latent --config {pipeline.model}/config.yaml --out {run} {flags}")
    done = succeed("verify_resume", run)
    for words in ("4 steps from step 4", "the run's own step-8", "logged means of 2 interval(s)"):
        assert words in done.out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines[2]["loss"] += 1e-9
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = script("verify_resume", run)
    assert done.code == 1 and "losses logged at step 6 differ" in done.err


def test_checkpoints_of_neighbouring_steps_are_verified_with_a_stop_between(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    run = tmp_path / "m"
    succeed(f"train_latent --config {pipeline.model}/config.yaml --out {run} --steps 3 --save-every 1 --keep 3")
    done = succeed("verify_resume", run)
    assert "2 steps from step 1" in done.out and "the run's own step-3" in done.out


def test_a_run_in_training_may_remove_the_checkpoints_that_are_verified(
    pipeline: Pipeline, succeed: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before, while and after they are copied."""
    run, copy, verify = tmp_path / "m", shutil.copytree, checkpoints.verify
    succeed(f"train_latent --config {pipeline.model}/config.yaml --out {run} --steps 6 --save-every 2 --keep 3")
    newest = checkpoints.directories(run / "checkpoints")
    assert len(newest) == 3
    left = {"verified": newest[2], "copied": newest[1]}

    def prune(when: str, path: Path) -> None:
        if left.get(when) == path:
            shutil.rmtree(left.pop(when))

    def verifying(path: Path) -> checkpoints.Checkpoint:
        prune("verified", path)
        return verify(path)

    def copying(source: Any, *arguments: Any, **options: Any) -> Any:
        prune("copied", source)
        made = copy(source, *arguments, **options)
        if Path(source).parent == run / "checkpoints":
            shutil.rmtree(run / "checkpoints")
        return made

    monkeypatch.setattr(checkpoints, "verify", verifying)
    monkeypatch.setattr(shutil, "copytree", copying)
    done = succeed("verify_resume", run, "--steps", 2)
    assert "2 steps from step 6" in done.out and "skipped" not in done.out
    assert not left and not checkpoints.directories(run / "checkpoints")


def test_randomness_that_has_a_state_is_found(
    pipeline: Pipeline, script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise from a generator that is not reset: the stopped run meets other noise than the straight one."""
    generator, normal = torch.Generator().manual_seed(0), Context.normal

    def careless(self: Context, purpose: str, shape: tuple[int, ...] = ()) -> Tensor:
        right = normal(self, purpose, shape)
        return torch.randn(right.shape, generator=generator) if purpose == "noise" else right

    monkeypatch.setattr(Context, "normal", careless)
    done = script("verify_resume", pipeline.model, "--steps", 4)
    assert done.code == 1
    assert "straight and stopped-and-resumed differ" in done.err
    assert "randomness" in done.err
    assert not (pipeline.model / ".verify").exists()


# ---- averages after training ----


def test_a_posthoc_run_holds_the_reconstructed_average_and_samples(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    out = tmp_path / "wide"
    done = succeed("posthoc_ema", pipeline.model, "--std", 0.08, "--out", out)
    trained = load_model(out, torch.device("cpu"))
    expected = reconstruct(find_snapshots(pipeline.model / "posthoc"), 25, 0.08)
    assert all(torch.equal(value, expected[name]) for name, value in trained.model.state_dict().items())
    assert trained.weights == "averaged post hoc, width 0.08, step 25"
    done = succeed(f"sample --model {out} --solver ddim --nfe 2 --n 4 --seed 0 --out {out}/a.png")
    assert "width 0.08" in done.out
    own = pipeline.load().model.state_dict()
    assert any(not torch.equal(value, own[name]) for name, value in expected.items())


def test_a_tracked_width_comes_back_as_it_was_stored(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    succeed("posthoc_ema", pipeline.model, "--std", 0.1, "--step", 15, "--out", tmp_path / "m")
    made = load_model(tmp_path / "m", torch.device("cpu")).model.state_dict()
    (stored,) = (s for s in find_snapshots(pipeline.model / "posthoc") if (s.step, s.std) == (15, 0.1))
    for name, value in reconstruct([Snapshot(stored.path, 15, 0.1)], 15, 0.1).items():
        torch.testing.assert_close(made[name], value, rtol=1e-5, atol=1e-6)


def test_a_latent_model_without_averages_has_its_newest_weights(
    pipeline: Pipeline, succeed: Script, tmp_path: Path
) -> None:
    """`--ema 0`: no ema file, the newest weights are loaded, and the names of pictures as well."""
    succeed(f"train_latent --config {pipeline.model}/config.yaml --out {tmp_path}/m --steps 2 --ema 0")
    assert not list(tmp_path.glob("m/checkpoints/step-2/ema.safetensors"))
    assert [p.name for p in (tmp_path / "m/samples").iterdir()] == ["newest-000002-nfe20.png"]
    trained = load_model(tmp_path / "m", torch.device("cpu"))
    assert trained.weights == "newest, step 2"
    assert isinstance(trained.model, LatentModel)
