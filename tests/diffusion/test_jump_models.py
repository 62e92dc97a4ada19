"""Latent models that jump: derivatives of the network, the loss of the exact network, and what they share with flow models."""

import copy
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from average_velocity import Gaussian, gaussian
from scipy import stats
from tensors import grad, normal, randomised
from torch import Tensor, nn

from midway.gen.core.errors import UsageError
from midway.gen.diffusion.inversion import inverse, rest_of
from midway.gen.diffusion.likelihood import bits_per_dim
from midway.gen.diffusion.load import TrainedModel
from midway.gen.diffusion.loss import states, target_of
from midway.gen.diffusion.model import Guidance, LatentModel, LatentModelConfig
from midway.gen.networks.dit_config import DiTConfig
from midway.gen.networks.network import NetworkOutput
from midway.gen.objectives.jump_config import JUMPS, JumpConfig
from midway.gen.objectives.jumps import time_derivative
from midway.gen.sweep.trajectories import trajectories
from midway.gen.training.accelerator import loss_need
from midway.gen.training.batches import Context, LatentBatch
from midway.gen.training.interface import Items
from midway.gen.training.loading import batches_like
from midway.gen.training.optim import checkpoint_activations, compile_networks
from midway.samplers.jumps import JUMPS as SAMPLERS
from midway.samplers.jumps import jump
from midway.samplers.prediction import JumpField, expand
from midway.samplers.sample import ForwardCounter, sample
from midway.samplers.schedule import Linear
from midway.samplers.solvers import euler
from midway.tokenizers.memory import peak_bytes
from midway.tokenizers.tokenizer import ImageTokenizer

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


@pytest.mark.parametrize("objective", JUMPS)
def test_only_the_prediction_has_a_gradient_and_goes_through_what_wraps_the_network(objective: str) -> None:
    """Once; the passes of samples through the network are known; scales of guidance are log-uniform, and 1 without a class."""
    made = model(objective, dropout=0.2, guidance=4.0, **SETTINGS.get(objective, {}))
    wrapped = list[int]()

    def compiled(*arguments: Any, **more: Any) -> Any:
        wrapped.append(len(arguments[0]))
        return made.network._call_impl(*arguments, **more)

    made.network._compiled_call_impl = compiled  # as torch.compile does  # pyright: ignore[reportAttributeAccessIssue]
    with ForwardCounter(made.network) as counter:
        loss, _ = made.loss(batch(256), context(256))
    assert wrapped == [256]
    further = {"shortcut": 64 * 2, "alphaflow": 128, "meanflow": 64, "imf": 128 * 2}[objective]  # and guidance at r = t
    assert counter.evaluations == 256 + further + 2 * 256
    loss.backward()
    assert all(grad(parameter).abs().sum() > 0 for parameter in made.parameters())
    some = states(made, batch(256), context(256))
    unlabelled = some.labels == made.classes
    assert some.guidance[unlabelled].eq(1).all() and not some.v.requires_grad
    assert stats.kstest((some.guidance[~unlabelled].log() / math.log(4)).numpy(), "uniform").pvalue > 0.01
    assert some.r.le(some.t).all() and some.r.lt(some.t).any()


@pytest.mark.parametrize("objective", JUMPS)
def test_memory_is_estimated_without_numbers(objective: str) -> None:
    """A derivative is taken for two passes, which it is not quite: within 15 %."""
    made, items = model(objective, **SETTINGS.get(objective, {})), Items(lambda some: batch(len(some)), 64)
    need = loss_need(made, batches_like(items, torch.device("cpu"))).of(64)
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    assert need == pytest.approx(peak_bytes(lambda: made.loss(batch(64), context(64))[0].backward()), rel=0.15)


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
    ) -> NetworkOutput:
        t, r = (self._time(each.double()) for each in (angle, angle - more["span"]))
        schedule = self.data.schedule
        z = x.flatten(1).double() * torch.hypot(schedule.alpha(t), schedule.sigma(t))[:, None]
        u = self.scale * self.data.average(z, t, r)
        others = torch.stack([u, z, expand(t - r, z).expand_as(z)])
        d_alpha, d_sigma = schedule.rates(t)
        value = (u + torch.einsum("k,kbd->bd", self.more, others)) / torch.hypot(d_alpha, d_sigma)[:, None]
        return NetworkOutput(value.view_as(x), value[:, None])

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
        torch.autograd.grad(one, some.network.get_parameter("head.weight"))[0]
        for one, some in ((loss, made), (expected, flow))
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


# ---- saved and loaded ----


