"""Precision, recall, density and coverage against toy sets worked out by hand, loops over exact integers, and a peer."""

import math

import pytest
import torch
from torch import Tensor

from midway.gen.metrics import precision_recall as manifold
from midway.gen.metrics.precision_recall import density_coverage, precision_recall


def points(*values: float) -> Tensor:
    """On a line, in two dimensions."""
    return torch.tensor([[value, 0.0] for value in values])


def features(seed: int, count: int, dim: int = 16) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def four(reference: Tensor, generated: Tensor, k: int) -> tuple[float, float, float, float]:
    one, two = precision_recall(reference, generated, k), density_coverage(reference, generated, k)
    assert one.k == two.k == k
    return one.precision, one.recall, two.density, two.coverage


def by_loops(x: Tensor, y: Tensor, k: int) -> tuple[float, float, float, float]:
    """The definitions in exact integers: features are whole numbers."""

    def square(a: list[int], b: list[int]) -> int:
        return sum((p - q) ** 2 for p, q in zip(a, b, strict=True))

    def radius(i: int, z: list[list[int]]) -> int:
        return sorted(square(z[i], other) for j, other in enumerate(z) if j != i)[k - 1]

    xs, ys = ([[int(v) for v in row] for row in z.tolist()] for z in (x, y))
    real, fake = ([radius(i, z) for i in range(len(z))] for z in (xs, ys))
    precision = sum(any(square(a, b) <= r for b, r in zip(xs, real, strict=True)) for a in ys) / len(ys)
    recall = sum(any(square(a, b) <= r for b, r in zip(ys, fake, strict=True)) for a in xs) / len(xs)
    density = sum(square(a, b) < r for a in ys for b, r in zip(xs, real, strict=True)) / (k * len(ys))
    coverage = sum(any(square(a, b) < r for a in ys) for b, r in zip(xs, real, strict=True)) / len(xs)
    return precision, recall, density, coverage


def test_a_toy_worked_out_by_hand() -> None:
    """Reference 0, 1, 3 with k = 1 has radii 1, 1, 2; generated 0.5, 2, 9 has 1.5, 1.5, 7.

    0.5 is inside the balls of 0 and 1; 2 on the rim of that of 1 and inside that of 3; 9 in none.
    """
    assert four(points(0, 1, 3), points(0.5, 2, 9), 1) == pytest.approx((2 / 3, 1, (2 + 1) / 3, 1))
    assert four(points(0, 1, 3), points(2, 9), 1) == pytest.approx((1 / 2, 1, 1 / 2, 1 / 3))
    assert four(points(0, 1, 10), points(9.5, 9.9, 20), 1) == pytest.approx((2 / 3, 1 / 3, 2 / 3, 1 / 3))


