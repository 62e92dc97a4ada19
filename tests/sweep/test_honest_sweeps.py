"""What a sweep must not do in silence: mix times, classes, writers or float settings."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from measurements import measurement
from pipelines import Pipeline, Script
from sweeps import sweep_task, watch_samples

from midway.gen.commands import evaluate
from midway.gen.core.errors import DataError, DivergedError
from midway.gen.core.processes import ProcessInfo
from midway.gen.core.runs import Run
from midway.gen.data.images import ImageData
from midway.gen.data.splits import Splits, load_splits
from midway.gen.diffusion.class_draw import ClassDraw, LabelRule
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import SamplingConfig
from midway.gen.evaluation.metrics import METRICS, Features, check_metrics, possible
from midway.gen.evaluation.sources import SolverSource
from midway.gen.features.classifier import load_features
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.metrics.inception_score import inception_score
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.report.notes import class_notes, timing_notes
from midway.gen.sweep import measure
from midway.gen.sweep.measure import EvaluationContext
from midway.gen.sweep.run import held_out_images, measure_images
from midway.gen.sweep.store import CellStore, Part, Seeds

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")


# ---- processes ----


def test_blocks_are_shared_among_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes, four blocks: the second one measures the second alone, and nothing that is there already."""
    monkeypatch.setattr(
        measure, "_block", lambda numbers, parts, context, fine: Part({}, {"block": parts[0].costs["block"]})
    )
    store = CellStore(tmp_path)
    cell = store.cell({"a": 1})
    context = EvaluationContext(None, Seeds(0, 5, 4), store, ProcessInfo(0, 3))  # pyright: ignore[reportArgumentType]
    for block in range(4):
        cell.write(block, Part({}, {"block": block}))

    def there() -> list[int]:
        found = [cell.part(place) for place in measure._block_places(context.seeds)]
        return [part.costs["block"] for part in found if part is not None]

    unchecked: Any = SimpleNamespace(samples=None, block=None, fine=None)
    measure._sum_blocks(cell, dataclasses.replace(context, process=ProcessInfo(1, 3)), unchecked)
    assert there() == [1]
    measure._sum_blocks(cell, context, unchecked)
    assert there() == [0, 1, 3]


def test_a_second_sweep_into_the_same_folder_raises(pipeline: Pipeline, script: Script, tmp_path: Path) -> None:
    with CellStore(tmp_path / "cells").claimed():
        runs = f"--model {pipeline.model} --features {pipeline.features} --out {tmp_path}"
        done = script(*f"evaluate {runs} --solvers ddim --nfe 4 --grids uniform --n 20 --exact-nfe 0".split())
        assert done.code == 2 and "is being written by another process" in done.err
    assert evaluate.run(sweep_task(pipeline, tmp_path)).measurements


# ---- times ----


def test_seconds_of_other_circumstances_are_named(pipeline: Pipeline, tmp_path: Path) -> None:
    evaluate.run(sweep_task(pipeline, tmp_path))
    assert "Seconds compare only" not in (tmp_path / "report.md").read_text()
    evaluate.run(sweep_task(pipeline, tmp_path, solvers="ddim,euler", batch_size=16))
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert ["batches of 8" in row["timing"] for row in rows if row["nfe"]] == [True, True, False]
    text = (tmp_path / "report.md").read_text()
    assert "Seconds compare only" in text and "batches of 16" in text


def test_times_alike_need_no_note() -> None:
    cell = measurement(timing="a machine")
    assert timing_notes([cell, cell]) == ()
    assert "a machine / another" in timing_notes([cell, dataclasses.replace(cell, timing="another")])[0]


# ---- classes ----


def splits(counts: list[int]) -> Splits:
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    images = torch.zeros(len(labels), 1, 8, 8, dtype=torch.uint8)
    data = ImageData(images, labels, tuple("abcdefghij"[: len(counts)]), "toy", "0" * 64)
    return Splits(data, data)


