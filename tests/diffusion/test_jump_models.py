"""Latent models that jump: derivatives of the network, the loss of the exact network, and what they share with flow models."""

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from average_velocity import Gaussian, gaussian
from tensors import grad, normal, randomised
from torch import Tensor, nn

from midway.gen.diffusion.dit import DiTConfig, DiTOutput
from midway.gen.diffusion.jump_config import JUMPS, JumpConfig
from midway.gen.diffusion.jump_objectives import time_derivative
from midway.gen.diffusion.loss import states, target_of
from midway.gen.diffusion.model import LatentModel, LatentModelConfig
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.optim import checkpoint_activations, compile_networks
from midway.samplers.jumps import jump
from midway.samplers.prediction import JumpField, expand
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.schedule import Linear
from midway.samplers.solvers import euler

SHAPE = (3, 4, 4)
DIT = DiTConfig(width=16, depth=2, heads=2, time_scale=1.0)


def model(objective: str = "meanflow", dropout: float = 0.0, schedule: str = "linear", **jumps: Any) -> LatentModel:
    """With weights that are zero nowhere."""
    torch.manual_seed(0)
    dit = replace(DIT, dropout=dropout)
    config = LatentModelConfig(schedule=schedule, dit=dit, objective=objective, jump=JumpConfig(**jumps))  # pyright: ignore
    return randomised(LatentModel(config, SHAPE, 5), seed=1, std=0.2)


def jumps_of(made: LatentModel, labels: Tensor, guidance: float = 1.0) -> JumpField:
    field = made.field(labels, guidance)
    assert isinstance(field, JumpField)
    return field


def context(count: int, step: int = 3, start: int = 0) -> Context:
    return Context(seed=0, step=step, sample_ids=torch.arange(start, start + count))


def batch(count: int, shape: tuple[int, ...] = SHAPE) -> LatentBatch:
    return LatentBatch(normal(count, *shape), torch.arange(count) % 5)


SETTINGS: dict[str, dict[str, Any]] = {"alphaflow": {"alpha_steps": 1, "alpha_end": 0.01}, "shortcut": {"finest": 12}}
"""alpha is 0.01, and the shortest jumps, which are two steps along the velocity, are short."""


# ---- the derivative of the network ----

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.3},
    "recomputed": {"dropout": 0.3, "recomputed": True},
    "guidance": {"guidance": 4.0},
    "cosine": {"schedule": "cosine"},
}


def derivative(made: LatentModel, recomputed: bool = False) -> tuple[Tensor, Tensor]:
    """du/dt as training takes it, for some samples without a class, and by central differences; (B, C, H, W) each."""
    if recomputed:
        checkpoint_activations(made)
    made.double()
    some = states(made, batch(8), context(8))
    assert 0 < (some.labels == made.classes).sum() < 8
    z, t, r, v = (value.double() for value in (some.z, some.t, some.r, some.v))
    with torch.no_grad():
        found = time_derivative(some.average, z, t, r, v)
        h = 1e-5
        ahead, behind = (some.average(z + s * h * v, t + s * h, r) for s in (1, -1))
    return found, (ahead - behind) / (2 * h)


