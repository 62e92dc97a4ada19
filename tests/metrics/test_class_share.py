"""The share of variance between classes, and principal axes: closed forms."""

import pytest
import torch

from midway.gen.metrics.class_share import between_class_share
from midway.gen.metrics.moments import FeatureStatistics
from midway.gen.metrics.principal_axes import axes_of


def test_the_share_is_that_of_the_decomposition_of_variance() -> None:
    """One class at -a +- b, one at a +- b, at right angles: a^2 / (a^2 + b^2), in units of which nothing depends."""
    a, b = 3.0, 2.0
    x = torch.tensor([[-a, b], [-a, -b], [a, b], [a, -b]], dtype=torch.float64)
    labels = torch.tensor([7, 7, 2, 2])
    expected = a**2 / (a**2 + b**2)
    for scale, shift in ((1.0, 0.0), (1e-3, 5.0)):
        assert between_class_share(x * scale + shift, labels) == pytest.approx(expected)
    assert between_class_share(x, torch.zeros(4, dtype=torch.int64)) == pytest.approx(0, abs=1e-15)
    assert between_class_share(x, torch.arange(4)) == pytest.approx(1)
    assert between_class_share(torch.ones(4, 2), labels) == 0


def test_between_and_within_add_up_for_unequal_classes() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 4, (60,), generator=generator) ** 2
    means = torch.stack([x[labels == c].mean(0) for c in labels])
    within = (x - means).square().sum() / (x - x.mean(0)).square().sum()
    assert between_class_share(x, labels) == pytest.approx(1 - float(within))
    for bad in (labels[1:], labels[:0]):
        with pytest.raises(ValueError, match="one label"):
            between_class_share(x, bad)


def test_axes_are_those_of_a_known_covariance() -> None:
    """x = sum_j s_j z_j q_j with orthonormal q and exactly uncorrelated z: the axes are q in the order of s, signs fixed."""
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    z = torch.linalg.qr(torch.randn(50, 7, generator=generator, dtype=torch.float64))[0]
    z = torch.linalg.qr(z - z.mean(0))[0][:, :6]
    x = z * torch.tensor([1.0, 5, 2, 6, 3, 4]) @ q.T + 10
    axes = axes_of(FeatureStatistics.of(x), 3)
    expected = q[:, [3, 1, 5]]
    expected = expected * expected.gather(0, expected.abs().argmax(0, keepdim=True)).sign()
    torch.testing.assert_close(axes.basis, expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(axes.mean, torch.full((6,), 10.0, dtype=torch.float64))
    coordinates = axes.project(x)
    torch.testing.assert_close(coordinates.double(), (x - 10) @ expected, rtol=0, atol=1e-5)
    assert torch.equal(axes.project(x[7:9]), coordinates[7:9]) and axes.project(x[:0]).shape == (0, 3)
    for wrong in (0, 7):
        with pytest.raises(ValueError, match="there are 6"):
            axes_of(FeatureStatistics.of(x), wrong)
    with pytest.raises(ValueError, match="one feature network"):
        axes.project(x[:, :5])
