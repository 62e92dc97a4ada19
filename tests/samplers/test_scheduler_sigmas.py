"""What flow pipelines pass to `set_timesteps`: sigmas and mu, as FlowMatchEulerDiscreteScheduler reads them; pipelines of
diffusers that slice their timesteps; what nobody may change between steps."""

import copy
import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from flow_pipelines import flux, flux_inputs, kandinsky, kandinsky_inputs
from tensors import normal
from torch import Tensor

from midway.samplers import grids
from midway.samplers.interop import parametrisation_of
from midway.samplers.learned import LearnedTable
from midway.samplers.prediction import NetworkField
from midway.samplers.sample import sample
from midway.samplers.schedule import Linear
from midway.samplers.solvers import SOLVERS

diffusers = pytest.importorskip("diffusers")

from midway.samplers.diffusers_scheduler import MidwayScheduler  # noqa: E402

FLOW: dict[str, Any] = {"prediction_type": "flow_prediction"}
V: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "v_prediction",
}


def _scheduler(config: dict[str, Any], **options: Any) -> Any:
    return MidwayScheduler(**config, **options)


def _network(x: Tensor, t: Tensor | float) -> Tensor:
    return x.sin() + torch.as_tensor(t).reshape(-1)[0] / 1000


def _run(scheduler: Any, x: Tensor, timesteps: Any = None) -> Tensor:
    for t in scheduler.timesteps if timesteps is None else timesteps:
        x = scheduler.step(_network(x, t), t, x, return_dict=False)[0]
    return x


# ---- as theirs ----

CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shift": {"shift": 3.0},
    "dynamic": {"use_dynamic_shifting": True},
    "linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.1},
}