def test_a_model_that_jumps_is_saved_and_loaded_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a card whose lines draw a picture by jumps."""
    made = model("alphaflow", guidance=4.0, alpha_steps=9)
    made.save_pretrained(tmp_path / "model", tokenizer=pixels())
    monkeypatch.chdir(tmp_path / "model")
    (lines,) = re.findall(r"```python\n(.*?)\n```", Path("README.md").read_text(), re.DOTALL)
    assert 'make_solver("jump", model.schedule, nfe=2, grid="uniform")' in lines
    exec(lines, {})
    assert Path("samples.png").read_bytes().startswith(b"\x89PNG")
    loaded = LatentModel.from_pretrained(tmp_path / "model")
    assert (loaded.config, loaded.hash, loaded.text) == (made.config, made.hash, made.text)
    labels, x, (t, r) = torch.arange(4), normal(4, *SHAPE), torch.tensor([0.9, 0.1])[:, None].expand(2, 4)
    assert torch.equal(
        jumps_of(loaded, labels, 2.0).average(x, t, r), jumps_of(made.eval(), labels, 2.0).average(x, t, r)
    )


def test_a_model_from_before_jumps_is_the_flow_model_that_it_was(tmp_path: Path) -> None:
    """Its description names no objective, no time scale: 1000 at one time. Neither of the two has the weights of the other."""
    flow, made = flow_and("meanflow")
    flow = randomised(LatentModel(LatentModelConfig(dit=replace(DIT, time_scale=1000.0)), SHAPE, 5), seed=2)
    for name, one in (("flow", flow), ("jumps", made)):
        one.save_pretrained(tmp_path / name)
        text = json.loads((tmp_path / name / "config.json").read_text())
        if name == "jumps":
            shutil.copytree(tmp_path / "flow", tmp_path / "weights of a flow")
            (tmp_path / "weights of a flow/config.json").write_text(json.dumps(text))
        del text["config"]["objective"], text["config"]["jump"], text["config"]["dit"]["time_scale"]
        (tmp_path / name / "config.json").write_text(json.dumps(text))
    old = LatentModel.from_pretrained(tmp_path / "flow")
    assert old.config == flow.config and not old.config.is_jump
    x, t, labels = normal(4, *SHAPE), torch.full((4,), 0.4), torch.arange(4)
    assert torch.equal(old.field(labels)(x, t).x0, flow.eval().field(labels)(x, t).x0)
    for name in ("jumps", "weights of a flow"):
        with pytest.raises(
            ValueError, match=r"the weights beside it do not fit .*network\.more\.span.* get both again"
        ):
            LatentModel.from_pretrained(tmp_path / name)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "predicts velocities": ({"objective": "imf", "target": "x0"}, "use target velocity"),
    "on schedule edm": ({"objective": "meanflow", "schedule": "edm"}, "use linear or cosine"),
    "halves its jumps": ({"objective": "shortcut", "jump": {"ends": "data"}}, "alphaflow, meanflow or imf"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_configuration_on_which_jumps_are_not_defined_names_another(why: str) -> None:
    values, fix = REFUSED[why]
    with pytest.raises(ValueError, match=rf"{why}.*{fix}"):
        LatentModelConfig(**{**values, "jump": JumpConfig(**values.get("jump", {}))})


def test_guidance_of_jumps_is_what_they_were_trained_with() -> None:
    """A model without guidance in training has none; one with it takes scales up to its own, everywhere, by itself."""
    labels = torch.arange(4)
    plain, guided, other = model(), model(guidance=4.0), model("imf")
    for made, guidance, why in (
        (plain, 2.0, r"train the model with guidance.*--teacher"),
        (guided, 5.0, "scales from 1 to 4"),
        (guided, 0.5, "scales from 1 to 4"),
        (guided, Guidance(2.0, (0.1, 5.0)), "by its own input alone, and everywhere"),
        (guided, Guidance(2.0, weak=other), "by its own input alone, and everywhere"),
    ):
        with pytest.raises(ValueError, match=why):
            made.field(labels, guidance)
    assert isinstance(guided.field(labels, 4.0), JumpField)
    with pytest.raises(ValueError, match="sample with `jump`"):
        plain.field(labels, network=plain.conditional_field)


def test_jumps_that_rise_or_leave_the_clock_raise_errors() -> None:
    field, x = jumps_of(model(), torch.arange(4)), normal(4, *SHAPE)
    with pytest.raises(ValueError, match="from noise to data"):
        field.jumps((0.2,), (0.5,), x)
    with pytest.raises(ValueError, match="exchange t and r"):
        field(x, torch.full((4,), 0.2), torch.full((4,), 0.5))


# ---- what cannot use jumps ----


def test_image_to_image_takes_the_last_jumps_and_nothing_inverts_them() -> None:
    grid = (0.9, 0.6, 0.3, 0.1)
    for name, build in SAMPLERS.items():
        table = build(Linear(), grid)
        assert rest_of(table, name, Linear(), 0.6) == build(Linear(), grid[1:])
        with pytest.raises(UsageError, match="no inverse"):
            inverse(table, name, Linear())


def pixels() -> ImageTokenizer:
    tokenizer = ImageTokenizer(3, 4, downsample=1, quantizer={"type": "identity", "dim": 3})
    tokenizer.set_latent_statistics(torch.zeros(3), torch.ones(3))
    return tokenizer


def test_the_density_of_pixels_is_that_of_a_flow_model() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"no probability flow\n.*score a flow model"):
        bits_per_dim(model(), pixels(), images, labels, 256, context(2))


def test_trajectories_by_a_solver_at_one_time_are_those_of_the_velocity() -> None:
    flow, made = flow_and("meanflow")
    table = euler(Linear(), (0.9, 0.5, 0.1))
    found = [
        trajectories(cast(TrainedModel, SimpleNamespace(model=one)), table, torch.arange(3)) for one in (flow, made)
    ]
    assert torch.equal(*found) and found[0].std() > 0.1
