"""A figure belongs to how it was measured: identities of cells, names of distances, and what a report raises for or warns of."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measurements import changed, measurement
from pipelines import Pipeline, Script
from sweeps import sweep_task

from midway.gen.commands import evaluate
from midway.gen.core.errors import UsageError
from midway.gen.core.processes import ProcessInfo
from midway.gen.data.images import ImageData
from midway.gen.diffusion.samplers import SamplerConfig, make_samplers
from midway.gen.diffusion.sampling import SamplingConfig
from midway.gen.evaluation.comparing import FID, distance_name, limit_name
from midway.gen.evaluation.records import Measurement
from midway.gen.evaluation.sources import SampledBatch, SolverSource
from midway.gen.features import reference as references
from midway.gen.features.reference import FeatureReference, make_reference
from midway.gen.metrics.frechet import frechet_distance, frechet_distance_of_features, frechet_distance_to
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.psnr_ssim import psnr
from midway.gen.report.notes import few_note
from midway.gen.report.plots import distance_figure
from midway.gen.report.sweep import markdown_tables, report_html, report_md, terminal_text, write_report
from midway.gen.report.sweep_tables import all_figures
from midway.gen.report.table import ReportContext
from midway.gen.sweep.figures import Seconds
from midway.gen.sweep.measure import EvaluationContext, FineSolution
from midway.gen.sweep.store import CellStore, Numbers, Seeds

pytestmark = pytest.mark.usefixtures("undrawn")
CONTEXT = ReportContext("Budgets", "flow", "digits", "python x.py", "2 cores", {"torch": "2"}, "0-199")


def one(solver: str = "euler", nfe: int = 4, distance: float = 2.0, n: int = 100, **more: Any) -> Measurement:
    blocks = (distance - 0.1, distance + 0.1)
    like = measurement(solver, "uniform", nfe, distance, 0.1, 0.3, n, decode_seconds=3.0, feature_seconds=0.5)
    return changed(like, **({"distance_blocks": blocks} | more))


def floor(n: int) -> Measurement:
    return one("floor", 0, 1.0, n, grid="", rmse=None, distance_blocks=(), distance_std=None)


# ---- identities ----


@pytest.mark.parametrize("part", ["model", "decoder", "latent_mean", "plan"])
def test_a_cell_of_other_weights_is_another_cell(part: str, pipeline: Pipeline) -> None:
    trained = pipeline.load()
    plans = [make_samplers(trained, "ddim", nfe, SamplerConfig(grids=("uniform",)))["uniform"] for nfe in (4, 5)]
    before = SolverSource(trained, plans[0], SamplingConfig()).identity
    assert SolverSource(pipeline.load(), plans[0], SamplingConfig()).identity == before
    if part == "model":
        trained = dataclasses.replace(trained, hash="0" * 12)
    elif part == "decoder":
        next(trained.tokenizer.parameters()).data.view(-1)[0] += 1e-3
    elif part == "latent_mean":
        trained.tokenizer.latent_mean[0] += 1e-3
    changed = dataclasses.replace(trained)  # hashes are computed once for each
    assert SolverSource(changed, plans[part == "plan"], SamplingConfig()).identity != before


@pytest.mark.parametrize("change", [{"features": "b"}, {"fingerprint": "1"}, {"root": "newton-schulz"}], ids=str)
def test_a_cell_seen_otherwise_is_another_cell(change: dict[str, Any], pipeline: Pipeline, tmp_path: Path) -> None:
    trained = pipeline.load()
    plan = make_samplers(trained, "ddim", 4, SamplerConfig(grids=("uniform",)))["uniform"]
    source = SolverSource(trained, plan, SamplingConfig())
    seen = FeatureReference(None, "a", FeatureStatistics.of(torch.randn(9, 2)), "digits@1", fingerprint="0")  # pyright: ignore

    def record(reference: FeatureReference) -> str:
        return EvaluationContext({"": reference}, Seeds(0, 4, 1), CellStore(tmp_path), ProcessInfo()).cell(source).id

    assert record(seen) == record(seen) != record(dataclasses.replace(seen, **change))


def test_every_row_names_the_record_that_says_what_it_was_made_from(pipeline: Pipeline, tmp_path: Path) -> None:
    sweep = evaluate.run(sweep_task(pipeline, tmp_path, grids="uniform,karras", baselines=(pipeline.baseline,)))
    names = {path.stem for path in tmp_path.glob("cells/*.json")}
    assert {c.record for c in sweep.measurements if c.solver not in ("floor", "ceiling")} == names and len(
        names
    ) == 3, "the exact solution, ddim on the chosen grid, the baseline"


def test_two_processes_that_find_the_same_damage_both_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = CellStore(tmp_path).cell({"a": 1})
    cell.finish(Numbers(4, (0.5,), 0, {}, Seconds(1.0, 0.0, 0.0), ""), None)
    (path,) = tmp_path.glob("*.json")
    path.write_text("{")
    real = Path.replace

    def late(self: Path, target: Path) -> Path:
        real(self, target)  # the other process
        return real(self, target)

    monkeypatch.setattr(Path, "replace", late)
    assert cell.numbers() is None


# ---- errors to the fine solution ----


def test_errors_to_the_fine_solution_by_hand(tmp_path: Path) -> None:
    class Fine:
        @property
        def identity(self) -> dict[str, Any]:
            return {"source": "toy"}

        @property
        def kind(self) -> str:
            return "toy"

        def sample(self, seeds: torch.Tensor) -> SampledBatch:
            return SampledBatch(seeds.float().view(-1, 1, 1, 1).expand(-1, 2, 2, 2).contiguous(), 8, 0.0)

        def images(self, raw: SampledBatch) -> torch.Tensor:
            return (10 * raw.values[:, :1]).byte()

    fine = FineSolution(Fine(), Seeds(3, 2, 1), CellStore(tmp_path), ProcessInfo(), {})
    fine.make()
    images = torch.tensor([30, 60], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    errors = fine.errors(0, torch.zeros(2, 2, 2, 2), images)
    assert errors["errors"].tolist() == [9.0, 16.0]
    assert [fine.latents(most)[:, 0, 0, 0].tolist() for most in (1, 2, 9)] == [[3.0], [3.0, 4.0], [3.0, 4.0]]
    expected = psnr(images, torch.tensor([30, 40], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 1, 2, 2))
    assert torch.equal(errors["psnr"], expected) and expected[0] > expected[1]


# ---- names ----


def test_only_the_published_inception_network_makes_a_fid() -> None:
    inception = [changed(c, features=f"{FID}, float32") for c in (floor(100), one())]
    assert distance_name(inception) == "FID" and distance_name([floor(100), one()]) == "Fréchet distance"
    mixed = [inception[0], one()]
    assert distance_name(mixed) == "Fréchet distance"
    assert "<h2>FID to the data by step budget</h2>" in report_html(inception, CONTEXT)
    assert "FID" not in report_html([floor(100), one()], CONTEXT)
    other = [changed(c, features="inception-v3-2015-12-05@ffffffff") for c in inception]
    assert "FID" not in terminal_text(other)


def test_a_floor_of_another_count_is_named_with_it_everywhere() -> None:
    alike, other = [floor(100), one()], [floor(40), one()]
    assert (limit_name(alike[0], alike), limit_name(other[0], other)) == ("floor", "floor (n = 40)")
    page = report_html(other, CONTEXT)
    assert '<th scope="row">floor (n = 40)</th>' in page
    for text in (markdown_tables(other), terminal_text(other)):
        assert "floor (n = 40)" in text
    assert "floor (n = 40) 1.00" in {text.get_text() for text in distance_figure(other).axes[0].texts}
    assert "(n = " not in terminal_text(alike)


def test_a_report_that_raises_writes_nothing(tmp_path: Path) -> None:
    cells = [floor(100), one(), one("heun", n=200)]
    with pytest.raises(ValueError, match="do not compare"):
        write_report(tmp_path / "out", cells, CONTEXT)
    with pytest.raises(ValueError, match="do not compare"):
        report_html(cells, CONTEXT)
    assert not list(tmp_path.iterdir())


# ---- warnings ----


def test_few_images_are_warned_about_in_the_report(pipeline: Pipeline, tmp_path: Path) -> None:
    assert few_note(128, 64) == () and "127 images for 64 features" in few_note(127, 64)[0]
    for n, warned in ((8, True), (40, False)):
        evaluate.run(sweep_task(pipeline, tmp_path, n=n, blocks=1, exact_nfe=0))
        for name in ("report.md", "report.html"):
            assert ("mostly bias" in (tmp_path / name).read_text()) is warned


# ---- all figures ----


def test_all_figures_and_the_split_of_the_time_are_in_the_report() -> None:
    cells = [
        floor(100),
        one(precision=0.75, psnr=31.5, flops=12_340_000),
        one("heun", 8, 1.5),
        one("vae", 1, 3.0, baseline=True),
    ]
    table = all_figures(cells)
    rows = [(line.name, *("–" if e is None else e.value for e in line.entries)) for line in table.lines]
    assert table.heads == (
        "solver",
        "NFE",
        "distance",
        "RMSE",
        "PSNR (dB)",
        "precision",
        "MFLOP",
        *(f"{what} s" for what in ("solver", "decode", "features")),
    )
    assert rows[0] == ("euler", "4", "2.00", "0.300", "31.5", "0.750", "12.3", "10.0", "30.0", "5.00")
    assert rows[-1] == ("floor", "–", "1.00", *"–" * 7)
    page, text = report_html(cells, CONTEXT), report_md(cells, CONTEXT)
    assert "<td>31.5</td>" in page and "| euler | 4 | 2.00 | 0.300 | 31.5 | 0.750 | 12.3 | 10.0 | 30.0 | 5.00 |" in text
    assert "Difference from the best" in page and "Difference from the best" in text


def test_the_box_says_what_learned_solvers_cost() -> None:
    page = report_html([floor(100), one(), one("table", training_nfe=12345)], CONTEXT)
    assert "<dt>training of solvers</dt><dd>table 12,345 evaluations</dd>" in page


def test_the_front_is_drawn_against_the_time_to_make_images() -> None:
    cells = [
        one("a", 4, 3.0),
        one("a", 8, 1.0, seconds=2.0),
        one("b", 8, 2.0, seconds=9.0),
    ]
    front, *others = distance_figure(cells, "seconds").axes[0].lines
    assert np.asarray(front.get_xdata()).tolist() == [4.0, 5.0] and np.asarray(front.get_ydata()).tolist() == [3.0, 1.0]
    assert front.get_alpha() == 0.25 and {line.get_alpha() for line in others} == {None}
    assert {line.get_alpha() for line in distance_figure(cells, "nfe").axes[0].lines} == {None}


# ---- fewer images than features ----


@pytest.mark.parametrize("count", [30, 17, 12])
def test_few_features_against_statistics_are_exact(count: int) -> None:
    torch.manual_seed(0)
    y = torch.randn(count, 16, dtype=torch.float64) @ torch.randn(16, 16, dtype=torch.float64) + 1
    x = torch.randn(9, 16, dtype=torch.float64)
    exact = frechet_distance_of_features(x, y)
    reference = FeatureStatistics.of(y)
    assert frechet_distance_to(x, reference) == pytest.approx(exact, rel=1e-12 if count > 16 else 1e-7)
    many = torch.randn(40, 16, dtype=torch.float64)
    assert frechet_distance_to(many, reference) == frechet_distance(FeatureStatistics.of(many), reference)
    with pytest.raises(ValueError, match="dimensions"):
        frechet_distance_to(x[:, :8], reference)
    for few in (x[:1], x[:0]):
        with pytest.raises(ValueError, match="at least 2 feature vectors"):
            frechet_distance_to(few, reference)


@pytest.fixture
def images() -> ImageData:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (60, 1, 8, 8), generator=generator, dtype=torch.uint8)
    return ImageData(pixels, torch.arange(60) % 4, ("a", "b", "c", "d"), "toy", "f" * 64)


class Pixels:
    """Features are the first pixels."""

    has_logits = False

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :16].float()

    activations: Any = None


def test_a_reference_too_large_to_be_kept_loses_no_digits_either(
    images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    network: Any = Pixels()
    few = network.features(images.images[:10])
    whole = make_reference(network, "pixels@1", images).distance_of(few)
    monkeypatch.setattr(references, "KEPT", 20)
    reference = make_reference(network, "pixels@1", images)
    assert reference.sample is not None and len(reference.sample) == 20
    assert reference.distance_of(few) == pytest.approx(whole, rel=1e-12)


# ---- the root by products ----


def test_the_root_by_products_agrees_and_raises_where_it_cannot(
    images: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    network: Any = Pixels()
    many = network.features(images.images[:50])
    plain = make_reference(network, "pixels@1", images)
    products = make_reference(network, "pixels@1", images, root="newton-schulz")
    used: list[str] = []
    real = references.frechet_distance
    monkeypatch.setattr(
        references, "frechet_distance", lambda a, b, *root: used.append(root[0] if root else "") or real(a, b, *root)
    )
    assert products.distance_of(many) == pytest.approx(plain.distance_of(many), rel=1e-9)
    assert used == ["newton-schulz", ""]
    flat = many.clone()
    flat[:, 0] = 0  # a singular covariance, and a reference that has one too
    singular = dataclasses.replace(products, statistics=FeatureStatistics.of(flat))
    with pytest.raises(UsageError, match="--root newton-schulz"):
        singular.distance_of(flat)


def test_the_root_is_a_flag(pipeline: Pipeline, succeed: Script, tmp_path: Path) -> None:
    line = f"evaluate --model {pipeline.model} --features {pipeline.features} --solvers ddim --nfe 4 --n 80"
    found = []
    for root in ("eigen", "newton-schulz"):
        succeed(f"{line} --grids uniform --exact-nfe 0 --root {root} --out {tmp_path / root}")
        text = (tmp_path / root / "results.csv").read_text().splitlines()
        found.append(float(text[2].split(",")[3]))
    assert found[1] == pytest.approx(found[0], rel=1e-6) and math.isfinite(found[0])
