"""The geometry of trajectories: closed forms, and the model's own field behind them."""

import math

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from pipelines import Pipeline
from torch import Tensor

from midway.gen.core.errors import DivergedError, UsageError
from midway.gen.diffusion.model import Guidance
from midway.gen.diffusion.sampling import SamplingConfig, labels_of, noise_of, sample_latents
from midway.gen.report.drawing import PAPER, Drawing
from midway.gen.report.sections import trajectory_figure
from midway.gen.sweep.trajectories import (
    TrajectoryGeometry,
    deviation,
    effective_rank,
    geometry_of,
    own_plane,
    random_walk,
    shares,
    trajectories,
    trajectory_geometry,
)
from midway.samplers.card import SolverCard
from midway.samplers.grids import karras
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.schedule import VP, Linear, Schedule
from midway.samplers.solvers import SOLVERS
from midway.samplers.step_parameters import AMEDConfig, Predictor
from midway.samplers.table import fingerprint

pytestmark = pytest.mark.usefixtures("one_thread")
SEEDS = torch.arange(3, 8)


def turned(points: Tensor, seed: int = 0) -> Tensor:
    """The same shape elsewhere in 40 dimensions."""
    draws = torch.randn(40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.pad(points, (0, 40 - points.shape[-1])) @ torch.linalg.qr(draws)[0] + 5 * draws[0]


def line() -> Tensor:
    return turned(torch.tensor([[0.0], [1.0], [1.5], [4.0], [9.0]], dtype=torch.float64))


def circle(points: int = 12) -> Tensor:
    angles = torch.arange(points, dtype=torch.float64) * 2 * math.pi / points
    return turned(torch.stack([angles.cos(), angles.sin()], -1))


def staircase(steps: int) -> Tensor:
    """A walk along one new axis at each step."""
    return turned(torch.tril(torch.ones(steps + 1, steps, dtype=torch.float64), diagonal=-1))


def test_a_line_has_one_component() -> None:
    torch.testing.assert_close(shares(line()), torch.eye(6, dtype=torch.float64)[0], atol=1e-12, rtol=0)
    assert effective_rank(line()).item() == pytest.approx(1, abs=1e-9)
    assert deviation(line()).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("axis", [1.0, 3.0])
def test_an_ellipse_has_the_squares_of_its_axes_as_shares(axis: float) -> None:
    """The entropy is of those shares; a circle has two equal ones."""
    angles = torch.arange(16, dtype=torch.float64) * math.pi / 8
    ellipse = turned(torch.stack([axis * angles.cos(), angles.sin()], -1))
    expected = [axis**2 / (axis**2 + 1), 1 / (axis**2 + 1)]
    assert shares(ellipse, 4).tolist() == pytest.approx([*expected, 0, 0], abs=1e-12)
    assert effective_rank(ellipse).item() == pytest.approx(math.exp(-sum(p * math.log(p) for p in expected)))


def test_half_a_circle_deviates_by_half_its_chord() -> None:
    angles = torch.linspace(0, math.pi, 9, dtype=torch.float64)
    assert deviation(turned(torch.stack([angles.cos(), angles.sin()], -1))).item() == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [3, 5, 12])
def test_a_walk_at_right_angles_has_the_shares_of_its_closed_form(steps: int) -> None:
    points = staircase(steps)
    torch.testing.assert_close(shares(points), random_walk(steps), atol=1e-12, rtol=0)
    centred = points.numpy() - points.numpy().mean(0)
    values = np.linalg.eigvalsh(centred.T @ centred)[::-1]
    expected = values[values > 1e-9] / values.sum()
    assert random_walk(steps).tolist()[:3] == pytest.approx(expected[:3])
    assert effective_rank(points).item() == pytest.approx(math.exp(-(expected * np.log(expected)).sum()))


def test_a_long_walk_has_three_quarters_in_two_components() -> None:
    expected = [6 / (math.pi * k) ** 2 for k in (1, 2, 3)]
    assert random_walk(2000, 3).tolist() == pytest.approx(expected, abs=1e-3)


def test_a_geometry_of_nothing_raises() -> None:
    with pytest.raises(ValueError, match="does not move"):
        shares(torch.ones(4, 3))
    with pytest.raises(ValueError, match="where it began"):
        deviation(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]))


def test_float32_states_are_looked_at_in_float64() -> None:
    """A bend of 1e-6 far from the origin."""
    points = torch.tensor([[0.0, 0.0], [0.5, 1e-6], [1.0, 0.0]])
    assert shares(points, 2).dtype == torch.float64
    assert shares(points, 2)[1].item() == pytest.approx((2e-12 / 3) / 0.5, rel=1e-4)


def test_own_planes_keep_distances_and_run_forward_and_up() -> None:
    angles = torch.linspace(0, 2, 7, dtype=torch.float64)
    arc = torch.stack([angles.cos(), angles.sin()], -1)
    points = torch.stack([turned(arc), turned(arc.flip(0), 1), turned(-2 * arc, 2)])
    plane = own_plane(points)
    torch.testing.assert_close(torch.cdist(plane, plane), torch.cdist(points, points))
    assert (plane[:, -1, 0] > plane[:, 0, 0]).all()
    assert (plane[..., 1].amax(1) > -plane[..., 1].amin(1)).all()
    torch.testing.assert_close(plane.mean(1), torch.zeros(3, 2, dtype=torch.float64))
    assert own_plane(line()[None, :, :1]).shape == (1, 5, 2)


