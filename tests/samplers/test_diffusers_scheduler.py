"""Pipelines of diffusers with our tables: what `sample` gives, for every solver; equal to diffusers' own DDIM and Euler where
those are the same method; learned tables, analytic first steps, image to image, saving; the page's code."""

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_models import conditional_unet, dit, unet
from tensors import normal
from torch import Tensor

from midway.samplers import grids
from midway.samplers.card import SolverCard
from midway.samplers.denoisers import conditional_from_diffusers, field_from_diffusers
from midway.samplers.guidance import classifier_free
from midway.samplers.interop import parametrisation_of, table_from_numbers, trained_range
from midway.samplers.learned import LearnedTable
from midway.samplers.learned_solver import LearnedSolver
from midway.samplers.rows import Row
from midway.samplers.sample import EvaluationCounter, sample
from midway.samplers.solvers import SOLVERS, ddim
from midway.samplers.step_parameters import AMEDConfig, Constants, Predictor
from midway.samplers.table import Table, fingerprint

diffusers = pytest.importorskip("diffusers")

from midway.samplers.diffusers_scheduler import MidwayScheduler  # noqa: E402

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
V = {**LATENT, "prediction_type": "v_prediction"}
ROOT = Path(__file__).resolve().parents[2]


def _dit_pipeline(scheduler: Any) -> Any:
    transformer = dit(diffusers, 1000)
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=4)
    pipe = diffusers.DiTPipeline(transformer, vae.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _ddpm_pipeline(scheduler: Any) -> Any:
    pipe = diffusers.DDPMPipeline(unet(diffusers), scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Recorded:
    """What the scheduler's `step` returned, call by call, and the network's time inputs."""

    def __init__(self, scheduler: Any) -> None:
        self.states, self.times = [], []
        step = scheduler.step

        def recording(output: Tensor, timestep: Tensor, *arguments: Any, **named: Any) -> Any:
            result = step(output, timestep, *arguments, **named)
            self.times.append(timestep)
            self.states.append(result.prev_sample)
            return result

        scheduler.step = recording


def _seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _loop(scheduler: Any, network: Callable[[Tensor, Tensor], Tensor], x: Tensor, steps: int, **named: Any) -> Tensor:
    """The loop of a latent pipeline, from `init_noise_sigma` to the last step."""
    scheduler.set_timesteps(steps)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(network(scheduler.scale_model_input(x, t), t), t, x, return_dict=False, **named)[0]
    return x


def _sine(x: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
    """A network."""
    return (x.sin() + timestep.reshape(-1, 1) / 1000,)


def _close(got: Tensor, expected: Tensor) -> None:
    assert got.isfinite().all()
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ---- pipelines equal sample() ----


@pytest.mark.parametrize(
    ("solver", "prediction_type"),
    [*((name, "v_prediction") for name in SOLVERS), ("heun", "epsilon"), ("heun", "sample"), ("dpmpp2m", "epsilon")],
)
@torch.no_grad()
def test_a_ddpm_pipeline_is_sample(solver: str, prediction_type: str) -> None:
    config = {**LATENT, "prediction_type": prediction_type}
    scheduler = MidwayScheduler(**config, solver=solver, grid="karras")
    recorded, pipe = Recorded(scheduler), _ddpm_pipeline(scheduler)
    pipe(batch_size=2, num_inference_steps=4, generator=_seeded(), output_type="pt")
    field = field_from_diffusers(pipe.unet, config)
    counter = EvaluationCounter(field)
    table = SOLVERS[solver].build(field.schedule, grids.karras(field.schedule, 4, *trained_range(field.schedule)))
    generator = _seeded()
    x = torch.randn(2, 3, 8, 8, generator=generator)
    expected = sample(field, table, x, lambda x: torch.randn(x.shape, generator=generator))
    _close(recorded.states[-1], expected)
    sample(counter, table, x, lambda x: x)
    assert len(recorded.times) == table.nfe == counter.evaluations / 2
    assert len(recorded.times) == 4 * scheduler.order


@pytest.mark.parametrize("analytic_first", [False, True])
@pytest.mark.parametrize("solver", ["ddim", "heun", "dpm2", "dpmpp2m", "unipc2"])
@torch.no_grad()
def test_a_guided_dit_pipeline_is_sample(solver: str, analytic_first: bool) -> None:
    scheduler = MidwayScheduler(solver=solver, grid="logsnr", analytic_first=analytic_first)
    recorded, pipe = Recorded(scheduler), _dit_pipeline(scheduler)
    pipe([7, 3], guidance_scale=3.0, num_inference_steps=3, generator=_seeded(), output_type="pt")
    schedule = parametrisation_of({}).schedule
    counter = EvaluationCounter(conditional_from_diffusers(pipe.transformer, {}))
    field = classifier_free(counter, torch.tensor([7, 3]), torch.tensor([1000, 1000]), 3.0)
    table = SOLVERS[solver].build(schedule, grids.logsnr(schedule, 3, *trained_range(schedule)), analytic_first)
    _close(recorded.states[-1][:2], sample(field, table, normal(2, 4, 4, 4)))
    assert len(recorded.times) == table.nfe == counter.evaluations / 4
    assert table.nfe == 3 * SOLVERS[solver].evaluations - analytic_first


@pytest.mark.parametrize("analytic_first", [False, True])
@torch.no_grad()
def test_a_text_to_image_loop_is_sample(analytic_first: bool) -> None:
    """The loop of the latent pipelines, where the scaled input is a batch of 2 B and `step` gets the state itself."""
    network = conditional_unet(diffusers)
    prompts, null = normal(2, 3, 6, seed=1), torch.zeros(2, 3, 6)
    scheduler = MidwayScheduler(**V, solver="dpmpp2m", analytic_first=analytic_first)
    scheduler.set_timesteps(5)
    x = normal(2, 4, 8, 8) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        doubled = scheduler.scale_model_input(torch.cat([x, x]), t)
        uncond, cond = network(doubled, t, encoder_hidden_states=torch.cat([null, prompts])).sample.chunk(2)
        x = scheduler.step(uncond + 4.0 * (cond - uncond), t, x, return_dict=False)[0]
    field = classifier_free(conditional_from_diffusers(network, V, "encoder_hidden_states"), prompts, null, 4.0)
    schedule = parametrisation_of(V).schedule
    grid = grids.uniform(schedule, 5, *trained_range(schedule))
    _close(x, sample(field, SOLVERS["dpmpp2m"].build(schedule, grid, analytic_first), normal(2, 4, 8, 8)))


@torch.no_grad()
def test_a_flow_loop_is_sample() -> None:
    def network(x: Tensor, timestep: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (x.tanh() + (timestep / 1000).reshape(-1, 1),)

    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = MidwayScheduler.from_config(theirs.config, solver="heun", grid="shift", grid_options={"factor": 3.0})
    assert scheduler.config["prediction_type"] == "flow_prediction"
    x = normal(4, 2)
    got = _loop(scheduler, lambda x, t: network(x, t)[0], x, 6)
    field = field_from_diffusers(network, theirs.config)
    grid = grids.shift(field.schedule, 6, factor=3.0)
    assert scheduler.timesteps[0].item() == pytest.approx(1000 * 80 / 81)
    start = x * (grid[0] ** 2 + (1 - grid[0]) ** 2) ** 0.5
    _close(got, sample(field, SOLVERS["heun"].build(field.schedule, grid), start))


# ---- diffusers' own schedulers ----


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize(
    ("prediction_type", "spacing", "zero_snr"),
    [
        *itertools.product(["epsilon", "sample", "v_prediction"], ["leading", "trailing"], [False]),
        ("v_prediction", "trailing", True),
    ],
)
@torch.no_grad()
def test_ddim_is_their_ddim(prediction_type: str, spacing: str, zero_snr: bool, eta: float) -> None:
    network, x = unet(diffusers), normal(2, 3, 8, 8)
    config = {**LATENT, "prediction_type": prediction_type, "rescale_betas_zero_snr": zero_snr}
    theirs = diffusers.DDIMScheduler(**config, timestep_spacing=spacing, clip_sample=False)
    theirs.set_timesteps(5)
    expected, generator = x, _seeded(1)
    for t in theirs.timesteps:
        scaled = theirs.scale_model_input(expected, t)
        expected = theirs.step(network(scaled, t).sample, t, expected, eta=eta, generator=generator).prev_sample
    if spacing == "leading":
        assert theirs.timesteps.tolist() == [800, 600, 400, 200, 0]
    schedule: Any = parametrisation_of(config).schedule
    ours = MidwayScheduler.from_config(
        theirs.config, solver="ddim", grid=schedule.grid(theirs.timesteps.tolist()), solver_options={"eta": eta}
    )
    assert ours.config["rescale_betas_zero_snr"] == zero_snr
    got = _loop(ours, lambda x, t: network(x, t).sample, x, 5, generator=_seeded(1))
    assert torch.equal(ours.timesteps, theirs.timesteps.float())
    _close(got, expected)


@torch.no_grad()
def test_euler_is_their_flow_matching_euler() -> None:
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    theirs.set_timesteps(6)
    x = expected = normal(4, 2)
    for t in theirs.timesteps:
        expected = theirs.step(expected.tanh() * (1 + t / 1000), t, expected).prev_sample
    ours = MidwayScheduler.from_config(theirs.config, solver="euler", grid=theirs.sigmas.tolist())
    _close(_loop(ours, lambda x, t: x.tanh() * (1 + t / 1000), x, 6), expected)


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "LCMScheduler", "DPMSolverMultistepScheduler", "EulerDiscreteScheduler"]
)
def test_a_config_is_read_with_the_defaults_of_its_own_class(name: str) -> None:
    theirs = getattr(diffusers, name)()
    ours = MidwayScheduler.from_config(theirs.config, solver="ddim")
    k = torch.tensor([0, 100, 500, 999])
    x0, noise = normal(4, 3), normal(4, 3, seed=1)
    expected = diffusers.DDPMScheduler.from_config({**theirs.config, "_use_default_values": []}).add_noise(x0, noise, k)
    torch.testing.assert_close(ours.add_noise(x0, noise, k), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.add_noise(x0, noise, k.float()), expected, rtol=0, atol=1e-5)


# ---- learned tables ----


def _learned_table_of(config: dict[str, Any], analytic_first: bool = False, steps: int = 3) -> Table:
    schedule = parametrisation_of(config).schedule
    learned = LearnedTable(
        schedule, grids.karras(schedule, steps, *trained_range(schedule)), analytic_first=analytic_first
    )
    for i, parameter in enumerate(learned.parameters()):
        torch.nn.init.normal_(parameter, std=0.1, generator=_seeded(i))
    return learned.table({"teacher": "none"})


def _card(name: str, schedule: str) -> SolverCard:
    return SolverCard(name, "karras", schedule, "model", 6, False, 1.0, 0, "teacher")


@pytest.mark.parametrize("analytic_first", [False, True])
@torch.no_grad()
def test_a_learned_table_runs_and_travels_in_the_config(analytic_first: bool, tmp_path: Path) -> None:
    table = _learned_table_of(V, analytic_first)
    table.save(tmp_path / "table.safetensors")
    scheduler = MidwayScheduler.from_config(V, table=str(tmp_path / "table.safetensors"))
    (tmp_path / "table.safetensors").unlink()
    scheduler.save_pretrained(tmp_path / "scheduler")
    assert [p.name for p in (tmp_path / "scheduler").iterdir()] == ["scheduler_config.json"]
    again: Any = MidwayScheduler.from_pretrained(tmp_path / "scheduler")
    copied = MidwayScheduler.from_config(scheduler.config)
    network, x = unet(diffusers), normal(2, 3, 8, 8)
    expected = sample(field_from_diffusers(network, V), table, x)
    for each in (scheduler, again, copied):
        _close(_loop(each, lambda x, t: network(x, t).sample, x, 3), expected)
        assert each.table == table
        with pytest.raises(ValueError, match="has 3 steps, not 4"):
            each.set_timesteps(4)
    pipe = _dit_pipeline(MidwayScheduler.from_config(scheduler.config, prediction_type="v_prediction"))
    assert pipe([1], num_inference_steps=3, output_type="pt").images.isfinite().all()


def test_constants_are_a_table_and_predictors_raise_an_error(tmp_path: Path) -> None:
    schedule = parametrisation_of(V).schedule
    grid, path = grids.logsnr(schedule, 3, *trained_range(schedule)), tmp_path / "solver.safetensors"
    constants = Constants(3, AMEDConfig())
    torch.nn.init.normal_(constants.raw, std=0.1, generator=_seeded())
    solver = LearnedSolver(_card("amed", fingerprint(schedule)), grid, constants, schedule)
    solver.save(path)
    scheduler = MidwayScheduler.from_config(V, table=str(path))
    scheduler.set_timesteps(3)
    assert scheduler.table is not None
    assert scheduler.table == solver.table
    assert (scheduler.order, len(scheduler.timesteps)) == (2, 6)
    LearnedSolver(_card("amed-predictor", fingerprint(schedule)), grid, Predictor(4, 3, AMEDConfig()), schedule).save(
        path
    )
    with pytest.raises(ValueError, match="without -predictor instead"):
        MidwayScheduler.from_config(V, table=str(path))


def test_a_table_of_another_schedule_raises_an_error() -> None:
    table = ddim(parametrisation_of({}).schedule, (0.9, 0.1))
    assert table_from_numbers(json.loads(json.dumps(asdict(table)))) == table
    with pytest.raises(ValueError, match="use the config of the scheduler that the model was trained with"):
        MidwayScheduler.from_config(V, table=asdict(table))


def test_rows_without_an_evaluation_run_inside_step() -> None:
    """Analytic rows at the start, in the middle and at the end; stochastic ones only after the first evaluation."""
    rows = (
        Row(None, 0.9, (0.5,), ()),
        Row(0.9, 0.7, (0.1, 0.2), (0.3,)),
        Row(None, 0.6, (0.1, 0.0, 0.9), (0.05,), noise=0.5),
        Row(0.6, 0.3, (0.0, 0.1, 0.2, 0.3), (0.1, 0.4)),
        Row(None, 0.1, (0.0, 0.1, 0.0, 0.0, 1.0), (0.0, 0.2)),
    )
    table = Table("rows", (0.95, 0.9, 0.7, 0.6, 0.3, 0.1), tuple(range(6)), rows)
    scheduler = MidwayScheduler.from_config(V, table=asdict(table))

    x, generator = normal(4, 2), _seeded(3)
    got = _loop(scheduler, lambda x, t: _sine(x, t)[0], x, 5, generator=_seeded(3))
    field = field_from_diffusers(_sine, V)
    _close(got, sample(field, table, x, lambda x: torch.randn(x.shape, generator=generator)))
    noisy = Table(
        "noisy", (0.9, 0.5, 0.1), (0, 1, 2), (Row(None, 0.5, (1.0,), (), 0.1), Row(0.5, 0.1, (0.0, 1.0), (1.0,)))
    )
    scheduler = MidwayScheduler.from_config(V, table=asdict(noisy))
    with pytest.raises(ValueError, match="draws noise before its first evaluation"):
        scheduler.set_timesteps(2)


# ---- the scheduler as an object ----


@torch.no_grad()
def test_a_pipeline_is_saved_and_loaded_with_its_solver(tmp_path: Path) -> None:
    scheduler = MidwayScheduler.from_config(
        diffusers.DDIMScheduler(**V, clip_sample=False).config,
        solver="ddim", grid="shift", grid_options={"factor": 2.0}, solver_options={"eta": 0.5},
    )  # fmt: skip
    pipe = _ddpm_pipeline(scheduler)
    pipe.save_pretrained(tmp_path)
    again = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert type(again.scheduler) is MidwayScheduler
    one, other = (p(num_inference_steps=3, generator=_seeded(), output_type="pt").images for p in (pipe, again))
    _close(one, other)
    back = diffusers.DDIMScheduler.from_config(again.scheduler.config)
    assert back.config.clip_sample is False, "what is not ours to read stays for the scheduler it came from"
    assert back.config.prediction_type == "v_prediction"


def test_runs_begin_with_set_timesteps_and_end_with_the_table() -> None:
    scheduler, x = MidwayScheduler(**V), normal(2, 2)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 0, x)
    first = _loop(scheduler, lambda x, t: x.sin(), x, 4)
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.step(x, 0, x)
    scheduler.set_timesteps(4)
    scheduler.step(x, scheduler.timesteps[0], x)  # a run that is given up half way leaves nothing behind
    assert torch.equal(_loop(scheduler, lambda x, t: x.sin(), x, 4), first)
    assert scheduler.timesteps.dtype == torch.float32
    fresh = _loop(MidwayScheduler(**V), lambda x, t: x.sin(), x, 6)
    assert torch.equal(_loop(scheduler, lambda x, t: x.sin(), x, 6), fresh), "another number of steps is another table"


def test_a_pipeline_that_does_not_scale_inputs_cannot_skip_the_first_evaluation() -> None:
    with pytest.raises(ValueError, match="set analytic_first=False"):
        _ddpm_pipeline(MidwayScheduler(**V, analytic_first=True))(num_inference_steps=3)


def test_wrong_names_and_grids_raise_an_error() -> None:
    with pytest.raises(ValueError, match="unknown solver 'eulr'"):
        MidwayScheduler(solver="eulr")
    with pytest.raises(ValueError, match="unknown grid 'even'"):
        MidwayScheduler(grid="even")
    with pytest.raises(ValueError, match="unknown prediction_type"):
        MidwayScheduler(prediction_type="noise")
    with pytest.raises(ValueError, match="the grid has 2 steps, not 5"):
        MidwayScheduler(grid=[1.0, 0.5, 0.1]).set_timesteps(5)
    with pytest.raises(ValueError, match="falling times"):
        MidwayScheduler(grid=[0.1, 0.5]).set_timesteps(1)


@pytest.mark.parametrize("solver", ["ddim", "heun", "dpmpp2m"])
def test_image_to_image_is_sample_on_the_rest_of_the_grid(solver: str) -> None:
    scheduler: Any = MidwayScheduler(**V, solver=solver)
    scheduler.set_timesteps(6)
    timesteps = scheduler.timesteps[2 * scheduler.order :]
    scheduler.set_begin_index(2 * scheduler.order)
    x0, noise = normal(3, 2), normal(3, 2, seed=1)
    x = start = scheduler.add_noise(x0, noise, timesteps[:1])
    for t in timesteps:
        x = scheduler.step(_sine(x, t)[0], t, x).prev_sample

    field = field_from_diffusers(_sine, V)
    grid = grids.uniform(field.schedule, 6, *trained_range(field.schedule))[2:]
    at = torch.tensor(grid[0])
    torch.testing.assert_close(start, field.schedule.alpha(at) * x0 + field.schedule.sigma(at) * noise)
    _close(x, sample(field, SOLVERS[solver].build(field.schedule, grid), start))
    scheduler.set_begin_index(0)
    assert torch.equal(
        _rest(scheduler, noise), _loop(MidwayScheduler(**V, solver=solver), lambda x, t: _sine(x, t)[0], noise, 6)
    )


def _rest(scheduler: Any, x: Tensor) -> Tensor:
    for t in scheduler.timesteps:
        x = scheduler.step(_sine(x, t)[0], t, x).prev_sample
    return x


def test_image_to_image_cannot_begin_inside_a_step() -> None:
    scheduler = MidwayScheduler(**V, solver="dpm2")
    with pytest.raises(ValueError, match="call set_timesteps"):
        scheduler.set_begin_index(1)
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="cannot begin at evaluation 1"):
        scheduler.set_begin_index(1)
    learned = MidwayScheduler.from_config(V, table=asdict(_learned_table_of(V)))
    learned.set_timesteps(3)
    with pytest.raises(ValueError, match="cannot begin at evaluation 1"):
        learned.set_begin_index(1)


