"""TarFlow: exact densities, causality, sequential sampling with cached keys, denoising."""

import math
from dataclasses import replace

import pytest
import torch
from flows import assert_bijection, assert_undone_in_float32, batch, context, images, randomise
from torch import Tensor

from midway.gen.baselines.tarflow import TarFlow, TarFlowConfig, tweedie
from midway.gen.baselines.tarflow_blocks import AutoregressiveFlow
from midway.gen.core import randomness
from midway.gen.data.images import to_float
from midway.gen.data.levels import bits_per_dim, from_levels, to_levels

SMALL = TarFlowConfig(patch=2, flows=3, depth=2, width=8, heads=2, mlp_ratio=2, entry="symmetric")
SHAPE = (1, 4, 6)
PAIR = (1, 1, 2)


def _model(config: TarFlowConfig = SMALL, classes: int = 0, shape=SHAPE, levels: int = 17, std: float = 0.3) -> TarFlow:
    """With every parameter random, as zeros would hide errors; std 0 leaves the initial weights."""
    torch.manual_seed(0)
    model = TarFlow(config, shape, levels, classes)
    return (randomise(model, std) if std else model).eval().requires_grad_(False)


def _tokens(count: int) -> Tensor:
    """float64 (count, 5, 2)."""
    return images(count, (5, 2))


def _flow(flipped: bool, classes: int = 0) -> AutoregressiveFlow:
    flow = AutoregressiveFlow((5, 2), 8, 2, 2, 2.0, classes, flipped)
    return randomise(flow, 0.4).double().requires_grad_(False)


# ---- densities ----


def test_a_model_is_a_bijection_with_the_jacobians_determinant() -> None:
    model, x, labels = _model(classes=3).double(), images(3, SHAPE), torch.tensor([0, 2, 3])  # the last has no class
    z, log_det = model(x, labels)
    assert (z - x).abs().mean() > 0.3
    assert log_det.abs().min() > 0.1
    assert_bijection(model, model.inverse, x, labels)
    single = _model(classes=3, std=0.15)
    assert_undone_in_float32(single, single.inverse, x, labels)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_flow_is_triangular_in_its_order(flipped: bool) -> None:
    """Token i of z changes with tokens up to i alone, with all of those, and number by number with its own."""
    flow, x = _flow(flipped), _tokens(1)
    jacobian = torch.autograd.functional.jacobian(lambda v: flow(v[None])[0][0], x[0])
    blocks = jacobian.abs().amax((1, 3))  # pyright: ignore[reportAttributeAccessIssue] (5, 5)
    later = torch.ones(5, 5).tril(-1).bool()
    on, off = (later.T, later) if flipped else (later, later.T)
    assert (blocks[off] == 0).all()
    assert (blocks[on] > 1e-6).all()
    own = jacobian.diagonal(dim1=0, dim2=2)  # pyright: ignore[reportAttributeAccessIssue] (2, 2, 5)
    assert (own[0, 1] == 0).all()
    assert (own[0, 0] > 0).all()


def test_moments_do_not_see_their_own_token_or_later_ones() -> None:
    flow, x = _flow(False), _tokens(2)
    changed = x.clone()
    changed[:, 2:] += 5
    before, after = flow.moments(x), flow.moments(changed)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.isclose(before[:, 3:], after[:, 3:]).any()


def test_orders_take_turns() -> None:
    model = _model(replace(SMALL, flows=4))
    assert [flow.flipped for flow in model.flows] == [False, True, False, True]


@pytest.mark.parametrize("entry", ["symmetric", "logit"])
def test_densities_integrate_to_one(entry) -> None:
    """Of what the flows see, over a wide square, and hence the bounds of all images stay below 1 together."""
    model = _model(replace(SMALL, patch=1, entry=entry), shape=PAIR, levels=3, std=0.2).double()
    line = torch.linspace(-12, 12, 201, dtype=torch.float64)
    y = torch.cartesian_prod(line, line).view(-1, *PAIR)
    assert (model.flow_density(y).exp().sum() * (line[1] - line[0]) ** 2).item() == pytest.approx(1, abs=1e-4)
    k = torch.cartesian_prod(torch.arange(3), torch.arange(3)).view(9, *PAIR)
    draws = 200
    nats = model.log_likelihood(from_levels(k, 3).repeat(draws, 1, 1, 1), None, context(9 * draws))
    weights = nats.exp().view(draws, 9)  # unbiased for P(k)
    fine = (torch.arange(60, dtype=torch.float64) + 0.5) / 60
    x = torch.cartesian_prod(fine, fine).view(-1, *PAIR)  # 20 x 20 in a bin, whose mean density is P(k) 9
    bins = (model.log_density(x).exp() / 9).view(3, 20, 3, 20).mean((1, 3)).flatten()
    assert bins.sum() < 1
    error = weights.std(0) / math.sqrt(draws)
    assert ((weights.mean(0) - bins).abs() < 4 * error + 1e-4).all()
    assert nats.view(draws, 9).mean(0).exp().sum() < bins.sum()


# ---- the objective ----


