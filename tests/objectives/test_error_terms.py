"""Errors at several resolutions and in direction, against closed forms."""

import pytest
import torch

from midway.gen.diffusion.loss import noised
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.objectives.errors import direction, multiscale
from midway.gen.objectives.jump_config import JUMPS
from midway.gen.training.batches import Context, LatentBatch
from midway.samplers.prediction import TARGETS, Target, solve
from midway.samplers.schedule import SCHEDULES

DIT = DiTConfig(width=8, depth=1, heads=2)
A, B = torch.randn(2, 3, 5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_one_scale_is_the_mean_square() -> None:
    assert torch.equal(multiscale(A, B, 1), (A - B).square().flatten(1).mean(1))


def test_scales_of_a_constant_and_of_an_alternating_difference() -> None:
    flat = torch.full((2, 3, 8, 8), 0.5, dtype=torch.float64)  # the same at every resolution
    torch.testing.assert_close(multiscale(flat, 0 * flat, 3), torch.full((2,), 0.25 * (1 + 2 + 4), dtype=torch.float64))
    board = ((torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2 - 1).double()  # whose averages are 0
    torch.testing.assert_close(multiscale(board.expand(2, 3, 8, 8), 0 * flat, 3), torch.ones(2, dtype=torch.float64))


def test_direction_is_that_of_channels_and_has_no_length() -> None:
    length = torch.rand(3, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.11
    torch.testing.assert_close(direction(length * B, B), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(direction(-length * B, B), torch.full((3,), 2.0, dtype=torch.float64))
    dots = (A * B).sum(1) / (A.square().sum(1) * B.square().sum(1)).sqrt()
    torch.testing.assert_close(direction(A, B), 1 - dots.mean((1, 2)))
    torch.testing.assert_close(
        direction(0.02 * B, B), torch.full((3,), 0.8, dtype=torch.float64)
    )  # shorter than a tenth


def found(**options: object) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss and log of a model of seed 0, and its gradient, for one batch."""
    torch.manual_seed(0)
    model = LatentModel(LatentModelConfig(dit=DIT, **options), (4, 4, 4), 3)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    batch = LatentBatch(torch.randn(6, 4, 4, 4), torch.zeros(6, dtype=torch.long))
    loss, logs = model.loss(batch, Context(0, 0, torch.arange(6)))
    loss.backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), logs, torch.cat(grads)


def test_the_loss_adds_them_and_its_log_does_not() -> None:
    plain, before, gradient = found()
    directed, after, other = found(direction=2.0)
    scaled, also, _ = found(scales=2)
    doubled, _, further = found(direction=4.0)
    torch.testing.assert_close(doubled - directed, directed - plain, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(further - other, other - gradient, rtol=1e-3, atol=1e-5)
    assert directed > plain + 0.1 and scaled > plain + 0.01
    for logs in (after, also):
        assert torch.equal(logs["loss_time"], before["loss_time"])


@pytest.mark.parametrize("option", [{"scales": 2}, {"direction": 1.0}])
def test_weights_by_noise_level_act_on_squared_errors_alone(option: dict[str, float]) -> None:
    own, weighted = (found(target="x0", weight=kind)[0] for kind in ("own", "velocity"))
    more, with_weight = (found(target="x0", weight=kind, **option)[0] for kind in ("own", "velocity"))
    if "direction" in option:
        torch.testing.assert_close(with_weight - weighted, more - own, rtol=1e-3, atol=1e-4)
    else:
        assert with_weight - weighted > 1.5 * (more - own)


@pytest.mark.parametrize("objective", JUMPS)
@pytest.mark.parametrize("option", [{"scales": 2}, {"direction": 1.0}])
def test_jumps_have_an_error_of_their_own(objective: str, option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"drop --model\.scales and --model\.direction"):
        LatentModelConfig(objective=objective, **option)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("target", TARGETS)
def test_direction_is_of_the_velocity_whatever_is_predicted(target: Target, schedule: str) -> None:
    """A network whose output is known, at one noise level: the added loss is 1 - cos of the velocities by hand."""
    plain, directed = (
        LatentModel(LatentModelConfig(schedule=schedule, target=target, direction=each, dit=DIT), (4, 2, 2), 3)  # pyright: ignore[reportArgumentType]
        for each in (0.0, 2.0)
    )
    output = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(3))
    batch = LatentBatch(torch.randn(5, 4, 2, 2), torch.zeros(5, dtype=torch.long))
    context, process = Context(0, 0, torch.arange(5)), SCHEDULES[schedule]()
    for model in (plain, directed):
        model.forward_network = lambda *_, **__: (output, output)  # pyright: ignore[reportAttributeAccessIssue]
    (own, _), (more, _) = plain.loss(batch, context), directed.loss(batch, context)
    t = plain.time_of(context.uniforms("label", "time")[1])
    eps = context.normal("noise", (4, 2, 2))
    x_t, _ = noised(process, target, t, batch.latents, eps)
    field = solve(output * plain.output_scale(t)[:, None, None, None], target, x_t, t, process)
    rates = [rate[:, None, None, None] for rate in process.rates(t)]
    v, velocity = (rates[0] * x0 + rates[1] * e for x0, e in ((field.x0, field.eps), (batch.latents, eps)))
    cos = (v * velocity).sum(1) / (v.square().sum(1) * velocity.square().sum(1)).sqrt()
    torch.testing.assert_close(more - own, 2 * (1 - cos).mean(), rtol=1e-4, atol=1e-5)


def test_latents_that_cannot_be_halved_so_often() -> None:
    with pytest.raises(ValueError, match=r"lower --model\.scales"):
        LatentModel(LatentModelConfig(scales=3, dit=DIT), (4, 4, 2), 3)


def test_one_channel_has_no_direction() -> None:
    with pytest.raises(ValueError, match=r"drop --model\.direction"):
        LatentModel(LatentModelConfig(direction=1.0, dit=DIT), (1, 4, 4), 3)


def test_the_gradient_of_direction_is_bounded_where_nothing_is_predicted() -> None:
    """By 1 / (0.1 |velocity|) of a place; and that of a new model, whose output is 0, is of the size of that of other losses."""
    velocity = B.clone()
    velocity[0, :, 0, 0] = 0  # which has no direction
    v = torch.zeros_like(velocity).requires_grad_()
    direction(v, velocity).sum().backward()
    assert v.grad is not None
    expected = -velocity / (0.1 * velocity.square().sum(1, keepdim=True).clamp(min=1e-16)) / 64
    torch.testing.assert_close(v.grad, expected, rtol=1e-9, atol=0)
    torch.manual_seed(0)
    model = LatentModel(LatentModelConfig(direction=1.0, dit=DIT), (4, 4, 4), 3)
    batch = LatentBatch(torch.randn(6, 4, 4, 4), torch.zeros(6, dtype=torch.long))
    model.loss(batch, Context(0, 0, torch.arange(6)))[0].backward()
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]) < 30
