"""Laws of the noise levels that training draws, against their closed forms."""

import math

import pytest
import torch
from torch import Tensor

from midway.gen.core.errors import UsageError
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.objectives.times import MODE_SCALES, cosmap, logit_normal, mode, shift_factor, time_at
from midway.samplers.schedule import SCHEDULES, Linear, Shifted

U = torch.linspace(0.001, 0.999, 1999, dtype=torch.float64)


def tau_of(log_rho: Tensor) -> Tensor:
    return log_rho.sigmoid()


def density_of(tau: Tensor) -> Tensor:
    """|du / dtau| by central differences of a map of U."""
    return ((U[2:] - U[:-2]) / (tau[2:] - tau[:-2])).abs()


def test_cosmap_has_its_published_density() -> None:
    tau = tau_of(cosmap(U))
    expected = 2 / (math.pi - 2 * math.pi * tau + 2 * math.pi * tau.square())
    torch.testing.assert_close(density_of(tau), expected[1:-1], rtol=1e-5, atol=0)
    torch.testing.assert_close(tau, 1 - 1 / ((math.pi / 2 * U).tan() + 1), rtol=1e-12, atol=0)


def test_logit_normal_has_its_published_density() -> None:
    tau = tau_of(logit_normal(U, 0.3, 0.8))
    normal = (-(tau.logit() - 0.3).square() / (2 * 0.8**2)).exp() / (0.8 * math.sqrt(2 * math.pi))
    expected = normal / (tau * (1 - tau))
    inner = slice(20, -20)  # where differences are exact enough
    torch.testing.assert_close(density_of(tau)[inner], expected[1:-1][inner], rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [MODE_SCALES[0], 0.0, 0.81, 1.29, MODE_SCALES[1]])
def test_mode_is_the_published_map_and_falls(scale: float) -> None:
    tau = tau_of(mode(U, scale))
    expected = 1 - U - scale * ((math.pi / 2 * U).cos().square() - 1 + U)
    torch.testing.assert_close(tau, expected, rtol=1e-9, atol=1e-12)
    assert bool((tau.diff() < 0).all())
    slope = 1 + scale - scale * math.pi / 2 * (math.pi * U).sin()  # -dtau / du
    inner = (slope > 0.05)[1:-1]
    torch.testing.assert_close(density_of(tau)[inner], 1 / slope[1:-1][inner], rtol=1e-4, atol=0)


def model(values: tuple[int, int, int] = (4, 8, 8), **config: object) -> LatentModel:
    dit = DiTConfig(width=8, depth=1, heads=2, patch=values[1])
    return LatentModel(LatentModelConfig(dit=dit, **config), values, 2)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("config", "expected"),
    [({"time": "mode", "time_mode": 0.5}, mode(U, 0.5)), ({"time": "cosmap"}, cosmap(U))],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_model_draws_the_density_of_its_name(schedule: str, config: dict[str, object], expected: Tensor) -> None:
    found = model((4, 8, 8), schedule=schedule, **config)
    assert torch.equal(found.time_of(U), time_at(found.schedule, expected).float())


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("time", ["logit_normal", "uniform", "mode", "cosmap"])
def test_a_shift_lowers_logsnr_of_every_draw_on_every_schedule(schedule: str, time: str) -> None:
    found = [model(schedule=schedule, time=time, time_shift=factor) for factor in (1.0, 2.0)]
    plain, shifted = (each.schedule.logsnr(each.time_of(U).double()) for each in found)
    inside = (plain.abs() < 6) & (shifted > -8)  # not at the ends of what grids sample, nor of the schedule
    assert int(inside.sum()) > 300
    torch.testing.assert_close(shifted[inside], plain[inside] - 2 * math.log(2), rtol=0, atol=2e-3)


def test_shifts_compose_invert_and_are_sd3s() -> None:
    tau = torch.linspace(0.05, 0.95, 100, dtype=torch.float64)
    a, b = shift_factor("auto", 16384), shift_factor("auto", 1024)
    assert (a, b, shift_factor("auto", 4096), shift_factor(3.0, 7)) == (2.0, 0.5, 1.0, 3.0)

    def shifted(tau: Tensor, factor: float) -> Tensor:
        return time_at(Linear(), tau.logit() + math.log(factor))

    torch.testing.assert_close(shifted(tau, a), a * tau / (1 + (a - 1) * tau), rtol=1e-12, atol=0)
    torch.testing.assert_close(shifted(tau, a), Shifted(Linear(), a).warp(tau), rtol=1e-12, atol=0)
    torch.testing.assert_close(shifted(shifted(tau, a), 1.3), shifted(tau, a * 1.3), rtol=1e-12, atol=0)
    torch.testing.assert_close(shifted(shifted(tau, a), b), tau, rtol=1e-12, atol=0)


def test_auto_follows_the_number_of_values_of_a_latent() -> None:
    large, same, none = model((16, 32, 32), time_shift="auto"), model((4, 32, 32), time_shift="auto"), model()
    assert torch.equal(same.time_of(U), none.time_of(U))
    torch.testing.assert_close(large.time_of(U), model(time_shift=2.0).time_of(U))


@pytest.mark.parametrize("time", ["logit_normal", "uniform", "mode", "cosmap"])
def test_draws_end_where_the_network_was_trained(time: str) -> None:
    """Of imported networks with timesteps that is at their first level of noise, above the least of grids."""
    found = model(
        schedule="vp", target="eps", inputs="ddpm", time=time, time_std=9.0 if time == "logit_normal" else 1.0
    )
    low, high = found.time_range
    assert low > model(schedule="vp").time_range[0]
    t = found.time_of(torch.tensor([1e-9, 0.01, 0.5, 0.99, 1 - 1e-9], dtype=torch.float64)).double()
    assert bool(((t > low - 1e-6) & (t < high + 1e-6)).all())
    torch.testing.assert_close(t.min(), torch.tensor(low, dtype=torch.float64), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"time_mode": -1.1}, {"time_mode": 1.8}, {"time_shift": 0.0}])
def test_what_is_no_law_raises(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="it can be"):
        model(**wrong).time_of(U)  # pyright: ignore[reportArgumentType]
