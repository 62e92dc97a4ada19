"""Models of diffusers and EDM as fields: the discrete schedule against its formulas, prediction types against exact denoisers,
float times that are never truncated, and tiny diffusers models against their own definition."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers_models import conditional_unet, dit, unet
from oracles import convergence, mixture, times_of, uneven_grid
from tensors import grad, normal
from torch import Tensor

from midway.samplers import grids
from midway.samplers.denoisers import conditional_from_diffusers, field_from_diffusers, field_from_edm
from midway.samplers.discrete import Discrete
from midway.samplers.guidance import classifier_free
from midway.samplers.interop import Parametrisation, parametrisation_of, trained_range
from midway.samplers.prediction import expand
from midway.samplers.sample import EvaluationCounter, sample
from midway.samplers.schedule import EDM, Cosine, Linear, Schedule
from midway.samplers.solvers import SOLVERS, ddim
from midway.samplers.table import Table, fingerprint

LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 400}
CONFIGS: dict[str, dict[str, Any]] = {
    "linear": {},
    "latent": LATENT,
    "cosine": COSINE,
    "zero-snr": {**LATENT, "rescale_betas_zero_snr": True},
    "trained": {"trained_betas": np.linspace(0.001, 0.3, 50).tolist()},
}
all_configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
PREDICTION_TYPES = ["epsilon", "sample", "v_prediction"]


def _discrete(config: Mapping[str, Any]) -> Discrete:
    schedule = parametrisation_of(config).schedule
    assert isinstance(schedule, Discrete)
    return schedule


# ---- the discrete schedule ----


@all_configs
def test_timesteps_have_the_alphas_of_diffusers(config: dict[str, Any]) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**config).alphas_cumprod
    schedule = _discrete(config)
    t = schedule.time(torch.arange(len(theirs), dtype=torch.float64))
    torch.testing.assert_close(schedule.alpha(t).square().float(), theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(schedule.alpha(t).square() + schedule.sigma(t).square(), torch.ones_like(t))


@all_configs
def test_the_float_timestep_interpolates_log_rho(config: dict[str, Any]) -> None:
    """As k-diffusion and diffusers' Euler find the timestep of a sigma, here without rounding."""
    schedule = _discrete(config)
    finite = np.array([value for value in schedule.log_rho if math.isfinite(value)])
    log_rho = np.linspace(finite[0], finite[-1], 777)[1:-1]
    t = schedule.time_of_rho(torch.from_numpy(np.exp(log_rho)))
    expected = np.interp(log_rho, finite, np.arange(len(finite)))
    np.testing.assert_allclose(schedule.timestep(t).numpy(), expected, rtol=0, atol=1e-8)
    np.testing.assert_allclose(schedule.rho(t).log().numpy(), log_rho, rtol=0, atol=1e-10)


@all_configs
def test_closed_forms_are_what_alpha_and_sigma_imply_between_timesteps(config: dict[str, Any]) -> None:
    schedule = _discrete(config)
    t = (torch.arange(schedule.steps, dtype=torch.float64) + 0.37) / schedule.steps  # the first lies before timestep 0
    for closed, derived in zip(schedule.rates(t), Schedule.rates(schedule, t), strict=True):
        torch.testing.assert_close(closed, derived, rtol=1e-8, atol=1e-10)
    assert (schedule.logsnr(t).diff() < 0).all()
    torch.testing.assert_close(schedule.logsnr(t), Schedule.logsnr(schedule, t), rtol=0, atol=1e-7)
    torch.testing.assert_close(schedule.rho(t), Schedule.rho(schedule, t), rtol=1e-9, atol=0)
    torch.testing.assert_close(schedule.time_of_logsnr(schedule.logsnr(t)), t, rtol=0, atol=1e-12)
    torch.testing.assert_close(Schedule.time_of_logsnr(schedule, schedule.logsnr(t)), t, rtol=0, atol=1e-10)


