"""A table walked from outside: somebody else calls the network, one evaluation at a time."""

from collections.abc import Callable

import torch
from torch import Tensor

from midway.samplers.interop import Convention
from midway.samplers.prediction import x0_coefficients
from midway.samplers.sample import Places, Step, plan
from midway.samplers.table import Table


def leading_factors(table: Table) -> list[float]:
    """The states up to the first evaluation as multiples of the first state: analytic rows only scale."""
    factors = [1.0]
    for row in table.rows:
        if row.time is not None:
            return factors
        if row.noise != 0:
            raise ValueError(
                f"table '{table.solver}' draws noise before its first evaluation: set analytic_first=False"
            )
        factors.append(sum(w * f for w, f in zip(row.states, factors, strict=True)))
    raise ValueError(f"table '{table.solver}' never evaluates the network: take more steps")


class TableWalk:
    """The loop of `sample`, run from outside: `take`, called after each evaluation, gives the state of the next, or the end."""

    def __init__(self, table: Table, convention: Convention) -> None:
        coefficients = x0_coefficients(convention.target, convention.schedule, table.times)
        if coefficients not in table.plans:
            table.plans[coefficients] = plan(table, coefficients)
        self.steps: tuple[Step, ...] = table.plans[coefficients]
        self.leading = leading_factors(table)
        self.row = len(self.leading) - 1
        self._first = len(table.rows) + 1
        self._places: Places = [None] * (self._first + table.nfe)

    @property
    def begins(self) -> bool:
        """Whether no evaluation was taken yet."""
        return self.row == len(self.leading) - 1

    @property
    def finished(self) -> bool:
        return self.row == len(self.steps)

    def start(self, x: Tensor) -> Tensor:
        """The state of the first evaluation, from x (B, *) at the start of the grid."""
        for j, factor in enumerate(self.leading):
            self._places[j] = x * factor
        return self._places[self.row]

    def take(self, x: Tensor, value: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """x (B, *): the state that was evaluated; value (B, *): what the network said; draw: fresh noise (B, *)."""
        step = self.steps[self.row]
        assert step.evaluation is not None
        self._places[self.row], self._places[self._first + step.evaluation] = x, value
        self._advance(draw)
        while not self.finished and self.steps[self.row].evaluation is None:
            self._advance(draw)
        return self._places[self.row]

    def _advance(self, draw: Callable[[], Tensor]) -> None:
        step = self.steps[self.row]
        state = step.form(self._places)
        if step.noise != 0:
            state = torch.add(state, draw(), alpha=step.noise)
        self.row += 1
        self._places[self.row] = state
        for j in step.done:
            self._places[j] = None
