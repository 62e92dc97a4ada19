"""Fréchet distance and streaming statistics against closed forms, invariances, scipy and other libraries."""

import warnings
from functools import partial
from typing import cast

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from midway.gen.metrics.frechet import Root, frechet_distance, frechet_distance_of_features
from midway.gen.metrics.moments import FeatureStatistics

D = 12
ROOTS: tuple[Root, ...] = ("eigen", "newton-schulz")
BY_ROOT = pytest.mark.parametrize("root", ROOTS)


def gaussian(mean: Tensor, covariance: Tensor, count: int = 1000) -> FeatureStatistics:
    """The statistics of an imagined sample with exactly this mean and covariance."""
    return FeatureStatistics(count, mean, (count - 1) * covariance)


def features(seed: int, count: int = 400, dim: int = D) -> Tensor:
    """float64 (count, dim), correlated and shifted, different for each seed."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    shift = torch.randn(dim, generator=generator, dtype=torch.float64)
    return torch.randn(count, dim, generator=generator, dtype=torch.float64) @ mix + shift


def distance(x: Tensor, y: Tensor, root: Root = "eigen") -> float:
    return frechet_distance(FeatureStatistics.of(x), FeatureStatistics.of(y), root)


@BY_ROOT
def test_diagonal_closed_form(root: Root) -> None:
    generator = torch.Generator().manual_seed(0)
    m1, m2, v1, v2 = torch.rand(4, D, generator=generator, dtype=torch.float64)
    expected = float((m1 - m2).square().sum() + (v1.sqrt() - v2.sqrt()).square().sum())
    a, b = gaussian(m1, v1.diag()), gaussian(m2, v2.diag())
    assert frechet_distance(a, b, root) == pytest.approx(expected, rel=1e-11)


@BY_ROOT
def test_agrees_with_the_matrix_square_root(root: Root) -> None:
    a, b = FeatureStatistics.of(features(1)), FeatureStatistics.of(features(2))
    product = np.real(np.asarray(sqrtm((a.covariance @ b.covariance).numpy())))
    spread = np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * product)
    expected = float((a.mean - b.mean).square().sum()) + float(spread)
    assert frechet_distance(a, b, root) == pytest.approx(expected, rel=1e-9)


def test_distance_to_itself_is_zero() -> None:
    """Never below, though rounding is as often negative as positive."""
    assert all(0 <= distance(features(seed), features(seed)) < 1e-10 for seed in range(20))


def test_singular_covariances_give_a_finite_distance() -> None:
    """Features on lines: commuting rank-1 covariances, whose distance is the squared difference of deviations."""
    line = torch.linspace(-1, 1, 100).double()[:, None] * torch.ones(1, D).double()
    deviation = float(line[:, 0].std())
    assert distance(line, 3 * line) == pytest.approx(D * (3 * deviation - deviation) ** 2, rel=1e-9)


FORMS = {
    "eigen": distance,
    "newton-schulz": partial(distance, root="newton-schulz"),
    "features": frechet_distance_of_features,
}
"""Ways to the distance of two sets of features."""
FEW = 9  # images, which only the last form takes without loss
ALL_WAYS = pytest.mark.parametrize(
    ("form", "count"), [(form, 400) for form in FORMS] + [("features", FEW)], ids=[*FORMS, "few features"]
)


@ALL_WAYS
@pytest.mark.filterwarnings("ignore:.*images for")
def test_invariances(form: str, count: int) -> None:
    """Symmetric, unchanged by rotations and shifts of both, and with the square of a factor."""
    way, x, y = FORMS[form], features(1, count), features(2)
    expected = pytest.approx(way(x, y), rel=1e-9)
    rotation, _ = torch.linalg.qr(features(3, D))
    assert way(y, x) == expected
    assert way(x @ rotation, y @ rotation) == expected
    assert way(x + 3, y + 3) == expected
    assert way(2.5 * x, 2.5 * y) / 2.5**2 == expected


# ---- roots and forms ----


def graded(condition: float, seed: int, dim: int = 48) -> tuple[FeatureStatistics, FeatureStatistics, float]:
    """Two Gaussians whose covariances share a basis and have this condition, and their distance in closed form."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    v1, v2 = condition ** -torch.rand(2, dim, generator=generator, dtype=torch.float64)
    expected = float((v1.sqrt() - v2.sqrt()).square().sum())
    zero = torch.zeros(dim, dtype=torch.float64)
    return gaussian(zero, (basis * v1) @ basis.T), gaussian(zero, (basis * v2) @ basis.T), expected


@BY_ROOT
@pytest.mark.parametrize(("condition", "error"), [(1e2, 1e-13), (1e5, 1e-12), (1e8, 1e-11)])
def test_small_eigenvalues_are_not_lost(root: Root, condition: float, error: float) -> None:
    """A factor from eigenvectors misses the second and third by factors of 20 and more."""
    for seed in range(5):
        a, b, expected = graded(condition, seed)
        assert frechet_distance(a, b, root) == pytest.approx(expected, rel=error)