def test_means_and_deviations_are_over_trajectories() -> None:
    points = torch.stack([staircase(12), circle(13), line()[[0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]]])
    found = geometry_of("walk", points, paths=2)
    each = np.array([np.cumsum(shares(one).numpy()) for one in points])
    assert [spread.mean for spread in found.explained] == pytest.approx(each.mean(0))
    assert [spread.std for spread in found.explained] == pytest.approx(each.std(0, ddof=1))
    ranks = [effective_rank(one).item() for one in points]
    assert (found.effective_rank.mean, found.effective_rank.std) == pytest.approx(
        (np.mean(ranks), np.std(ranks, ddof=1))
    )
    assert found.deviation.mean == pytest.approx(np.mean([deviation(one).item() for one in points]))
    assert (found.solver, found.steps, found.count, found.paths.shape) == ("walk", 12, 3, (2, 13, 2))
    assert geometry_of("line", line()[None]).effective_rank.std == 0


# ---- of a model ----


@pytest.mark.parametrize("schedule", [VP(), Linear()])
def test_trajectories_run_from_the_seeds_noise_to_the_seeds_latents(pipeline: Pipeline, schedule: Schedule) -> None:
    """Whatever the batch size; with guidance and the seeds' own classes."""
    trained = pipeline.load()
    model = trained.model
    model.schedule = schedule
    table = SOLVERS["heun"].build(model.schedule, karras(model.schedule, 4))
    config = SamplingConfig(Guidance(3.0), batch_size=2)
    states = trajectories(trained, table, SEEDS, config)
    assert states.shape == (5, 5, math.prod(model.latent_shape))
    t = torch.tensor(table.grid[0], dtype=torch.float64)
    noise = noise_of(SEEDS, model.latent_shape).flatten(1)
    scale = (model.schedule.alpha(t) ** 2 + model.schedule.sigma(t) ** 2).sqrt()
    torch.testing.assert_close(states[:, 0], (scale * noise).float(), atol=1e-5, rtol=1e-5)
    ends = sample_latents(trained, table, SEEDS, config, labels_of(SEEDS, model.classes))
    torch.testing.assert_close(states[:, -1], ends.latents.flatten(1))
    torch.testing.assert_close(
        trajectories(trained, table, SEEDS, SamplingConfig(Guidance(3.0))), states, atol=1e-5, rtol=1e-4
    )


def test_the_geometry_of_a_model_is_that_of_its_trajectories(pipeline: Pipeline) -> None:
    trained = pipeline.load()
    schedule = trained.model.schedule
    table = SOLVERS["euler"].build(schedule, karras(schedule, 8))
    found = trajectory_geometry(trained, table, SEEDS, paths=3)
    expected = geometry_of("euler", trajectories(trained, table, SEEDS), 3)
    assert (found.explained, found.deviation) == (expected.explained, expected.deviation)
    assert (found.solver, found.steps, found.count, len(found.paths)) == ("euler", 8, 5, 3)


def test_a_solver_per_sample_and_states_that_are_not_finite_raise(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = pipeline.load()
    schedule = trained.model.schedule
    grid = karras(schedule, 2)
    card = SolverCard("amed-predictor", "karras", fingerprint(schedule), trained.hash, 4, False, 1.0, 0, "")
    with pytest.raises(UsageError, match="learned constants"):
        trajectory_geometry(trained, LearnedSolver(card, grid, Predictor(4, 2, AMEDConfig()), schedule), SEEDS)
    monkeypatch.setattr("midway.gen.sweep.trajectories.trajectories", lambda *_: torch.full((2, 3, 4), math.nan))
    with pytest.raises(DivergedError, match="euler"):
        trajectory_geometry(trained, SOLVERS["euler"].build(schedule, grid), SEEDS)


# ---- drawn ----


def drawn() -> TrajectoryGeometry:
    return geometry_of("heun", torch.stack([staircase(12), circle(13), 2 * staircase(12)]))


def test_the_plot_shows_shares_in_per_cent_beside_the_random_walk_and_every_path() -> None:
    geometry = drawn()
    left, right = trajectory_figure(geometry).axes
    walk, mean = (np.asarray(line.get_ydata()) for line in left.lines[:2])
    assert walk == pytest.approx((100 * random_walk(12).cumsum(0)).numpy())
    assert mean == pytest.approx([100 * spread.mean for spread in geometry.explained])
    drawn_at = [np.stack([np.asarray(line.get_xdata()), np.asarray(line.get_ydata())], -1) for line in right.lines]
    paths = [at for at in drawn_at if len(at) == 13]
    assert np.array_equal(np.stack(paths), geometry.paths.numpy())
    assert np.array_equal(np.concatenate(drawn_at[1:3]), geometry.paths[0, [0, -1]].numpy())
    assert right.lines[1].get_markerfacecolor() == PAPER != right.lines[2].get_markerfacecolor()


def test_bars_stay_below_a_hundred_and_the_bytes_are_the_same() -> None:
    straight = line()[[0, 1, 1, 2, 3, 4]]
    left = trajectory_figure(geometry_of("heun", torch.stack([straight, straight, straight, staircase(5)]))).axes[0]
    bars = [bar for bar in left.collections if isinstance(bar, LineCollection)]
    ends = [np.asarray(segment)[:, 1].max() for bar in bars for segment in bar.get_segments()]
    assert len(ends) == 6
    assert max(ends) <= 100 + 1e-9
    first, second = (Drawing("", "", "", lambda narrow: trajectory_figure(drawn(), narrow)) for _ in range(2))
    assert first.png() == second.png() and first.svg(True) == second.svg(True)
