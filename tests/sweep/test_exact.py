"""The exact solution, the limits of a table, and grids that are chosen on seeds that are not scored."""

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurements import changed, measurement
from PIL import Image
from pipelines import Pipeline, Script
from sweeps import measured, sweep_task, watch_samples

from midway.gen.commands import evaluate
from midway.gen.core.errors import UsageError
from midway.gen.data.images import to_float
from midway.gen.data.splits import load_splits
from midway.gen.diffusion.sampling import decode
from midway.gen.evaluation import sources
from midway.gen.evaluation.comparing import limit_of, question
from midway.gen.evaluation.records import Estimate, Measurement
from midway.gen.evaluation.sources import SampledBatch
from midway.gen.features.reference import balanced
from midway.gen.report.sections import choice_table
from midway.gen.report.sweep import headline_tables, markdown_tables
from midway.gen.report.sweep_page import report_html
from midway.gen.report.sweep_tables import difference_table, distance_table, error_table
from midway.gen.report.table import ReportContext
from midway.gen.sweep import choice as choices
from midway.gen.sweep import run
from midway.gen.sweep.choice import Choice
from midway.gen.sweep.fine import distance_between
from midway.gen.sweep.run import Sweep
from midway.gen.sweep.store import Seeds

pytestmark = pytest.mark.usefixtures("one_thread", "undrawn")
CONTEXT = ReportContext("", "", "", "", "", {}, "")