@pytest.mark.parametrize("solver", ["heun", "dpmpp3m", "unipc3"])
def test_step_never_reads_a_tensor(solver: str) -> None:
    """Tensors without storage: reading a value fails."""
    scheduler, x = MidwayScheduler(**V, solver=solver), torch.empty(2, 4, device="meta")
    scheduler.set_timesteps(5, device="meta")
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, scheduler.scale_model_input(x, t), return_dict=False)[0]
    assert x.shape == (2, 4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_dtype_of_the_pipeline_is_kept_and_half_precision_is_not_computed_in(dtype: torch.dtype) -> None:
    scheduler = MidwayScheduler(**V, solver="ddim", grid=[0.9, 0.1])
    exact, narrow = (
        _loop(scheduler, lambda x, t: torch.cat([x, x], dim=1), normal(64, 2).to(dtype).to(into), 1)
        for into in (torch.float64, dtype)
    )
    assert narrow.dtype == dtype
    assert torch.equal(narrow, exact.to(dtype))


@pytest.mark.slow
def test_without_diffusers_only_the_scheduler_is_missing() -> None:
    code = (
        "import sys; sys.modules['diffusers'] = None\n"
        "import midway.samplers.interop, midway.samplers.denoisers\n"
        "try:\n    import midway.samplers.diffusers_scheduler\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "MidwayScheduler needs diffusers: pip install 'diffusers>=0.35'\n"


# ---- the page ----


def _blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "diffusers.md").read_text(), flags=re.DOTALL)


@torch.no_grad()  # restores what the page sets
def test_the_code_of_the_page_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks in order, in a folder where the names of the page's models are tiny local copies."""
    monkeypatch.chdir(tmp_path)
    _ddpm_pipeline(diffusers.DDPMScheduler()).save_pretrained("google/ddpm-cifar10-32")
    dit = _dit_pipeline(diffusers.DDIMScheduler())
    dit.save_pretrained("facebook/DiT-XL-2-256")
    _learned_table_of({}).save(Path("table.safetensors"))
    names: dict[str, Any] = {}
    blocks = _blocks()
    assert len(blocks[0].strip().splitlines()) <= 10, "our solver in a pipeline takes ten lines"
    for block in blocks:
        exec(block, names)
    assert len(names["images"]) == 4
    assert names["errors"]["heun"] > 0
    assert set(names["errors"]) == {name for name, solver in SOLVERS.items() if not solver.stochastic}
    assert names["latents"].isfinite().all()
