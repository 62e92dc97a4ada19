"""Schedules, targets and grids: closed forms against derivation, conversions there and back."""

import math
from itertools import pairwise

import pytest
import torch

from midway.samplers import grids
from midway.samplers.prediction import TARGETS, solve, target_value
from midway.samplers.schedule import EDM, SCHEDULES, VP, Cosine, Linear, Schedule, Shifted

ALL = [Linear(), Cosine(), VP(), EDM(), Shifted(Linear(), 3.0), Shifted(VP(), 0.5)]
names = [type(s).__name__ + str(i) for i, s in enumerate(ALL)]
T = torch.linspace(0.01, 0.97, 33, dtype=torch.float64)


@pytest.mark.parametrize("schedule", ALL, ids=names)
def test_closed_forms_are_what_alpha_and_sigma_imply(schedule: Schedule) -> None:
    d_alpha, d_sigma = schedule.rates(T)
    derived_alpha, derived_sigma = Schedule.rates(schedule, T)
    torch.testing.assert_close(d_alpha, derived_alpha, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(d_sigma, derived_sigma, rtol=1e-9, atol=1e-12)
    logsnr = schedule.logsnr(T)
    assert (logsnr.diff() < 0).all()
    torch.testing.assert_close(schedule.time_of_logsnr(logsnr), T, rtol=0, atol=1e-10)
    torch.testing.assert_close(Schedule.time_of_logsnr(schedule, logsnr), T, rtol=0, atol=1e-10)
    torch.testing.assert_close(schedule.time_of_rho(schedule.rho(T)), T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("schedule", [Cosine(), VP()])
def test_variance_preserving(schedule: Schedule) -> None:
    torch.testing.assert_close(schedule.alpha(T).square() + schedule.sigma(T).square(), torch.ones_like(T))


def test_shift_is_sd3s_formula_and_a_logsnr_offset() -> None:
    shifted = Shifted(Linear(), 3.0)
    torch.testing.assert_close(shifted.warp(T), 3 * T / (1 + 2 * T))
    torch.testing.assert_close(shifted.logsnr(T), Linear().logsnr(T) - 2 * math.log(3))


@pytest.mark.parametrize("schedule", ALL, ids=names)
@pytest.mark.parametrize("target", TARGETS)
def test_targets_there_and_back(target, schedule: Schedule) -> None:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(T), 3, 2, 2, dtype=torch.float64, generator=generator)
    alpha, sigma = schedule.alpha(T)[:, None, None, None], schedule.sigma(T)[:, None, None, None]
    got = solve(target_value(target, x0, eps, T, schedule), target, alpha * x0 + sigma * eps, T, schedule)
    torch.testing.assert_close(got.x0, x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.eps, eps, rtol=0, atol=1e-6)


def test_v_is_salimans_and_ho_on_vp_and_edms_output_on_edm() -> None:
    x0, eps = torch.randn(2, len(T), 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    vp, edm = Cosine(), EDM()
    alpha, sigma = vp.alpha(T)[:, None], vp.sigma(T)[:, None]
    torch.testing.assert_close(target_value("v", x0, eps, T, vp), alpha * eps - sigma * x0)
    s = edm.sigma(T)[:, None]
    x = x0 + s * eps
    c_skip, c_out = 1 / (s**2 + 1), s / (s**2 + 1).sqrt()
    torch.testing.assert_close(-target_value("v", x0, eps, T, edm), (x0 - c_skip * x) / c_out)


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(ValueError, match="unknown target 'noise'"):
        target_value("noise", T, T, T, Linear())  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("schedule", [s() for s in SCHEDULES.values()])
@pytest.mark.parametrize("grid", list(grids.GRIDS))
def test_grids_share_their_ends_and_nest(grid: str, schedule: Schedule) -> None:
    times = grids.GRIDS[grid](schedule, 8)
    assert len(times) == 9
    grids.explicit(times)
    rho = schedule.rho(torch.tensor([times[0], times[-1]], dtype=torch.float64))
    torch.testing.assert_close(rho, torch.tensor([80.0, 0.002], dtype=torch.float64), rtol=1e-6, atol=0)
    assert grids.GRIDS[grid](schedule, 16)[::2] == pytest.approx(times, abs=1e-12)


def test_grid_formulas() -> None:
    schedule = EDM()
    rho = [80 * t for t in grids.karras(schedule, 4)]
    i = [(80 ** (1 / 7) + k / 4 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for k in range(5)]
    assert rho == pytest.approx(i, rel=1e-9)
    log_rho = [math.log(80 * t) for t in grids.logsnr(schedule, 4)]
    assert [a - b for a, b in pairwise(log_rho)] == pytest.approx([math.log(40000) / 4] * 4)


@pytest.mark.parametrize("times", [(0.5,), (0.1, 0.5), (1.5, 0.5), (0.5, 0.5)])
def test_grids_that_do_not_fall_raise_an_error(times: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="falling times"):
        grids.explicit(times)


def test_grid_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="at least 1 step"):
        grids.uniform(Linear(), 0)
    with pytest.raises(ValueError, match="rho_min < rho_max"):
        grids.karras(Linear(), 4, rho_max=0.001)