@pytest.mark.parametrize("case", CASES)
def test_the_derivative_of_the_network_is_that_of_central_differences(case: str) -> None:
    """In float64: with dropout, blocks that are computed again, normalised queries and keys, classes left out, guidance."""
    options = dict(CASES[case])
    recomputed = options.pop("recomputed", False)
    found, expected = derivative(model(**options), recomputed)
    assert found.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_network_has_the_same_loss_and_gradients() -> None:
    """The derivative is taken of the network as it is, the prediction by the compiled one."""
    plain = model(dropout=0.1)
    compiled = copy.deepcopy(plain)
    compile_networks(compiled)
    for one in (plain, compiled):
        one.loss(batch(8), context(8))[0].backward()
    for a, b in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(grad(b), grad(a), rtol=1e-4, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("objective", JUMPS)
def test_targets_in_half_precision_are_those_in_float32(objective: str) -> None:
    """To the rounding of u: the differences of alpha-Flow, which are divided by alpha = 0.01, are taken in float32."""
    made = model(objective, **SETTINGS.get(objective, {}))
    some = states(made, batch(64), context(64))

    def error(half: bool) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            u = some.average(some.z, some.t, some.r)
            return u - target_of(some, u)

    whole = error(False)
    assert (error(True) - whole).square().mean().sqrt() < 0.02 * whole.square().mean().sqrt()


# ---- the loss of the exact network ----


class ExactNetwork(nn.Module):
    """In place of a DiT: the average velocities of Gaussian data, in units of `scale`, and some of other functions beside."""

    def __init__(self, data: Gaussian, scale: float = 1.0) -> None:
        super().__init__()
        self.data, self.scale = data, scale
        self.more = nn.Parameter(torch.zeros(3, dtype=torch.float64))

    def forward(
        self, x: Tensor, angle: Tensor, labels: Tensor, context: Context, more: Mapping[str, Tensor]
    ) -> DiTOutput:
        t, r = (self._time(each.double()) for each in (angle, angle - more["span"]))
        schedule = self.data.schedule
        z = x.flatten(1).double() * torch.hypot(schedule.alpha(t), schedule.sigma(t))[:, None]
        u = self.scale * self.data.average(z, t, r)
        others = torch.stack([u, z, expand(t - r, z).expand_as(z)])
        d_alpha, d_sigma = schedule.rates(t)
        value = (u + torch.einsum("k,kbd->bd", self.more, others)) / torch.hypot(d_alpha, d_sigma)[:, None]
        return DiTOutput(value.view_as(x), value[:, None])

    def _time(self, angle: Tensor) -> Tensor:
        rho = torch.tan(math.pi / 2 * angle)
        return self.data.schedule.time_of_rho(rho)


def loss_of(objective: str, scale: float, start: int = 0, teacher: bool = False) -> tuple[LatentModel, Tensor]:
    """The model whose network is `scale` times the exact one, and its loss on samples from this position on."""
    made, data = model(objective, **SETTINGS.get(objective, {})).double(), gaussian(Linear())
    made.network = ExactNetwork(data, scale)  # pyright: ignore[reportAttributeAccessIssue]
    if teacher:
        made.teacher = lambda z, t, labels: data.velocity(z.flatten(1), t.double()).view_as(z)
    latents = data.sample(2048, seed=start).view(-1, 3, 1, 1)
    batch = LatentBatch(latents, torch.zeros(2048, dtype=torch.int64))
    return made, made.loss(batch, context(2048, start=start))[0]


@pytest.mark.parametrize("objective", JUMPS)
def test_the_exact_network_has_no_expected_gradient(objective: str) -> None:
    """Through the loss that training takes, for all its draws: within 4 standard errors of 0; a network 10% off is not."""

    def worst(scale: float) -> float:
        """Of the mean gradients by the weights of the other functions, in standard errors."""
        found = []
        for block in range(16):
            made, loss = loss_of(objective, scale, 2048 * block)
            found.append(torch.autograd.grad(loss, [*made.network.parameters()])[0])
        blocks = torch.stack(found)
        return (blocks.mean(0) / blocks.std(0)).abs().max().item() * len(found) ** 0.5

    assert worst(1.0) < 4 < 8 < worst(1.1)


@pytest.mark.parametrize("objective", JUMPS)
def test_the_velocity_of_a_teacher_leaves_the_exact_network_no_error(objective: str) -> None:
    """In no sample, but for alpha-Flow's step along the velocity and the shortest jumps of shortcut; another one has an error."""
    exact, other = (loss_of(objective, scale, teacher=True)[1].item() for scale in (1.0, 1.1))
    assert exact < {"alphaflow": 0.02, "shortcut": 1e-8}.get(objective, 1e-10) < other / 10  # times are float32


# ---- what a model that jumps shares with a flow model ----


def flow_and(objective: str, **options: Any) -> tuple[LatentModel, LatentModel]:
    """A flow model, and one that jumps with its weights: the embedding of the length of a jump is as it begins."""
    torch.manual_seed(0)
    config = LatentModelConfig(dit=DIT, label_dropout=0.3)
    flow = randomised(LatentModel(config, SHAPE, 5), seed=1, std=0.2)
    made = LatentModel(replace(config, objective=objective, jump=JumpConfig(**options)), SHAPE, 5)  # pyright: ignore
    assert all(name.startswith("network.more.") for name in made.load_state_dict(flow.state_dict(), strict=False)[0])
    return flow, made


@pytest.mark.parametrize("objective", JUMPS)
def test_at_one_time_the_loss_is_that_of_flow_matching(objective: str) -> None:
    """All samples at r = t, and no weight: of shortcut with the same draws. The others draw two times and take the later."""
    flow, made = flow_and(objective, flow_share=1.0, weight_power=0.0)
    if objective != "shortcut":
        second = context(64).uniform("end")
        later = flow.time_of(context(64).uniform("time")).maximum(flow.time_of(second))
        flow.time_of = lambda u: later
    loss, logs = made.loss(batch(64), context(64))
    expected, _ = flow.loss(batch(64), context(64))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(logs["error"], loss, rtol=1e-6, atol=0)
    a, b = (
        torch.autograd.grad(one, network.network.head.weight)[0] for one, network in ((loss, made), (expected, flow))
    )
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_with_the_weights_of_a_flow_model_it_is_that_model() -> None:
    """Its velocity, bit for bit; its jumps are steps of Euler's method, one evaluation each."""
    flow, made = flow_and("meanflow")
    labels, grid = torch.arange(4), (0.98, 0.5, 0.3, 0.01)
    x = normal(4, *SHAPE)
    plain, average = flow.field(labels), jumps_of(made, labels)
    with ForwardCounter(made.network) as counter:
        jumped = sample(average, jump(made.schedule, grid), x)
    assert counter.evaluations == 3 * len(x)
    assert torch.equal(jumped, sample(plain, euler(flow.schedule, grid), x))
    assert torch.equal(sample(average.velocity, euler(flow.schedule, grid), x), jumped)
    t = torch.full((4,), 0.5)
    assert torch.equal(average.velocity(x, t).x0, plain(x, t).x0)


@torch.no_grad()
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_prepared_for_a_table_it_is_the_field_that_is_called(schedule: str) -> None:
    """With the embedding of the length of a jump at work, and of the guidance scale."""
    made, labels, grid = model(schedule=schedule, guidance=4.0), torch.arange(4), (0.9, 0.5, 0.3, 0.1)
    ends = []
    for scale in (1.0, 3.0):
        field, x = jumps_of(made, labels, scale), normal(4, *SHAPE)
        prepared = sample(field, jump(made.schedule, grid), x)
        for time, end in pairwise(grid):
            t, r = torch.full((4,), time), torch.full((4,), end)
            x = x - expand(t - r, x) * field.average(x, t, r)
        torch.testing.assert_close(prepared, x, rtol=1e-4, atol=1e-4)
        ends.append(prepared)
    assert (ends[0] - ends[1]).abs().max() > 1e-2
    field, x, (t, r) = jumps_of(made, labels), normal(4, *SHAPE), torch.tensor([0.9, 0.1])[:, None].expand(2, 4)
    assert (field.average(x, t, r) - field.average(x, t, t)).abs().max() > 1e-2


@pytest.mark.parametrize("objective", JUMPS)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(objective: str) -> None:
    """Draws are functions of a sample's position: neither accumulation nor processes change them."""
    made = model(objective, dropout=0.2, alpha_steps=6)
    made.loss(batch(64), context(64))[0].backward()
    whole = [grad(parameter).clone() for parameter in made.parameters()]
    made.zero_grad()
    for start in (0, 32):
        part = LatentBatch(*(value[start : start + 32] for value in (batch(64).latents, batch(64).labels)))
        (made.loss(part, context(32, start=start))[0] / 2).backward()
    for a, b in zip(made.parameters(), whole, strict=True):
        torch.testing.assert_close(grad(a), b, rtol=1e-3, atol=1e-6)
