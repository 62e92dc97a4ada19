"""Where a run of MidwayScheduler begins: at the timestep that it is first called with, however that is passed; every other must
be the next in the list."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import pytest
import torch
from tensors import normal
from torch import Tensor

from midway.samplers import grids
from midway.samplers.interop import parametrisation_of, trained_range
from midway.samplers.learned import LearnedTable
from midway.samplers.prediction import NetworkField
from midway.samplers.solvers import SOLVERS
from midway.samplers.timesteps import Timesteps

diffusers = pytest.importorskip("diffusers")

from midway.samplers.diffusers_scheduler import MidwayScheduler  # noqa: E402

V = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "prediction_type": "v_prediction"}
SCHEDULE: Any = parametrisation_of(V).schedule
WHOLE = SCHEDULE.grid([999, 799, 599, 399, 199], 0.01)
"""A grid whose timesteps are whole numbers."""


def _network(x: Tensor, timestep: Tensor | float) -> Tensor:
    return x.sin() + torch.as_tensor(timestep, dtype=torch.float32).reshape(-1)[0].to(x.device) / 1000


def _run(scheduler: Any, timesteps: Sequence[Any] | Tensor, x: Tensor, scaled: bool = False) -> Tensor:
    """The loop of a pipeline on these timesteps, as it passes them."""
    for t in timesteps:
        seen = scheduler.scale_model_input(x, t) if scaled else x
        x = scheduler.step(_network(seen, t), t, x, return_dict=False)[0]
    return x


def _after_set_begin_index(scheduler: Any, k: int, x: Tensor) -> Tensor:
    scheduler.set_timesteps(scheduler.num_inference_steps)
    scheduler.set_begin_index(k)
    return _run(scheduler, scheduler.timesteps[k:], x)


def _scheduler(solver: str = "dpmpp2m", steps: int = 6, **options: Any) -> Any:
    scheduler: Any = MidwayScheduler(**V, solver=solver, **options)
    scheduler.set_timesteps(steps)
    return scheduler


def _learned(steps: int = 3) -> Any:
    learned = LearnedTable(SCHEDULE, grids.karras(SCHEDULE, steps, *trained_range(SCHEDULE)))
    torch.nn.init.normal_(learned.predictions, std=0.1, generator=torch.Generator().manual_seed(0))
    scheduler = MidwayScheduler.from_config(V, table=asdict(learned.table()))
    scheduler.set_timesteps(steps)
    return scheduler


# ---- in the middle of the list ----


@pytest.mark.parametrize("solver", ["ddim", "dpmpp3m", "unipc2", "heun", "dpm2"])
@torch.no_grad()
def test_half_a_run_of_an_exact_gaussian_is_as_near_as_a_whole_one(solver: str) -> None:
    """x0 ~ N(0, 0.6^2): the flow scales x by s(t) = sqrt(0.36 alpha^2 + sigma^2)."""
    scheduler = _scheduler(solver, 50)
    process = scheduler.parametrisation

    def spread(timestep: Tensor) -> Tensor:
        t = process.time(timestep.double())
        return (0.36 * process.schedule.alpha(t).square() + process.schedule.sigma(t).square()).sqrt()

    def network(x: Tensor, timestep: Tensor) -> Tensor:
        t = process.time(timestep.double())
        alpha, sigma = process.schedule.alpha(t), process.schedule.sigma(t)
        x0 = 0.36 * alpha / spread(timestep).square() * x
        return alpha * (x - alpha * x0) / sigma - sigma * x0

    timesteps = scheduler.timesteps[25 * scheduler.order :]
    x = torch.ones(1, 1, dtype=torch.float64)
    for t in timesteps:
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    end = process.timestep(torch.tensor([scheduler.table.grid[-1]]))
    assert x.item() == pytest.approx((spread(end) / spread(timesteps[:1])).item(), rel=0.05)


WAYS: dict[str, Callable[[Tensor], Any]] = {
    "entries": lambda timesteps: timesteps,
    "copies": lambda timesteps: [t.clone() for t in timesteps],
    "numbers": lambda timesteps: timesteps.tolist(),
    "float64": lambda timesteps: timesteps.double(),
    "float16": lambda timesteps: timesteps.half(),
    "one of each sample": lambda timesteps: [t.expand(4) for t in timesteps],
    "copies for each sample": lambda timesteps: [t.repeat(4) for t in timesteps],
    "rows of one": lambda timesteps: timesteps[:, None],
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("solver", ["dpmpp3m", "unipc3", "heun", "dpm2", "rk4", "dpmpp2s"])
@torch.no_grad()
def test_a_run_begins_at_its_first_timestep_however_that_is_passed(solver: str, way: str) -> None:
    scheduler, x = _scheduler(solver), normal(4, 2)
    for step in (0, 1, 4, 5):  # the last step alone has no history
        k = step * scheduler.order
        scheduler.set_timesteps(6)
        got = _run(scheduler, WAYS[way](scheduler.timesteps[k:]), x, scaled=bool(step % 2))
        torch.testing.assert_close(got, _after_set_begin_index(scheduler, k, x), rtol=0, atol=2e-3 * ("16" in way))


@pytest.mark.parametrize("dtype", [int, torch.int64, torch.int32, torch.float32])
@torch.no_grad()
def test_whole_timesteps_may_be_integers(dtype: Any) -> None:
    scheduler, x = _scheduler("ddim", 5, grid=WHOLE), normal(3, 2)
    assert scheduler.timesteps.tolist() == [999, 799, 599, 399, 199]
    passed = [int(t) for t in scheduler.timesteps[2:]] if dtype is int else scheduler.timesteps[2:].to(dtype)
    assert torch.equal(_run(scheduler, passed, x), _after_set_begin_index(scheduler, 2, x))


@torch.no_grad()
def test_the_first_steps_of_a_multistep_solver_are_of_lower_order() -> None:
    """From k on it is the solver on the rest of the grid, whose first step is DDIM's."""
    scheduler, x = _scheduler("dpmpp3m"), normal(4, 2)
    field = NetworkField(lambda x, t: _network(x, SCHEDULE.timestep(t)), "v", SCHEDULE)
    for steps in (1, 3):
        solver = SOLVERS["ddim" if steps == 1 else "dpmpp3m"]
        table = solver.build(SCHEDULE, scheduler.table.grid[3:])
        *_, expected = [x for x, _ in zip(table.states(field, x), range(1 + steps), strict=False)]
        scheduler.set_timesteps(6)
        got = _run(scheduler, scheduler.timesteps[3 : 3 + steps], x)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_inpainting_loop_is_the_same_with_and_without_a_begin_index() -> None:
    """Between steps the known half of the state is replaced by noised data, at the timestep that comes next."""
    scheduler, x0, noise = _scheduler("heun"), normal(4, 2), normal(4, 2, seed=1)
    mask = torch.tensor([0.0, 1.0])

    def loop() -> Tensor:
        timesteps = scheduler.timesteps[4:]
        x = scheduler.add_noise(x0, noise, timesteps[:1])
        for i, t in enumerate(timesteps):
            x = scheduler.step(_network(scheduler.scale_model_input(x, t), t), t, x).prev_sample
            if i + 1 < len(timesteps):
                x = mask * x + (1 - mask) * scheduler.add_noise(x0, noise, torch.tensor([timesteps[i + 1]]))
        return x

    found = loop()
    scheduler.set_timesteps(6)
    scheduler.set_begin_index(4)
    assert torch.equal(found, loop())


