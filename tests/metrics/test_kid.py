"""Kernel inception distance against double loops, the exact value of its expectation, and torch-fidelity."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor

from midway.gen.metrics import kid as kernel_distance
from midway.gen.metrics.kid import Kid, kid

D = 6


def features(seed: int, count: int, shift: float = 0.0, dim: int = D) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def mmd(x: Tensor, y: Tensor) -> float:
    """The estimate from whole sets."""
    return kid(x, y, size=None).value


def by_loops(x: Tensor, y: Tensor) -> float:
    """The definition, pair by pair."""

    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (sum(float(p) * float(q) for p, q in zip(a, b, strict=True)) / len(a) + 1) ** 3

    xs, ys = x.double().numpy(), y.double().numpy()
    own = [np.mean([kernel(z[i], z[j]) for i, j in itertools.permutations(range(len(z)), 2)]) for z in (xs, ys)]
    return float(own[0] + own[1] - 2 * np.mean([kernel(a, b) for a in xs for b in ys]))


@pytest.mark.parametrize(("counts", "block"), [((9, 14), 2**22), ((14, 9), 30), ((2, 3), 1)])
def test_the_whole_sets_agree_with_loops(counts: tuple[int, int], block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_distance, "_BLOCK", block)
    x, y = features(1, counts[0]), features(2, counts[1], 0.5)
    whole = kid(x, y, size=None)
    assert whole.value == pytest.approx(by_loops(x, y), rel=1e-12)
    assert kid(y, x, size=None).value == pytest.approx(whole.value, rel=1e-12)
    assert whole == Kid(whole.value, None, 1, min(counts))


def test_a_block_is_as_large_as_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    mixed = kernel_distance._mixed
    monkeypatch.setattr(kernel_distance, "_mixed", lambda t, *rest: (sizes.append(t.numel()), mixed(t, *rest))[1])
    monkeypatch.setattr(kernel_distance, "_BLOCK", 100)
    mmd(features(1, 40), features(2, 30))
    assert 90 <= max(sizes) <= 100


def exactly(x: Tensor, y: Tensor) -> float:
    """The definition in rational numbers."""

    def kernel(a: list[Fraction], b: list[Fraction]) -> Fraction:
        return (sum(p * q for p, q in zip(a, b, strict=True)) / Fraction(len(a)) + 1) ** 3

    xs, ys = ([[Fraction(value) for value in row] for row in z.tolist()] for z in (x, y))
    own = [sum(kernel(a, b) for a, b in itertools.permutations(z, 2)) / (len(z) * (len(z) - 1)) for z in (xs, ys)]
    return float(own[0] + own[1] - 2 * sum(kernel(a, b) for a in xs for b in ys) / (len(xs) * len(ys)))


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6, 1e8, -1e8])
def test_features_far_from_the_origin_lose_no_digit(offset: float) -> None:
    x, y = features(1, 7) + offset, features(2, 5, 0.5) + offset
    assert mmd(x, y) == pytest.approx(exactly(x, y), rel=1e-6 if abs(offset) > 1e6 else 1e-9)


def test_point_masses_in_closed_form() -> None:
    """All x = 1, all y = 2: k(x, x) = 2^3, k(y, y) = 5^3, k(x, y) = 3^3."""
    ones = torch.ones(5, D)
    assert mmd(ones, 2 * ones[:3]) == pytest.approx(8 + 125 - 2 * 27, rel=1e-14)


def test_unbiased() -> None:
    """Means over sets of 5 of one distribution are 0 within 3 standard errors; with the diagonal they would be 1 and more."""
    found = torch.tensor([mmd(features(i, 5), features(10_000 + i, 5)) for i in range(600)])
    error = float(found.std()) / len(found) ** 0.5
    assert abs(float(found.mean())) < 3 * error < 0.3
    assert (found < 0).any()


def test_same_distribution_within_its_own_error() -> None:
    x = features(1, 400)
    found = kid(x[:200], x[200:], subsets=50, size=40)
    assert found.std is not None
    assert abs(found.value) < 3 * found.std / (200 / 40) ** 0.5
    assert kid(x[:200], x[200:] + 1, subsets=50, size=40).value > 10 * found.std


def subset_values(x: Tensor, y: Tensor, subsets: int, size: int, seed: int) -> list[float]:
    """One by one, as results of kid: the sum of i + 1 subsets less that of i."""
    sums = [kid(x, y, i + 1, size, seed).value * (i + 1) for i in range(subsets)]
    return [b - a for a, b in itertools.pairwise([0.0, *sums])]


def test_mean_and_std_are_those_of_subsets() -> None:
    x, y = features(1, 30), features(2, 25, 0.3)
    values = subset_values(x, y, 6, 10, seed=3)
    found = kid(x, y, subsets=6, size=10, seed=3)
    assert found.value == pytest.approx(np.mean(values), rel=1e-12)
    assert found.std == pytest.approx(np.std(values), rel=1e-9)
    assert (found.subsets, found.size) == (6, 10)
    assert len({round(v, 9) for v in values}) == 6
    assert kid(x, y, subsets=1, size=10).std is None


def test_subsets_are_functions_of_seed_and_number() -> None:
    x, y = features(1, 30), features(2, 25)
    state = torch.get_rng_state()
    assert kid(x, y, 4, 10, seed=5) == kid(x, y, 4, 10, seed=5)
    assert kid(x, y, 4, 10, seed=5) != kid(x, y, 4, 10, seed=6)
    assert torch.equal(torch.get_rng_state(), state)


def test_subsets_are_drawn_without_replacement_and_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[float], list[float]]] = []
    monkeypatch.setattr(
        kernel_distance, "_squared_mmd", lambda x, y: (seen.append((x[:, 0].tolist(), y[:, 0].tolist())), 0.0)[1]
    )
    numbered = torch.arange(20.0)[:, None].expand(-1, 2)
    kid(numbered, numbered, subsets=5, size=19)
    assert all(len(set(side)) == 19 for pair in seen for side in pair)
    assert all(left != right for left, right in seen)
    assert len({tuple(left) for left, _ in seen}) == 5


def test_a_size_beyond_the_sets_is_lowered_and_told() -> None:
    x, y = features(1, 30), features(2, 25, 0.3)
    found = kid(x, y, subsets=5)
    assert (found.size, found.subsets, found.std) == (25, 1, None)
    assert found.value == mmd(x, y)
    some = kid(x, y, subsets=5, size=28)
    assert (some.size, some.subsets) == (25, 5)
    assert some.std is not None
    assert kid(x, y, subsets=5, size=25) == some


def test_agrees_with_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_kid", reason="a peer")
    x, y = features(1, 40), features(2, 40, 0.3)
    kernel = {"kid_kernel_poly_degree": 3, "kid_kernel_poly_gamma": None, "kid_kernel_poly_coef0": 1}
    expected = metric.kernel_mmd(x.numpy(), y.numpy(), kid_kernel="poly", **kernel)
    assert mmd(x, y) == pytest.approx(expected, rel=1e-11)


def test_float32_features_are_measured_in_float64() -> None:
    x, y = features(1, 30).float(), features(2, 30).float()
    assert mmd(x, y) == mmd(x.double(), y.double())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(5), r"expected \(N, D\)"),
        (torch.full((4, D), math.nan), "4 of 4 feature vectors are not finite"),
        (torch.zeros(1, D), "sets of 1 and 10"),
        (torch.zeros(9, D + 1), "one feature network"),
    ],
)
def test_raises_for_sets_that_cannot_be_compared(x: Tensor, message: str) -> None:
    for measure in (kid, mmd):
        with pytest.raises(ValueError, match=message):
            measure(x, features(1, 10))


@pytest.mark.parametrize(("subsets", "size"), [(0, 5), (3, 1), (3, -1)])
def test_raises_for_subsets_of_nothing(subsets: int, size: int) -> None:
    with pytest.raises(ValueError, match=f"subsets={subsets}, size={size}"):
        kid(features(1, 10), features(2, 10), subsets, size)