@pytest.mark.filterwarnings("ignore:.*images for")
@pytest.mark.parametrize(
    ("counts", "message"),
    [((9, 400), r"residual .* \d\.\de"), ((400, 9), r"residual .* \d\.\de"), ((9, 9), "both covariances are singular")],
)
def test_an_iteration_without_end_raises(counts: tuple[int, int], message: str) -> None:
    a, b = (FeatureStatistics.of(features(seed, count, 48)) for seed, count in zip((1, 2), counts, strict=True))
    with pytest.raises(ValueError, match=message) as caught:
        frechet_distance(a, b, "newton-schulz")
    assert "root='eigen'" in str(caught.value)
    assert "more images" in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*images for")
def test_an_iteration_that_ends_is_right() -> None:
    """Rounding may make a singular matrix regular: then the root is as near as that of eigenvalues, or it raises."""
    ended = 0
    for dim in range(2, 14):
        few, many = features(dim, dim), features(2)
        few, many = few[:, :dim], many[:, :dim]
        try:
            found = distance(many, few, "newton-schulz")
        except ValueError:
            continue
        ended += 1
        assert found == pytest.approx(frechet_distance_of_features(many, few), rel=1e-6)
    assert ended


def test_raises_for_an_unknown_root() -> None:
    a = FeatureStatistics.of(features(1))
    with pytest.raises(ValueError, match="'newton-schulz'"):
        frechet_distance(a, a, cast(Root, "sqrtm"))


def of_rank(ranks: tuple[int, int], counts: tuple[int, int], dim: int) -> tuple[Tensor, Tensor, float]:
    """Two sets whose centred features have the right singular vectors in common: their distance in closed form."""
    generator = torch.Generator().manual_seed(sum(counts))
    basis, _ = torch.linalg.qr(torch.randn(dim, dim, generator=generator, dtype=torch.float64))
    sets, deviations = [], torch.zeros(2, dim, dtype=torch.float64)
    for i, (rank, count) in enumerate(zip(ranks, counts, strict=True)):
        rows = torch.randn(count, rank, generator=generator, dtype=torch.float64)
        left, _ = torch.linalg.qr(rows - rows.mean(0))
        deviations[i, :rank] = torch.rand(rank, generator=generator, dtype=torch.float64) + 0.1
        sets.append(left * deviations[i, :rank] * (count - 1) ** 0.5 @ basis[:, :rank].T + i)
    return sets[0], sets[1], dim + float((deviations[0] - deviations[1]).square().sum())


@pytest.mark.filterwarnings("ignore:.*images for")
@pytest.mark.parametrize("counts", [(10, 15), (10, 24), (24, 10), (10, 300), (300, 10), (25, 26), (200, 300)])
def test_features_closed_form(counts: tuple[int, int]) -> None:
    dim = 24
    x, y, expected = of_rank((min(dim, counts[0] - 1), min(dim, counts[1] - 1)), counts, dim)
    assert frechet_distance_of_features(x, y) == pytest.approx(expected, rel=1e-14 if min(counts) <= dim else 1e-12)


@pytest.mark.filterwarnings("ignore:.*images for")
def test_few_features_are_nearer_than_covariances() -> None:
    """Without images enough the eigenvalue form keeps half of the digits, the form of features all of them."""
    x, y, expected = of_rank((20, 40), (21, 41), 64)
    form, eigen = frechet_distance_of_features(x, y), distance(x, y)
    assert eigen == pytest.approx(expected, rel=1e-7)
    assert abs(form - expected) < 1e-14 * expected < abs(eigen - expected)


def test_forms_agree_beyond_the_dimension() -> None:
    assert frechet_distance_of_features(features(1), features(2)) == distance(features(1), features(2))