@all_configs
def test_the_ends_are_finite(config: dict[str, Any]) -> None:
    """At t = 0 there is no noise and rho grows linearly; without terminal signal 1 / rho falls linearly to t = 1."""
    schedule, ends = _discrete(config), torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert schedule.alpha(ends)[0] == 1
    assert schedule.sigma(ends)[0] == 0
    assert all(rate.isfinite().all() for rate in schedule.rates(ends))
    inside = torch.tensor([0.2, 0.7], dtype=torch.float64) / schedule.steps
    first = math.exp(schedule.log_rho[0])
    torch.testing.assert_close(schedule.rho(inside), first * inside * schedule.steps)
    torch.testing.assert_close(schedule.rates(ends)[1][0].item(), first * schedule.steps)
    if schedule.zero_terminal_snr:
        assert schedule.alpha(ends)[1] == 0
        last = math.exp(schedule.log_rho[-2])
        torch.testing.assert_close(1 / schedule.rho(1 - inside), inside * schedule.steps / last)
        torch.testing.assert_close(schedule.rates(ends)[0][1].item(), -schedule.steps / last)
        assert schedule.time_of_rho(torch.tensor(math.inf)) == 1
    assert schedule.time_of_rho(torch.tensor(1e30, dtype=torch.float64)) == pytest.approx(1, abs=1e-12)


