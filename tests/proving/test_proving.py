"""The proving ground: patches and their mixture, exact figures, the choice of grids, learned solvers, and the published order."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import spearmanr
from tensors import normal
from torch import Tensor

from midway.gen.core.errors import DataError
from midway.gen.distillation.amed import DistillConfig
from midway.gen.distillation.learning import Lesson
from midway.gen.distillation.table import TableConfig
from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.proving.contest import EXACT_ROW, FLOOR, Cell, Contest, ContestConfig, run_contest
from midway.gen.proving.ground import GroundConfig, fit, flattened, make_ground, principal
from midway.gen.proving.learning import Teaching, teach
from midway.gen.proving.model import MixtureModel, figures, make_block
from midway.gen.proving.published import PUBLISHED, correlations, overall, ranks, ratio, spearman
from midway.samplers.grids import GRIDS
from midway.samplers.mixture import Mixture
from midway.samplers.solvers import SOLVERS

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ContestConfig(nfe=(5, 6), n=256, blocks=2, choosing=64)
LESSONS = Teaching(
    amed=DistillConfig(teacher_steps=16, trajectories=32, checkpointing=False),
    table=TableConfig(pairs=64, teacher_steps=24),
    amed_lesson=Lesson(steps=60, batch=16),
    table_lesson=Lesson(steps=60, batch=16, lr=0.01, clip=1.0),
)


def model() -> MixtureModel:
    """Four components in six dimensions with standard deviation about 1/2."""
    factors = normal(4, 6, 6, seed=1, dtype=torch.float64) / 8
    covariances = factors @ factors.mT + 1e-3 * torch.eye(6, dtype=torch.float64)
    means = normal(4, 6, seed=2, dtype=torch.float64) / 2
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    return MixtureModel(Mixture.of(weights, means - weights @ means, covariances))


@pytest.fixture(scope="module")
def contest() -> Contest:
    return Contest(model(), SMALL, LESSONS)


# ---- the ground ----


def test_patches_are_those_of_the_photographs() -> None:
    """Every fifth pixel of two 427 x 640 photographs, of which 20,000 are chosen; a patch is channels first."""
    ramp = torch.arange(3 * 16 * 16).view(1, 3, 16, 16).remainder(256).to(torch.uint8)
    got = flattened([ramp], GroundConfig())
    assert got.shape == (4, 192)  # starts 0 and 5 in both directions
    wanted = ramp[0, :, 5:13, 0:8].flatten().float() / 127.5 - 1
    torch.testing.assert_close(got[2], wanted, rtol=0, atol=0)


def test_principal_axes_keep_distances_and_scale_to_half() -> None:
    vectors = normal(500, 6, seed=3) @ torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5, 0.2, 0.0])) + 7
    turned, share = principal(vectors, 10)
    assert turned.shape == (500, 5)  # one direction has no variance
    assert share == pytest.approx(1)
    assert turned.mean(0).abs().max() < 1e-5  # the vectors are float32
    assert (turned.square().sum() / 500 / 6).sqrt() == pytest.approx(0.5)
    covariance = turned.T @ turned / 500
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-5
    assert (covariance.diag().diff() < 0).all()
    factor = torch.cdist(turned[:20], turned[:20]) / torch.cdist(vectors[:20].double(), vectors[:20].double())
    off = factor[~torch.eye(20, dtype=torch.bool)]
    torch.testing.assert_close(off, off[:1].expand_as(off), rtol=1e-5, atol=0)
    fewer, part = principal(vectors, 2)
    torch.testing.assert_close(fewer, turned[:, :2])
    assert part < share


def test_the_fit_is_deterministic_and_has_the_moments_of_the_data() -> None:
    """The mean of a mixture after a step of EM is that of the data, its covariance too (but for the regularisation)."""
    vectors = principal(normal(800, 5, seed=4).abs() ** 1.5, 5)[0]
    first, again = fit(vectors, 3, 0), fit(vectors, 3, 0)
    assert first.hash == again.hash != fit(vectors, 3, 1).hash
    assert first.mean.abs().max() < 1e-3
    torch.testing.assert_close(first.covariance, vectors.T @ vectors / 800, rtol=0, atol=2e-3)


def test_a_folder_of_images_is_a_ground(tmp_path: Path) -> None:
    for number in range(40):
        pixels = normal(12, 12, 3, seed=number).mul(40).add(128).clamp(0, 255).to(torch.uint8).numpy()
        Image.fromarray(np.asarray(pixels)).save(tmp_path / f"{number:02}.png")
    ground = make_ground(GroundConfig(str(tmp_path), patch=4, axes=8, components=2))
    assert ground.mixture.dim == 8
    assert "360 4x4x3 patches" in ground.description  # 9 of each image, without overlap
    whole = make_ground(GroundConfig(str(tmp_path), patch=0, axes=3, components=2))
    assert "40 images" in whole.description
    with pytest.raises(DataError, match="patches have a side of 16"):
        make_ground(GroundConfig(str(tmp_path), patch=16))
    with pytest.raises(DataError, match="gives 40 vectors"):
        make_ground(GroundConfig(str(tmp_path), patch=0, components=20))


def test_images_that_are_all_alike_are_no_ground() -> None:
    with pytest.raises(DataError, match="all alike"):
        principal(torch.ones(50, 4), 3)


# ---- figures ----


def test_the_exact_solution_has_no_error_and_its_own_distance(contest: Contest) -> None:
    block = contest.scored[0]
    found = figures(contest.model, block, block.exact)
    assert found.rmse == 0
    assert found.to_exact == pytest.approx(0, abs=1e-9)
    assert found.to_data == contest.reference_cells()[1].blocks["to_data"][0]
    assert figures(contest.model, block, block.exact.clone().fill_(math.nan)).rmse == math.inf


def test_a_known_error_has_its_rmse_and_distance(contest: Contest) -> None:
    """A shift of every sample by a vector moves the mean alone."""
    block, shift = contest.scored[0], torch.tensor([0.3, 0, 0, 0, 0.4, 0])
    found = figures(contest.model, block, block.exact + shift)
    assert found.rmse == pytest.approx(0.5 / 6**0.5, rel=1e-5)
    assert found.to_exact == pytest.approx(0.25, rel=1e-5)


def test_the_truth_is_the_mixture_itself() -> None:
    own, count = model(), 100_000
    torch.testing.assert_close(own.truth.covariance, own.mixture.covariance)
    drawn = FeatureStatistics.of(own.draw(torch.arange(count)))
    assert frechet_distance(drawn, own.truth) < 20 / count


def test_floor_and_exact_row_are_equal_within_two_errors(contest: Contest) -> None:
    """The exact solution of the field is a sample of the data: neither is biased against the other."""
    wide = Contest(contest.model, dataclasses.replace(SMALL, n=512, blocks=8), LESSONS)
    floor, exact = wide.reference_cells()
    assert (floor.solver, exact.solver) == (FLOOR, EXACT_ROW)
    errors = math.hypot(*(cell.error("to_data") or 0 for cell in (floor, exact)))
    assert abs((floor.mean("to_data") or 0) - (exact.mean("to_data") or 0)) < 2 * errors
    assert wide.exact_error < 1e-3


def test_seeds_are_disjoint_and_a_sample_depends_on_its_seed_alone(contest: Contest) -> None:
    seeds = torch.cat([block.seeds for block in (*contest.scored, contest.unscored)])
    assert seeds.unique().numel() == len(seeds)
    noisy = SOLVERS["ddpm"].build(contest.model.schedule, GRIDS["karras"](contest.model.schedule, 4))
    own = contest.model.run(noisy, torch.arange(300))
    torch.testing.assert_close(contest.model.run(noisy, torch.tensor([270])), own[270:271], rtol=1e-4, atol=1e-5)


# ---- the contest ----


@pytest.mark.parametrize(("solver", "nfe"), [("dpmpp3m", 6), ("ipndm4", 5)])
def test_the_grid_is_the_one_of_least_rmse_on_unscored_seeds(contest: Contest, solver: str, nfe: int) -> None:
    """Here another grid has the least distance."""
    cell = contest.solver_cell(solver, nfe)
    assert cell is not None
    tables = contest.tables(SOLVERS[solver], nfe)
    ends = {grid: contest.model.run(table, contest.unscored.seeds) for grid, table in tables.items()}
    errors = {grid: (end - contest.unscored.exact).square().mean().sqrt().item() for grid, end in ends.items()}
    distances = {grid: figures(contest.model, contest.unscored, end).to_data for grid, end in ends.items()}
    assert set(errors) == {*GRIDS, "gits"}
    assert cell.grid == min(errors, key=errors.__getitem__) != min(distances, key=distances.__getitem__)
    scored = [contest.model.run(tables[cell.grid], block.seeds) - block.exact for block in contest.scored]
    assert cell.blocks["rmse"] == pytest.approx([e.square().mean().sqrt().item() for e in scored], rel=1e-5)


def test_a_two_evaluation_solver_takes_odd_budgets_with_an_analytic_first_step(contest: Contest) -> None:
    odd, even = contest.solver_cell("heun", 5), contest.solver_cell("heun", 6)
    assert odd is not None and even is not None
    assert (odd.nfe, odd.analytic_first, even.nfe, even.analytic_first) == (5, True, 6, False)
    assert contest.solver_cell("rk4", 5) is None  # 5 and 6 evaluations are no multiple of 4
    noisy = contest.solver_cell("ddpm", 5)
    assert noisy is not None and "rmse" not in noisy.blocks


def test_learned_solvers_beat_what_they_start_from(contest: Contest) -> None:
    """Against their warm start, DPM-Solver-2 and DPM-Solver++(3M) on their best grids, on seeds that none has seen."""
    rmse = {name: _rmse(contest.solver_cell(name, 5)) for name in ("dpm2", "dpmpp3m")}
    learned = {name: contest.learned_cell(name, 5, {}) for name in ("amed", "table")}
    for name, base, share in (("amed", "dpm2", 0.5), ("table", "dpmpp3m", 0.8)):
        cell = learned[name]
        assert cell is not None and cell.nfe == 5 and cell.training_nfe > 0
        assert _rmse(cell) < share * rmse[base]
    unlearned = dataclasses.replace(LESSONS, amed_lesson=dataclasses.replace(LESSONS.amed_lesson, steps=0))
    start = dataclasses.replace(contest, teaching=unlearned).learned_cell("amed", 5, {})
    assert _rmse(learned["amed"]) < 0.85 * _rmse(start)


def test_cells_do_not_depend_on_the_number_of_workers(contest: Contest) -> None:
    counts: list[tuple[str, int]] = []
    one, three = (
        run_contest(contest, ("euler", "rk4"), ("amed",), lambda *made: counts.append(made), workers)
        for workers in (1, 3)
    )
    assert one == three
    assert [cell.solver for cell in one] == [FLOOR, EXACT_ROW, "euler", "euler", "amed", "amed"]
    assert counts == [("euler", 2), ("rk4", 0), ("amed", 2)] * 2


def test_learning_is_repeatable(contest: Contest) -> None:
    first, again = (teach(contest.model, "table", 3, contest.unscored, LESSONS, {}) for _ in range(2))
    assert first.sampler.hash == again.sampler.hash
    assert first.grid == again.grid


def _rmse(cell: Cell | None) -> float:
    assert cell is not None
    return cell.mean("rmse") or math.nan


# ---- the published order ----


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_scipys(seed: int) -> None:
    """With ties."""
    a, b = (torch.randint(0, 6, (9,), generator=torch.Generator().manual_seed(s)).tolist() for s in (seed, seed + 9))
    assert spearman(a, b) == pytest.approx(np.asarray(spearmanr(a, b))[0], abs=1e-12)


def test_ranks_and_what_has_no_correlation() -> None:
    assert ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]
    assert spearman([1, 2], [1, 2]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


def _cells(value: Tensor | None = None) -> list[Cell]:
    """Every published cell, with the published figure, or another, as what was measured."""
    keys = [(solver, nfe) for solver, budgets in PUBLISHED.items() for nfe in budgets]
    values = [PUBLISHED[s][k] for s, k in keys] if value is None else value.tolist()
    return [Cell(s, k, "", False, 0, {"to_data": (v,)}) for (s, k), v in zip(keys, values, strict=True)]


def test_the_published_order_agrees_with_itself_and_not_with_its_reverse() -> None:
    cells = _cells()
    assert set(correlations(cells, "to_data")) == set(range(3, 11))
    assert {value for value, _ in correlations(cells, "to_data").values()} == {1.0}
    assert overall(cells, "to_data") == (pytest.approx(1.0), len(cells))
    assert ratio(cells, "to_data") == pytest.approx(7.59 / 24.97)
    reverse = _cells(-torch.tensor([cell.blocks["to_data"][0] for cell in cells], dtype=torch.float64))
    assert overall(reverse, "to_data") == (pytest.approx(-1.0), len(cells))
    assert correlations(cells, "rmse") == {}
    assert overall(cells, "rmse") is None
    assert ratio(cells, "rmse") is None


def test_the_error_is_that_of_a_mean() -> None:
    cell = Cell("x", 3, "", False, 0, {"rmse": (1.0, 2.0, 4.0, 5.0), "to_data": (1.0,)})
    assert cell.mean("rmse") == 3
    assert cell.error("rmse") == pytest.approx(np.std([1, 2, 4, 5], ddof=1) / 2)
    assert cell.error("to_data") is None
    assert cell.mean("to_exact") is None


def test_blocks_are_consecutive_seeds() -> None:
    block = make_block(model(), 7, 3, 4)
    assert block.seeds.tolist() == [7, 8, 9]
    assert block.exact.shape == (3, 6)
