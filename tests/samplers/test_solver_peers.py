"""The same numbers as diffusers' schedulers and torchdiffeq's fixed-step methods.

Diffusers' loops feed a model with rounded times. Here their schedulers get our noise levels as `sigmas`, and the network is
an exact function of the level, so that only the formulas are compared: to 1e-12 in float64 where the peer computes in it, to
1e-5 in float32. Where a peer differs, its test states the reason.
"""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import mixture
from tensors import normal
from torch import Tensor

from midway.samplers.grids import Grid
from midway.samplers.runge_kutta import HEUN, MIDPOINT, RK38, Tableau, runge_kutta
from midway.samplers.sample import sample, trajectory
from midway.samplers.schedule import EDM, VP, Linear, Schedule
from midway.samplers.solvers import SOLVERS, adams_bashforth, ddim, deis, dpmpp, euler, heun, ipndm, unipc
from midway.samplers.table import Table

RHO = (12.0, 7.0, 5.5, 3.0, 1.7, 1.2, 0.6, 0.25, 0.1, 0.03)
STEPS = len(RHO) - 1
VPS = VP()
VE = EDM(sigma_max=20.0)
NOISE = normal(16, 2, dtype=torch.float64)


def grid_of(schedule: Schedule, dtype: torch.dtype = torch.float64) -> Grid:
    return tuple(schedule.time_of_rho(torch.tensor(RHO, dtype=dtype).double()).tolist())


def eps_at(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The exact noise estimate of the mixture, in float64."""
    ones = x.new_ones(len(x), 1).double()
    return (x - alpha * mixture().x0(x.double(), alpha * ones, sigma * ones)) / sigma


def levels(rho: float) -> tuple[float, float]:
    """(alpha, sigma) of a variance-preserving process."""
    alpha = 1 / math.sqrt(1 + rho**2)
    return alpha, rho * alpha


def with_our_levels(scheduler: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A multistep scheduler on our noise levels instead of its own; its coefficients come out in this dtype."""
    scheduler.set_timesteps(STEPS)
    scheduler.sigmas = torch.tensor(RHO, dtype=dtype)
    scheduler.timesteps = torch.arange(STEPS, dtype=torch.float32)
    scheduler.set_begin_index(0)
    return scheduler


def run_peer(scheduler: Any, x: Tensor) -> Tensor:
    """Their loop on a variance-preserving process, in the dtype of their levels."""
    dtype = scheduler.sigmas.dtype
    x = x.to(dtype)
    for i, t in enumerate(scheduler.timesteps):
        eps = eps_at(x, *levels(scheduler.sigmas[i].item())).to(dtype)
        x = scheduler.step(eps, t, x).prev_sample
    return x


def run_ours(table: Table, schedule: Schedule = VPS, x: Tensor | None = None) -> Tensor:
    return sample(mixture().field(schedule), table, NOISE if x is None else x)


def assert_agree(ours: Tensor, theirs: Tensor, atol: float | None = None) -> None:
    """In the peer's dtype: to 1e-12 in float64 and 1e-5 in float32, by default."""
    atol = atol or (1e-12 if theirs.dtype == torch.float64 else 1e-5)
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=atol)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


@pytest.mark.parametrize("order", [1, 2, 3])
def test_dpmpp_is_diffusers_dpm_solver_multistep(order: int) -> None:
    """It casts the state to float32 in every step, so there is nothing to compare in float64."""
    peers = pytest.importorskip("diffusers")
    theirs = peers.DPMSolverMultistepScheduler(solver_order=order, final_sigmas_type="sigma_min")
    ours = run_ours(dpmpp(VPS, grid_of(VPS, torch.float32), order=order))
    assert_agree(ours, run_peer(with_our_levels(theirs), NOISE))
    if order == 2:
        assert_agree(run_ours(SOLVERS["dpmpp2m"].build(VPS, grid_of(VPS, torch.float32))), ours)


@DTYPES
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers_unipc(order: int, variant, final: bool, dtype: torch.dtype) -> None:
    peers = pytest.importorskip("diffusers")
    theirs = peers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, lower_order_final=final, final_sigmas_type="sigma_min"
    )
    table = unipc(VPS, grid_of(VPS, dtype), order=order, variant=variant, lower_order_final=final)
    assert_agree(run_ours(table), run_peer(with_our_levels(theirs, dtype), NOISE))


@DTYPES
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_is_diffusers_deis(order: int, dtype: torch.dtype) -> None:
    """Its coefficients are differences of large logarithmic terms, of which float32 keeps 2e-5; in float64 they are ours."""
    peers = pytest.importorskip("diffusers")
    theirs = with_our_levels(peers.DEISMultistepScheduler(solver_order=order, lower_order_final=False), dtype)
    atol = 2e-5 if dtype == torch.float32 else None
    assert_agree(run_ours(deis(VPS, grid_of(VPS, dtype), order=order)), run_peer(theirs, NOISE), atol)


@DTYPES
def test_ipndm4_is_diffusers_ipndm(dtype: torch.dtype) -> None:
    """It takes v = alpha eps - sigma x0 of a variance-preserving process, whose levels it calls `betas` and `alphas`."""
    peers = pytest.importorskip("diffusers")
    theirs = peers.IPNDMScheduler()
    theirs.set_timesteps(STEPS)
    theirs.set_begin_index(0)
    alpha, sigma = (torch.tensor(v, dtype=dtype) for v in zip(*(levels(rho) for rho in RHO), strict=True))
    theirs.alphas, theirs.betas = alpha, sigma
    x = NOISE.to(dtype)
    for i in range(STEPS):
        eps = eps_at(x, alpha[i].item(), sigma[i].item())
        v = alpha[i] * eps - sigma[i] * (x - sigma[i] * eps) / alpha[i]
        x = theirs.step(v.to(dtype), theirs.timesteps[i], x).prev_sample
    assert_agree(run_ours(ipndm(VPS, grid_of(VPS), order=4)), x)


