"""Latent and pixel models beside baselines: bits of a pixel model by its ODE, none of a latent model, samples of both."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import TINY, TINY_DIT, Pipeline
from resuming import everything
from sweeps import sweep_task

from midway.gen.commands import evaluate, evaluate_likelihood
from midway.gen.commands.evaluate_likelihood import LikelihoodTask
from midway.gen.core.errors import DataError, UsageError
from midway.gen.core.runs import Run
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.class_draw import ClassDraw
from midway.gen.diffusion.likelihood import LikelihoodConfig, bits_per_dim
from midway.gen.diffusion.load import load_model
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import decode, sample_latents
from midway.gen.features.classifier import load_features
from midway.gen.features.reference import balanced_subject
from midway.gen.flags.tasks import LatentTask, TokenizerConfig, TokenizerTask
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.trainings import train_latent, train_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = LikelihoodConfig(steps=2, trace="hutchinson", probes=1)


@pytest.fixture(scope="module")
def pixels(pipeline: Pipeline) -> Path:
    """A dequantising pixel model of digits."""
    identity = TokenizerConfig(quantizer="identity", downsample=1)
    train_tokenizer.train(TokenizerTask(pipeline.root / "identity", model=identity, train=TINY))
    config = LatentModelConfig(dequantise=True, dit=replace(TINY_DIT, patch=4))
    path = pipeline.root / "pixel-model"
    train_latent.train(LatentTask(path, pipeline.root / "identity", model=config, train=TINY))
    return path


def task(pipeline: Pipeline, out: Path, *models: Path, **changes: object) -> LikelihoodTask:
    base = LikelihoodTask(
        models=models, features=str(pipeline.features), out=out, n=24, iwae=0, nfe=4, grid="uniform", ode=FAST
    )
    return replace(base, **changes)  # pyright: ignore[reportArgumentType]


def test_every_kind_of_model_is_a_row(pipeline: Pipeline, pixels: Path, tmp_path: Path) -> None:
    rows = {
        r.name: r for r in evaluate_likelihood.run(task(pipeline, tmp_path, pipeline.model, pixels, pipeline.baseline))
    }
    latent, pixel = rows["model"], rows["pixel-model"]
    assert (latent.kind, latent.bits, latent.error, latent.sample_nfe) == ("latent model", None, None, 4)
    assert (pixel.kind, pixel.levels, pixel.dims) == ("pixel model", 17, 64)
    assert pixel.bits is not None and pixel.bits < 20
    assert pixel.bound == "1 draw of u, rk4 with 8 NFE, hutchinson trace of 1 probe(s)"
    text = (tmp_path / "report.md").read_text()
    assert "4 (dpmpp2m, uniform)" in text
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert lines[-1].startswith("| model |"), "models without bits come last"


def test_figures_are_those_of_the_model_itself(pipeline: Pipeline, pixels: Path, tmp_path: Path) -> None:
    (row, *_) = evaluate_likelihood.run(task(pipeline, tmp_path, pixels, batch_size=10))
    trained = load_model(pixels, torch.device("cpu"))
    splits = load_splits(trained.data)
    subject = balanced_subject(splits.held_out, 24)
    bits, _ = bits_per_dim(
        trained.model, trained.tokenizer, subject.images[:], subject.labels, 17, Context(0, 0, subject.places), FAST
    )
    assert row.bits == pytest.approx(bits.mean().item(), rel=1e-5)
    (plan,) = make_samplers(trained, "dpmpp2m", 4, SamplerConfig(grids=("uniform",))).values()
    labels = ClassDraw(tuple(splits.train.labels.bincount().tolist())).labels(torch.arange(24))
    images = decode(trained, sample_latents(trained, plan, torch.arange(24), labels=labels).latents)
    network = load_features(Run.open(pipeline.features, "features").checkpoint / "features.safetensors")
    ours, reference = (FeatureStatistics.of(network.features(part)) for part in (images, splits.train.images[:]))
    assert row.distance == pytest.approx(frechet_distance(ours, reference), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"nfe": 5, "solver": "heun"}, "heun"), ({"solver": "eulr"}, "euler"), ({"grid": "karas"}, "karras")],
    ids=str,
)
def test_a_solver_that_cannot_be_raises_before_work(
    changes: dict[str, object], words: str, pipeline: Pipeline, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=words):
        evaluate_likelihood.run(task(pipeline, tmp_path / "out", pipeline.model, **changes))
    assert not (tmp_path / "out").exists()


def test_a_folder_has_one_report_and_one_writer(pipeline: Pipeline, tmp_path: Path, monkeypatch: Any) -> None:
    """Neither a second command nor a sweep that began meanwhile mixes its files with another's."""
    both = task(pipeline, tmp_path / "out", pipeline.baseline, draws=1)
    sweep = sweep_task(pipeline, tmp_path / "sweep")
    measure = evaluate_likelihood.model_row

    def meanwhile(*arguments: Any) -> Any:
        with pytest.raises(UsageError, match="out is being written by another process"):
            evaluate_likelihood.run(both)
        return measure(*arguments)

    monkeypatch.setattr(evaluate_likelihood, "model_row", meanwhile)
    evaluate_likelihood.run(both)
    before = everything(tmp_path / "out")
    (tmp_path / "out/cells").mkdir()
    with pytest.raises(UsageError, match=r"results\.csv is not of an earlier report"):
        evaluate.run(replace(sweep, out=tmp_path / "out"))
    with pytest.raises(UsageError, match="out is of a sweep"):
        evaluate_likelihood.run(both)
    (tmp_path / "out/cells").rmdir()
    assert everything(tmp_path / "out") == before
    monkeypatch.setattr(evaluate_likelihood, "model_row", lambda *a: [(tmp_path / "new/cells").mkdir(), measure(*a)][1])
    with pytest.raises(UsageError, match="new is of a sweep"):
        evaluate_likelihood.run(replace(both, out=tmp_path / "new"))


