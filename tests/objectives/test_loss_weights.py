"""Weights of squared errors: the same loss, whatever the target is that the network predicts."""

import math

import pytest
import torch

from midway.gen.diffusion.loss import noised
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.objectives.jump_config import JUMPS
from midway.gen.objectives.weights import LossLevel, Weighting, up_to_edge, weight
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers.prediction import TARGETS, Target, solve, target_coefficients, target_value
from midway.samplers.schedule import SCHEDULES

WEIGHTS: tuple[Weighting, ...] = ("own", "velocity", "min_snr")
"""Those in closed form."""
GENERATOR = torch.Generator().manual_seed(0)
X0, EPS, WRONG = torch.randn(3, 50, 7, dtype=torch.float64, generator=GENERATOR)
RHO = torch.logspace(-0.8, 1.5, 50, dtype=torch.float64)


def errors(target: Target, schedule: str) -> tuple[torch.Tensor, ...]:
    """Of one prediction with errors WRONG of x0: squared errors of a unit-variance target, of x0, and of the unit velocity."""
    process = SCHEDULES[schedule]()
    t = process.time_of_rho(RHO)
    x_t, truth = noised(process, target, t, X0, EPS)
    a, b = target_coefficients(target, t, process)
    eps = EPS - (process.alpha(t) / process.sigma(t))[:, None] * WRONG  # the state is given
    value = target_value(target, X0 + WRONG, eps, t, process)
    torch.testing.assert_close(solve(value, target, x_t, t, process).x0, X0 + WRONG, rtol=1e-7, atol=1e-7)
    own = value / (a.square() + b.square()).sqrt()[:, None] - truth
    _, velocity = noised(process, "velocity", t, X0, EPS)
    rates = process.rates(t)
    theirs = target_value("velocity", X0 + WRONG, eps, t, process)
    theirs = theirs / (rates[0].square() + rates[1].square()).sqrt()[:, None] - velocity
    return t, own.square().mean(1), WRONG.square().mean(1), theirs.square().mean(1)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_velocity_is_the_loss_of_the_velocity_and_min_snr_that_of_x0(target: Target, schedule: str) -> None:
    process = SCHEDULES[schedule]()
    t, own, x0, velocity = errors(target, schedule)
    found, within = own * weight("velocity", target, process, t, 5.0), up_to_edge(target, process, t) == t
    torch.testing.assert_close(found[within], velocity[within], rtol=1e-10, atol=0)
    assert int(within.sum()) >= 45
    snr = (process.alpha(t) / process.sigma(t)).square()
    assert float(snr.max()) > 5 > float(snr.min())
    torch.testing.assert_close(
        own * weight("min_snr", target, process, t, 5.0), snr.clamp(max=5) * x0, rtol=1e-10, atol=0
    )
    assert torch.equal(weight("own", target, process, t, 5.0), torch.ones_like(t))


def test_min_snr_has_its_published_forms() -> None:
    process = SCHEDULES["cosine"]()
    t = process.time_of_rho(RHO)
    snr = RHO.reciprocal().square()
    least = snr.clamp(max=5)
    published: dict[Target, torch.Tensor] = {"x0": least, "eps": least / snr, "v": least / (snr + 1)}
    for target, expected in published.items():
        torch.testing.assert_close(weight("min_snr", target, process, t, 5.0), expected, rtol=1e-9, atol=0)


def test_the_weight_of_velocity_ends_where_the_target_knows_it_no_more() -> None:
    """On rectified flows in closed form: by 1 / t of x0, by 1 / (1 - t) of eps and of the score, and everywhere of v."""
    process = SCHEDULES["linear"]()
    t = torch.tensor([1e-4, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95, 0.99, 1 - 1e-4], dtype=torch.float64)
    low, high = t.clamp(min=0.05), t.clamp(max=0.95)
    expected: dict[Target, torch.Tensor] = {
        "x0": 0.5 / low.square(),
        "eps": 0.5 / (1 - high).square(),
        "score": 0.5 / (1 - high).square(),
        "v": 0.5 / ((1 - t).square() + t.square()),
        "velocity": torch.ones_like(t),
    }
    assert set(expected) == set(TARGETS)
    for target, value in expected.items():
        torch.testing.assert_close(weight("velocity", target, process, t, 5.0), value, rtol=1e-9, atol=0)


