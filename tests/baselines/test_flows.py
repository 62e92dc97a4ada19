"""Coupling flows: exact densities and bounds, dequantisation, conditions, samples, start and resume."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flows import assert_bijection, assert_undone_in_float32, batch, context, images, jacobian_log_det, randomise
from safetensors.torch import save_file

from midway.gen.baselines.base import write_baseline
from midway.gen.baselines.couplings import CouplingNetworkConfig
from midway.gen.baselines.flow import CouplingFlow, Dequantiser
from midway.gen.baselines.flow_config import FlowConfig, build_flow, glow, nice, realnvp
from midway.gen.baselines.flow_layers import ActNorm
from midway.gen.baselines.registry import read_baseline
from midway.gen.core import randomness
from midway.gen.data.images import to_uint8
from midway.gen.data.levels import bits_per_dim, from_levels

SHAPE = (1, 4, 4)
SMALL = {"nice": nice(8, 4), "realnvp": realnvp(8, 2), "glow": glow(8, 2, 2)}
PAIR = (1, 1, 2)
ADDITIVE = FlowConfig(
    transform="additive", scales=0, checkerboards=2, actnorm=False, network=CouplingNetworkConfig("mlp", 8)
)
"""A new model of this is the identity flow."""


def make(config: FlowConfig, classes: int = 0, shape: tuple[int, int, int] = SHAPE, levels: int = 17) -> CouplingFlow:
    torch.manual_seed(0)
    return CouplingFlow(config, shape, levels, classes)


# ---- the flows of the presets ----


@pytest.mark.parametrize("cond", [None, (3, 1, 1)], ids=["free", "conditional"])
@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("channels", [1, 2])
def test_presets_are_bijections_with_the_jacobians_determinant(name: str, cond, channels: int) -> None:
    shape = (channels, 4, 4)
    torch.manual_seed(0)
    flow = build_flow(SMALL[name], shape, cond)
    randomise(flow, 0.3)
    flow = flow.double().eval().requires_grad_(False)
    x, c = images(2, shape), images(2, cond) if cond else None
    assert_bijection(flow, flow.inverse, x, c)
    randomise(flow, 0.1).float()  # better conditioned: float32 loses what a flow stretches
    assert_undone_in_float32(flow, flow.inverse, x, c)


@pytest.mark.parametrize("name", SMALL)
def test_presets_use_every_pixel(name: str) -> None:
    """Each output depends on more than its own pixel; NICE with two couplings already."""
    flow = build_flow(SMALL[name], SHAPE)
    randomise(flow, 0.3)
    flow = flow.double().eval()
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], images(1, SHAPE)[0]).reshape(16, 16)  # pyright: ignore
    assert (jacobian.abs() > 1e-12).sum(1).min() > 1
    assert (jacobian.abs() > 1e-12).sum(0).min() > 1


def test_presets_have_the_layers_of_their_papers() -> None:
    kinds = {name: [type(m).__name__ for m in build_flow(SMALL[name], (1, 8, 8)).modules()] for name in SMALL}
    counts = {
        name: [
            kind.count(c) for c in ("CheckerboardCoupling", "ChannelCoupling", "InvertibleConv", "FactorOut", "ActNorm")
        ]
        for name, kind in kinds.items()
    }
    assert counts == {
        "nice": [4, 0, 0, 0, 0],
        "realnvp": [9, 3 + 1 + 3 + 1, 0, 2, 15],
        "glow": [0, 2 + 1 + 2, 4, 1, 4],
    }
    assert kinds["nice"].count("DiagonalScale") == 1


# ---- exact values ----


@pytest.mark.parametrize("levels", [2, 17, 256])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_a_uniform_model_scores_the_logarithm_of_the_levels(levels: int, margin: float) -> None:
    """A logistic prior under the logit is uniform on (0, 1); the margin puts 2 a of it outside."""
    config = replace(ADDITIVE, prior="logistic", logit_margin=margin)
    model, given = make(config, levels=levels), batch(6, SHAPE, levels)
    nats = model.log_likelihood(given.images, None, context(6))
    assert nats.dtype == torch.float64
    expected = math.log2(levels) - math.log2(1 - 2 * margin)
    torch.testing.assert_close(
        bits_per_dim(nats, 16), torch.full((6,), expected, dtype=torch.float64), rtol=0, atol=2e-6
    )


def test_the_bound_does_not_depend_on_the_range_inside() -> None:
    """ActNorm starts from data, so a model on [0, 1] and one on [-1, 1] become the same model."""
    bounds = []
    for entry in ("unit", "symmetric"):
        model, given = make(replace(SMALL["glow"], entry=entry)), batch(64, SHAPE)
        model.start(given, context(64))
        bounds.append(model.log_likelihood(given.images, None, context(64)))
    torch.testing.assert_close(bounds[0], bounds[1], rtol=0, atol=1e-3)
    assert bounds[0].std() > 1


@pytest.mark.parametrize("entry", ["logit", "symmetric", "unit"])
@pytest.mark.parametrize("prior", ["normal", "logistic"])
def test_the_density_of_a_random_flow_integrates_to_one(entry, prior) -> None:
    """Quadrature over everything that the entry maps to the plane, two pixels, conditional."""
    config = replace(ADDITIVE, transform="affine", entry=entry, prior=prior, diagonal_scale=True)
    model = randomise(make(config, classes=2, shape=PAIR), 0.3).eval().double()
    n = 300
    p = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    if entry == "logit":  # midpoints of q in (0, 1), which is x in a wider interval; smooth ends: q = sin^2
        q, weight = torch.sin(math.pi / 2 * p) ** 2, math.pi / 2 * torch.sin(math.pi * p) / n
        x, weight = (q - 0.05) / 0.9, weight / 0.9
    else:
        x, weight = 60 * (p - 0.5), torch.full((n,), 60 / n, dtype=torch.float64)
    grid = torch.cartesian_prod(x, x).view(-1, *PAIR)
    with torch.no_grad():
        density = model.log_density(grid, torch.ones(n * n, dtype=torch.int64)).exp()
    total = (density * torch.outer(weight, weight).flatten()).sum()
    assert total.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("dequantise", ["uniform", "variational"])
def test_samples_are_as_frequent_as_their_likelihood(dequantise) -> None:
    """All 16 images of two pixels and four levels: exp(bound), averaged over many draws, is P(k); margin 0 loses none of it."""
    network = CouplingNetworkConfig("mlp", 8)
    config = FlowConfig(
        scales=0, checkerboards=2, network=network, dequantise=dequantise, prior="logistic", logit_margin=0.0
    )
    model = randomise(make(config, classes=2, shape=PAIR, levels=4), 0.3).eval()
    count = 2000
    k = torch.tensor(list(itertools.product(range(4), repeat=2))).view(-1, *PAIR).repeat(count, 1, 1, 1)
    draws = model.log_likelihood(from_levels(k, 4), torch.ones(len(k), dtype=torch.int64), context(len(k)))
    p = draws.exp().view(count, 16).mean(0)
    assert p.sum().item() == pytest.approx(1, abs=0.02)
    assert p.max() > 1.5 * p.min(), "not a uniform model"
    samples = to_uint8(model.sample(torch.arange(20000), torch.ones(20000, dtype=torch.int64)))
    index = (samples.double() / 85).round().long().flatten(1) @ torch.tensor([4, 1])
    share = torch.bincount(index, minlength=16) / 20000
    assert (share - p).abs().max() < 0.012


# ---- dequantisation ----


def test_the_dequantisers_density_is_that_of_its_map_from_uniform_noise() -> None:
    """u = h(v), v uniform: ln q(u) = -ln|det dh/dv|; a new one is uniform."""
    torch.manual_seed(0)
    dequantiser = Dequantiser(3, CouplingNetworkConfig(width=8), (1, 2, 4))
    noise, x = randomness.uniform(0, "v", 0, torch.arange(2), (1, 2, 4)), images(2, (1, 2, 4))
    u, log_q = dequantiser.double()(x, noise)
    torch.testing.assert_close(u, noise)
    torch.testing.assert_close(log_q, torch.zeros_like(log_q))
    randomise(dequantiser)
    u, log_q = dequantiser(x, noise)
    assert 0 < u.min() < u.max() < 1
    expected = jacobian_log_det(lambda v, x: dequantiser(x, v)[0], noise, x)
    torch.testing.assert_close(log_q, -expected, rtol=0, atol=1e-6)
    assert (dequantiser(x + 1, noise)[0] - u).abs().max() > 1e-3, "it sees the image"


# ---- training, reproducibility ----


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("dequantise", ["uniform", "variational"])
def test_the_loss_is_the_bound_and_every_parameter_gets_a_finite_gradient(name: str, dequantise) -> None:
    model, given = randomise(make(replace(SMALL[name], dequantise=dequantise), classes=3), 0.3).eval(), batch(8, SHAPE)
    loss, logs = model.loss(given, context(8))
    nats = model.log_likelihood(given.images, given.labels, context(8))
    assert loss.item() == pytest.approx(bits_per_dim(nats, 16).mean().item(), rel=1e-6)
    assert logs["bits_per_dim"].item() == loss.item()
    assert not logs["bits_per_dim"].requires_grad
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    silent = [n for n, gradient in gradients.items() if not gradient.any()]
    assert len(silent) < 0.1 * len(gradients), silent  # a small network may have all its ReLUs shut


@pytest.mark.parametrize("name", SMALL)
def test_autocast_touches_the_networks_alone(name: str) -> None:
    """Densities stay float32 and what a bf16 network did is undone exactly, since the inverse has it do the same."""
    model, given = randomise(make(replace(SMALL[name], dequantise="variational")), 0.1).eval(), batch(6, SHAPE)
    plain = model.loss(given, context(6))[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        rounded = model.loss(given, context(6))[0]
        y, log_det = model.flow(images(6, SHAPE, torch.float32))
        x = model.flow.inverse(y)
    assert rounded.dtype == y.dtype == log_det.dtype == torch.float32
    assert 0 < abs(rounded.item() - plain.item()) < 0.01
    torch.testing.assert_close(x, images(6, SHAPE, torch.float32), rtol=0, atol=2e-3)


def test_start_normalises_once_and_survives_saving(tmp_path: Path) -> None:
    model, given = make(SMALL["realnvp"], classes=3), batch(40, SHAPE)
    with pytest.raises(ValueError, match="12 of 12 ActNorm layers"):
        model.log_likelihood(given.images, given.labels, context(40))
    with pytest.raises(ValueError, match="call start"):
        model.sample(torch.arange(2), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="call start"):
        model.eval().loss(given, context(40))
    model.train().start(given, context(40))
    assert all(m.initialised for m in model.modules() if isinstance(m, ActNorm))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    write_baseline(tmp_path, model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded, _ = read_baseline(tmp_path)
    loaded.train().start(batch(7, SHAPE), context(7, step=5))
    assert all(torch.equal(value, before[name]) for name, value in loaded.state_dict().items())


# ---- sampling and conditions ----


def test_samples_of_a_class_have_its_mean_and_deviation() -> None:
    """On the identity flow: x = sigmoid(mean + std e)."""
    model = make(replace(ADDITIVE, logit_margin=0.0), classes=2, levels=256)
    assert model.prior is not None
    model.prior.mean.data[1] = 1.0
    model.prior.log_std.data[1] = math.log(0.5)
    seeds, labels = torch.arange(8), torch.ones(8, dtype=torch.int64)
    e = randomness.normal(0, "sample", 0, seeds, SHAPE)
    expected = (torch.sigmoid(1 + 0.5 * e) * 256).floor()
    assert torch.equal(to_uint8(model.sample(seeds, labels)).float(), expected)
