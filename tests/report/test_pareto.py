"""The Pareto front is what no point beats."""

import math
import random

import pytest

from midway.gen.report.pareto import pareto_front


def dominated(p: tuple[float, float], points: list[tuple[float, float]]) -> bool:
    return any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)


@pytest.mark.parametrize("seed", range(20))
def test_the_front_is_what_no_point_dominates(seed: int) -> None:
    draw = random.Random(seed)
    points = [(float(draw.randint(0, 6)), float(draw.randint(0, 6))) for _ in range(12)]
    front = pareto_front(points)
    assert sorted(front) == [i for i, p in enumerate(points) if not dominated(p, points)]
    assert front == sorted(front, key=lambda i: points[i])


def test_equal_points_are_on_it_together_in_their_order() -> None:
    assert pareto_front([(2, 1), (1, 3), (2, 1), (2, 2), (1, 4)]) == [1, 0, 2]


def test_what_is_not_finite_is_neither_on_it_nor_beats_others() -> None:
    points = [(1, math.nan), (math.nan, 0), (-math.inf, 5), (0, -math.inf), (2, 3), (1, math.inf)]
    assert pareto_front(points) == [4]
    assert pareto_front([]) == []
