"""The sampling loop: folded coefficients, prepared fields, memory, graphs' host side, the weighted sum."""

import os
import subprocess
import sys
import weakref

import pytest
import torch
from torch import Tensor

from midway.samplers import fused, grids
from midway.samplers.fused import chain, combine
from midway.samplers.graph import Graphs
from midway.samplers.prediction import Field, NetworkField, Prediction, x0_coefficients
from midway.samplers.recorder import Recorder
from midway.samplers.rows import Row, compile_rows, run_rows
from midway.samplers.sample import ForwardCounter, sample, trajectory
from midway.samplers.schedule import VP, Cosine, Linear
from midway.samplers.solvers import SOLVERS, ddim
from midway.samplers.table import fingerprint

# ---- folding ----


def test_a_row_is_one_sum_of_states_and_outputs() -> None:
    """Two terms for a first-order solver; at most two more for every earlier output that a multistep solver weighs."""
    schedule = VP()
    for solver, most in (("euler", 2), ("ddim", 2), ("dpmpp2m", 4), ("dpmpp3m", 6), ("unipc2", 6), ("ipndm4", 8)):
        table = SOLVERS[solver].build(schedule, grids.karras(schedule, 8))
        steps = table.rows_for(x0_coefficients("eps", schedule, table.times))
        assert max(len(step.weights) for step in steps) <= most, solver


def test_a_weight_of_one_comes_first() -> None:
    """Adding to a state is one operation less than scaling it."""
    table = SOLVERS["euler"].build(Linear(), grids.uniform(Linear(), 7))
    steps = table.rows_for(x0_coefficients("velocity", Linear(), table.times))
    assert all(step.weights[0] == 1 for step in steps)


@pytest.mark.parametrize("plain", [True, False])
def test_places_are_emptied_after_their_last_use(plain: bool) -> None:
    """Of a long first-order trajectory no more than one of the network's outputs is alive at once."""
    schedule, alive, most = Cosine(), weakref.WeakSet(), 0
    table = ddim(schedule, grids.uniform(schedule, 12))

    def predict(x: Tensor, t: Tensor) -> Tensor:
        nonlocal most
        out = torch.zeros_like(x)
        alive.add(out)
        most = max(most, len(alive))
        return out

    network = NetworkField(predict, "x0", schedule)
    sample((lambda x, t: Prediction(predict(x, t), x)) if plain else network, table, torch.ones(2, 2))
    assert most == 1


def test_weights_that_cancel_give_zeros() -> None:
    """x0 = x + value, so x_1 = x0 - x weighs nothing where the value has no part in x0."""
    (row,) = compile_rows((Row(0.5, 0.1, (-1.0,), (1.0,)),), ((1.0, 0.0),))
    *_, x = run_rows([row], [lambda x: x], torch.ones(2, 2))
    assert x.eq(0).all()


# ---- errors ----


def test_a_table_of_another_schedule_raises_an_error() -> None:
    table = ddim(VP(), grids.karras(VP(), 3))
    with pytest.raises(ValueError, match=r"made for VP.*field is of Cosine"):
        sample(NetworkField(lambda x, t: x, "eps", Cosine()), table, torch.ones(2, 2))
    with pytest.raises(ValueError, match="beta_max=10"):
        sample(NetworkField(lambda x, t: x, "eps", VP(beta_max=10.0)), table, torch.ones(2, 2))
    assert fingerprint(VP()) != fingerprint(VP(beta_max=10.0))


@pytest.mark.parametrize("grid", [(0.9,), (0.9, 0.9), (0.9, 0.5, 0.7), (1.1, 0.5), (0.5, -0.1)])
def test_a_grid_that_does_not_fall_raises_an_error(grid: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="falls all the way"):
        Recorder("probe", VP(), grid)


def test_a_target_that_does_not_determine_x0_raises_an_error() -> None:
    table = ddim(Linear(), (1.0, 0.5))
    with pytest.raises(ValueError, match="does not determine x0"):
        sample(NetworkField(lambda x, t: x, "eps", Linear()), table, torch.ones(2, 2))
    sample(NetworkField(lambda x, t: x, "velocity", Linear()), table, torch.ones(2, 2))