@pytest.mark.parametrize("mu", [0.5, 1.15])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_sigmas_and_mu_are_their_flow_matching_euler(name: str, mu: float) -> None:
    """Of a config without dynamic shifting mu is ignored there, and here."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    ours = MidwayScheduler.from_config(theirs.config, solver="euler")
    sigmas = np.linspace(1.0, 1 / 7, 7)
    for scheduler in (theirs, ours):
        scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-6, atol=0)
    assert ours.num_inference_steps == theirs.num_inference_steps == 7
    x = normal(3, 2)
    torch.testing.assert_close(_run(ours, x), _run(theirs, x), rtol=0, atol=2e-6)


def test_mu_is_the_shift_by_its_exponential() -> None:
    """With no config of theirs; the formula in the closed form that FLUX has, exp(mu) / (exp(mu) + 1 / t - 1)."""
    scheduler, sigmas = _scheduler(FLOW), [1.0, 0.7, 0.2]
    scheduler.set_timesteps(3, sigmas=torch.tensor(sigmas), mu=0.8)
    expected = [math.exp(0.8) / (math.exp(0.8) + 1 / t - 1) for t in sigmas] + [0.0]
    assert scheduler.table.grid == pytest.approx(expected, abs=1e-7)
    scheduler.set_timesteps(sigmas=sigmas)
    assert scheduler.table.grid == (1.0, 0.7, 0.2, 0.0)
    scheduler.set_timesteps(sigmas=[*sigmas, 0.0])
    assert scheduler.table.grid == (1.0, 0.7, 0.2, 0.0), "the end may be there"


@pytest.mark.parametrize("name", ["uniform", "shift", "karras", "logsnr"])
def test_mu_alone_shifts_the_grid_between_the_same_ends(name: str) -> None:
    plain, shifted = _scheduler(FLOW, grid=name), _scheduler(FLOW, grid=name)
    plain.set_timesteps(6)
    shifted.set_timesteps(6, mu=math.log(2.5))
    expected = grids.shift(Linear(), 6, factor=2.5) if name in ("uniform", "shift") else plain.table.grid
    assert shifted.table.grid == pytest.approx(expected, abs=1e-12), "equal steps of any power of rho are invariant"
    assert shifted.table.grid[0] == pytest.approx(80 / 81, abs=1e-12)


def test_an_explicit_grid_is_shifted_by_mu() -> None:
    scheduler = _scheduler(FLOW, grid=[0.9, 0.5, 0.1])
    scheduler.set_timesteps(2, mu=math.log(3.0))
    assert scheduler.table.grid == pytest.approx([2.7 / 2.8, 0.75, 0.25], abs=1e-12)


@torch.no_grad()
def test_sigmas_of_discrete_timesteps_are_noise_to_signal_ratios() -> None:
    """Euler in sigma is DDIM: the same sigmas and samples as EulerDiscreteScheduler, whose timesteps are no whole ones either."""
    sigmas = [14.0, 3.0, 1.0, 0.2, 0.0]
    theirs = diffusers.EulerDiscreteScheduler(**V)
    theirs.set_timesteps(sigmas=sigmas)
    ours = MidwayScheduler.from_config(theirs.config, solver="ddim")
    ours.set_timesteps(sigmas=sigmas)
    torch.testing.assert_close(ours.timesteps, theirs.timesteps.float(), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-5, atol=0)
    x = normal(3, 2)
    y = x * (1 + 14.0**2) ** 0.5
    for t in theirs.timesteps:
        y = theirs.step(_network(theirs.scale_model_input(y, t), t), t, y, return_dict=False)[0]
    torch.testing.assert_close(_run(ours, x), y, rtol=0, atol=1e-4)


@torch.no_grad()
def test_timesteps_are_a_grid_that_nothing_shifts() -> None:
    scheduler = _scheduler(FLOW, solver="dpmpp3m")
    scheduler.set_timesteps(timesteps=[1000.0, 600.0, 150.0])
    assert scheduler.table.grid == pytest.approx((1.0, 0.6, 0.15, 0.0))
    discrete = _scheduler(V, solver="ddim")
    discrete.set_timesteps(timesteps=[999, 499, 0])
    assert discrete.timesteps.tolist() == [999, 499, 0] and discrete.table.grid[-1] == 0


@pytest.mark.parametrize("solver", ["dpmpp3m", "unipc3", "ab3", "heun", "dpm2"])
@torch.no_grad()
def test_a_run_on_sigmas_is_sample_on_that_grid(solver: str) -> None:
    """Where a solver can be neither at pure noise nor at data, `grid_options` bound the grid; without, the error names them."""
    bound = {"rho_max": 80.0, "rho_min": 0.002} if solver in ("heun", "dpm2") else {}
    scheduler, sigmas = _scheduler(FLOW, solver=solver, grid_options=bound), [1.0, 0.8, 0.5, 0.2]
    scheduler.set_timesteps(sigmas=sigmas)
    ends = (80 / 81, 0.002 / 1.002) if bound else (1.0, 0.0)
    grid = grids.explicit([ends[0], *sigmas[1:], ends[1]])
    field = NetworkField(lambda x, t: _network(x, 1000 * t), "velocity", Linear())
    x = normal(4, 2)
    expected = sample(field, SOLVERS[solver].build(Linear(), grid), x)
    torch.testing.assert_close(_run(scheduler, x), expected, rtol=0, atol=1e-5)
    if bound:
        with pytest.raises(ValueError, match=r"rho = .*grid_options=\{\"rho_max\": 80, \"rho_min\": 0.002\}"):
            _scheduler(FLOW, solver=solver).set_timesteps(sigmas=sigmas)


def test_a_learned_table_keeps_its_grid_and_counts_its_sigmas() -> None:
    learned = LearnedTable(Linear(), grids.logsnr(Linear(), 3))
    scheduler = MidwayScheduler.from_config(FLOW, table=asdict(learned.table()))
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 3, 3), mu=0.9)
    assert scheduler.table.grid == pytest.approx(grids.logsnr(Linear(), 3), abs=1e-6)
    with pytest.raises(ValueError, match="has 3 steps, not 4"):
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 4, 4))


DYNAMIC = {**FLOW, "use_dynamic_shifting": True}


@pytest.mark.parametrize(
    ("config", "given", "match"),
    [
        (FLOW, {"sigmas": [0.2, 0.9]}, "from 0.2 to 0.9"),
        (FLOW, {"sigmas": [1.0, 0.5, 0.5]}, "from 0.5 to 0.5"),
        (FLOW, {"sigmas": [1.5, 0.5]}, "have 1.5: .*from 0 to 1"),
        (FLOW, {"sigmas": [0.5, -0.1]}, "have -0.1"),
        (FLOW, {"sigmas": [float("nan"), 0.1]}, "have nan"),
        (FLOW, {"sigmas": []}, "empty"),
        (FLOW, {"sigmas": [0.0]}, "do not fall"),
        (FLOW, {"sigmas": [1.0, 0.5], "num_inference_steps": 3}, "2 sigmas or timesteps for 3 steps"),
        (FLOW, {"sigmas": [1.0, 0.5], "timesteps": [1000.0, 500.0]}, "not both"),
        (FLOW, {}, "needs num_inference_steps, sigmas or timesteps"),
        (FLOW, {"timesteps": [1200.0, 5.0]}, "timesteps have 1200"),
        (FLOW, {"timesteps": [5.0, 500.0]}, "timesteps go from 5 to 500"),
        (FLOW, {"num_inference_steps": 4, "mu": float("nan")}, "mu is nan"),
        (FLOW, {"num_inference_steps": 4, "mu": 1e9}, "mu is 1000000000"),
        (FLOW, {"sigmas": [1.0, 0.5], "mu": 90.0}, "do not fall"),
        ({**DYNAMIC, "time_shift_type": "linear"}, {"sigmas": [1.0], "mu": -1.0}, "mu is -1.0.* and positive"),
        (DYNAMIC, {"sigmas": [1.0, 0.5]}, "so that sigmas need mu"),
        ({**FLOW, "use_karras_sigmas": True}, {"sigmas": [1.0, 0.5]}, "use_karras_sigmas of the config"),
        (V, {"sigmas": [100.0, 1.0]}, "have 100: .*from 0 to 14.6"),
        (V, {"sigmas": [3.0, 1.0], "mu": 0.5}, "this model is none"),
        (V, {"num_inference_steps": 4, "mu": 0.5}, "this model is none"),
    ],
)
def test_what_is_no_run_of_the_model_raises_an_error(config: Any, given: Any, match: str) -> None:
    scheduler = MidwayScheduler.from_config(config, solver="ddim")
    with pytest.raises(ValueError, match=match):
        scheduler.set_timesteps(**given)


def test_a_flow_in_reversed_time_raises_an_error() -> None:
    with pytest.raises(ValueError, match="invert_sigmas"):
        MidwayScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)


# ---- pipelines of diffusers ----


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_flux_pipeline_with_our_euler_is_with_theirs(name: str) -> None:
    """It passes sigmas, and mu whatever the config."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(**CONFIGS[name])
    expected = flux(diffusers, theirs)(**flux_inputs(5)).images
    got = flux(diffusers, MidwayScheduler.from_config(theirs.config, solver="euler"))(**flux_inputs(5)).images
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("strength", [0.4, 0.8, 1.0])
@torch.no_grad()
def test_flux_image_to_image_with_our_euler_is_with_theirs(strength: float) -> None:
    """It slices timesteps, calls set_begin_index and scale_noise."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    where, found = ("pipeline_flux_img2img", "FluxImg2ImgPipeline"), []
    for scheduler in (theirs, MidwayScheduler.from_config(theirs.config, solver="euler")):
        inputs = {**flux_inputs(5), "image": torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}
        found.append(flux(diffusers, scheduler, *where)(**inputs, strength=strength).images)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=5e-6)


@pytest.mark.parametrize("strength", [0.2, 0.6, 1.0])
@torch.no_grad()
def test_a_pipeline_that_slices_and_sets_no_begin_index_starts_there(strength: float) -> None:
    """Kandinsky's image to image; their DDIM takes its step from the timestep alone."""
    theirs = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    theirs.set_timesteps(5)
    schedule: Any = parametrisation_of(theirs.config).schedule
    ours = MidwayScheduler.from_config(theirs.config, solver="ddim", grid=schedule.grid(theirs.timesteps.tolist()))
    expected, got = (kandinsky(diffusers, s)(**kandinsky_inputs(5, strength)).images for s in (theirs, ours))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_pipeline_that_slices_inside_a_step_raises_an_error() -> None:
    """It slices by steps, whatever the evaluations of a step."""
    pipe = kandinsky(diffusers, _scheduler({}, solver="dpm2"))
    assert pipe(**kandinsky_inputs(6, 0.7)).images.isfinite().all(), "4 of 12: step 2 begins there"
    with pytest.raises(ValueError, match="cannot begin at evaluation 3 of 12"):
        pipe(**kandinsky_inputs(6, 0.5))