def _ve_start() -> Tensor:
    return RHO[0] * NOISE


def test_euler_is_diffusers_euler_discrete() -> None:
    peers = pytest.importorskip("diffusers")
    theirs = with_our_levels(peers.EulerDiscreteScheduler())
    x = _ve_start().float()
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(eps_at(x, 1.0, RHO[i]).float(), t, x).prev_sample
    assert_agree(run_ours(euler(VE, grid_of(VE)), VE, _ve_start()), x)


def test_heun_is_diffusers_heun_discrete_up_to_its_last_step() -> None:
    """Its last step is Euler's, because it ends at sigma = 0; ours is corrected like the others."""
    peers = pytest.importorskip("diffusers")
    theirs = peers.HeunDiscreteScheduler()
    theirs.set_timesteps(STEPS)
    rho = torch.tensor(RHO, dtype=torch.float32)
    theirs.sigmas = torch.cat([rho[:1], rho[1:-1].repeat_interleave(2), rho[-1:]])
    theirs.timesteps = torch.arange(len(theirs.sigmas) - 1)
    theirs.set_begin_index(0)
    x = _ve_start().float()
    inputs = [RHO[0], *(rho for rho in RHO[1:-1] for _ in range(2))]
    for t, level in zip(theirs.timesteps[:-1], inputs[:-1], strict=True):
        x = theirs.step(eps_at(x, 1.0, level).float(), t, x).prev_sample
    ours = trajectory(mixture().field(VE), heun(VE, grid_of(VE)), _ve_start())[-2]
    assert_agree(ours, x)


@DTYPES
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_is_diffusers_ddim(eta: float, dtype: torch.dtype) -> None:
    """On its own integer times: alpha^2 is its `alphas_cumprod`. The last step, to its artificial alpha = 1, is left out.

    It forms 1 - alpha^2 near alpha = 1 and divides by it, of which float32 keeps 2e-5; in float64 its step is ours.
    """
    peers = pytest.importorskip("diffusers")
    theirs = peers.DDIMScheduler(clip_sample=False)
    theirs.set_timesteps(10)
    theirs.alphas_cumprod = theirs.alphas_cumprod.to(dtype)
    squares = theirs.alphas_cumprod[theirs.timesteps].double()
    grid = tuple(VPS.time_of_rho(((1 - squares) / squares).sqrt()).tolist())
    draws = [normal(16, 2, seed=seed, dtype=torch.float64) for seed in range(1, 10)]
    x = NOISE.to(dtype)
    for i, t in enumerate(theirs.timesteps[:-1]):
        eps = eps_at(x, squares[i].sqrt().item(), (1 - squares[i]).sqrt().item()).to(dtype)
        given = draws[i].to(dtype) if eta else None
        x = theirs.step(eps, t, x, eta=eta, variance_noise=given).prev_sample
    fresh = iter(draws)
    ours = sample(mixture().field(VPS), ddim(VPS, grid, eta=eta), NOISE, lambda x: next(fresh))
    assert_agree(ours, x, atol=2e-5 if dtype == torch.float32 else None)


@pytest.mark.parametrize("schedule", [Linear(), VPS, VE], ids=["Linear", "VP", "EDM"])
@pytest.mark.parametrize(
    ("method", "tableau"),
    [
        ("midpoint", MIDPOINT),
        ("heun2", HEUN),
        ("heun3", Tableau("heun3", ((), (1 / 3,), (0.0, 2 / 3)), (1 / 4, 0.0, 3 / 4), order=3)),
        ("rk4", RK38),  # what torchdiffeq calls rk4 is the 3/8 rule
    ],
)
def test_runge_kutta_is_torchdiffeqs(method: str, tableau: Tableau, schedule: Schedule) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    grid = grid_of(schedule)
    table = runge_kutta(schedule, grid, tableau=tableau)
    assert_odes_agree(torchdiffeq, method, schedule, grid, table)


@pytest.mark.parametrize("schedule", [Linear(), VPS, VE], ids=["Linear", "VP", "EDM"])
def test_euler_and_adams_bashforth_1_are_torchdiffeqs_euler(schedule: Schedule) -> None:
    torchdiffeq = pytest.importorskip("torchdiffeq")
    grid = grid_of(schedule)
    for build in (euler, adams_bashforth):
        table = euler(schedule, grid) if build is euler else adams_bashforth(schedule, grid, order=1)
        assert_odes_agree(torchdiffeq, "euler", schedule, grid, table)


def assert_odes_agree(torchdiffeq: Any, method: str, schedule: Schedule, grid: Grid, table: Table) -> None:
    """Every node of dx / dt = v to 1e-10 in float64."""
    field = mixture().field(schedule)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        d_alpha, d_sigma = schedule.rates(t)
        prediction = field(x, t.expand(len(x)))
        return d_alpha * prediction.x0 + d_sigma * prediction.eps

    start = torch.tensor(grid[0], dtype=torch.float64)
    x = NOISE * torch.hypot(schedule.alpha(start), schedule.sigma(start))
    times = torch.tensor(grid, dtype=torch.float64)
    assert all(a > b for a, b in pairwise(grid))
    theirs = torchdiffeq.odeint(velocity, x, times, method=method)
    torch.testing.assert_close(torch.stack(trajectory(field, table, x)), theirs, rtol=0, atol=1e-10)