# ---- dtype, counting, graphs ----


def test_the_state_keeps_its_dtype_when_the_network_returns_a_narrower_one() -> None:
    """As under autocast."""
    for solver in ("ddim", "dpmpp2m"):
        table = SOLVERS[solver].build(Cosine(), grids.uniform(Cosine(), 4))
        field = NetworkField(lambda x, t: x.bfloat16(), "v", Cosine())
        states = trajectory(field, table, torch.ones(3, 2))
        assert all(state.dtype == torch.float32 for state in states)


def test_the_forward_counter_counts_samples_and_lets_go() -> None:
    module = torch.nn.Linear(2, 2)
    with ForwardCounter(module) as counter:
        module(torch.ones(3, 2))
        module(torch.ones(4, 2))
    module(torch.ones(5, 2))
    assert counter.evaluations == 7


def test_a_graph_on_a_cpu_is_the_same_call() -> None:
    table = ddim(Cosine(), grids.uniform(Cosine(), 4))

    def make_field(shift: Tensor) -> Field:
        return NetworkField(lambda x, t: 0.1 * x + shift, "v", Cosine())

    x, shift = torch.randn(3, 2), torch.ones(3, 2)
    got = Graphs().sample(make_field, table, x, (shift,))
    assert torch.equal(got, sample(make_field(shift), table, x))
    with pytest.raises(ValueError, match="draws noise"):
        Graphs().sample(make_field, ddim(Cosine(), (0.9, 0.5), eta=0.5), x, (shift,))


# ---- the weighted sum ----


@pytest.mark.parametrize("count", [1, 2, 3, 17])
def test_the_weighted_sum_is_one(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    tensors = [torch.randn(3, 5, dtype=torch.float64, generator=generator) for _ in range(count)]
    weights = torch.randn(count, dtype=torch.float64, generator=generator).tolist()
    expected = sum(w * x for w, x in zip(weights, tensors, strict=True))
    before = [x.clone() for x in tensors]
    torch.testing.assert_close(combine(weights, tensors), expected, rtol=1e-12, atol=1e-12)
    weights[0] = 1.0
    expected = sum(w * x for w, x in zip(weights, tensors, strict=True))
    torch.testing.assert_close(chain(weights, tensors), expected, rtol=1e-12, atol=1e-12)
    assert all(map(torch.equal, tensors, before)), "the terms stay as they were"


def test_the_weighted_sum_can_be_differentiated() -> None:
    tensors = [torch.randn(3, requires_grad=True) for _ in range(3)]
    for weights in ((2.0, 3.0, -1.0), (1.0, 3.0, -1.0)):
        found = torch.autograd.grad(combine(weights, tensors).sum(), tensors)
        assert [g[0].item() for g in found] == list(weights)


def test_the_kernel_gives_what_torch_gives() -> None:
    """By Triton's interpreter, in a process of its own, since it decides once where it runs."""
    pytest.importorskip("triton")
    code = (
        "import torch; from midway.samplers.fused import fused, chain\n"
        "torch.manual_seed(0)\n"
        "for n in (2, 3, 17):\n"
        "    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.3)):\n"
        "        xs = [torch.randn(3, 701).to(dtype) for _ in range(n)]; ws = torch.randn(n).tolist()\n"
        "        got = fused(ws, xs); assert got.dtype == dtype and got.shape == (3, 701)\n"
        "        assert torch.allclose(got.float(), chain(ws, [x.float() for x in xs]), atol=tolerance), n\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_kernel_that_disagrees_or_fails_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cpu")
    works = fused._kernel_works.__wrapped__
    monkeypatch.setattr(fused, "fused", chain)
    assert works(device)
    monkeypatch.setattr(fused, "fused", lambda weights, tensors: chain(weights[:-1], tensors[:-1]))
    assert not works(device)

    def fails(weights: list[float], tensors: list[Tensor]) -> Tensor:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(fused, "fused", fails)
    with pytest.warns(UserWarning, match="no compiler"):
        assert not works(device)
