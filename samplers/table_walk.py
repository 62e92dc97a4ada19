"""A table run from outside: the caller evaluates the network, one evaluation at a time."""

from collections.abc import Callable

from torch import Tensor

from midway.samplers.interop import Parametrisation
from midway.samplers.prediction import x0_coefficients
from midway.samplers.rows import Execution
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
    """The rows of a table for a network of this parametrisation; `take`, called after each evaluation, gives the state of the
    next, or the end. ValueError for a table that jumps."""

    def __init__(self, table: Table, model: Parametrisation) -> None:
        table.check_plain("the network of a pipeline")
        self.rows = table.rows_for(x0_coefficients(model.target, model.schedule, table.times))
        self.leading = leading_factors(table)
        self._execution: Execution | None = None

    @property
    def begins(self) -> bool:
        """Whether no evaluation was taken yet."""
        return self._execution is None

    @property
    def finished(self) -> bool:
        return self._execution is not None and self._execution.finished

    def start(self, x: Tensor) -> Tensor:
        """The state of the first evaluation, from x (B, *) at the start of the grid."""
        self._execution = Execution(self.rows, x)
        for _ in self.leading[1:]:
            self._execution.advance()
        return self._execution.state

    def take(self, x: Tensor, value: Tensor, draw: Callable[[], Tensor]) -> Tensor:
        """x (B, *): the state that was evaluated; value (B, *): the network's output; draw: fresh noise (B, *)."""
        if self._execution is None:
            self.start(x)
        execution = self._execution
        assert execution is not None
        execution.buffers[execution.row] = x
        execution.advance(value, draw)
        while not execution.finished and self.rows[execution.row].evaluation is None:
            execution.advance(None, draw)
        return execution.state
