"""The objectives of average velocities on data whose average velocities are known: their targets, and where they are least."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from average_velocity import MAKERS, Data, gaussian, mixture, states
from tensors import normal
from torch import Tensor

from midway.gen.objectives import jumps
from midway.samplers.prediction import expand
from midway.samplers.schedule import Cosine, Linear, Schedule

PROBLEMS = {f"{make.__name__} {type(s).__name__}": make(s) for make in MAKERS for s in (Linear(), Cosine())}
EXACT = 1e-11


def wrong(data: Data, target: Callable[[jumps.Average, Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """What the target of the exact network misses its prediction by (B, D), with the velocity of the trajectory."""
    z, t, r = states(data)
    return target(data.average, z, t, r, data.velocity(z, t)) - data.average(z, t, r)


def shortcut(average: jumps.Average, z: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    return jumps.shortcut_target(average, z, t, r, shortest=0.0)


def imf(average: jumps.Average, z: Tensor, t: Tensor, r: Tensor, v: Tensor) -> Tensor:
    return jumps.meanflow_target(average, z, t, r, v, average(z, t, t))


def alphaflow(alpha: float) -> Callable[..., Tensor]:
    return lambda average, z, t, r, v: jumps.alphaflow_target(average, z, t, r, v, alpha)


# ---- what the exact network is trained towards ----


@pytest.mark.parametrize("target", [shortcut, jumps.meanflow_target, imf])
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_target_of_the_exact_network_is_its_prediction(name: str, target: Callable[..., Tensor]) -> None:
    assert wrong(PROBLEMS[name], target).abs().max() < EXACT


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_target_of_alpha_flow_is_wrong_by_alpha_squared(name: str) -> None:
    """One step of Euler's method over the share alpha of the jump; at alpha = 1 the velocity, in the limit MeanFlow's target."""
    data = PROBLEMS[name]
    alphas = [0.08, 0.04, 0.02, 0.01]
    errors = [wrong(data, alphaflow(alpha)).square().mean().sqrt().item() for alpha in alphas]
    order = np.polyfit(np.log(alphas), np.log(errors), 1)[0]
    assert order == pytest.approx(2, abs=0.1)
    z, t, r = states(data)
    v = data.velocity(z, t)
    torch.testing.assert_close(jumps.alphaflow_target(data.average, z, t, r, v, 1.0), v, rtol=0, atol=0)


def other_network(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """No average velocity of anything."""
    t, r = t[:, None], r[:, None]
    return torch.sin(2 * z + t) * torch.cos(3 * r) + t * r * z.sum(1, keepdim=True).tanh()


@pytest.mark.parametrize("name", ["gaussian Linear", "mixture Cosine"])
def test_what_alpha_flow_is_at_one_half_and_in_the_limit(name: str) -> None:
    """Of any network: shortcut's target where the first half is its own, and MeanFlow's, of order 1 in alpha, when enlarged."""
    z, t, r = states(PROBLEMS[name])
    half = jumps.alphaflow_target(other_network, z, t, r, other_network(z, t, (t + r) / 2), 0.5)
    torch.testing.assert_close(half, shortcut(other_network, z, t, r, z), rtol=0, atol=1e-15)
    v, u = torch.cos(z), other_network(z, t, r)
    limit = jumps.meanflow_target(other_network, z, t, r, v)

    def missed(alpha: float) -> float:
        target = jumps.enlarged(u, jumps.alphaflow_target(other_network, z, t, r, v, alpha), alpha)
        return (target - limit).abs().max().item()

    assert missed(1e-3) / missed(1e-4) == pytest.approx(10, rel=0.05)
    assert missed(1e-6) < 1e-4


def test_alpha_falls_from_one_to_the_least_and_stays_there() -> None:
    found = [jumps.alpha_at(progress, 0.02) for progress in (0.0, 0.4, 0.5, 0.6, 1.0, 1e3)]
    assert found == pytest.approx([1, 1 - 1 / (1 + math.exp(2.5)), 0.5, 1 / (1 + math.exp(2.5)), 0.02, 0.02], abs=1e-5)


def test_the_shortest_shortcuts_take_two_steps_along_the_velocity() -> None:
    data = PROBLEMS["mixture Linear"]
    z, t, r = states(data)
    r = t - 0.01
    middle = (t + r) / 2
    first = data.velocity(z, t)
    second = data.velocity(z - expand(t - middle, z) * first, middle)
    found = jumps.shortcut_target(data.average, z, t, r, shortest=0.005)
    torch.testing.assert_close(found, (first + second) / 2, rtol=0, atol=1e-15)


@pytest.mark.parametrize("finest", [1, 7, 13, 16, 20])
def test_the_shortest_are_known_in_float32(finest: int) -> None:
    """They alone, of times that training draws: the two halves of a jump of the least length end where they begin."""
    level, place = torch.rand(2, 20000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    low, high = 0.002, 0.9877
    times = jumps.dyadic_times(level, place, finest, low, high)
    least = (times[0] - times[1]) < 1.1 * (high - low) * 2.0 ** (1 - finest)
    ends: list[Tensor] = []

    def average(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        ends.append(t == r)
        return torch.zeros_like(z)

    t, r = (each.float() for each in times)
    jumps.shortcut_target(average, torch.zeros(20000, 1), t, r, (high - low) * 2.0**-finest)
    assert least.any() and all(torch.equal(end, least) for end in ends) and len(ends) == 2


def test_guidance_in_training_ends_at_the_guided_velocity() -> None:
    """A network whose velocity is U + s (V - U) has it as its target; without guidance the target is V."""
    labelled, unlabelled = normal(2, 8, 3, dtype=torch.float64)
    scale = torch.linspace(1, 5, 8, dtype=torch.float64)
    guided = unlabelled + expand(scale, labelled) * (labelled - unlabelled)
    target = jumps.guided(labelled, guided, unlabelled, scale)
    torch.testing.assert_close(target, guided, rtol=0, atol=EXACT)
    assert torch.equal(target[0], labelled[0])


# ---- wrong tangents ----

TANGENTS = {"dr = 1": (1, 1, 1), "dz = 0": (0, 1, 0), "dz = -v": (-1, 1, 0), "dt = 0": (1, 0, 0), "dt = -1": (1, -1, 0)}


@pytest.mark.parametrize("target", [jumps.meanflow_target, imf])
@pytest.mark.parametrize("tangents", TANGENTS)
def test_wrong_tangents_show(tangents: str, target: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """The derivative that the objective takes is replaced by one along them."""
    dz, dt, dr = TANGENTS[tangents]
    jvp = torch.func.jvp

    def along(
        function: Callable[[Tensor, Tensor], Tensor], at: tuple[Tensor, ...], given: tuple[Tensor, ...]
    ) -> object:
        assert len(given) == 2 and torch.equal(given[1], torch.ones_like(given[1]))
        return jvp(function, at, (dz * given[0], dt * given[1]))

    data = PROBLEMS["rotated Linear"]
    if dr:  # r is fixed by the objective: move it with t inside the network
        z, t, r = states(data)
        found = target(lambda z, t, at: data.average(z, t, at + (t - t.detach())), z, t, r, data.velocity(z, t))
        error = found - data.average(z, t, r)
    else:
        monkeypatch.setattr(torch.func, "jvp", along)
        error = wrong(data, target)
    assert error.abs().max() > 0.3


# ---- where the expected loss is least ----


def conditional(data: Data, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The law of the samples' velocity v_c at z for Gaussian data: values (Q, B, D) and weights (Q,), exact for polynomials."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(10)
    schedule = data.schedule
    alpha, sigma = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    d_alpha, d_sigma = (rate[:, None] for rate in schedule.rates(t))
    spread = data.std * (alpha * d_sigma - sigma * d_alpha) / data.spread(t)  # pyright: ignore[reportAttributeAccessIssue]
    values = data.velocity(z, t) + torch.from_numpy(nodes)[:, None, None] * spread
    return values, torch.from_numpy(weights / weights.sum())


OBJECTIVES = {
    "flow": lambda average, z, t, r, v: v,
    "shortcut": shortcut,
    "meanflow": jumps.meanflow_target,
    "imf": imf,
}


@pytest.mark.parametrize("power", [0.0, 1.0])
@pytest.mark.parametrize("objective", [*OBJECTIVES, "alphaflow"])
@pytest.mark.parametrize("schedule", [Linear(), Cosine()], ids=["linear", "cosine"])
def test_the_exact_network_has_no_expected_gradient(schedule: Schedule, objective: str, power: float) -> None:
    """At any state and times the mean of weight x error over the samples that are there is 0, for Gaussian data and any weight;
    and a network 1% off is seen. That of alpha-Flow falls with alpha."""
    data = gaussian(schedule)
    z, t, r = states(data, 12)
    r = t if objective == "flow" else r
    velocities, shares = conditional(data, z, t)

    def gradient(scale: float, alpha: float = 1e-3) -> float:
        def average(z: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return scale * data.average(z, t, r)

        u, total = average(z, t, r), torch.zeros_like(z)
        for v, share in zip(velocities, shares, strict=True):
            if objective == "alphaflow":
                target = jumps.enlarged(u, jumps.alphaflow_target(average, z, t, r, v, alpha), alpha)
            else:
                target = OBJECTIVES[objective](average, z, t, r, v)
            error = u - target
            weight = jumps.adaptive_weight(error.square().mean(1), power, 1e-3)
            total += share * expand(weight, error) * error
        return total.abs().max().item()

    if objective == "alphaflow":
        assert gradient(1.0) / gradient(1.0, 1e-4) == pytest.approx(10, rel=0.1)
        assert gradient(1.0, 1e-6) < 1e-4 < 1e-2 < gradient(1.01, 1e-6)
    else:
        assert gradient(1.0) < EXACT < 1e-3 < gradient(1.01)


def test_a_weight_by_the_samples_own_error_moves_the_optimum_of_skewed_data() -> None:
    """Velocities at a state of a mixture in one dimension are not symmetric around their mean: with power 1 the expected loss is
    least far from it, and only power 0 has its optimum there. In many dimensions, over which the error is a mean, it is less."""
    data = mixture(Linear())
    z, t, _ = states(data, 16)
    nodes, shares = np.polynomial.hermite_e.hermegauss(40)
    alpha, sigma = (1 - t)[:, None], t[:, None]
    variance, off = (alpha * data.stds).square() + sigma.square(), z - alpha * data.means
    posterior = torch.softmax(data.weights.log() - (off.square() / variance + variance.log()) / 2, dim=1)  # (B, K)
    mean = -data.means + (sigma - alpha * data.stds.square()) / variance * off
    v = mean[:, :, None] + (data.stds * (alpha + sigma) / variance.sqrt())[:, :, None] * torch.from_numpy(nodes)
    likely = posterior[:, :, None] * torch.from_numpy(shares / shares.sum())
    exact = data.velocity(z, t)[:, 0]

    def moved(power: float) -> float:
        """The optimum's distance from the velocity, root mean squares, by fixed-point iteration from there."""
        u = exact
        for _ in range(200):
            weight = likely * jumps.adaptive_weight((u[:, None, None] - v).square(), power, 1e-3)
            u = (weight * v).sum((1, 2)) / weight.sum((1, 2))
        return (u - exact).square().mean().sqrt().item()

    assert moved(0.0) < EXACT < 0.3 < moved(1.0)