@torch.no_grad()
def test_full_strength_is_a_run_of_all_steps() -> None:
    scheduler, x = _scheduler("unipc2"), normal(4, 2)
    whole = _run(_scheduler("unipc2"), scheduler.timesteps, x)
    scheduler.set_begin_index(0)
    assert torch.equal(_run(scheduler, scheduler.timesteps, x), whole)


@pytest.mark.parametrize("solver", ["ddim", "heun"])
@torch.no_grad()
def test_an_analytic_first_step_is_only_that_of_a_run_from_the_start(solver: str) -> None:
    """Entry 0 is evaluated after the analytic step; a run from a later entry has none."""
    scheduler, x = _scheduler(solver, analytic_first=True), normal(4, 2)
    plain = _scheduler(solver)
    k = 3 if solver == "heun" else 2  # entries that begin step 2 or 3
    rest = scheduler.timesteps[k:]
    assert torch.equal(_run(scheduler, rest, x, scaled=True), _run(plain, plain.timesteps[k + 1 :], x))
    scheduler.set_timesteps(6)
    assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is not x


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [0, 1, 166, 400, 498])
@torch.no_grad()
def test_timesteps_that_half_precision_cannot_tell_apart_begin_nowhere_else(dtype: torch.dtype, k: int) -> None:
    """Within a run the one that comes next is meant; the first has to be the only one."""
    scheduler, x = _scheduler("ddim", 500), normal(2, 2)
    passed = scheduler.timesteps[k:].to(dtype)
    expected = _after_set_begin_index(scheduler, k, x)
    scheduler.set_timesteps(500)
    if int((scheduler.timesteps.to(dtype) == passed[0]).sum()) > 1:
        _wrong(scheduler, passed[0], "can be any of the entries")
        scheduler.set_begin_index(k)
    torch.testing.assert_close(_run(scheduler, passed, x), expected, rtol=0, atol=5e-3)


