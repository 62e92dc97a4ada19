"""Inception score: closed forms, splits by hand, and torch-fidelity."""

import math
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from midway.gen.metrics.inception_score import inception_score


def logits(seed: int, count: int = 200, classes: int = 7) -> Tensor:
    return 2 * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_images_of_no_class_score_one() -> None:
    for row in (torch.zeros(7), logits(1)[0]):
        found = inception_score(row.expand(100, -1), splits=5)
        assert found.value == pytest.approx(1, abs=1e-14)
        assert found.std == pytest.approx(0, abs=1e-14)


@pytest.mark.parametrize("classes", [2, 7, 100])
def test_images_surely_of_k_classes_score_k(classes: int) -> None:
    """Probabilities of exactly 0 and 1 too."""
    labels = torch.arange(10 * classes) % classes
    found = inception_score(1e4 * one_hot(labels, classes).float(), splits=1)
    assert found.value == pytest.approx(classes, rel=1e-13)
    assert (found.std, found.splits, found.size) == (0, 1, 10 * classes)


def test_some_sure_and_some_unsure_images() -> None:
    """Two classes, p = (1 - e, e) and (e, 1 - e): log IS = log 2 - H(e)."""
    e = 0.1
    rows = torch.tensor([[1 - e, e], [e, 1 - e]], dtype=torch.float64).log().repeat(20, 1)
    expected = 2 * (1 - e) ** (1 - e) * e**e
    assert inception_score(rows, splits=2).value == pytest.approx(expected, rel=1e-14)


def by_loops(rows: Tensor) -> float:
    """exp of the mean divergence."""
    p = np.exp(rows.numpy()) / np.exp(rows.numpy()).sum(1, keepdims=True)
    mean = p.mean(0)
    return math.exp(float(np.mean([sum(v * math.log(v / m) for v, m in zip(row, mean, strict=True)) for row in p])))


@pytest.mark.parametrize(("count", "splits"), [(200, 10), (203, 10), (30, 3), (31, 2)])
def test_mean_and_std_over_consecutive_parts(count: int, splits: int) -> None:
    rows = logits(1, count)
    edges = [math.floor(i * count / splits) for i in range(splits + 1)]
    scores = [by_loops(rows[edges[i] : edges[i + 1]]) for i in range(splits)]
    found = inception_score(rows, splits)
    assert found.value == pytest.approx(np.mean(scores), rel=1e-12)
    assert found.std == pytest.approx(np.std(scores), rel=1e-9)
    assert found.size == min(b - a for a, b in pairwise(edges))


def test_the_order_is_the_callers() -> None:
    """A part of one class scores 1, a part of all of them K."""
    rows = 1e4 * one_hot(torch.arange(4).repeat_interleave(10), 4).float()
    assert inception_score(rows, splits=4).value == pytest.approx(1)
    mixed = rows.view(4, 10, 4).transpose(0, 1).reshape(40, 4)
    assert inception_score(mixed, splits=2).value == pytest.approx(4)


def test_ten_parts_unless_told() -> None:
    assert (inception_score(logits(1)).splits, inception_score(logits(1)).size) == (10, 20)


def test_float32_logits_are_scored_in_float64() -> None:
    assert inception_score(logits(1).float()) == inception_score(logits(1).float().double())


def test_agrees_with_torch_fidelity() -> None:
    metric = pytest.importorskip("torch_fidelity.metric_isc", reason="a peer")
    done = metric.isc_features_to_metric(logits(1, 203), 10, False, 2020)
    found = inception_score(logits(1, 203))
    assert found.value == pytest.approx(done["inception_score_mean"], rel=1e-12)
    assert found.std == pytest.approx(done["inception_score_std"], rel=1e-9)


def test_warns_of_parts_of_few_images() -> None:
    with pytest.warns(UserWarning, match="9 images in a part"):
        inception_score(logits(1, 99))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inception_score(logits(1, 100))


@pytest.mark.parametrize(
    ("bad", "splits", "message"),
    [
        (torch.zeros(20), 1, r"expected \(N, K\)"),
        (torch.zeros(20, 1), 1, r"expected \(N, K\)"),
        (torch.tensor([[0.0, math.inf], [0.0, 0.0]]), 1, "1 of 2 images are not finite"),
        (torch.zeros(20, 3), 0, "splits is 0 for 20 images"),
        (torch.zeros(20, 3), 21, "splits is 21 for 20 images"),
    ],
)
def test_raises_for_what_has_no_score(bad: Tensor, splits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inception_score(bad, splits)