@all_configs
def test_the_dtype_is_kept_and_float32_is_enough(config: dict[str, Any]) -> None:
    schedule = _discrete(config)
    t = torch.rand(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name in ("alpha", "sigma", "rho", "logsnr", "timestep"):
        exact, narrow = getattr(schedule, name)(t), getattr(schedule, name)(t.float())
        assert (narrow.dtype, narrow.shape) == (torch.float32, t.shape)
        torch.testing.assert_close(narrow, exact.float(), rtol=1e-4, atol=2e-4 if name == "timestep" else 1e-6)
    back = schedule.time_of_logsnr(schedule.logsnr(t.float()))
    assert back.dtype == torch.float32
    torch.testing.assert_close(back, t.float(), rtol=0, atol=1e-6)


def test_integer_timesteps_survive_float32_and_times_can_be_learned() -> None:
    schedule = _discrete({})
    k = torch.arange(1000)
    assert torch.equal(schedule.timestep(schedule.time(k.float())), k.float())
    assert schedule.timestep(torch.tensor(0.5004)).item() == pytest.approx(499.4, abs=1e-3)
    assert schedule.timestep(torch.tensor(0.0003)) == 0
    t = torch.tensor([0.5, 0.50037], dtype=torch.float64, requires_grad=True)
    schedule.timestep(t).sum().backward()
    assert grad(t).tolist() == [1000, 1000]


def test_schedules_that_do_not_rise_raise_an_error() -> None:
    with pytest.raises(ValueError, match="rising noise"):
        Discrete((0.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="rising noise"):
        Discrete((-math.inf, 0.0, 1.0))
    with pytest.raises(ValueError, match="unknown beta_schedule 'sigmoid'"):
        parametrisation_of({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="unknown prediction_type 'noise'"):
        parametrisation_of({"prediction_type": "noise"})
    for config in ({"_class_name": "EDMEulerScheduler"}, {"sigma_max": 80.0, "sigma_data": 0.5}):
        with pytest.raises(ValueError, match="field_from_edm"):
            parametrisation_of(config)


def test_the_class_of_a_scheduler_tells_the_process_also_before_it_was_saved() -> None:
    diffusers = pytest.importorskip("diffusers")
    flow = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    multistep = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    for config in (flow.config, {"_class_name": "FlowMatchHeunDiscreteScheduler"}, multistep.config):
        assert parametrisation_of(config) == Parametrisation(Linear(), "velocity", 1000.0)
    for name in (
        "DDPMScheduler",
        "DDIMScheduler",
        "PNDMScheduler",
        "EulerDiscreteScheduler",
        "UniPCMultistepScheduler",
    ):
        assert parametrisation_of(getattr(diffusers, name)().config) == parametrisation_of({})


def test_a_grid_starts_and_ends_where_the_model_was_trained() -> None:
    assert trained_range(Linear()) == (80.0, 0.002)
    high, low = trained_range(_discrete(LATENT))
    assert (high, low) == pytest.approx((14.6146, 0.0291672), rel=1e-4)  # AutoencoderKL latents, Stable Diffusion 1
    grid = grids.karras(_discrete(LATENT), 5, high, low)
    assert (grid[0], grid[-1]) == pytest.approx((1, 0.001), abs=1e-12)
    assert trained_range(_discrete({}))[0] == 80
    schedule = _discrete({})
    assert schedule.grid([999, 499]) == pytest.approx((1, 0.5, 0))
    assert schedule.grid([999, 499], end=0.001) == pytest.approx((1, 0.5, 0.001))


# ---- models of diffusers ----


class Oracle:
    """A diffusers-like model that is exact for the mixture at float timesteps; it has the betas, not `Discrete`."""

    def __init__(self, config: Mapping[str, Any], channels: int = 1) -> None:
        self.kind, self.channels, self.times = config.get("prediction_type", "epsilon"), channels, []
        self.knots = np.array(_discrete(config).log_rho) if self.kind != "flow_prediction" else np.zeros(1)

    def numbers(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "flow_prediction":
            return 1 - timestep / 1000, timestep / 1000
        log_rho = torch.from_numpy(np.interp(timestep.numpy(), np.arange(len(self.knots)), self.knots))
        return 1 / (1 + (2 * log_rho).exp()).sqrt(), 1 / (1 + (-2 * log_rho).exp()).sqrt()

    def __call__(self, x: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        assert not return_dict
        self.times.append(timestep)
        alpha, sigma = (expand(c, x) for c in self.numbers(timestep))
        x0 = mixture().x0(x, alpha, sigma)
        eps = (x - alpha * x0) / sigma
        values = {
            "epsilon": eps,
            "sample": x0,
            "v_prediction": alpha * eps - sigma * x0,
            "flow_prediction": eps - x0,
        }
        return (torch.cat([values[self.kind]] * self.channels, dim=1),)


@pytest.mark.parametrize("kind", [*PREDICTION_TYPES, "flow_prediction"])
def test_every_prediction_type_gives_the_exact_denoiser(kind: str) -> None:
    config = {**LATENT, "prediction_type": kind}
    field = field_from_diffusers(Oracle(config), config)
    assert isinstance(field.schedule, Linear if kind == "flow_prediction" else Discrete)
    x, t = (
        2 * normal(6, 2, dtype=torch.float64),
        torch.tensor([0.0023, 0.1, 0.2501, 0.50049, 0.9, 0.9995], dtype=torch.float64),
    )
    exact = mixture().field(field.schedule)(x, t)
    got = field(x, t)
    torch.testing.assert_close(got.x0, exact.x0, rtol=0, atol=1e-8)
    torch.testing.assert_close(got.eps, exact.eps, rtol=0, atol=1e-8)


def test_second_order_survives_to_fine_grids() -> None:
    """A model of discrete timesteps is a continuous one: with truncated timesteps the error would stall."""
    field = field_from_diffusers(Oracle(LATENT), LATENT)
    start, end = times_of(field.schedule, 3.0, 0.1)

    def build(steps: int) -> Table:
        return SOLVERS["dpm2"].build(field.schedule, uneven_grid(start, end, steps))

    order, error = convergence(field, field.schedule, build, (64, 128, 256, 512))
    assert order == pytest.approx(2, abs=0.15)
    assert error < 1e-5


def test_the_network_gets_float_timesteps() -> None:
    discrete, flow = Oracle(LATENT), Oracle({"prediction_type": "flow_prediction"})
    x, t = normal(3, 2), torch.tensor([0.25, 0.50049, 1.0])
    field_from_diffusers(discrete, LATENT)(x, t)
    torch.testing.assert_close(discrete.times[0], torch.tensor([249.0, 499.49, 999.0]))
    config = {"num_train_timesteps": 1000, "shift": 3.0}
    field_from_diffusers(flow, config)(x, t)
    torch.testing.assert_close(flow.times[0], 1000 * t)
    field_from_diffusers(flow, config, timestep_scale=1.0)(x, t)
    torch.testing.assert_close(flow.times[1], t)
    with pytest.raises(ValueError, match="timestep_scale is for flow-matching"):
        field_from_diffusers(discrete, LATENT, timestep_scale=1.0)


def test_learned_variances_are_cut_and_dtypes_kept() -> None:
    plain, both = Oracle(LATENT), Oracle(LATENT, channels=2)
    x, t = normal(3, 2, dtype=torch.float64), torch.full((3,), 0.3, dtype=torch.float64)
    one, other = (field_from_diffusers(model, LATENT)(x, t) for model in (plain, both))
    assert torch.equal(one.x0, other.x0)

    class Half:
        dtype = torch.bfloat16

        def __call__(self, x: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
            assert x.dtype == torch.bfloat16
            assert timestep.dtype == torch.float32, "bfloat16 cannot hold a timestep"
            return (0.5 * x,)

    got = field_from_diffusers(Half(), LATENT)(x.float(), t.float())
    assert got.x0.dtype == torch.float32
    torch.testing.assert_close(got.eps, 0.5 * x.float(), rtol=0.01, atol=0)


def test_noise_predicted_without_signal_raises_an_error() -> None:
    zero_snr = {**LATENT, "rescale_betas_zero_snr": True}
    table = ddim(_discrete(zero_snr), (1.0, 0.5, 0.0))
    with pytest.raises(ValueError, match="'eps' does not determine x0"):
        sample(field_from_diffusers(Oracle(zero_snr), zero_snr), table, normal(3, 2, dtype=torch.float64))
    config = {**zero_snr, "prediction_type": "v_prediction"}
    x = normal(3, 2, dtype=torch.float64)
    assert sample(field_from_diffusers(Oracle(config), config), table, x).isfinite().all()


def test_schedules_are_distinguished() -> None:
    marks = {fingerprint(parametrisation_of(config).schedule) for config in CONFIGS.values()}
    assert len(marks) == len(CONFIGS)
    assert all(len(mark) < 60 for mark in marks)
    assert fingerprint(_discrete(LATENT)) == fingerprint(_discrete(dict(LATENT)))
    with pytest.raises(ValueError, match="build the table with the field's schedule"):
        sample(
            field_from_diffusers(Oracle(LATENT), LATENT),
            ddim(_discrete({}), (0.9, 0.1)),
            normal(3, 2, dtype=torch.float64),
        )


Build = Callable[[Any], tuple[Any, str, tuple[int, ...], dict[str, Tensor]]]


def _unet(diffusers: Any) -> tuple[Any, str, tuple[int, ...], dict[str, Tensor]]:
    model = unet(diffusers, "AttnDownBlock2D", "AttnUpBlock2D", num_class_embeds=5, attention_head_dim=4)
    return model, "sample", (3, 8, 8), {"class_labels": torch.tensor([0, 3])}


def _conditional_unet(diffusers: Any) -> tuple[Any, str, tuple[int, ...], dict[str, Tensor]]:
    return conditional_unet(diffusers), "sample", (4, 8, 8), {"encoder_hidden_states": normal(2, 3, 6)}


def _dit(diffusers: Any) -> tuple[Any, str, tuple[int, ...], dict[str, Tensor]]:
    return dit(diffusers, 10), "hidden_states", (4, 4, 4), {"class_labels": torch.tensor([1, 9])}


def _flow_transformer(diffusers: Any) -> tuple[Any, str, tuple[int, ...], dict[str, Tensor]]:
    size = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "sample_size": 4, "patch_size": 2}
    widths = {"joint_attention_dim": 6, "caption_projection_dim": 16, "pooled_projection_dim": 5}
    model = diffusers.SD3Transformer2DModel(in_channels=4, out_channels=4, pos_embed_max_size=4, **size, **widths)
    given = {"encoder_hidden_states": normal(2, 3, 6), "pooled_projections": normal(2, 5)}
    return model, "hidden_states", (4, 4, 4), given


@pytest.mark.parametrize("build", [_unet, _conditional_unet, _dit, _flow_transformer])
@torch.no_grad()
def test_models_of_diffusers_become_fields(build: Build) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, first, shape, given = build(diffusers)
    model.eval()
    flow = build is _flow_transformer
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler() if flow else diffusers.DDIMScheduler()
    field = field_from_diffusers(model, scheduler.config, given)
    x, t = normal(2, *shape), torch.tensor([0.25, 0.50049])
    timestep = torch.tensor([250.0, 500.49]) if flow else torch.tensor([249.0, 499.49])
    value = model(**{first: x}, timestep=timestep, **given).sample[:, : shape[0]]
    got = field(x, t)
    if flow:
        torch.testing.assert_close(got.x0, x - expand(t, x) * value, rtol=0, atol=1e-5)
        torch.testing.assert_close(got.eps - got.x0, value, rtol=0, atol=1e-5)
    else:
        torch.testing.assert_close(got.eps, value, rtol=0, atol=1e-5)
    elsewhere = field_from_diffusers(
        model, scheduler.config, {**given, next(iter(given)): given[next(iter(given))].flip(0)}
    )
    assert (elsewhere(x, t).eps - got.eps).abs().max() > 1e-6, "the conditioning must reach the model"


@torch.no_grad()
def test_guidance_runs_on_labels_of_any_shape() -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model, _, shape, given = _conditional_unet(diffusers)
    model.eval()
    prompts = given["encoder_hidden_states"]
    counter = EvaluationCounter(conditional_from_diffusers(model, LATENT, "encoder_hidden_states"))
    guided = classifier_free(counter, prompts, torch.zeros_like(prompts), 3.0)
    x, t = normal(2, *shape), torch.tensor([0.25, 0.75])
    with_prompt, without = (
        model(x, torch.tensor([249.0, 749.0]), encoder_hidden_states=p).sample
        for p in (prompts, torch.zeros_like(prompts))
    )
    torch.testing.assert_close(guided(x, t).eps, without + 3 * (with_prompt - without), rtol=0, atol=1e-5)
    assert counter.evaluations == 4


# ---- EDM ----


@pytest.mark.parametrize("schedule", [EDM(), Linear(), Cosine(), _discrete(LATENT)])
def test_an_edm_network_serves_every_schedule(schedule: Schedule) -> None:
    def net(x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor:
        assert class_labels is not None
        shift = class_labels.to(x)[:, None]
        return mixture().x0(x - shift, torch.ones_like(x[:, :1]), sigma[:, None]) + shift

    labels = torch.tensor([0, 0, 2, 0])
    x, t = (
        normal(4, 2, dtype=torch.float64),
        schedule.time_of_rho(torch.tensor([0.05, 0.7, 1.0, 9.0], dtype=torch.float64)),
    )
    got = field_from_edm(net, schedule, labels)(x, t)
    alpha, sigma = expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)
    shift = labels.to(x)[:, None]
    torch.testing.assert_close(got.x0, mixture().x0(x - alpha * shift, alpha, sigma) + shift, rtol=0, atol=1e-9)
    torch.testing.assert_close(alpha * got.x0 + sigma * got.eps, x, rtol=0, atol=1e-12)