@pytest.mark.filterwarnings("ignore:.*images for")
def test_one_singular_covariance_gives_the_same_from_either_side() -> None:
    """The other one is factored, whichever it is."""
    few, many = features(1, FEW), features(2)
    assert distance(few, many) == distance(many, few)
    assert distance(few, many) == pytest.approx(frechet_distance_of_features(few, many), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*images for")
def test_half_precision_features_are_measured_in_float64() -> None:
    x, y = features(1, FEW).bfloat16(), features(2, FEW).bfloat16()
    assert frechet_distance_of_features(x, y) == frechet_distance_of_features(x.double(), y.double())


# ---- other libraries ----


@pytest.mark.parametrize("dim", [8, 64])
def test_agrees_with_torch_fidelity(dim: int) -> None:
    metric = pytest.importorskip("torch_fidelity.metric_fid", reason="a peer")
    x, y = features(1, dim=dim), features(2, dim=dim)
    done = [{"mu": z.mean(0).numpy(), "sigma": np.cov(z.numpy(), rowvar=False)} for z in (x, y)]
    expected = metric.fid_statistics_to_metric(*done, verbose=False)["frechet_inception_distance"]
    assert distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_agrees_with_torchmetrics() -> None:
    fid = pytest.importorskip("torchmetrics.image.fid", reason="a peer")
    network = torch.nn.Identity()
    network.register_buffer("num_features", torch.tensor(D))  # which it reads
    metric = fid.FrechetInceptionDistance(network)
    for real, seed in ((True, 1), (False, 2)):
        for part in features(seed).split(90):
            metric.update(part, real=real)
    assert distance(features(1), features(2)) == pytest.approx(float(metric.compute()), rel=1e-9)


# ---- statistics ----


@pytest.mark.parametrize(("offset", "lost"), [(0.0, 1e-10), (50.0, 1e-10), (1e6, 1e-8), (1e8, 1e-6)])
def test_streamed_moments_equal_two_passes(offset: float, lost: float) -> None:
    """Second moments about the mean, which one pass does not know; what is lost is what float64 features lack."""
    x = features(1) + offset
    streamed = sum((FeatureStatistics.of(part) for part in x[7:].split(31)), FeatureStatistics.of(x[:7]))
    centred = x - x.mean(0)
    torch.testing.assert_close(streamed.covariance, centred.T @ centred / (len(x) - 1), rtol=lost, atol=lost)
    assert frechet_distance(streamed, FeatureStatistics.of(features(2) + offset)) == pytest.approx(
        distance(features(1), features(2)), rel=lost
    )


@pytest.mark.parametrize("sizes", [[1, 399], [200, 200], [0, 7, 393], [100] * 4])
def test_merged_shards_equal_the_whole(sizes: list[int]) -> None:
    parts = [FeatureStatistics.of(part) for part in features(1).split(sizes)]
    merged, whole = sum(parts[1:], parts[0]), FeatureStatistics.of(features(1))
    assert merged.count == whole.count == 400
    torch.testing.assert_close(merged.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(merged.covariance, whole.covariance, rtol=1e-11, atol=1e-11)


def test_order_of_images_and_shards_does_not_matter() -> None:
    x = features(1)
    shuffled = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    parts = [FeatureStatistics.of(part) for part in shuffled.split(90)]
    merged = sum(parts[:-1][::-1], parts[-1])
    assert frechet_distance(merged, FeatureStatistics.of(x)) < 1e-10


@pytest.mark.parametrize("offset", [5.0, 50.0])
def test_a_large_mean_does_not_cost_precision(offset: float) -> None:
    """float32 features and sums lose 1e-3 at offset 5 and everything at 50."""
    x, y = features(1).float() + offset, features(2).float() + offset
    centre = x.double().mean(dim=0)
    expected = distance(x.double() - centre, y.double() - centre)
    assert distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_half_precision_features_are_summed_in_float64() -> None:
    x = torch.full((5000, 2), 3.0, dtype=torch.bfloat16)
    assert FeatureStatistics.of(x).mean.tolist() == [3.0, 3.0]


def test_tensors_round_trip() -> None:
    a = FeatureStatistics.of(features(1))
    b = FeatureStatistics.from_tensors(a.to_tensors())
    assert b.count == a.count
    assert torch.equal(b.mean, a.mean)
    assert torch.equal(b.scatter, a.scatter)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(50), r"expected \(N, D\)"),
        (torch.zeros(50, 1), r"expected \(N, D\)"),
        (torch.zeros(5, 4, 4), r"expected \(N, D\)"),
        (torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), "1 of 2 feature vectors are not finite"),
        (torch.tensor([[0.0, float("inf")]]), "1 of 1 feature vectors are not finite"),
    ],
)
def test_raises_for_unusable_features(bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureStatistics.of(bad)
    for pair in ((bad, torch.zeros(5, 2)), (torch.zeros(5, 2), bad)):
        with pytest.raises(ValueError, match=message):
            frechet_distance_of_features(*pair)


@pytest.mark.parametrize(
    ("bad", "message"),
    [(features(1, count=1), "at least 2"), (features(2, dim=D + 1), "one feature network")],
    ids=["a single image", "other dimensions"],
)
def test_raises_for_sets_that_cannot_be_compared(bad: Tensor, message: str) -> None:
    for measure in (distance, frechet_distance_of_features):
        for pair in ((bad, features(2)), (features(2), bad)):
            with pytest.raises(ValueError, match=message):
                measure(*pair)


def test_raises_for_adding_different_dimensions() -> None:
    with pytest.raises(ValueError, match="one feature network"):
        _ = FeatureStatistics.of(features(1)) + FeatureStatistics.of(features(2, dim=D + 1))


def test_raises_for_incomplete_or_misshapen_tensors() -> None:
    tensors = FeatureStatistics.of(features(1)).to_tensors()
    with pytest.raises(ValueError, match="lack scatter"):
        FeatureStatistics.from_tensors({name: tensor for name, tensor in tensors.items() if name != "scatter"})
    with pytest.raises(ValueError, match="float64 mean"):
        FeatureStatistics.from_tensors({**tensors, "scatter": tensors["scatter"].float()})


def test_warns_below_twice_the_dimension() -> None:
    with pytest.warns(UserWarning, match="23 images for 12 features"):
        distance(features(1, count=23), features(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distance(features(1, count=24), features(2))
    with pytest.warns(UserWarning, match="9 images for 12 features"):
        frechet_distance_of_features(features(1), features(2, count=FEW))
