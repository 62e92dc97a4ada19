"""A whole trajectory as one CUDA graph: network and solver, replayed without the host.

The first call for a (table, shape, dtype, device, key) runs the trajectory twice to warm up, then captures it; later calls copy
their inputs into the captured ones and replay. On other devices the same call runs the trajectory as it is.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from midway.samplers.prediction import Field
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.table import Table

WARM_UP = 2
MakeField = Callable[..., Field]
"""(*conditions) -> Field. What it does with the conditions is captured too."""


@dataclass(frozen=True)
class Captured:
    """A graph with its inputs and output, and how many network evaluations one replay makes."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor
    evaluations: int


class Graphs:
    """Trajectories captured so far; they keep their memory until this object is dropped."""

    def __init__(self) -> None:
        self._captured: dict[Hashable, tuple[Table, Captured]] = {}  # the table is held so that its id stays its own

    def sample(
        self,
        make_field: MakeField,
        table: Table,
        x: Tensor,
        conditions: tuple[Tensor, ...] = (),
        key: Hashable = (),
        counter: ForwardCounter | None = None,
    ) -> Tensor:
        """`sample(make_field(*conditions), table, x)`, from a graph on a CUDA device.

        key: whatever else the field depends on (guidance, autocast, which model): it must be equal for equal fields only.
        counter: incremented by the evaluations of every replay, which runs no Python. ValueError for a table that draws noise.
        """
        if table.stochastic:
            raise ValueError(f"table '{table.solver}' draws noise, which a graph cannot: sample it without")
        if not x.is_cuda:
            return sample(make_field(*conditions), table, x)
        inputs = (x, *conditions)
        shapes = tuple((tuple(tensor.shape), tensor.dtype, tensor.device) for tensor in inputs)
        place = (id(table), shapes, key)
        if place not in self._captured:
            self._captured[place] = (table, _capture(make_field, table, inputs, counter or ForwardCounter()))
        _, captured = self._captured[place]
        for held, given in zip(captured.inputs, inputs, strict=True):
            held.copy_(given)
        captured.graph.replay()
        if counter is not None:
            counter.evaluations += captured.evaluations
        return captured.output.clone()


def _capture(make_field: MakeField, table: Table, inputs: tuple[Tensor, ...], counter: ForwardCounter) -> Captured:
    """Run on a side stream until nothing is made for the first time any more, then record."""
    held = tuple(tensor.clone() for tensor in inputs)
    before = counter.evaluations
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(WARM_UP):
            sample(make_field(*held[1:]), table, held[0])
    torch.cuda.current_stream().wait_stream(side)
    warm = counter.evaluations
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        output = sample(make_field(*held[1:]), table, held[0])
    evaluations, counter.evaluations = counter.evaluations - warm, before  # warm-up and recording made no sample
    return Captured(graph, held, output, evaluations)
