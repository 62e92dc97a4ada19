"""train_baseline.py and evaluate_likelihood.py: figures by independent sums, the best weights, the report."""

import csv
import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from midway.gen.baselines.flow_config import nice
from midway.gen.baselines.registry import load_trained_baseline, read_baseline
from midway.gen.baselines.vae import VAE, VAEConfig
from midway.gen.commands import evaluate_likelihood
from midway.gen.commands.evaluate_likelihood import LikelihoodTask
from midway.gen.core.config import read_yaml
from midway.gen.data.levels import bits_per_dim, to_levels
from midway.gen.data.splits import DataConfig, Splits, load_splits
from midway.gen.evaluation.likelihood import (
    Bounds,
    bits_of,
    histogram_score,
    iwae_of,
    levels_in_data,
    uniform_score,
)
from midway.gen.evaluation.other_sources import BaselineSource
from midway.gen.features.reference import balanced_subject
from midway.gen.flags.baseline_tasks import BASELINE_TASKS, FlowTask, VAETask
from midway.gen.recipes.baseline_recipes import BASELINE_RECIPES
from midway.gen.report.likelihood import FILES
from midway.gen.training.batches import Context
from midway.gen.training.config import TrainConfig
from midway.gen.trainings import train_baseline, train_features

pytestmark = pytest.mark.usefixtures("one_thread")
TINY = TrainConfig(steps=12, batch_size=32, lr=1e-2, warmup=2, ema=0.5, log_every=4, validate_every=3)
SMALL_VAE = VAEConfig(latent_dim=2, width=8, blocks=1, mixtures=1)


@dataclass(frozen=True)
class Runs:
    """A conditional VAE, a NICE that gets worse after its first validations, and the features of their images."""

    root: Path
    vae: Path
    flow: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("baselines")
    found = Runs(root, root / "vae", root / "flow")
    small = {"validation_images": 30, "train": TINY}
    train_baseline.train(VAETask(out=found.vae, model=SMALL_VAE, conditional=True, draws=2, **small))
    worse = replace(TINY, steps=60, lr=3.0, warmup=0, clip=1e9, patience_validations=3)
    train_baseline.train(FlowTask(out=found.flow, model=nice(8, 2), validation_images=30, train=worse))
    features = TrainConfig(steps=3, batch_size=32, ema=0, log_every=3)
    train_features.train(train_features.FeaturesTask(root / "features", width=8, dim=8, train=features))
    return found


@pytest.fixture(scope="module")
def splits() -> Splits:
    return load_splits(DataConfig())


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# ---- training ----


@pytest.mark.parametrize("kind", ["vae", "flow"])
def test_the_best_weights_are_what_is_loaded(kind: str, runs: Runs) -> None:
    run: Path = getattr(runs, kind)
    values = {r["step"]: r["validation"] for r in records(run) if "validation" in r}
    best = min(values, key=lambda step: values[step] if values[step] is not None else math.inf)
    weights = load_file(run / f"best/step-{best}/ema.safetensors")
    trained = load_trained_baseline(run)
    assert all(torch.equal(value, weights[name]) for name, value in trained.model.state_dict().items())
    assert trained.weights == f"averaged, step {best}, the best in validation"
    newest, _ = read_baseline(next((run / "checkpoints").glob("step-*")))
    differ = any(not torch.equal(value, weights[name]) for name, value in newest.state_dict().items())
    assert differ == (best != max(values))
    if kind == "flow":
        assert best < max(values) < 60, "it stopped early, after its best"
        assert "stopped early at step" in (run / "log.txt").read_text()


def test_without_validation_the_newest_checkpoint_is_loaded(runs: Runs, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs.vae, run, ignore=shutil.ignore_patterns("best"))
    trained = load_trained_baseline(run)
    assert trained.weights == "averaged, step 12" and trained.data == DataConfig()


def test_validation_is_the_bits_of_its_images(runs: Runs, splits: Splits) -> None:
    """Of the best step: by the loaded weights, image by image."""
    trained = load_trained_baseline(runs.vae)
    assert isinstance(trained.model, VAE)
    subject = balanced_subject(splits.held_out, 30)
    nats = [
        trained.model.log_likelihood(
            splits.held_out.images[:][place, None], splits.held_out.labels[place, None], Context(0, 0, place[None]), 2
        )
        for place in subject.places
    ]
    logged = min(r["validation"] for r in records(runs.vae) if "validation" in r)
    assert bits_per_dim(torch.cat(nats), 64).mean().item() == pytest.approx(logged, rel=1e-5)