@pytest.fixture(scope="module")
def sweep(pipeline: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Solvers on two grids, among them the exact solution's own at its own budget, in two feature spaces."""
    out = tmp_path_factory.mktemp("exact")
    more = {"solvers": "ddim,heun,dpmpp3m", "nfe": "4,8", "grids": "karras,logsnr", "n": 24, "exact_nfe": 8}
    return evaluate.run(sweep_task(pipeline, out, features=f"{pipeline.features},pixels", choice_seeds=16, **more))


def row(sweep: Sweep, solver: str, nfe: int) -> Measurement:
    return next(m for m in measured(sweep) if (m.solver, m.nfe) == (solver, nfe))


# ---- the exact solution ----


@pytest.mark.parametrize("name", ["rmse", "to_exact", "pixels-32_to_exact"])
def test_the_error_is_zero_at_convergence_whatever_the_model(name: str, sweep: Sweep) -> None:
    same, other = row(sweep, "dpmpp3m", 8), row(sweep, "ddim", 4)
    assert same.grid == "logsnr", "the exact solution's"
    assert abs(same.value(name) or 0.0) < 1e-9 < 1e-4 < (other.value(name) or 0.0)
    assert same.distances == pytest.approx(exact(sweep).distances), "it is as far from the data as the exact row"
    assert exact(sweep).nfe == 8 and exact(sweep).value(name) is None


def exact(sweep: Sweep) -> Measurement:
    found = limit_of(sweep.measurements, "exact")
    assert found is not None
    return found


def test_the_distance_to_the_exact_solution_is_between_images_of_the_same_seeds(
    sweep: Sweep, pipeline: Pipeline
) -> None:
    """By hand, of both blocks."""
    assert sweep.fine is not None
    m, spaces = row(sweep, "heun", 4), sweep.fine.spaces
    job, trained = sweep.jobs["heun", m.grid, 4], pipeline.load()
    for block, expected in enumerate(m.values("to_exact")):
        seeds = torch.arange(24 * block, 24 * block + 24)
        images = [decode(trained, source.sample(seeds).values) for source in (job.source, sweep.fine.source)]
        by_hand = distance_between(*(spaces[""].activations(its).features.cpu() for its in images))
        assert by_hand == pytest.approx(expected, rel=1e-3)


def test_rmse_is_that_of_all_seeds_with_its_deviation_over_blocks(sweep: Sweep) -> None:
    """By hand, of the latents of both blocks."""
    assert sweep.fine is not None
    m = row(sweep, "heun", 4)
    seeds = torch.arange(48)
    near = sweep.jobs["heun", m.grid, 4].source.sample(seeds).values
    square = (near - sweep.fine.latents(48)).double().square().flatten(1).mean(1)
    assert m.value("rmse") == pytest.approx(square.mean().sqrt().item(), rel=1e-4)
    blocks = square.view(2, 24).mean(1).sqrt()
    assert m.values("rmse") == pytest.approx(blocks.tolist(), rel=1e-4)
    assert m.std("rmse") == pytest.approx(blocks.std().item(), rel=1e-3) and m.std("rmse") != 0


def test_its_own_error_is_measured_against_twice_the_evaluations(
    sweep: Sweep, pipeline: Pipeline, tmp_path: Path
) -> None:
    finer = evaluate.run(sweep_task(pipeline, tmp_path, exact_nfe=64))
    assert isinstance(sweep.choice, Choice) and isinstance(finer.choice, Choice)
    assert 0 < finer.choice.exact_error < 0.2 * sweep.choice.exact_error
    text = (tmp_path / "report.md").read_text()
    assert "with 64 evaluations from the same noise; its RMSE to twice the evaluations is" in text
    assert "ranks nothing" not in text, "ddim at 4 evaluations is resolved"


def test_a_solver_that_is_nearer_than_can_be_resolved_is_named(pipeline: Pipeline, tmp_path: Path) -> None:
    evaluate.run(sweep_task(pipeline, tmp_path, solvers="dpmpp3m", nfe="8", grids="logsnr", exact_nfe=8))
    assert "own error and ranks nothing (dpmpp3m)" in (tmp_path / "report.md").read_text()


def test_without_it_nothing_is_compared_with_it_and_no_grid_chosen(pipeline: Pipeline, tmp_path: Path) -> None:
    without = sweep_task(pipeline, tmp_path, exact_nfe=0)
    found = evaluate.run(without)
    assert [m.solver for m in found.measurements] == ["floor", "ceiling", "ddim"] and question(
        found.measurements
    ) == "distance"
    with pytest.raises(UsageError, match="on several grids, without an exact solution"):
        evaluate.run(replace(without, grids="uniform,karras"))


# ---- the other limits ----


def test_the_ceiling_is_held_out_images_through_the_tokenizer(sweep: Sweep, pipeline: Pipeline) -> None:
    assert sweep.fine is not None
    trained = pipeline.load()
    held_out = load_splits(trained.data).held_out
    images = held_out.images[balanced(held_out.labels)[:24]]
    latents = trained.tokenizer.encode_latents(to_float(images))
    spaces = sweep.fine.spaces
    for name, seen in (("floor", images), ("ceiling", decode(trained, latents))):
        m = limit_of(sweep.measurements, name)
        assert m is not None and m.n == 24
        assert m.distance == pytest.approx(spaces[""].distance(seen), rel=1e-6)
        assert m.value("pixels-32_distance") == pytest.approx(spaces["pixels-32"].distance(seen), rel=1e-6)
        assert sweep.limits[name].startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_ceiling_is_made_part_by_part(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the figures of all at once, so that no process holds more than a part of reconstructions."""
    asked = {"n": 40, "blocks": 1, "exact_nfe": 0, "features": f"{pipeline.features},pixels"}
    whole = limit_of(evaluate.run(sweep_task(pipeline, tmp_path / "a", **asked)).measurements, "ceiling")
    sizes: list[int] = []
    real = sources.reconstruct
    monkeypatch.setattr(
        sources, "reconstruct", lambda trained, images: sizes.append(len(images)) or real(trained, images)
    )
    monkeypatch.setattr(run, "PART", 16)
    parts = evaluate.run(sweep_task(pipeline, tmp_path / "b", **asked))
    assert sizes == [16, 16, 8]
    found = limit_of(parts.measurements, "ceiling")
    assert found is not None and whole is not None and found.n == whole.n == 40
    for name, estimate in whole.metrics.items():
        assert found.value(name) == pytest.approx(estimate.mean, rel=1e-4, abs=1e-6), name
    shape = np.asarray(Image.open(io.BytesIO(parts.limits["ceiling"]))).shape
    assert shape == np.asarray(Image.open(io.BytesIO(parts.limits["floor"]))).shape, "as many pictures"


def test_a_tokenizer_that_loses_nothing_is_no_limit(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a pixel model; the row would be the floor again."""
    monkeypatch.setattr(sources, "reconstruct", lambda trained, images: images.clone())
    found = evaluate.run(sweep_task(pipeline, tmp_path))
    assert [m.solver for m in found.measurements] == ["floor", "exact", "ddim"]


# ---- grids ----


def test_the_chosen_grid_has_the_least_error_on_seeds_that_are_not_scored(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the other grid is sampled on those seeds alone."""
    drawn: list[tuple[int, int]] = []
    watch_samples(monkeypatch, lambda seeds, batch: drawn.append((int(seeds[0]), len(seeds))))
    found = evaluate.run(sweep_task(pipeline, tmp_path, solvers="ddim", grids="karras,logsnr", choice_seeds=6))
    choice = found.choice
    assert isinstance(choice, Choice) and choice.seeds == "40-45"
    assert sorted(drawn) == [(0, 20)] * 2 + [(20, 20)] * 2 + [(40, 6)] * 4, "exact, exact twice as fine, two grids"
    (m,) = measured(found)
    assert choice.figures["ddim", m.grid, 4] == min(choice.figures.values()) and len(choice.figures) == 2
    table = choice_table(choice)
    assert [e.best for e in table.lines[0].entries if e] == [grid == f"4 {m.grid}" for grid in table.heads[1:]]
    assert "Choice of the grids" in (tmp_path / "report.md").read_text()


def test_the_scored_figures_have_no_part_in_the_choice(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spoilt for the chosen grid on the scored seeds alone, its figures are bad, and it stays chosen."""
    before = measured(evaluate.run(sweep_task(pipeline, tmp_path / "a", grids="karras,logsnr")))[0]

    def spoil(seeds: torch.Tensor, batch: SampledBatch) -> None:
        if batch.nfe == 4 and int(seeds[0]) < 40:
            batch.values.add_(1.0)

    watch_samples(monkeypatch, spoil)
    after = measured(evaluate.run(sweep_task(pipeline, tmp_path / "b", grids="karras,logsnr")))[0]
    assert after.grid == before.grid and (after.value("rmse") or 0) > 0.5 + (before.value("rmse") or 0)


def test_a_solver_that_draws_noise_is_chosen_by_its_distance_to_the_exact_solution(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = choices.extract
    monkeypatch.setattr(choices, "extract", lambda *arguments: seen.append("features") or real(*arguments))
    found = evaluate.run(sweep_task(pipeline, tmp_path, grids="karras,logsnr", eta=1.0)).choice
    assert found is not None and len(found.figures) == 2 and seen == ["features"] * 2
    seen.clear()
    evaluate.run(sweep_task(pipeline, tmp_path, grids="karras,logsnr"))
    assert seen == []


def test_a_candidate_that_diverges_is_not_chosen(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = measured(evaluate.run(sweep_task(pipeline, tmp_path / "a", grids="karras,logsnr")))[0]
    real = choices._figure
    monkeypatch.setattr(choices, "_figure", lambda job, fine: math.inf if job.grid == before.grid else real(job, fine))
    after = measured(evaluate.run(sweep_task(pipeline, tmp_path / "b", grids="karras,logsnr")))[0]
    assert {before.grid, after.grid} == {"karras", "logsnr"}


def test_the_seeds_of_choice_follow_those_that_are_scored() -> None:
    config = choices_config(n=20, blocks=3, first_seed=7, choice=5)
    assert str(config.seeds) == "7-66" and config.choice_seeds == Seeds(67, 5, 1)
    with pytest.raises(UsageError, match="choice-seeds 1"):
        choices_config(n=20, choice=1).check()


def choices_config(**values: Any) -> Any:
    from midway.gen.sweep.jobs import SweepConfig

    return SweepConfig(**values)


# ---- feature spaces ----


def test_further_feature_spaces_are_columns_with_their_names_in_files(sweep: Sweep, pipeline: Pipeline) -> None:
    m = row(sweep, "ddim", 4)
    assert {f"pixels-32_{name}" for name in ("distance", "kid", "to_exact")} <= m.metrics.keys()
    assert m.further.startswith("pixels") and m.further.endswith("axes") and m.spaces == {"pixels-32": m.further}
    text = markdown_tables(sweep.measurements)
    assert f"Fréchet distance ({m.further})" in text.replace("\\", "")
    assert "Fréchet distance (pixels" in report_html(sweep.measurements, CONTEXT)


@pytest.mark.parametrize("words", ["", "pixels,pixels", "effnet-lite"])
def test_feature_spaces_that_are_none_end_with_a_lesson(
    words: str, pipeline: Pipeline, script: Script, tmp_path: Path
) -> None:
    ended = script("evaluate", "--model", str(pipeline.model), "--features", words, "--out", str(tmp_path / "out"))
    assert ended.code == 2 and len(ended.err.strip().splitlines()) == 3 and not (tmp_path / "out").exists()


# ---- tables ----


def cells(*distances: float, errors: tuple[float, ...]) -> list[Measurement]:
    """An exact row at distance 1.0 in three blocks, and solvers a, b, ... at 4 evaluations."""
    at_exact = measurement("exact", "", 48, 1.0, distance_blocks=(0.9, 1.0, 1.1))
    found = [at_exact]
    for name, distance, error in zip("abc", distances, errors, strict=False):
        blocks = (distance - 0.1, distance, distance + 0.1)
        like = measurement(name, "karras", 4, distance, distance_blocks=blocks, to_exact=error, rmse=error)
        found.append(changed(like, to_exact_blocks=(error - 0.01, error, error + 0.01)))
    return found


def test_nothing_below_the_exact_row_is_called_better() -> None:
    """a is nearer to the data by chance, b to the exact solution: b is best, a is at the limit of the model."""
    ms = cells(0.5, 1.2, errors=(0.4, 0.2))
    assert [e.best for line in error_table(ms).lines for e in line.entries if e] == [False, True]
    data = distance_table(ms)
    assert not data.has_best and [line.name for line in data.lines] == ["a", "b", "exact"]
    assert [line.entries[0].small for line in data.lines if line.entries[0]] == ["karras, ≈ exact", "karras", ""]
    two = [replace(m, metrics={**m.metrics, "distance": Estimate(m.distance, 0.1, m.distances[::2])}) for m in ms]
    unmarked = distance_table(two)
    assert [line.entries[0].small for line in unmarked.lines if line.entries[0]] == ["karras", "karras", ""]
    assert "≈" in data.note and "≈" not in unmarked.note
    differences = {line.name: line.entries[0] for line in difference_table(ms).lines}
    assert differences["b"] is not None and differences["b"].best
    page = report_html(ms, CONTEXT)
    assert "4 evaluations are enough for the solver a:" in page, "nothing gained by b shows in the data"
    assert "; b with 4 evaluations is nearest to the exact solution, at a distance of 0.200" in page
    assert [table.title[:16] for table, _ in headline_tables(ms)] == [
        "Fréchet distance",
        "Error of the sol",
        "Fréchet distance",
    ]


def test_without_an_exact_row_the_distance_to_the_data_ranks() -> None:
    ms = [changed(m, to_exact=None, to_exact_blocks=()) for m in cells(0.5, 1.2, errors=(0.4, 0.2))[1:]]
    assert [e.best for line in distance_table(ms).lines for e in line.entries if e] == [True, False]
    assert error_table(
        ms
    ).lines == () and "The solver a with 4 evaluations has the lowest distance to the data" in report_html(ms, CONTEXT)