# ---- one scheduler, several runs ----


@pytest.mark.parametrize("scaled", [False, True])
@torch.no_grad()
def test_another_run_needs_no_set_timesteps(scaled: bool) -> None:
    scheduler, x = _scheduler("dpmpp3m"), normal(4, 2)
    whole, rest = scheduler.timesteps, scheduler.timesteps[2:]
    expected = [_run(_scheduler("dpmpp3m"), some, x) for some in (whole, rest)]
    for some, end in [(whole, expected[0]), (rest, expected[1]), (rest, expected[1]), (whole, expected[0])]:
        assert torch.equal(_run(scheduler, some, x, scaled), end)
    scheduler.set_begin_index(2)
    assert torch.equal(_run(scheduler, rest, x, scaled), expected[1])
    assert torch.equal(_run(scheduler, whole, x, scaled), expected[0]), "the begin index was of one run"


def test_an_input_scaled_for_another_start_does_not_begin_the_run() -> None:
    scheduler, x = _scheduler("dpmpp3m"), normal(4, 2)
    scheduler.scale_model_input(x, scheduler.timesteps[4])
    scheduler.scale_model_input(x)
    assert torch.equal(_run(scheduler, scheduler.timesteps[2:], x), _after_set_begin_index(scheduler, 2, x))


# ---- timesteps that are not the next ----


