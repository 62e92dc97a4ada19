"""Sampling by a table, and counters of network evaluations."""

from collections.abc import Callable

from torch import Tensor, nn

from midway.samplers.prediction import Field, Prediction
from midway.samplers.rows import NoiseSource
from midway.samplers.table import Table


def sample(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> Tensor:
    """Solve from noise to data. x: (B, *) noise at `table.grid[0]`; returns (B, *) at `table.grid[-1]`.

    On a table built for a rising grid it is the inversion, from data to noise.
    """
    return table.run(field, x, noise)


def trajectory(field: Field, table: Table, x: Tensor, noise: NoiseSource | None = None) -> list[Tensor]:
    """The states at the grid's nodes, `len(table.grid)` tensors (B, *), the start included."""
    nodes = set(table.nodes)
    return [state for i, state in enumerate(table.states(field, x, noise)) if i in nodes]


class EvaluationCounter:
    """Counts forward passes where they happen: wrap the network, not the guided field.

    A batch of B counts B; classifier-free guidance runs 2 B samples through it and so counts twice.
    """

    def __init__(self, network: Callable[..., Prediction]) -> None:
        self.network = network
        self.evaluations = 0

    def __call__(self, x: Tensor, *arguments: Tensor) -> Prediction:
        self.evaluations += x.shape[0]
        return self.network(x, *arguments)


class ForwardCounter:
    """Counts the samples that go through the forward of these modules, whoever calls it, while the `with` block lasts."""

    def __init__(self, *modules: nn.Module) -> None:
        self.modules, self.evaluations = modules, 0

    def __enter__(self) -> "ForwardCounter":
        self._hooks = [module.register_forward_pre_hook(self._count) for module in self.modules]
        return self

    def _count(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        self.evaluations += arguments[0].shape[0]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