def test_the_last_figure_is_of_all_held_out_images(runs: Runs, splits: Splits) -> None:
    final = records(runs.vae)[-1]
    trained = load_trained_baseline(runs.vae)
    expected = bits_of(trained.model, balanced_subject(splits.held_out), Bounds(2))
    assert final["final"] and final["n"] == len(splits.held_out.images) == expected.n
    assert final["held_out_bits_per_dim"] == pytest.approx(expected.bits, rel=1e-6)
    log = (runs.vae / "log.txt").read_text()
    assert f"{expected} (n = {expected.n}, ELBO, mean of 2 draw(s), seed 0" in log and "chose the step" in log
    pictures = {p.name for p in (runs.vae / "samples").iterdir()}
    assert {"reconstructions.png", "interpolations.png", "traversals.png", "samples-averaged-000012.png"} <= pictures


def test_a_configuration_given_back_repeats_the_run(runs: Runs, tmp_path: Path) -> None:
    task = train_baseline.read_task(["--config", str(runs.flow / "config.yaml"), "--out", str(tmp_path / "again")])
    assert isinstance(task, FlowTask) and task.model == nice(8, 2)
    train_baseline.train(task)
    assert [r.get("validation") for r in records(tmp_path / "again")] == [
        r.get("validation") for r in records(runs.flow)
    ]
    assert read_yaml(tmp_path / "again/config.yaml")["baseline"] == "flow"


@pytest.mark.parametrize("recipe", BASELINE_RECIPES)
def test_a_recipe_is_a_task_of_its_kind(recipe: str) -> None:
    task = train_baseline.read_task([recipe, "--steps", "7"])
    assert task.train.steps == 7 and task.model == BASELINE_RECIPES[recipe]().model  # pyright: ignore
    assert type(task) is BASELINE_TASKS[train_baseline.kind_of(task)]
    stops = task.train.validate_every > 0 and task.train.patience_validations > 0
    assert stops == ("-" in recipe)
    if recipe.startswith("digits"):
        assert (task.train.betas, task.train.ema, task.train.warmup) == ((0.9, 0.99), 0.99, 50)


# ---- figures ----


def test_bits_depend_on_neither_batches_nor_the_other_images(runs: Runs, splits: Splits) -> None:
    for run in (runs.vae, runs.flow):
        model = load_trained_baseline(run).model
        subject = balanced_subject(splits.held_out, 17)
        together, apart = (bits_of(model, subject, Bounds(3, 5, size)) for size in (17, 4))
        assert apart.bits == pytest.approx(together.bits, rel=1e-5)
        assert apart.error == pytest.approx(together.error, rel=1e-4)
        assert bits_of(model, subject, Bounds(3, 5, 17)) == together
        assert bits_of(model, subject, Bounds(3, 6, 17)).bits != together.bits
        first = balanced_subject(splits.held_out, 5)
        assert torch.equal(first.places, subject.places[:5])


def test_more_draws_are_given_to_flows_for_the_time_of_a_figure(runs: Runs, splits: Splits) -> None:
    model, subject = load_trained_baseline(runs.flow).model, balanced_subject(splits.held_out, 20)
    one, eight = (bits_of(model, subject, Bounds(draws)).bits for draws in (None, 8))
    assert eight < one, "averaging inside the logarithm tightens the bound"
    assert model.config.draws == 1


def test_iwae_of_one_draw_is_the_bound_and_more_are_tighter(runs: Runs, splits: Splits) -> None:
    model, subject = load_trained_baseline(runs.vae).model, balanced_subject(splits.held_out, 20)
    assert isinstance(model, VAE)
    assert iwae_of(model, subject, Bounds(), 1).bits == pytest.approx(bits_of(model, subject, Bounds(1)).bits, rel=1e-9)
    assert iwae_of(model, subject, Bounds(), 32).bits < bits_of(model, subject, Bounds(32)).bits