def test_a_run_of_another_kind_raises(pipeline: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="baseline"):
        evaluate_likelihood.run(task(pipeline, tmp_path, pipeline.tokenizer))


@pytest.mark.parametrize(
    ("trace", "dims", "used"), [("auto", 32, "exact"), ("auto", 33, "hutchinson"), ("exact", 99, "exact")]
)
def test_the_trace_is_exact_where_that_is_cheap(trace: str, dims: int, used: str) -> None:
    assert LikelihoodConfig(trace=trace).trace_for(dims) == used  # pyright: ignore[reportArgumentType]


# ---- training on dequantised pixels ----


def test_levels_are_spread_uniformly_over_their_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LatentModel(LatentModelConfig(dequantise=True, dit=replace(TINY_DIT, patch=1)), (1, 2, 2), 0)
    std = torch.tensor([0.5])
    model.set_bins(17, std)
    seen: list[torch.Tensor] = []

    def forward(x: torch.Tensor, t: torch.Tensor, *_: object) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append((x - t.view(-1, 1, 1, 1) * noise) / (1 - t.view(-1, 1, 1, 1)))  # the linear schedule's x0
        return torch.zeros_like(x), x

    context = Context(0, 3, torch.arange(2000))
    noise = context.normal("noise", (1, 2, 2))
    monkeypatch.setattr(model, "forward_network", forward)
    model.loss(LatentBatch(torch.ones(2000, 1, 2, 2), torch.zeros(2000, dtype=torch.int64)), context)
    offset = (seen[0] - 1) * std
    half = 1 / 16
    kept = offset[offset.abs() < 2 * half]  # where t is near 1 the subtraction loses digits
    assert len(kept) > 7000
    assert kept.abs().max() < half * 1.01
    assert kept.mean().abs() < 0.002 and kept.std() == pytest.approx(half / 3**0.5, rel=0.03)


def test_only_pixels_can_be_dequantised(pipeline: Pipeline, tmp_path: Path) -> None:
    config = LatentModelConfig(dequantise=True, dit=TINY_DIT)
    with pytest.raises(UsageError, match="no pixels"):
        train_latent.train(LatentTask(tmp_path / "run", pipeline.tokenizer, model=config, train=TINY))
    assert not (tmp_path / "run").exists()


def test_a_pixel_models_cells_are_kept_with_its_weights(pixels: Path) -> None:
    trained = load_model(pixels, torch.device("cpu"))
    expected = 1 / (16 * trained.tokenizer.latent_std)
    torch.testing.assert_close(trained.model.half_cell.flatten(), expected)