def test_rims_belong_to_closed_balls_alone() -> None:
    """Radii 2 and 2: 4 lies on the rim of 2, and is nowhere inside."""
    assert four(points(0, 2), points(4, 100), 1)[::2] == (0.5, 0.0)
    assert density_coverage(points(0, 2), points(4, 100), 1).coverage == 0


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize("block", [2**22, 40, 1])
def test_agrees_with_loops_where_ties_abound(k: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few whole numbers in three dimensions: many distances are equal, many images are copies."""
    monkeypatch.setattr(manifold, "_BLOCK", block)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randint(0, 4, (30, 3), generator=generator)
        y = torch.randint(1, 6, (20, 3), generator=generator)
        y[:6] = x[:6]
        assert four(x.double(), y.double(), k) == pytest.approx(by_loops(x, y, k), abs=1e-15)
        # The same far from 0, where the quick form has lost all digits of the differences.
        assert four(x.double() + 2**30, y.double() + 2**30, k) == pytest.approx(by_loops(x, y, k), abs=1e-15)


def test_copies_lie_on_rims() -> None:
    """Copies of reference images, not whole numbers: only equal bits put them on the rims of their neighbours' balls."""
    x = features(1, 60) * torch.arange(1, 17) ** -0.5 + 5
    distances = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    radii = distances.sort(dim=1).values[:, 5]
    assert (distances == radii).any(0).all()
    assert density_coverage(x, x.flip(0)).density == float((distances < radii).sum()) / (5 * 60)


def test_identical_sets() -> None:
    x = features(1, 50)
    assert precision_recall(x, x).precision == precision_recall(x, x).recall == 1
    assert density_coverage(x, x).coverage == 1
    assert density_coverage(x, x).density == 1  # the image itself and k - 1 neighbours


def test_swapped_sets_swap_precision_and_recall() -> None:
    x, y = features(1, 60), 0.7 * features(2, 45) + 0.4
    one, two = precision_recall(x, y), precision_recall(y, x)
    assert (one.precision, one.recall) == (two.recall, two.precision)
    assert one.precision != one.recall


def test_one_collapsed_image_is_precise_and_recalls_little() -> None:
    x = features(1, 60)
    found = precision_recall(x, x[:1].expand(60, -1))
    assert found.precision == 1
    assert found.recall == 1 / 60
    far = precision_recall(x, x + 1000)
    assert (far.precision, far.recall) == (0, 0)


def test_equal_distributions_have_density_one() -> None:
    """E density = 1 and E coverage = 1 - 2^-k for large sets (Naeem et al. 2020)."""
    found = [density_coverage(features(i, 300, 4), features(100 + i, 300, 4)) for i in range(5)]
    assert sum(f.density for f in found) / 5 == pytest.approx(1, abs=0.06)
    assert sum(f.coverage for f in found) / 5 == pytest.approx(1 - 2**-5, abs=0.02)


def test_default_neighbours_are_those_of_the_papers() -> None:
    assert precision_recall(features(1, 9), features(2, 9)).k == 3
    assert density_coverage(features(1, 9), features(2, 9)).k == 5


def test_a_block_is_as_large_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, within = [], manifold._within
    monkeypatch.setattr(
        manifold,
        "_within",
        lambda block, *rest, **more: (sizes.append(block.squares.shape), within(block, *rest, **more))[1],
    )
    monkeypatch.setattr(manifold, "_BLOCK", 100)
    density_coverage(features(1, 30), features(2, 40))
    assert sizes == [(3, 30)] * 13 + [(1, 30)]


@pytest.mark.parametrize("many", [0.0, 1.0])
def test_pairs_and_blocks_have_equal_bits(many: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the two ways a doubtful distance is found, and however many at a time."""
    x, y = features(1, 40), features(2, 50)
    (_, block), *_ = manifold._blocks(x, y)
    where = torch.rand(40, 50, generator=torch.Generator().manual_seed(0)) < 0.3
    expected = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")[where]
    monkeypatch.setattr(manifold, "_MANY", many)
    monkeypatch.setattr(manifold, "_PAIRS", 7 * 16)
    assert torch.equal(block.exact(where), expected)
    assert len(block.exact(torch.zeros_like(where))) == 0


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_the_quick_form_is_as_near_as_it_says(offset: float) -> None:
    x, y = features(1, 200, 64) + offset, features(2, 200, 64) + offset
    (_, block), *_ = manifold._blocks(x, y)
    exact = (x[:, None] - y[None]).square().sum(-1)
    assert ((block.squares - exact).abs() <= block.slack).all()
    assert (block.slack < 1e-11 * (x.square().sum(1).max() + y.square().sum(1).max())).all()


def test_nothing_depends_on_what_the_quick_form_may_be_off_by() -> None:
    """Whatever its errors are within its slack, radii and decisions are those of the differences."""
    x, y = features(1, 50, 3), features(2, 60, 3)
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    radii = distances.sort(dim=1).values[:, 4:5]
    for seed in range(5):
        slack = 0.5 * torch.rand(50, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        errors = slack * (2 * torch.rand(50, 60, generator=torch.Generator().manual_seed(9), dtype=torch.float64) - 1)
        block = manifold._Block(x, y, distances.square() + 0.99 * errors, slack)
        assert torch.equal(manifold._kth(block, 5), radii[:, 0])
        assert torch.equal(manifold._within(block, radii, closed=True), distances <= radii)
        assert torch.equal(manifold._within(block, radii, closed=False), distances < radii)


def test_agrees_with_torch_fidelity() -> None:
    peer = pytest.importorskip("torch_fidelity.metric_prc", reason="a peer")
    x, y = features(1, 70), 0.8 * features(2, 50) + 0.2
    precision, recall = peer.calculate_precision_recall_full(y, x, 3, 1000)
    found = precision_recall(x, y, 3)
    assert (found.precision, found.recall) == pytest.approx((precision, recall), abs=1e-6)
    assert 0 < recall < 1


def test_raises_for_more_neighbours_than_there_are() -> None:
    x = features(1, 20)
    for k in (0, 20, 21):
        with pytest.raises(ValueError, match=f"k is {k} for 20 images"):
            precision_recall(x, features(2, 30), k)
        with pytest.raises(ValueError, match=f"k is {k} for 20 images"):
            density_coverage(x, features(2, 30), k)
    with pytest.raises(ValueError, match="k is 20 for 20 images"):
        precision_recall(features(2, 30), x, 20)
    assert density_coverage(features(2, 30), x, 20).k == 20  # generated images have no balls
    assert precision_recall(x, features(2, 30), 19).k == 19


@pytest.mark.parametrize("bad", [torch.zeros(9), torch.full((9, 16), math.inf), torch.zeros(9, 5)])
def test_raises_for_sets_that_cannot_be_compared(bad: Tensor) -> None:
    for measure in (precision_recall, density_coverage):
        with pytest.raises(ValueError, match=r"expected \(N, D\)|9 of 9 feature vectors|one feature network"):
            measure(features(1, 20), bad)