def test_references_by_hand(splits: Splits) -> None:
    subject = balanced_subject(splits.held_out, 3)
    train, mine = to_levels(splits.train.images[:], 17), to_levels(subject.images[:], 17)
    total = 0.0
    for image in mine:
        for y in range(8):
            for x in range(8):
                count = int((train[:, 0, y, x] == image[0, y, x]).sum())
                total -= math.log2((count + 1) / (len(train) + 17))
    assert histogram_score(splits.train.images, subject, 17).bits == pytest.approx(total / (3 * 64), rel=1e-12)
    assert uniform_score(subject, 17).bits == math.log2(17)


def test_levels_are_those_of_both_sides_of_the_split(tmp_path: Path) -> None:
    splits = load_splits(DataConfig())
    assert levels_in_data(splits) == 17
    odd = splits.held_out.images[:].clone()
    odd[0, 0, 0, 0] = 1
    assert levels_in_data(Splits(splits.train, replace(splits.held_out, images=odd))) == 256


def test_the_standard_error_is_that_of_the_mean(runs: Runs, splits: Splits) -> None:
    model, subject = load_trained_baseline(runs.flow).model, balanced_subject(splits.held_out, 25)
    each = bits_per_dim(model.log_likelihood(subject.images[:], None, Context(0, 0, subject.places)), 64)
    found = bits_of(model, subject, Bounds())
    assert found.bits == pytest.approx(each.mean().item(), rel=1e-6)
    assert found.error == pytest.approx((each.var(correction=1) / 25).sqrt().item(), rel=1e-4)


def test_samples_have_the_class_of_their_seed(runs: Runs) -> None:
    trained, seeds = load_trained_baseline(runs.vae), torch.arange(3, 16)
    expected = trained.model.sample(seeds, seeds % 10)
    source = BaselineSource(trained, batch_size=4)
    images = source.images(source.sample(seeds))
    assert images.dtype == torch.uint8 and images.shape == (13, 1, 8, 8)
    assert (images.float() - (expected + 1) * 127.5).abs().max() < 0.51


# ---- the report ----


def task(runs: Runs, **changes: Any) -> LikelihoodTask:
    return replace(LikelihoodTask(models=(runs.vae, runs.flow), features="pixels", n=20, iwae=3, draws=2), **changes)


def test_the_report(runs: Runs, tmp_path: Path, splits: Splits) -> None:
    rows = {row.name: row for row in evaluate_likelihood.run(task(runs, out=tmp_path, seed=4, first_seed=9))}
    assert list(rows) == ["vae", "flow", "per-pixel histogram", "uniform"]
    subject = balanced_subject(splits.held_out, 20)
    for name in ("vae", "flow"):
        model = load_trained_baseline(getattr(runs, name)).model
        assert rows[name].bits == bits_of(model, subject, Bounds(2, 4)).bits
        assert rows[name].parameters == sum(p.numel() for p in model.parameters())
        assert rows[name].conditional == (name == "vae")
        assert rows[name].features and rows[name].distance and rows[name].sample_nfe == 1
    assert rows["vae"].iwae_draws == 3 and rows["flow"].iwae_bits is None
    assert {p.name for p in tmp_path.iterdir()} == {*FILES, ".lock"}
    table = list(csv.DictReader((tmp_path / "results.csv").open()))
    stored = json.loads((tmp_path / "results.json").read_text())
    assert (
        [float(line["bits"]) for line in table]
        == [row["bits"] for row in stored["rows"]]
        == [r.bits for r in rows.values()]
    )
    page = (tmp_path / "report.md").read_text()
    assert all(f"{row.bits:.4f}" in page for row in rows.values())
    assert "samples 9-28" in page and "bounds 4" in page and "(K = 3)" in page and rows["vae"].model in page


def test_the_distance_is_that_of_the_samples(runs: Runs, tmp_path: Path) -> None:
    """Other seeds, other samples, other distance; no features, no distance."""
    ran = evaluate_likelihood.run
    one, same, other = (ran(task(runs, out=tmp_path, first_seed=s)) for s in (0, 0, 50))
    assert [r.distance for r in one] == [r.distance for r in same] and one[0].distance != other[0].distance
    none = ran(task(runs, out=tmp_path, features="none"))
    assert all(row.distance is None and row.features is None for row in none)
    assert [r.bits for r in none] == [r.bits for r in one]