@pytest.mark.parametrize("objective", JUMPS)
def test_jumps_have_weights_of_their_own(objective: str) -> None:
    with pytest.raises(ValueError, match="weights of its own"):
        LatentModelConfig(objective=objective, weight="velocity")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("kind", WEIGHTS[1:])
def test_the_loss_has_the_weight_and_its_log_has_not(kind: Weighting) -> None:
    torch.manual_seed(0)
    dit = DiTConfig(width=8, depth=1, heads=2)
    gammas: dict[Weighting, float] = {"own": 5.0, "velocity": 5.0, "min_snr": 0.1}
    own, weighted = (
        LatentModel(LatentModelConfig(target="x0", weight=each, min_snr_gamma=gammas[each], dit=dit), (2, 2, 2), 3)
        for each in ("own", kind)
    )
    weighted.load_state_dict(own.state_dict())
    batch, context = LatentBatch(torch.randn(1, 2, 2, 2), torch.tensor([1])), Context(0, 0, torch.tensor([0]))
    t = own.time_of(context.uniforms("label", "time")[1])
    (plain, before), (loss, after) = own.loss(batch, context), weighted.loss(batch, context)
    factor = weight(kind, "x0", own.schedule, t, gammas[kind])
    assert not torch.allclose(factor, torch.ones(1))
    assert kind == "velocity" or not torch.allclose(factor, weight(kind, "x0", own.schedule, t, 5.0))
    torch.testing.assert_close(loss, plain * factor[0])
    torch.testing.assert_close(after["loss_time"], before["loss_time"])


@pytest.mark.parametrize(("name", "chosen"), [("time_mode", "logit_normal"), ("min_snr_gamma", "own")])
def test_a_parameter_of_what_is_not_chosen_is_an_error(name: str, chosen: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 1.0 has no effect with {chosen}"):
        LatentModelConfig(**{name: 1.0})  # pyright: ignore[reportArgumentType]
    assert LatentModelConfig(time="mode", time_mode=1.0, weight="min_snr", min_snr_gamma=1.0)


def test_the_learned_level_is_the_log_of_the_mean_loss() -> None:
    """Losses of known means at every noise level, as different as 1 and 1000: e^u is their mean."""
    torch.manual_seed(0)
    level, generator = LossLevel(), torch.Generator().manual_seed(0)
    assert torch.equal(level(torch.tensor([0.01, 1.0, 80.0])), torch.zeros(3))
    optimizer = torch.optim.Adam(level.parameters(), lr=0.03)

    def mean_at(rho: torch.Tensor) -> torch.Tensor:
        return (-3.5 * torch.sin(rho.log() / 2)).exp()

    for step in range(600):
        rho = torch.randn(256, generator=generator).mul(1.5).exp()
        loss = mean_at(rho) * torch.rand(256, generator=generator) * 2
        u = level(rho)
        optimizer.zero_grad()
        (loss * (-u).exp() + u).mean().backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.03 * (1 - step / 600)
        optimizer.step()
    rho = torch.logspace(-1, 1, 30)
    torch.testing.assert_close(level(rho), mean_at(rho).log(), rtol=0, atol=0.15)


def test_the_learned_weight_is_in_the_loss_and_in_no_log_and_has_gradients() -> None:
    torch.manual_seed(0)
    dit = DiTConfig(width=8, depth=1, heads=2)
    model = LatentModel(LatentModelConfig(weight="learned", dit=dit), (2, 2, 2), 3)
    assert model.level is not None
    batch, context = LatentBatch(torch.randn(1, 2, 2, 2), torch.tensor([1])), Context(0, 0, torch.tensor([0]))
    plain, before = model.loss(batch, context)
    with torch.no_grad():
        model.level.map.bias.fill_(0.7)
    loss, after = model.loss(batch, context)
    loss.backward()
    torch.testing.assert_close(loss, plain * math.exp(-0.7) + 0.7)
    torch.testing.assert_close(model.level.map.bias.grad, 1 - plain[None].detach() * math.exp(-0.7))
    torch.testing.assert_close(after["loss_time"], before["loss_time"])