def test_the_loss_is_the_mean_bits_of_labels_some_of_which_are_dropped() -> None:
    model, given, which = _model(replace(SMALL, label_dropout=0.4), 3), batch(40, SHAPE), context(40)
    loss, logs = model.loss(given, which)
    labels = torch.where(which.uniform("label") < 0.4, 3, given.labels)
    assert 8 < (labels == 3).sum() < 24
    bits = bits_per_dim(model.bound(to_levels(given.images, 17), labels, which), 24).mean()
    torch.testing.assert_close(loss, bits)
    assert torch.equal(logs["bits_per_dim"], loss)
    exact = _model(replace(SMALL, label_dropout=0.0), 3)
    nats = exact.log_likelihood(given.images, given.labels, which)
    assert exact.loss(given, which)[0].item() == pytest.approx(bits_per_dim(nats, 24).mean().item(), rel=1e-6)


def test_moments_under_autocast_are_float32() -> None:
    model, tokens = _model(std=0.1), images(2, (6, 4), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = model.flows[0].moments(tokens)  # pyright: ignore[reportCallIssue]
    assert moments.dtype == torch.float32


def test_gaussian_noise_is_trained_on_the_density_of_noisy_images() -> None:
    model, given, which = _model(replace(SMALL, noise="gaussian", sigma=0.2)), batch(8, SHAPE), context(8)
    noisy = to_float(given.images) + 0.2 * which.normal("noise", SHAPE)
    z, log_det = model(noisy)
    nats = torch.distributions.Normal(0.0, 1.0).log_prob(z).flatten(1).sum(1) + log_det
    loss, logs = model.loss(given, which)
    assert loss.item() == pytest.approx(-nats.mean().item() / (24 * math.log(2)), rel=1e-5)
    assert set(logs) == {"density_bits"}


def test_gradients_are_the_same_when_activations_are_computed_again() -> None:
    model, given = _model().requires_grad_(True), batch(4, SHAPE)
    gradients = []
    for again in (False, True):
        for module in model.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = again  # pyright: ignore[reportArgumentType]
        model.zero_grad()
        model.loss(given, context(4))[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# ---- sampling ----


@pytest.mark.parametrize("flipped", [False, True])
def test_cached_keys_give_the_result_of_recomputation(flipped: bool) -> None:
    flow, z, labels = _flow(flipped, classes=2), _tokens(3), torch.tensor([0, 1, 2])
    x = torch.zeros_like(z)
    for i in range(5):  # every token by the whole network
        mean, log_scale = flow.moments(x, labels).chunk(2, dim=2)
        x[:, i] = flow.ordered(z)[:, i] * log_scale[:, i].exp() + mean[:, i]
    torch.testing.assert_close(flow.inverse(z, labels), flow.ordered(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(("noise", "extra"), [("uniform", 0), ("gaussian", 1)])
def test_a_sample_takes_one_evaluation_of_every_flow_per_token(noise, extra: int) -> None:
    """And denoising one pass forward and one backward, which count as two."""
    model, calls = _model(replace(SMALL, noise=noise), std=0.1), []
    for flow in model.flows:
        flow.head.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    model.sample(torch.arange(4))
    assert len(calls) == 3 * (6 + extra)
    assert model.sample_nfe == 6 + 2 * extra


@pytest.mark.parametrize("entry", ["symmetric", "logit"])
def test_samples_fall_into_the_bins_of_their_levels(entry) -> None:
    """A new model is the identity: y = z, of which the bin is known by hand."""
    model, seeds = _model(replace(SMALL, entry=entry), std=0, levels=4), torch.arange(50)
    z = randomness.normal(0, "sample", 0, seeds, SHAPE).double()
    x = (z + 1) / 2 if entry == "symmetric" else (torch.sigmoid(z) - 0.05) / 0.9
    expected = (4 * x).floor().clamp(0, 3) / 3 * 2 - 1
    torch.testing.assert_close(model.sample(seeds).double(), expected, rtol=0, atol=1e-6)


# ---- denoising ----


def test_tweedies_formula_is_the_posterior_mean_of_a_gaussian() -> None:
    """x ~ N(m, s^2), y = x + sigma eps: E[x | y] = (s^2 y + sigma^2 m) / (s^2 + sigma^2)."""
    m, s, sigma, y = 0.3, 0.7, 0.2, images(3, SHAPE)
    marginal = torch.distributions.Normal(y.new_tensor(m), y.new_tensor(math.hypot(s, sigma)))
    got = tweedie(y, lambda v: marginal.log_prob(v).flatten(1).sum(1), sigma)
    torch.testing.assert_close(got, (s**2 * y + sigma**2 * m) / (s**2 + sigma**2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("inference", [False, True])
def test_samples_of_gaussian_noise_are_denoised_once(inference: bool) -> None:
    """A new model is standard normal, of which y becomes (1 - sigma^2) y."""
    model, seeds = _model(replace(SMALL, noise="gaussian", sigma=0.5, entry="logit"), std=0), torch.arange(4)
    with torch.inference_mode(inference):
        got = model.sample(seeds)
    y = randomness.normal(0, "sample", 0, seeds, SHAPE)
    torch.testing.assert_close(got, (0.75 * y).clamp(-1, 1))


def test_denoising_uses_the_class() -> None:
    model, labels = _model(replace(SMALL, noise="gaussian", sigma=0.5), classes=3, std=0.15), torch.arange(3)
    y = model.inverse(randomness.normal(0, "sample", 0, torch.arange(3), SHAPE), labels)
    step = torch.autograd.functional.jacobian(lambda v: model.flow_density(v, labels).sum(), y)
    expected = (y + 0.25 * step).clamp(-1, 1)  # pyright: ignore[reportOperatorIssue]
    torch.testing.assert_close(model.sample(torch.arange(3), labels), expected)
