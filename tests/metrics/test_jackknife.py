"""The jackknife where its result is known, and against repeated draws."""

import math

import pytest
import torch

from midway.gen.metrics.frechet import frechet_distance
from midway.gen.metrics.jackknife import GROUPS, jackknife
from midway.gen.metrics.moments import FeatureStatistics


def test_of_a_mean_it_is_the_error_of_the_mean_of_group_means() -> None:
    """Efron & Tibshirani, eq. 11.5: with one row a group, the standard deviation over sqrt(n); so with the groups' means."""
    rows = torch.randn(120, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = torch.stack([part.mean() for part in rows.tensor_split(GROUPS)])
    expected = means.std().item() / math.sqrt(GROUPS)
    assert jackknife(lambda some: some.mean().item(), rows) == pytest.approx(expected, rel=1e-12)


def test_a_constant_figure_has_no_error() -> None:
    assert jackknife(lambda some: 3.0, torch.zeros(20, 2)) == 0


def test_of_a_distance_it_is_the_deviation_over_repeated_draws() -> None:
    """Within its own scatter: nine degrees of freedom give an error of a quarter, and the mean of 60 of them less."""
    generator = torch.Generator().manual_seed(1)
    reference = FeatureStatistics.of(torch.randn(4000, 4, generator=generator))

    def distance(rows: torch.Tensor) -> float:
        return frechet_distance(FeatureStatistics.of(rows), reference)

    draws = [torch.randn(400, 4, generator=generator) + 0.5 for _ in range(60)]
    seen = torch.tensor([distance(rows) for rows in draws], dtype=torch.float64).std().item()
    errors = torch.tensor([jackknife(distance, rows) for rows in draws], dtype=torch.float64)
    assert errors.square().mean().sqrt().item() == pytest.approx(seen, rel=0.25)


@pytest.mark.parametrize(("count", "groups"), [(19, 10), (4, 1), (0, 2)])
def test_too_few_rows_are_an_error(count: int, groups: int) -> None:
    with pytest.raises(ValueError, match="at least 2 groups of 2 rows"):
        jackknife(lambda some: 0.0, torch.zeros(count, 1), groups)
