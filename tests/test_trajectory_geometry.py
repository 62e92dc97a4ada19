"""Shapes whose principal components are known, the Pareto front by hand, and a model's own trajectories."""

import math

import pytest
import torch
from conftest import Pipeline

from midway.gen.errors import UsageError
from midway.gen.pareto import pareto_front
from midway.gen.plans import PlanConfig, make_plans
from midway.gen.report_sections import code_section, trajectory_section
from midway.gen.sampling import SamplingConfig, sample_latents
from midway.gen.splits import load_splits
from midway.gen.trajectory_geometry import (
    deviation,
    effective_rank,
    geometry_of,
    random_walk,
    shared_plane,
    shares,
    trajectories,
)
from midway.gen.trajectory_plot import trajectory_png

pytestmark = pytest.mark.usefixtures("one_thread")


def rotated(points: torch.Tensor, dims: int = 7) -> torch.Tensor:
    """Points in more dimensions, turned at random: shapes do not change."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(dims, dims, generator=generator, dtype=torch.float64))[0]
    return torch.nn.functional.pad(points.double(), (0, dims - points.shape[-1])) @ basis + 3


def test_a_straight_line_has_one_component() -> None:
    line = rotated(torch.linspace(0, 5, 9)[:, None])
    assert shares(line)[0] == pytest.approx(1)
    assert effective_rank(line) == pytest.approx(1)
    assert deviation(line) == pytest.approx(0, abs=1e-12)


def test_a_circle_has_two_equal_components() -> None:
    angle = torch.arange(12) * (2 * math.pi / 12)
    circle = rotated(torch.stack([angle.cos(), angle.sin()], 1))
    assert shares(circle)[:2].tolist() == pytest.approx([0.5, 0.5])
    assert effective_rank(circle) == pytest.approx(2)


def test_a_half_circle_strays_by_half_its_chord() -> None:
    angle = torch.linspace(0, math.pi, 9)
    assert deviation(rotated(torch.stack([angle.cos(), angle.sin()], 1))) == pytest.approx(0.5)


def test_a_walk_at_right_angles_has_the_shares_of_the_formula() -> None:
    walk = torch.cat([torch.zeros(1, 20), torch.eye(20).cumsum(0)])
    assert shares(walk).tolist() == pytest.approx(random_walk(20).tolist())
    assert random_walk(2000)[:2].sum() == pytest.approx(0.76, abs=0.005)


def test_shares_of_a_batch_are_those_of_each() -> None:
    points = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1))
    together = shares(points)
    assert all(torch.allclose(together[i], shares(points[i])) for i in range(3))
    assert together.sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_paths_in_one_plane_are_wholly_shown() -> None:
    flat = rotated(torch.randn(12, 2, generator=torch.Generator().manual_seed(2))).view(3, 4, 7)
    plane, held = shared_plane(flat)
    assert held == pytest.approx(1) and plane.shape == (3, 4, 2)
    assert torch.cdist(plane[0], plane[0]) == pytest.approx(torch.cdist(flat[0], flat[0]), abs=1e-9)


@pytest.mark.parametrize(
    "points", [torch.ones(4, 3), torch.tensor([[0.0, 0], [1, 1], [0, 0]])], ids=["still", "closed"]
)
def test_what_has_no_shape_is_refused(points: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="trajectory"):
        geometry_of("heun", points[None])


def test_a_models_trajectories_end_where_its_samples_are(pipeline: Pipeline) -> None:
    trained, seeds = pipeline.load(), torch.arange(3, 8)
    (plan,) = make_plans(trained, "heun", 8, PlanConfig(grids=("karras",))).values()
    assert not hasattr(plan, "rule")
    config = SamplingConfig(batch_size=2)
    points = trajectories(trained, plan, seeds, config)  # pyright: ignore[reportArgumentType]
    latents = sample_latents(trained, plan, seeds, config).latents
    assert points.shape == (5, 5, latents[0].numel())
    torch.testing.assert_close(points[:, -1], latents.flatten(1))


def test_the_sections_of_a_report(pipeline: Pipeline) -> None:
    trained = pipeline.load()
    shape = trajectory_section(trained, SamplingConfig())
    assert "64 trajectories" in shape.text and shape.png is not None and shape.png.startswith(b"\x89PNG")
    images = load_splits(trained.data).held_out.images
    latents = trained.tokenizer.encode_latents((images[:50].float() / 127.5 - 1).to(trained.tokenizer.device))
    codes = code_section(trained, images[:50], latents)
    assert codes is not None
    tokens = 50 * trained.tokenizer.tokens
    used = trained.tokenizer.encode_indices(images[:50].float() / 127.5 - 1).unique().numel()
    said = f"{used:,} different ones"
    assert codes.text.count(said) == 2 and f"in {tokens:,} tokens of 50" in codes.text, "the same images on both sides"


def test_a_plot_is_the_same_bytes_for_the_same_geometry() -> None:
    found = geometry_of("heun", torch.randn(4, 9, 6, generator=torch.Generator().manual_seed(3)))
    assert trajectory_png(found) == trajectory_png(found)


def test_a_solver_of_its_own_steps_is_no_table(pipeline: Pipeline) -> None:
    from midway.gen.trajectory_geometry import trajectory_geometry

    trained = pipeline.load()
    plans = make_plans(trained, "amed", 4, PlanConfig(grids=("uniform",)))
    with pytest.raises(UsageError, match="steps of its own"):
        trajectory_geometry(trained, plans["uniform"], torch.arange(2))


# ---- the Pareto front ----


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 5), (2, 4), (3, 6), (4, 1)], [0, 1, 3]),
        ([(4, 1), (1, 5), (1, 4)], [2, 0]),
        ([(1, 1), (1, 1), (2, 1)], [0, 1]),
        ([(1, math.inf), (math.nan, 0), (2, 3)], [2]),
        ([], []),
    ],
    ids=str,
)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]], front: list[int]) -> None:
    assert pareto_front(points) == front