# ---- more of the kind: steps that are not those the table is of ----


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_timestep_that_somebody_wrote_into_the_list_is_not_taken_for_the_old_one(mode: Any) -> None:
    """The network saw another time than the row has; entries are otherwise known by their place in memory."""
    with mode():
        scheduler, x = _scheduler(V, solver="ddim"), normal(2, 2)
        scheduler.set_timesteps(5)
        scheduler.timesteps[2] += 7
        with pytest.raises(ValueError, match="is not one of the 5 of this run"):
            _run(scheduler, x)
        scheduler.set_timesteps(5)
        expected = _run(scheduler, x)
        scheduler.timesteps[:] = scheduler.timesteps.clone()
        assert torch.equal(_run(scheduler, x), expected), "the same numbers, written"


def test_sigmas_that_somebody_wrote_are_not_ignored() -> None:
    """As Cosmos does with the last of theirs."""
    scheduler = _scheduler(FLOW, solver="euler")
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    scheduler.sigmas[-1] = scheduler.sigmas[-2]
    with pytest.raises(ValueError, match=r"pass them to set_timesteps\(sigmas="):
        _run(scheduler, normal(2, 2))


@pytest.mark.parametrize("solver", ["heun", "dpmpp3m"])
@torch.no_grad()
def test_copies_of_a_scheduler_run_side_by_side(solver: str) -> None:
    """As video and audio of one pipeline, on the timesteps of the first."""
    scheduler, x, y = _scheduler(V, solver=solver), normal(2, 2), normal(2, 2, seed=1)
    scheduler.set_timesteps(4)
    expected = [_run(scheduler, x), _run(scheduler, y)]
    scheduler.set_timesteps(4)
    other = copy.deepcopy(scheduler)
    for t in scheduler.timesteps:
        x = scheduler.step(_network(x, t), t, x, return_dict=False)[0]
        y = other.step(_network(y, t), t, y, return_dict=False)[0]
    assert torch.equal(x, expected[0]) and torch.equal(y, expected[1])
    assert torch.equal(_run(other, normal(2, 2)), expected[0]), "its own list is recognised, too"
