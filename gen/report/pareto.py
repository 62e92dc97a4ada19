"""The Pareto front: the points that no other beats in both cost and value, both lower is better.

p dominates q   if   cost_p <= cost_q and value_p <= value_q, one of them strictly
"""

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the non-dominated (cost, value), by rising cost and so falling value; ties keep their order.

    Points of equal cost and value are on the front together. Those with an infinite or undefined number are left out.
    """
    finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
    front: list[int] = []
    for i in sorted(finite, key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front