def test_unequal_classes_are_warned_about() -> None:
    def notes(counts: list[int], n: int, rule: LabelRule = "proportional") -> tuple[str, ...]:
        return class_notes(splits(counts), n, ClassDraw(tuple(counts), rule))

    assert notes([100, 110, 120], 30, "balanced") == ()
    assert "from 100 to 130 of a class" in notes([100, 130], 30, "balanced")[0]
    assert notes([100, 130], 30) == notes([100, 130], 30, "random") == () == class_notes(splits([100, 130]), 30, None)
    assert notes([100], 30) == ()
    assert notes([50] * 10, 20) == notes([50] * 10, 25, "random") == ()
    assert notes([50] * 10, 359) == ()
    assert "Blocks of 25 seeds" in notes([50] * 10, 25)[0]


# ---- float settings ----


def test_samples_are_drawn_in_ieee_float32(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, bool]] = []
    cudnn: Any = torch.backends.cudnn
    watch_samples(monkeypatch, lambda *sampled: seen.append((cudnn.conv.fp32_precision, cudnn.deterministic)))
    before, cudnn.conv.fp32_precision = cudnn.conv.fp32_precision, "tf32"
    try:
        for overlap in (False, True):
            evaluate.run(sweep_task(pipeline, tmp_path / str(overlap), overlap=overlap, exact_nfe=0))
        assert set(seen) == {("ieee", True)} and cudnn.conv.fp32_precision == "tf32"
    finally:
        cudnn.conv.fp32_precision = before


# ---- metrics ----


def test_precision_and_coverage_compare_equal_counts() -> None:
    """Of three times as many samples as kept reference features the first third counts."""
    torch.manual_seed(0)
    sample, many = torch.randn(50, 4), torch.randn(150, 4)
    reference = FeatureReference(None, "a", FeatureStatistics.of(sample), "r", sample)  # pyright: ignore[reportArgumentType]
    for name in ("precision", "density"):
        assert METRICS[name](Features(many, None), reference) == METRICS[name](Features(many[:50], None), reference)


def test_samples_sorted_by_class_have_their_inception_score() -> None:
    logits = 50 * torch.eye(10).repeat_interleave(100, 0)
    assert inception_score(logits, 10).value == pytest.approx(1)
    found = METRICS["is"](Features(torch.randn(1000, 4), logits), None)  # pyright: ignore[reportArgumentType]
    assert found["inception_score"] == pytest.approx(10, rel=0.05)


def test_the_floor_alone_goes_without_a_metric_it_is_too_small_for(pipeline: Pipeline) -> None:
    check_metrics(("infinity",), 400, 64, False)
    assert possible(("kid", "infinity"), 50, 64) == ("kid",)
    trained = pipeline.load()
    reference = make_reference(
        load_features(Run.open(pipeline.features, "features").checkpoint / "features.safetensors"),
        "cnn",
        load_splits(trained.data).train,
    )
    held_out = load_splits(trained.data).held_out
    assert reference.statistics.dim == 8
    found = [
        measure_images("floor", held_out_images(held_out, n), {"": reference}, ("kid", "infinity")) for n in (20, 40)
    ]
    assert [cell.value("fd_infinity") is None for cell in found] == [True, False] and found[0].value("kid") is not None
    errors = [cell.std("distance") for cell in found]
    assert all(error is not None and error > 0 for error in errors)
    few = measure_images("floor", held_out_images(held_out, 19), {"": reference})
    assert few.std("distance") is None


# ---- the reference's file ----


def test_a_reference_whose_numbers_were_changed_raises(tmp_path: Path) -> None:
    class Pixels:
        has_logits = False

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)[:, :4].float()

    data = splits([30, 30]).train
    data = dataclasses.replace(data, images=torch.randint(0, 256, data.images.shape, dtype=torch.uint8))
    network: Any = Pixels()
    make_reference(network, "pixels@1", data, tmp_path)
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="do not match their hash"):
        make_reference(network, "pixels@1", data, tmp_path)


def test_a_decoder_that_gives_no_image_ends_the_sweep_with_its_name(pipeline: Pipeline, tmp_path: Path) -> None:
    trained = pipeline.load()
    plan = make_samplers(trained, "ddim", 4, SamplerConfig(grids=("uniform",)))["uniform"]
    source = SolverSource(trained, plan, SamplingConfig())
    raw = source.sample(torch.arange(2))
    for parameter in trained.tokenizer.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(DivergedError, match="the decoder of model"):
        source.images(raw)