def _wrong(scheduler: Any, timestep: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        scheduler.step(torch.ones(2, 2), timestep, torch.ones(2, 2))


@pytest.mark.parametrize("solver", ["ddim", "dpmpp3m", "heun", "dpm2"])
@pytest.mark.parametrize("way", ["entries", "numbers"])
def test_a_timestep_out_of_order_raises_an_error(solver: str, way: str) -> None:
    scheduler, x = _scheduler(solver), normal(2, 2)
    timesteps = WAYS[way](scheduler.timesteps)
    order = scheduler.order
    _run(scheduler, timesteps[2 * order : 3 * order], x)
    for wrong in (0, order, 2 * order, 4 * order, len(timesteps) - 1):
        _wrong(scheduler, timesteps[wrong], f"out of order: entry {3 * order}")
    assert torch.isfinite(_run(scheduler, timesteps[3 * order :], x)).all(), "the run goes on at the right one"


def test_the_last_timestep_again_does_not_begin_another_run() -> None:
    scheduler, x = _scheduler("ddim"), normal(2, 2)
    _run(scheduler, scheduler.timesteps, x)
    _wrong(scheduler, scheduler.timesteps[-1], "has ended.*call set_timesteps")
    _run(scheduler, scheduler.timesteps, x)
    scheduler.set_timesteps(6)
    once = _run(scheduler, scheduler.timesteps[-1:], x)
    assert torch.equal(once, _run(scheduler, scheduler.timesteps[-1:], x)), "a run of one step may be made twice"


@pytest.mark.parametrize("wrong", [3, 713, 713.9, -1.0, float("inf"), torch.tensor(500), torch.tensor([500.0])])
def test_a_timestep_that_is_not_in_the_list_raises_an_error_with_the_nearest(wrong: Any) -> None:
    scheduler = _scheduler("ddim")
    values = scheduler.timesteps.tolist()
    nearest = min(values, key=lambda value: abs(value - float(wrong)))
    _wrong(scheduler, wrong, f"nearest is {nearest:g}, entry {values.index(nearest)}")
    with pytest.raises(ValueError, match="nearest is"):
        scheduler.scale_model_input(torch.ones(2, 2), wrong)


@pytest.mark.parametrize("wrong", [float("nan"), torch.tensor([999.0, 499.0]), torch.empty(0), "timesteps"])
def test_a_step_is_of_one_timestep(wrong: Any) -> None:
    scheduler = _scheduler("ddim")
    _wrong(scheduler, scheduler.timesteps if wrong == "timesteps" else wrong, "one timestep for the whole batch")


@pytest.mark.parametrize("solver", ["dpm2", "heun", "rk4"])
def test_no_run_begins_inside_a_step(solver: str) -> None:
    scheduler = _scheduler(solver, 3)
    _wrong(scheduler, scheduler.timesteps[1], "cannot begin at evaluation 1.*begin at 0, ")
    if solver == "dpm2":
        _wrong(scheduler, scheduler.timesteps[1].item(), "cannot begin at evaluation 1")
    else:  # its time is also that of an entry which begins a step; the next call shows that it was not meant
        values = scheduler.timesteps.tolist()
        with pytest.raises(ValueError, match="out of order"):
            _run(scheduler, values[scheduler.order - 1 :], torch.ones(2, 2))


def test_a_learned_table_begins_at_its_start() -> None:
    scheduler, x = _learned(), normal(2, 2)
    values = scheduler.timesteps.tolist()
    _wrong(scheduler, values[1], "cannot begin at evaluation 1.*a learned table")
    _wrong(scheduler, scheduler.timesteps[2], "cannot begin at evaluation 2.*a learned table")
    assert torch.equal(_run(scheduler, values, x), _run(_learned(), scheduler.timesteps, x))


@pytest.mark.parametrize("index", [6, 7, -1])
def test_a_begin_index_is_one_of_the_list(index: int) -> None:
    with pytest.raises(ValueError, match=f"cannot begin at evaluation {index} of 6"):
        _scheduler("ddim").set_begin_index(index)


def test_a_begin_index_and_another_first_timestep_raise_an_error() -> None:
    scheduler = _scheduler("ddim")
    scheduler.set_begin_index(2)
    _wrong(scheduler, scheduler.timesteps[3], "out of order: entry 2")
    scheduler.set_begin_index(0)
    _wrong(scheduler, scheduler.timesteps[3], "out of order: entry 0")
    with pytest.raises(ValueError, match="call set_timesteps"):
        MidwayScheduler(**V).index_for_timestep(999.0)


def test_entries_on_a_device_are_not_read() -> None:
    """Tensors without storage: reading a value fails."""
    found = Timesteps.on("meta", torch.tensor([9.0, 5.0, 5.0, 2.0]))
    assert [found.find(t) for t in found.tensor[1:]] == [(1,), (2,), (3,)]
    assert found.find(found.tensor[2].expand(4)) == (2,)
    assert found.find(torch.tensor(5.0)) == (1, 2)
    scheduler, x = _scheduler("heun"), torch.empty(2, 4, device="meta")
    scheduler.set_timesteps(5, device="meta")
    for t in scheduler.timesteps[4:]:
        x = scheduler.step(x, t, scheduler.scale_model_input(x, t), return_dict=False)[0]
    assert x.shape == (2, 4)
